"""Reports a neighbour's model that is suddenly much further away than it was lately. Nothing is refused for that."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

FAR = 10.0
"""A model is reported that is so many times as far away as the median of its recent distances."""

LEAST_OF_OWN = 0.1
"""A distance below this fraction of the own norm is none to report: models that agree differ by chance."""

QUIET = 10
"""Exchanges without a report after a link was down, a jump or a restart, when models have moved apart without anybody's fault."""

_RECENT = 20


@dataclass(slots=True)
class DistanceWatch:
    """How far one neighbour's models were from the own ones in the last exchanges."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    quiet: int = QUIET
    """Exchanges for which it still says nothing."""
    reports: int = 0
    """How often its model was far away."""
    _handshakes: int = 0

    def interrupt(self) -> None:
        """Say nothing for some exchanges: one was missed, or somebody jumped or started again."""
        self.quiet = QUIET

    def look(self, distance: float, own_norm: float, handshakes: int) -> str | None:
        """Take in the distance ||x_j - x_i|| and the norm ||x_i|| of an exchange; returns what is to be reported, None where nothing is.

        *handshakes*: changes where the link was made anew.
        """
        if handshakes != self._handshakes:
            self._handshakes = handshakes
            self.interrupt()
        is_looked_at = not self.quiet and distance > LEAST_OF_OWN * own_norm
        usual = median(self.recent) if is_looked_at and self.recent else distance
        self.recent.append(distance)
        self.quiet = max(0, self.quiet - 1)
        if not is_looked_at or distance <= FAR * usual:
            return None
        self.reports += 1
        if self.reports & (self.reports - 1):  # whoever is far away again and again must not fill the disk
            return None
        return f"its model is {distance:.3g} away, and was {usual:.3g} away in most of the last exchanges; its norm here is {own_norm:.3g}"
