"""The lockstep pace: all nodes go from exchange to exchange together, and a merge uses the updates of its own exchange."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from p2pfl.errors import StaleRound
from p2pfl.paces.base import Chosen, Pace, PacedEdges, PacedTimes


class Lockstep(Pace):
    """The neighbours' updates of one exchange, and those of later ones that came early."""

    in_step = True
    balances = True

    def __init__(self, edges: PacedEdges, times: PacedTimes) -> None:
        self._edges, self._times = edges, times
        self.exchange = edges.exchange
        self._here: dict[str, set[int]] = {}
        """By neighbour, exchanges whose update is here: this one and the next ones."""

    @classmethod
    def of(cls, edges: PacedEdges, times: PacedTimes, *, max_age: int) -> Self:  # noqa: ARG003  # nothing is merged twice
        """Make the pace of one node."""
        return cls(edges, times)

    def expected_from(self, peer: str) -> int:  # noqa: ARG002
        """All nodes are in the same exchange."""
        return self._edges.exchange

    def receive(self, peer: str, number: int) -> bool:
        """Take an update of this exchange or of one of the next; the first one stands. Who was not waited for is welcome."""
        if not self.exchange <= number <= self.exchange + self._edges.ahead:
            reason = "stale_round" if number < self.exchange else "far_round"
            expected = f"expected {self.exchange} to {self.exchange + self._edges.ahead}"
            raise StaleRound(f"an update of exchange {number}: {expected}", reason=reason)
        here = self._here.setdefault(peer, set())
        is_first = number not in here
        here.add(number)
        return is_first

    def forget(self, peer: str) -> None:
        """Drop what a neighbour has sent, of this exchange and of later ones."""
        self._here.pop(peer, None)

    def drop(self, peer: str) -> None:
        """Drop a neighbour's update of this exchange."""
        self._here.get(peer, set()).discard(self.exchange)

    def begin(self, exchange: int) -> None:
        """Be at an exchange from now on, not before the one that this node is in, with what came early for it."""
        if exchange < self.exchange:
            raise ValueError(f"exchange {exchange} after {self.exchange}: expected a later one")
        self.exchange = exchange
        self._here = {name: {number for number in here if number >= exchange} for name, here in self._here.items()}

    def chosen(self) -> dict[str, Chosen]:
        """Return the updates of this exchange, by sender."""
        return {name: Chosen(number=self.exchange) for name, here in self._here.items() if self.exchange in here}

    def needed(self, peer: str) -> Collection[int]:
        """Return the exchanges of a neighbour's updates that are here."""
        return self._here.get(peer, ())

    def missing(self) -> list[tuple[str, int]]:
        """List neighbours whose update of this exchange is not here."""
        return [(name, self.exchange) for name in self._edges.neighbourhood.weights if self.exchange not in self.needed(name)]

    def awaited(self) -> list[str]:
        """List the missing neighbours that have not been missed before, and have not closed this exchange."""
        refusing = self._edges.refusing()
        return [name for name, _ in self.missing() if name not in refusing and not self._edges.is_missed(name)]

    def is_over(self, now_s: float) -> bool:
        """Whether everybody who is waited for has come, or the time is up.

        Where nobody is waited for, because all were late before, the time has to pass: a node that is alone must not run ahead.
        """
        self._times.note_time(now_s)
        awaited = self.awaited()
        is_in_company = any(self.exchange in here for here in self._here.values()) or bool(self._edges.refusing())
        if not self._edges.neighbourhood.weights or (is_in_company and not awaited):
            return True
        if not is_in_company and now_s < self._times.deadline_s:
            return False
        has_time = [self._times.has_time(name, now_s) for name in awaited]  # each notes how long it was waited for beyond its time
        return not any(has_time)
