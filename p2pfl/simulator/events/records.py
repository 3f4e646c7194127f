"""Records of an event simulation: a row for each round of a node, and one of the network for each round that all have done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.mean_model import consensus_distance
from p2pfl.evaluation.progress import Progress
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.summary import FinalModels, Outcome
from p2pfl.experiment.plan import Plan
from p2pfl.runs.events import training_rows
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import NodeRow, row_of_nodes
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.node import EventNode


@dataclass(kw_only=True)
class EventRecords:
    """Rows of nodes as they come, and a row of the network for each number of rounds that all have done who will do so many.

    The network's row has no bounds: what neighbours merged was of different rounds. Its consensus distance is that of all nodes' models
    at the moment when the last of them had done the round.
    """

    plan: Plan
    folder: RunFolder
    stopwatch: Stopwatch
    nodes: list[EventNode]
    progress: Progress | None = None
    rounds: int = 0
    """Number of rows of the network so far."""
    bytes_sent: int = 0
    _open: dict[int, list[NodeRow]] = field(default_factory=dict)

    def add(self, node: EventNode, *, skipped: list[str], bytes_sent: int, time_s: float | None) -> None:
        """Record a round that a node has done, and count it."""
        experiment, number = self.plan.experiment, node.round
        node.round += 1
        self.bytes_sent += bytes_sent
        is_measured = node.round % experiment.evaluate_every == 0 or node.round == experiment.rounds
        row = NodeRow(
            round=number,
            node=node.name,
            kind="train",
            loss=node.loss,
            disagreement=None if node.squared is None else node.squared / 2,
            norm=node.norm,
            skipped=skipped,
            agreed_for=0,
            stop_round=None,
            bytes_sent=bytes_sent,
            seconds={"train": self.stopwatch.lap("train")},
            merged=node.merged,
            metrics=node.population.evaluate()[0] if is_measured else None,
            simulated_s=math.nan if time_s is None else time_s,
        )
        node.merged, node.squared = [], None
        if experiment.save_models_every and node.round % experiment.save_models_every == 0:
            population = node.population
            write_models(self.folder.path, (node.name,), population.estimate(), self.plan.layout, population.buffers, number)
        for event in training_rows(number, node.population.diverged, node.population.without_loss):
            self.folder.append_event(event)
        self.folder.append_node(row)
        self._open.setdefault(number, []).append(row)
        self.stopwatch.lap("evaluate")

    def close(self, is_over: Callable[[EventNode], bool]) -> None:
        """Write the network's rows that no node will add to; called when no merge is half done."""
        while self._open and all(node.round > self.rounds or is_over(node) for node in self.nodes):
            rows = self._open.pop(self.rounds, [])
            if not rows:
                return
            row = row_of_nodes(
                self.plan.bound_rule,
                rows,
                self.rounds,
                "train",
                seconds={"train": math.fsum(row.seconds["train"] for row in rows)},
                consensus_distance=consensus_distance(
                    self.plan.layout.shared_of(torch.cat([node.population.estimate() for node in self.nodes]))
                ),
                simulated_s=max(row.simulated_s for row in rows if row.simulated_s is not None),
            )
            self.folder.append_round(row)
            self.rounds += 1
            if self.progress is not None:
                self.progress(self.rounds, self.plan.experiment.rounds, row.as_row())

    def conclude(self, simulated_s: float | None) -> None:
        """Write the models and the summary."""
        self.close(lambda _: True)
        populations = [node.population for node in self.nodes]
        metrics = {node.name: node.population.evaluate()[0] for node in self.nodes}
        with_data = [population for population in populations if population.trains]
        models = FinalModels(
            names=self.plan.names,
            x_NP=torch.cat([population.estimate() for population in populations]),
            buffers={key: torch.cat([population.buffers[key] for population in populations]) for key in populations[0].buffers},
            population=populations[0],
        )
        outcome = Outcome(
            scope="network",
            engine="simulator",
            rounds=self.rounds,
            stop_reason="diverged" if with_data and all(population.all_diverged for population in with_data) else "rounds",
            bytes_sent=self.bytes_sent,
            metrics=metrics,
            models=models,
            book=self.stopwatch.book,
            row_by_row=populations[0].row_by_row,
            simulated_s=simulated_s,
        )
        conclude(self.plan, self.folder, outcome)

    def metadata(self) -> dict[str, Any]:
        """Metadata for a checkpoint."""
        return {
            "rounds": self.rounds,
            "bytes_sent": self.bytes_sent,
            "seconds": self.stopwatch.spent,
            "open": {str(number): [row.as_row() for row in rows] for number, rows in self._open.items()},
        }

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take up the metadata of a checkpoint."""
        self.rounds, self.bytes_sent = metadata["rounds"], metadata["bytes_sent"]
        self.stopwatch.resume(metadata["seconds"])
        self._open = {int(number): [NodeRow.of(row) for row in rows] for number, rows in metadata["open"].items()}
        self.folder.truncate(self.rounds, {node.name: node.round for node in self.nodes})
