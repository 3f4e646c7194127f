"""The pairwise pace: a node exchanges with one neighbour at a time, while everybody trains as fast as they can.

An exchange over an edge is a request and an answer, both an update of the edge's next number; both ends then move to the middle. A node
that waits for an answer merges with nobody else in the meantime: it lets the requests of neighbours before it in the order of the names
wait, and turns the others away, so that nobody waits in a circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from p2pfl.draws import Purpose, shuffled
from p2pfl.paces.base import Chosen, Pace, PacedEdges, PacedTimes

HALF = 0.5
"""How far two nodes that exchange go towards each other."""


@dataclass(frozen=True, slots=True)
class Request:
    """A neighbour's request for an exchange over its edge."""

    peer: str
    number: int
    is_welcome: bool = True
    """Whether to merge and answer it; else the neighbour is told that this node is busy."""


@dataclass(slots=True, kw_only=True)
class Pairwise(Pace):
    """Requests of neighbours, and the one request of this node's own that may be open."""

    in_step: ClassVar = False
    balances: ClassVar = True
    counts_edges: ClassVar = True
    me: str
    closed_through: Callable[[str], int]
    """The last exchange over the edge to a neighbour that is over."""
    may_answer: Callable[[str, int], bool] = lambda _peer, _number: True
    """Whether an answer to this node's own request can still come."""
    asked: tuple[str, int] | None = None
    """The neighbour, and the number over its edge, whose answer this node waits for."""
    requests: deque[tuple[str, int, bool]] = field(default_factory=deque)
    """Neighbour, number and whether it is a refusal, in the order in which they came; not looked at yet."""
    deferred: dict[str, int] = field(default_factory=dict)
    """By neighbour, the newest request that waits for the end of this node's own."""
    _is_accepted: bool | None = None
    """Whether the answer to this node's own request is an update; None: it has not come."""
    _has_ended: bool = False

    @classmethod
    def of(cls, edges: PacedEdges, times: PacedTimes, *, max_age: int) -> Self:  # noqa: ARG003  # nothing is merged twice
        """Make the pace of one node."""
        return cls(me=edges.me, closed_through=edges.closed_through, may_answer=edges.may_answer)

    def expected_from(self, peer: str) -> int:
        """Each edge counts for itself."""
        return self.closed_through(peer) + 1

    def receive(self, peer: str, number: int) -> bool:
        """Take a neighbour's newest update, and the awaited one: no more, so that nobody fills the memory."""
        return self._receive(peer, number, is_refusal=False)

    def forget(self, peer: str) -> None:
        """Drop a neighbour's requests."""
        self.requests = deque(each for each in self.requests if each[0] != peer)

    def note_busy(self, peer: str, number: int) -> None:
        """Take a refusal of this node's own request."""
        if (peer, number) == self.asked:
            self._receive(peer, number, is_refusal=True)

    def _receive(self, peer: str, number: int, *, is_refusal: bool) -> bool:
        # an answer that is waited for is not forgotten for the next request
        kind = (peer, is_refusal, (peer, number) == self.asked)
        kept = [each for each in self.requests if (each[0], each[2], each[:2] == self.asked) == kind]
        if any(other > number for _, other, _ in kept):
            return False
        for each in kept:
            self.requests.remove(each)
        self.requests.append((peer, number, is_refusal))
        return True

    def partner(self, names: Sequence[str], *, seed: int, row: int, round: int, is_there: Callable[[str], bool]) -> str | None:
        """Choose whom to ask in a round: the first that is there, in an order that is drawn; None: nobody is."""
        order = shuffled(seed, Purpose.PARTNER, len(names), node=row, round=round)
        return next((names[k] for k in order if is_there(names[k])), None)

    def ask(self, peer: str) -> int:
        """Wait for a neighbour's answer from now on; returns the number of the exchange."""
        self.asked, self._is_accepted = (peer, self.expected_from(peer)), None
        return self.asked[1]

    def next(self) -> Request | None:
        """Take the next request that is to be answered at once; None: there is none, or this node's own has been answered."""
        while self.requests and self._is_accepted is None:
            peer, number, is_refusal = self.requests.popleft()
            if (peer, number) == self.asked:
                self._is_accepted = not is_refusal
            elif is_refusal or number <= self.closed_through(peer):
                continue
            elif self.asked is None or self._has_ended:
                return Request(peer, number, is_welcome=not self._has_ended)
            elif peer < self.me:
                self.deferred.pop(peer, None)
                self.deferred[peer] = number
            else:
                return Request(peer, number, is_welcome=False)
        return None

    def chosen(self) -> dict[str, Chosen]:
        """Return the answer to this node's own request, where it has come and is no refusal."""
        return {self.asked[0]: Chosen(number=self.asked[1])} if self.asked is not None and self._is_accepted else {}

    def needed(self, peer: str) -> Collection[int]:
        """Return the numbers of a neighbour's requests and of its answer."""
        requests = [number for name, number, is_refusal in self.requests if name == peer and not is_refusal]
        held = [*self.deferred.items(), *((name, answer.number) for name, answer in self.chosen().items())]
        return {*requests, *(number for name, number in held if name == peer)}

    def missing(self) -> list[tuple[str, int]]:
        """List the answer to this node's own request, where it is still to come."""
        if self.asked is None or self._is_accepted is not None or self.asked[1] <= self.closed_through(self.asked[0]):
            return []
        return [self.asked]

    def awaited(self) -> list[str]:
        """List the neighbour whose answer this node waits for."""
        return [peer for peer, number in self.missing() if self.may_answer(peer, number)]

    def conclude(self) -> list[Request]:
        """End this node's own request; returns those that have waited for that."""
        deferred, self.deferred, self.asked, self._is_accepted = self.deferred, {}, None, None
        return [Request(peer, number) for peer, number in deferred.items()]

    def end(self) -> None:
        """Turn every request away from now on."""
        self._has_ended = True

    def restore_requests(self, asked: Sequence[Any] | None, deferred: Mapping[str, int], *, has_ended: bool) -> None:
        """Take up a simulation's checkpoint, in which messages on their way are not lost."""
        self.asked, self.deferred, self._has_ended = (asked[0], asked[1]) if asked else None, dict(deferred), has_ended
