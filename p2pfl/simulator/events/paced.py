"""What simulations share whose nodes go at their own pace: one node's steps, a virtual clock, and the records.

Shapes: one row a node, P parameters.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.algorithms import SlotInbox, over_an_edge
from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.summary import consensus_distance
from p2pfl.experiment.loading import ClockSpec
from p2pfl.experiment.plan import Plan
from p2pfl.runs.events import EventKind, event_row
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import NodeRow, row_of_nodes
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.events.clock import Delays
from p2pfl.topology.links import links_of
from p2pfl.wire.update import UpdateFormat

CHECKPOINT = "checkpoint.safetensors"

Message = Mapping[str, Tensor]
"""By channel, without the row's axis."""


class PacedNode:
    """One node, computed exactly as its daemon computes it.

    Args:
        plan: of the network.
        name: of the node.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        algorithm = plan.recipe.algorithm
        self.name, self.row = name, plan.names.index(name)
        self.population = plan.population([name])
        self.slots = plan.neighbours(name)
        self.links = links_of(plan.schedule, self.row, splits_mass=algorithm.splits_mass)(0)
        self.round = 0
        """Rounds that are over."""
        self.loss: float | None = None
        self.merged: list[list[Any]] = []
        """What has been merged in this round, in order, as the records hold it."""
        self.squared: float | None = None
        self.norm: float | None = None
        """sum_j ||x_i - x_j||**2 and ||x_i|| of this round's merges; None where no models were compared, or sent."""
        self._plan, self._channels = plan, algorithm.channels
        self._model_channel = algorithm.model_channel

    def train(self) -> None:
        """This round's local steps."""
        local_steps = self._plan.experiment.local_steps_at(self.round)
        self.loss = float(self.population.train(self.round)[0]) if local_steps and self.population.trains else None

    def outgoing(self) -> dict[str, Tensor]:
        """What it sends in this round, (1, ...)."""
        return self.population.outgoing(self.round, 0, local_steps=self._plan.experiment.local_steps_at(self.round))

    def merge(self, sent: Mapping[str, Tensor], messages: Mapping[str, Message], weights: Mapping[str, float]) -> None:
        """Take in what came.

        Args:
            sent: from `outgoing`.
            messages: by neighbour.
            weights: w_ij by neighbour.
        """
        inbox = SlotInbox.of_one_row(
            self._channels,
            sent,
            self.slots,
            messages,
            weights,
            self_weight=self.links.self_weight,
            dtype=self._plan.layout.dtype,
        )
        self.population.merge(self.round, 0, inbox, local_steps=self._plan.experiment.local_steps_at(self.round))
        if self._model_channel is not None:
            if inbox.present_NK.any():
                self.squared = (self.squared or 0.0) + float(inbox.squared_distances(self._model_channel)[0])
            self.norm = float(torch.linalg.vector_norm(sent[self._model_channel][0]).double())


