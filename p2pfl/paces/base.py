"""The pace of a node: whose updates a merge uses, and when it is over; without input, output or clock.

Daemons and simulated events ask the same object. It knows updates by the numbers of their exchanges alone. The updates themselves are
kept where they arrive, as long as the pace needs them.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from p2pfl.topology.schedule import Neighbourhood


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A neighbour's update that a merge uses: its number, and how often it was merged before."""

    number: int
    """Its sender's exchange; at a pairwise pace the number over the edge."""
    age: int = 0
    """Merges that it has been in: rounds of the holder since it came."""


class PacedEdges(typing.Protocol):
    """One node's edges as its pace sees them, of a daemon or of a simulated node."""

    me: str
    exchange: int
    """The exchange that the node is in."""
    ahead: int
    """So many exchanges are kept from a neighbour that is ahead."""

    @property
    def neighbourhood(self) -> Neighbourhood:
        """Whom the node exchanges with now."""
        ...

    def refusing(self) -> frozenset[str]:
        """Neighbours that have closed this exchange without this node."""
        ...

    def is_missed(self, name: str) -> bool:
        """Whether nobody waits for a neighbour now."""
        ...

    def closed_through(self, name: str) -> int:
        """The last exchange over an edge that is over here."""
        ...

    def may_answer(self, name: str, number: int) -> bool:
        """Whether a neighbour may still merge an exchange over its edge alone."""
        ...


class PacedTimes(typing.Protocol):
    """How long one node waits for its neighbours, as its pace sees it."""

    deadline_s: float

    def note_time(self, now_s: float) -> None:
        """Take up the time."""

    def has_time(self, name: str, now_s: float) -> bool:
        """Whether a neighbour that has not come still has time."""
        ...


class Pace(typing.Protocol):
    """One node's pace. Owned by the node's protocol, or by its events in a simulation."""

    in_step: ClassVar[bool]
    """Whether all nodes count the same exchanges."""
    balances: ClassVar[bool]
    """Whether both ends of an edge merge each other's update of the same number, so that what one takes in the other one gives."""
    counts_edges: ClassVar[bool] = False
    """Whether numbers are those of one edge alone, and not of a node's exchanges."""

    @classmethod
    def of(cls, edges: PacedEdges, times: PacedTimes, *, max_age: int) -> Self:
        """Make the pace of one node; *max_age*: the option of that name."""
        ...

    def expected_from(self, peer: str) -> int:
        """Return the number of the earliest update of a neighbour that is of use."""

    def receive(self, peer: str, number: int) -> bool:
        """Note that a neighbour's update is complete; returns whether to keep it.

        Raises:
            StaleRound: it comes too late or too early.
        """

    def note_busy(self, peer: str, number: int) -> None:  # noqa: ARG002
        """Note that a neighbour will not merge an update; its report says so, too."""
        return

    def forget(self, peer: str) -> None:
        """Drop all that a neighbour has sent."""

    def drop(self, peer: str) -> None:
        """Drop a neighbour's update of this merge."""
        self.forget(peer)

    def begin(self, exchange: int) -> None:  # noqa: ARG002
        """Be at an exchange from now on, with what came early for it."""
        return

    def chosen(self) -> dict[str, Chosen]:
        """Return the updates that this merge uses, by sender."""

    def needed(self, peer: str) -> Collection[int]:
        """Return the numbers of a neighbour's kept updates that a merge may still use; others can be released."""

    def missing(self) -> list[tuple[str, int]]:
        """List neighbours and numbers of updates that this merge could use, and that are not here."""
        return []

    def awaited(self) -> list[str]:
        """List neighbours that this merge still waits for."""
        return []

    def is_over(self, now_s: float) -> bool:  # noqa: ARG002
        """Tell whether this merge waits no longer."""
        return not self.awaited()

    def kept(self) -> Mapping[str, Chosen]:
        """Return updates that a checkpoint has to hold, by sender: those that are not sent again."""
        return {}

    def restore(self, held: Mapping[str, Chosen]) -> None:
        """Take up what `kept` gave; raises ValueError where the checkpoint is of another pace."""
        if held:
            raise ValueError(f"holds what {', '.join(held)} sent, as only nodes at their own pace do")
