"""The newest update of each neighbour, for nodes that do not wait for each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from p2pfl.errors import StaleRound

Payload = TypeVar("Payload")


@dataclass(slots=True, kw_only=True)
class Held(Generic[Payload]):
    """A neighbour's update, and how often it has been merged."""

    number: int
    """Its sender's round."""

    payload: Payload
    age: int = 0
    """Merges that it has been in: rounds of the holder since it came."""


@dataclass(slots=True, kw_only=True)
class NewestUpdates(Generic[Payload]):
    """What a node goes on with while others are slower, faster or gone.

    Age is counted in rounds of the holder, not in the distance of two round numbers: a neighbour that is ten times slower falls ever
    further behind in number, and its newest model is new all the same.
    """

    max_age: int
    """An update that has been merged so many times again is too old."""

    held: dict[str, Held[Payload]] = field(default_factory=dict)
    """By neighbour."""

    def receive(self, peer: str, number: int, payload: Payload) -> None:
        """A complete update came; it takes the place of the one before.

        Raises:
            StaleRound: "stale_round", it is not newer than the one before.
        """
        last = self.held.get(peer)
        if last is not None and number <= last.number:
            raise StaleRound(f"an update of round {number} after one of round {last.number}", reason="stale_round")
        self.held[peer] = Held(number=number, payload=payload)

    def take(self) -> dict[str, Held[Payload]]:
        """What the next merge may use, with ages before this merge; what is too old is left out and forgotten."""
        self.held = {peer: held for peer, held in self.held.items() if held.age <= self.max_age}
        taken = {peer: Held(number=held.number, payload=held.payload, age=held.age) for peer, held in self.held.items()}
        for held in self.held.values():
            held.age += 1
        return taken
