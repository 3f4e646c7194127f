"""Token bucket: so much a second, and some of it saved up; without a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """A rate with a limited reserve; full at first."""

    per_s: float
    """Tokens that come back each second."""

    most: float
    """Tokens that it holds at most."""

    left: float = -1.0
    """Tokens that are there now; negative at the start: as many as it holds."""

    at_s: float = float("-inf")
    """When it was last looked at."""

    def __post_init__(self) -> None:
        if self.left < 0:
            self.left = self.most

    def take(self, amount: float, now_s: float) -> bool:
        """Take tokens out, if there are so many; whether there were."""
        if self.refill(now_s) < amount:
            return False
        self.left -= amount
        return True

    def add(self, amount: float) -> None:
        """Put tokens in that were earned otherwise than by time."""
        self.left = min(self.most, self.left + amount)

    def refill(self, now_s: float) -> float:
        """Tokens that are there at this time."""
        if now_s > self.at_s:
            self.left = min(self.most, self.left + (now_s - self.at_s) * self.per_s)
            self.at_s = now_s
        return self.left
