"""The virtual clock of an event simulation: events in the order of their time, and how long training takes and messages travel."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from p2pfl.algorithms import over_an_edge
from p2pfl.experiment.plan import Plan
from p2pfl.experiment.spec import ClockSpec
from p2pfl.faults.script import FaultScript
from p2pfl.simulator.events.delays import Delays
from p2pfl.simulator.events.node import EventNode, Message
from p2pfl.wire.update import UpdateFormat


class Timeline:
    """Queue of events in the order of their time, the same on every machine, and the delays of the experiment's clock.

    Of the events of one moment, those of the first of its `kinds` come first.
    """

    def __init__(self, plan: Plan, faults: FaultScript | None, *kinds: str) -> None:
        self.now_s, self.is_scripted = 0.0, faults is not None
        self._events: list[tuple[float, int, int, int, str, tuple[Any, ...], Message | None]] = []
        """A heap of those to come: time, rank of the kind, row, number (which makes the order total), kind, content, message."""
        self._ranks = {kind: rank for rank, kind in enumerate(kinds)}
        self._count = 0
        graph, names = plan.topology, plan.names
        self._rows = {name: row for row, name in enumerate(names)}
        self._delays = Delays(plan.experiment.clock or ClockSpec(), graph, names, plan.experiment.seed, faults)
        self._edges = self._delays.edges_of(graph)
        self._channels = plan.recipe.algorithm.channels
        self._places = {(names[j], names[i]): e for e, (j, i) in enumerate(zip(graph.senders, graph.receivers, strict=True))}
        self._seconds: dict[int, list[float]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no event is to come."""
        return not self._events

    def is_at_this_moment(self, kind: str) -> bool:
        """Whether the next event is of this kind and of this moment."""
        return bool(self._events) and (self._events[0][0], self._events[0][4]) == (self.now_s, kind)

    def at(self, time_s: float, kind: str, row: int, *content: Any, message: Message | None = None) -> None:
        """Schedule an event of a row, with anything that JSON can hold and a message that it may bring."""
        self._count += 1
        heapq.heappush(self._events, (time_s, self._ranks[kind], row, self._count, kind, content, message))

    def next(self) -> tuple[str, int, tuple[Any, ...], Message | None] | None:
        """Advance the clock to the next event, and return its kind, row, content and message; None where no event is left."""
        if not self._events:
            return None
        self.now_s, _, row, _, kind, content, message = heapq.heappop(self._events)
        return kind, row, content, message

    def training_s(self, node: EventNode) -> float:
        """Seconds of a node's training that begins now, in its round."""
        return float(self._delays.training_from(node.round, np.full(len(self._rows), self.now_s))[node.row])

    def slowed_s(self, node: EventNode) -> float:
        """Seconds by which the script makes a node's training longer that begins now."""
        return self.training_s(node) - float(self._delays.training(node.round)[node.row]) if self.is_scripted else 0.0

    def training_through_s(self, node: EventNode) -> float:
        """Seconds of a node's training in all its rounds, the one that it is in included."""
        return self._delays.training_through(node.row, node.round)

    def arrival_s(self, sender: str, receiver: str, size_bytes: int, *, alone: bool = False) -> float:
        """Time of arrival of a message that is sent now; `alone`: the sender sends nothing else at this time."""
        edge = self._places[sender, receiver]
        if size_bytes not in self._seconds:
            self._seconds[size_bytes] = self._delays.message_s(self._edges, size_bytes)[1].tolist()
        uplink_s = size_bytes * 8 / (self._delays.spec.uplink_mbps * 1e6) if self._delays.spec.uplink_mbps else 0.0
        return self.now_s + (self._seconds[size_bytes][edge] - (uplink_s * (int(self._edges.place_E[edge]) - 1) if alone else 0.0))

    def send(self, time_s: float, kind: str, sender: str, receiver: str, *content: Any, message: Message | None = None) -> None:
        """Schedule the arrival of something that a node sends to another; the content begins with the sender's name."""
        self.at(time_s, kind, self._rows[receiver], sender, *content, message=message)

    def is_lost(self, sender: str, receiver: str, number: int) -> bool:
        """Whether the message of a round is lost."""
        ends = (np.array([self._rows[name]]) for name in (sender, receiver))
        return bool(self._delays.lost(number, *ends)[0])

    def bytes_each(self, number: int, sent: Mapping[str, Tensor]) -> int:
        """Size in bytes of one encoded update."""
        return UpdateFormat.of(over_an_edge(self._channels, sent), over_an_edge(self._channels, sent, whole=True)).encoded_bytes(number)

    def tensors(self) -> dict[str, Tensor]:
        """Messages on their way, for a checkpoint."""
        flying = [(number, message) for *_, number, _, _, message in self._events if message is not None]
        return {f"flight/{number}/{channel}": tensor for number, message in flying for channel, tensor in message.items()}

    def metadata(self) -> dict[str, Any]:
        """Events to come, for a checkpoint."""
        events = [[time_s, row, number, kind, list(content)] for time_s, _, row, number, kind, content, _ in self._events]
        return {"events": events, "now_s": self.now_s}

    def restore(self, groups: Mapping[str, Message], metadata: Mapping[str, Any]) -> None:
        """Take up the events of a checkpoint."""
        self.now_s = metadata["now_s"]
        for time_s, row, number, kind, content in sorted(metadata["events"], key=lambda event: event[2]):
            self.at(time_s, kind, row, *content, message=groups.get(f"flight/{number}"))
