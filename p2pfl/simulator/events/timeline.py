"""The virtual clock of an event simulation: events in the order of their time."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from p2pfl.simulator.events.node import Message


@dataclass(order=True, slots=True)
class TimedEvent:
    """An event at a moment of the virtual clock."""

    time_s: float
    rank: int
    """Order of the kinds at one moment, the lowest first."""

    row: int
    number: int
    """Number of the event, which makes the order total."""

    kind: str = field(compare=False)
    content: tuple[Any, ...] = field(compare=False, default=())
    """Anything that JSON can hold."""

    message: Message | None = field(compare=False, default=None)
    """Message that the event brings, if it brings one."""


class Timeline:
    """Queue of events in the order of their time, the same on every machine.

    Args:
        kinds: of events, the first comes first among those of one moment.
    """

    def __init__(self, *kinds: str) -> None:
        self.now_s = 0.0
        self._events: list[TimedEvent] = []  # to come, a heap
        self._ranks = {kind: rank for rank, kind in enumerate(kinds)}
        self._count = 0

    @property
    def is_empty(self) -> bool:
        """Whether no event is to come."""
        return not self._events

    def is_at_this_moment(self, kind: str) -> bool:
        """Whether the next event is of this kind and of this moment."""
        return bool(self._events) and self._events[0].kind == kind and self._events[0].time_s == self.now_s

    def at(self, time_s: float, kind: str, row: int, *content: Any, message: Message | None = None) -> None:
        """Schedule an event of a row."""
        self._count += 1
        heapq.heappush(self._events, TimedEvent(time_s, self._ranks[kind], row, self._count, kind, content, message))

    def next(self) -> TimedEvent | None:
        """Go on to the next event; None where there is none."""
        if not self._events:
            return None
        event = heapq.heappop(self._events)
        self.now_s = event.time_s
        return event

    def tensors(self) -> dict[str, Tensor]:
        """Messages on their way, for a checkpoint."""
        flying = [(event.number, event.message) for event in self._events if event.message is not None]
        return {f"flight/{number}/{channel}": tensor for number, message in flying for channel, tensor in message.items()}

    def metadata(self) -> dict[str, Any]:
        """Events to come, for a checkpoint."""
        events = [[event.time_s, event.row, event.number, event.kind, list(event.content)] for event in self._events]
        return {"events": events, "now_s": self.now_s}

    def restore(self, groups: Mapping[str, Message], metadata: Mapping[str, Any]) -> None:
        """Take up the events of a checkpoint."""
        self.now_s = metadata["now_s"]
        for time_s, row, number, kind, content in sorted(metadata["events"], key=lambda event: event[2]):
            self.at(time_s, kind, row, *content, message=groups.get(f"flight/{number}"))
