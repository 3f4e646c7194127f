"""How long to wait for neighbours, learnt from how long they took."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

WINDOW: Final = 20
"""How many recent durations count."""

QUANTILE: Final = 0.95
"""Quantile of these durations that the deadline is a multiple of."""

CEILING_S: Final = 3600.0
"""However slow recent rounds were: a neighbour that comes ever later must not stretch the deadline without end."""


class RoundDurations:
    """A deadline for the next round: a multiple of what nearly all recent rounds needed, with a floor.

    Args:
        factor: at least 1; what a round may take beyond the 95th percentile.
        floor_s: never less than this, and exactly this before the first round.
        window: how many recent durations count.
    """

    def __init__(self, *, factor: float, floor_s: float, window: int) -> None:
        if factor < 1 or floor_s <= 0 or window < 1:
            raise ValueError(f"factor {factor}, floor {floor_s} s, window {window}: expected at least 1, above 0, at least 1")
        self._factor = factor
        self.floor_s = floor_s
        self._durations_s: deque[float] = deque(maxlen=window)

    def record(self, duration_s: float) -> None:
        """A round in which everybody came took so long.

        Record a straggler as well, when its update comes after the deadline, with the time it would have taken to wait for it: else a pace
        that is too fast for a neighbour would never find out.
        """
        self._durations_s.append(duration_s)

    def allowance_s(self, own_s: float = 0.0) -> float:
        """How long the next round may wait: max(floor, factor * q95), q95 by nearest rank.

        Args:
            own_s: how long this node has needed itself, which counts as long as there was no round in which everybody came.
        """
        return max(self.floor_s, self._factor * (self.usual_s() if self._durations_s else own_s))

    def usual_s(self) -> float:
        """How long nearly all recent rounds needed, by nearest rank; 0 before the first."""
        ordered = sorted(self._durations_s)
        return ordered[math.ceil(QUANTILE * len(ordered)) - 1] if ordered else 0.0