def message_of(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What travels of a row's channels."""
    return {channel: tensor[0] for channel, tensor in sent.items()}


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's KIND/NAME/REST as {KIND/NAME: {REST: tensor}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name, rest = key.split("/", 2)
        groups.setdefault(f"{kind}/{name}", {})[rest] = tensor
    return groups


@dataclass(order=True, slots=True)
class Event:
    """Something that happens at a moment of the virtual clock."""

    time_s: float
    rank: int
    """Of several kinds at one moment, the lower first."""

    row: int
    number: int
    """Of the event: makes the order total."""

    kind: str = field(compare=False)
    content: tuple[Any, ...] = field(compare=False, default=())


class Timeline:
    """Events in the order of their time; the same events give the same order everywhere.

    Args:
        ranks: kinds of events, the first comes first among those of one moment.
    """

    def __init__(self, ranks: tuple[str, ...]) -> None:
        self.now_s = 0.0
        self.events: list[Event] = []
        """Those to come, as a heap."""
        self._ranks = {kind: rank for rank, kind in enumerate(ranks)}
        self._count = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to come."""
        return not self.events

    def is_at_this_moment(self, kind: str) -> bool:
        """Whether the next event is of a kind and of this moment."""
        return bool(self.events) and self.events[0].kind == kind and self.events[0].time_s == self.now_s

    def at(self, time_s: float, kind: str, row: int, *content: Any) -> None:
        """Let something happen to a row."""
        self._count += 1
        heapq.heappush(self.events, Event(time_s, self._ranks[kind], row, self._count, kind, content))

    def next(self) -> Event | None:
        """Go on to the next event; None where there is none."""
        if not self.events:
            return None
        event = heapq.heappop(self.events)
        self.now_s = event.time_s
        return event


class PacedDelays:
    """How long things take, and what is lost, by name; see `Delays`.

    Args:
        plan: of the network.
    """

    def __init__(self, plan: Plan) -> None:
        graph, names = plan.topology, plan.names
        self._rows = {name: row for row, name in enumerate(names)}
        self._delays = Delays(plan.experiment.clock or ClockSpec(), graph, names, plan.experiment.seed)
        self._edges = self._delays.edges_of(graph)
        self._channels = plan.recipe.algorithm.channels
        self._places = {(names[j], names[i]): e for e, (j, i) in enumerate(zip(graph.senders, graph.receivers, strict=True))}
        self._seconds: dict[int, list[float]] = {}

    def training_s(self, node: PacedNode) -> float:
        """Of the round that it is in."""
        return float(self._delays.training(node.round)[node.row])

    def training_through_s(self, node: PacedNode) -> float:
        """Of all its rounds, the one that it is in included."""
        return self._delays.training_through(node.row, node.round)

    def between_s(self, sender: str, receiver: str, size_bytes: int, *, alone: bool = False) -> float:
        """Until a message is there.

        Args:
            sender: its name.
            receiver: its name.
            size_bytes: of the message.
            alone: nothing else leaves the sender now.
        """
        edge = self._places[sender, receiver]
        if size_bytes not in self._seconds:
            self._seconds[size_bytes] = self._delays.message_s(self._edges, size_bytes)[1].tolist()
        uplink_s = size_bytes * 8 / (self._delays.spec.uplink_mbps * 1e6) if self._delays.spec.uplink_mbps else 0.0
        return self._seconds[size_bytes][edge] - (uplink_s * (int(self._edges.place_E[edge]) - 1) if alone else 0.0)

    def is_lost(self, sender: str, receiver: str, number: int) -> bool:
        """Whether a round's message never comes."""
        ends = (np.array([self._rows[name]]) for name in (sender, receiver))
        return bool(self._delays.lost(number, *ends)[0])

    def bytes_each(self, number: int, sent: Mapping[str, Tensor]) -> int:
        """Of one update."""
        return UpdateFormat.of(over_an_edge(self._channels, sent), over_an_edge(self._channels, sent, whole=True)).encoded_bytes(number)


@dataclass(kw_only=True)
class PacedRecords:
    """Rows of nodes as they come, and a row of the network for each number of rounds that all have done who will do so many.

    The network's row has no bounds: what neighbours merged was of different rounds. Its consensus distance is that of all nodes' models
    at the moment when the last of them had done the round.
    """

    plan: Plan
    folder: RunFolder
    stopwatch: Stopwatch
    nodes: list[PacedNode]
    progress: Callable[[int, int, Mapping[str, Any]], None] | None = None
    rounds: int = 0
    """Rows of the network so far."""

    bytes_sent: int = 0
    _open: dict[int, list[NodeRow]] = field(default_factory=dict)

    def add(self, node: PacedNode, *, skipped: list[str], bytes_sent: int, time_s: float | None) -> None:
        """A node has done a round, and counts on."""
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
        for name in node.population.diverged:
            detail = f"round {number}: training left the finite numbers and was taken back; lower optimizer.lr or set clip_norm"
            self.folder.append_event(event_row(EventKind.DIVERGED, number, name, detail))
        for name in node.population.without_loss:
            self.folder.append_event(event_row(EventKind.NO_LOSS, number, name, f"round {number}"))
        self.folder.append_node(row)
        self._open.setdefault(number, []).append(row)
        self.stopwatch.lap("evaluate")

    def close(self, is_over: Callable[[PacedNode], bool]) -> None:
        """Write the network's rows that nobody will add to; at a moment when no merge is half done."""
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
        """The models and the summary."""
        self.close(lambda _: True)
        populations = [node.population for node in self.nodes]
        metrics = {node.name: node.population.evaluate()[0] for node in self.nodes}
        with_data = [population for population in populations if population.trains]
        conclude(
            self.plan,
            self.folder,
            self.stopwatch,
            population=populations[0],
            x_NP=torch.cat([population.estimate() for population in populations]),
            buffers={key: torch.cat([population.buffers[key] for population in populations]) for key in populations[0].buffers},
            metrics=metrics,
            rounds=self.rounds,
            stop_reason="diverged" if with_data and all(population.all_diverged for population in with_data) else "rounds",
            bytes_sent=self.bytes_sent,
            simulated_s=simulated_s,
        )

    def story(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "rounds": self.rounds,
            "bytes_sent": self.bytes_sent,
            "seconds": self.stopwatch.spent,
            "open": {str(number): [row.as_row() for row in rows] for number, rows in self._open.items()},
        }

    def restore(self, story: Mapping[str, Any]) -> None:
        """Take up what `story` gave."""
        self.rounds, self.bytes_sent = story["rounds"], story["bytes_sent"]
        self.stopwatch.resume(story["seconds"])
        self._open = {int(number): [NodeRow.of(row) for row in rows] for number, rows in story["open"].items()}
        self.folder.truncate(self.rounds, {node.name: node.round for node in self.nodes})
