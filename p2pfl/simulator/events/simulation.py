"""The simulation of nodes that go at their own pace, whatever the pace is, and its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.mean_model import consensus_distance
from p2pfl.evaluation.progress import Progress
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.summary import FinalModels, Outcome
from p2pfl.experiment.plan import Plan
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, write_checkpoint
from p2pfl.runs.events import training_rows
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import NodeRow, row_of_nodes
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.node import EventNode
from p2pfl.simulator.events.timeline import Timeline

CHECKPOINT = "checkpoint.safetensors"

Groups = Mapping[str, Mapping[str, Tensor]]
"""A checkpoint's tensors KIND/NAME/REST as {KIND/NAME: {REST: tensor}}."""


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


class Events(Protocol):
    """Events of one run: what happens to which node, in which order."""

    nodes: list[EventNode]
    timeline: Timeline

    @property
    def may_be_saved(self) -> bool:
        """Whether a checkpoint may be written between the last event and the next one."""

    def next(self, records: EventRecords) -> bool:
        """Let the next event happen, and record what it ends; False where none is to come."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, by KIND/NAME/REST."""

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""

    def restore(self, groups: Groups, metadata: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""


def run_events(
    plan: Plan, folder: RunFolder, events: Events, progress: Progress | None, stopwatch: Stopwatch, *, resume: bool = False
) -> None:
    """Let events happen until every node has done its rounds, or has no neighbour left; then conclude the run.

    A run to `resume` goes on from its folder's checkpoint, and from the start where it has none.
    """
    records = EventRecords(plan=plan, folder=folder, stopwatch=stopwatch, nodes=events.nodes, progress=progress)
    stopwatch.lap("setup")
    if resume:
        with changes_told(folder.path / CHECKPOINT):
            _restore(events, records)
    saved = records.rounds
    while events.next(records):
        if records.rounds >= saved + plan.experiment.checkpoint_every and events.may_be_saved:
            saved = records.rounds
            tensors = events.tensors()
            for node in events.nodes:
                tensors |= {f"node/{node.name}/{key}": tensor for key, tensor in node.population.tensors().items()}
            write_checkpoint(folder.path / CHECKPOINT, tensors, {**events.metadata(), **records.metadata()})
    records.conclude(events.timeline.now_s)


def _restore(events: Events, records: EventRecords) -> None:
    """Go on exactly from the checkpoint that the records' folder has."""
    found = read_checkpoint(records.folder.path / CHECKPOINT)
    if found is None:
        records.folder.truncate(0)
        return
    tensors, metadata = found
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name, rest = key.split("/", 2)
        groups.setdefault(f"{kind}/{name}", {})[rest] = tensor
    for node in events.nodes:
        node.population.restore(groups[f"node/{node.name}"])
    events.restore(groups, metadata)
    records.restore(metadata)
