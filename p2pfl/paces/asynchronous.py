"""The asynchronous pace: a node merges the newest update of each neighbour, and waits for nobody."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from p2pfl.errors import StaleRound
from p2pfl.paces.base import Chosen, Pace, PacedEdges, PacedTimes


@dataclass(slots=True, kw_only=True)
class Asynchronous(Pace):
    """The newest update of each neighbour, however fast or slow its sender is.

    Age is counted in rounds of the holder, not in the distance of two round numbers: a neighbour that is ten times slower falls ever
    further behind in number, and its newest model is new all the same.
    """

    in_step: ClassVar = False
    balances: ClassVar = False
    max_age: int
    """An update that has been merged so many times again is too old."""
    held: dict[str, Chosen] = field(default_factory=dict)
    """Newest updates, by neighbour."""
    _taken: dict[str, Chosen] | None = None
    """Updates of the merge that has begun, with their ages before it."""

    @classmethod
    def of(cls, edges: PacedEdges, times: PacedTimes, *, max_age: int) -> Self:  # noqa: ARG003  # it waits for nobody
        """Make the pace of one node."""
        return cls(max_age=max_age)

    def expected_from(self, peer: str) -> int:
        """Any update after the one that is here is of use."""
        held = self.held.get(peer)
        return 0 if held is None else held.number + 1

    def receive(self, peer: str, number: int) -> bool:
        """Put an update in the place of the one before, if it is newer than that."""
        last = self.held.get(peer)
        if last is not None and number <= last.number:
            raise StaleRound(f"an update of round {number} after one of round {last.number}", reason="stale_round")
        self.held[peer] = Chosen(number=number)
        return True

    def forget(self, peer: str) -> None:
        """Drop a neighbour's update, also from a merge that has begun."""
        self.held.pop(peer, None)
        (self._taken or {}).pop(peer, None)

    def begin(self, exchange: int) -> None:  # noqa: ARG002  # its own count does not matter to anybody
        """The next merge takes what is newest then."""
        self._taken = None

    def chosen(self) -> dict[str, Chosen]:
        """Return the newest updates with their ages, taken at the first call of a merge; what is too old is left out and forgotten."""
        if self._taken is None:
            self._taken = {peer: held for peer, held in self.held.items() if held.age <= self.max_age}
            self.held = {peer: replace(held, age=held.age + 1) for peer, held in self._taken.items()}
        return dict(self._taken)

    def needed(self, peer: str) -> Collection[int]:
        """Return the numbers of the newest update and of the one that is in the merge."""
        return {held[peer].number for held in (self.held, self._taken or {}) if peer in held}

    def kept(self) -> Mapping[str, Chosen]:
        """Return the newest updates: their senders send newer ones only."""
        return self.held

    def restore(self, held: Mapping[str, Chosen]) -> None:
        """Take up what `kept` gave."""
        self.held, self._taken = dict(held), None
