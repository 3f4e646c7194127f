"""The pace of a node: whose updates a merge uses, and when it is over; without input, output or clock.

Daemons and simulated events ask the same object. What an update is does not matter here: bytes that came in, or tensors.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Generic, TypeVar

Update = TypeVar("Update")


@dataclass(slots=True, kw_only=True)
class Held(Generic[Update]):
    """An update that is here, its number, and how often it was merged before."""

    number: int
    """Its sender's exchange; at a pairwise pace the number over the edge."""

    update: Update
    age: int = 0
    """Merges that it has been in: rounds of the holder since it came."""


class Pace(typing.Protocol[Update]):
    """One node's pace. Owned by the node's protocol, or by its events in a simulation."""

    in_step: bool
    """Whether all nodes count the same exchanges."""

    balances: bool
    """Whether both ends of an edge merge each other's update of the same number, so that what one takes in the other one gives."""

    def expected_from(self, peer: str) -> int:
        """Return the number of the earliest update of a neighbour that is of use."""

    def receive(self, peer: str, number: int, update: Update) -> None:
        """Keep a complete update of a neighbour.

        Raises:
            StaleRound: it comes too late or too early.
        """

    def forget(self, peer: str) -> None:
        """Drop what a neighbour has sent."""

    def begin(self, exchange: int) -> None:
        """Be at an exchange from now on, with what came early for it."""

    def updates(self) -> dict[str, Held[Update]]:
        """Return whose updates this merge uses."""

    def awaited(self) -> list[tuple[str, int]]:
        """List neighbours and numbers of updates that this merge still waits for, however long."""

    def is_over(self, now_s: float) -> bool:
        """Tell whether this merge waits no longer."""
