"""One sum of a plan on which members agree before anybody gives a number."""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl.privacy.fixed_point import FixedPoint


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSum:
    """One sum of a plan: a statistic, and in which form each participant gives its numbers."""

    statistic: str
    """Function and variables, as canonical text: the same question has the same text in every study."""
    shape: tuple[int, ...]
    number_format: FixedPoint
    bound: float
    """No number of a participant exceeds it in magnitude."""
    may_be_shorter: bool = False
    """Whether the analysis may need fewer numbers than the vector has, as totals before it say; zeros then stand at its end."""
