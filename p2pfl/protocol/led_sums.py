"""An analysis led to its result by planned sums in fixed point, one request after the other.

The sums of an analysis follow each other in the plan, from its first position on; it may leave some out where its totals say so. What a sum
depends on beside the rows follows from the totals before it, so their digest stands for it: all members have it to the bit, whatever their
machines make of the last digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import ConfigError
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.statistics.sums import Numbers, Result, Rows, SumRequest


class LedAnalysis(Generic[Rows, Result]):
    """Requests of an analysis one by one, each with its place in the plan.

    Args:
        analysis: a generator that has not begun.
        sums: the plan.
        first: position of the analysis' first sum in it.

    Raises:
        ConfigError: the analysis asks for what is not planned.
    """

    def __init__(self, analysis: Generator[SumRequest[Rows], Numbers, Result], sums: Sequence[PlannedSum], first: int = 0) -> None:
        self._analysis, self._sums = analysis, sums
        self._totals = hashlib.sha256()
        self.position = first - 1
        self.parameters: list[str] = []
        """Parameters of the sum that is asked for."""
        self.request: SumRequest[Rows] | None = None
        """The sum that is asked for; None where the result is there."""
        self.results: list[Result] = []
        self._go_on(None)

    @property
    def planned(self) -> PlannedSum:
        """The plan of the sum that is asked for."""
        return self._sums[self.position]

    def numbers(self, rows: Rows) -> Numbers:
        """A site's contribution to the sum that is asked for, in the planned shape; ValueError where it has another one."""
        assert self.request is not None
        found = np.asarray(self.request.contribution(rows), dtype=np.float64)
        if found.shape != self.request.shape:
            raise ValueError(f"{self.request.statistic}: numbers of shape {found.shape} where {self.request.shape} is agreed")
        if found.shape == self.planned.shape:
            return found
        return np.concatenate([found, np.zeros(self.planned.shape[0] - len(found))])

    def take(self, total: Limbs) -> None:
        """Take the total of the sum that was asked for, (..., L)."""
        self._totals.update(total.astype("<u8").tobytes())
        self.parameters = [self._totals.hexdigest()]
        assert self.request is not None
        decoded = self.planned.number_format.decode(total)
        self._go_on(decoded if decoded.shape == self.request.shape else decoded[: self.request.shape[0]])

    def _go_on(self, total: NDArray[Any] | None) -> None:
        try:
            request = next(self._analysis) if total is None else self._analysis.send(total)
        except StopIteration as end:
            self.request = None
            self.results = [end.value]
            return
        self.position = next((each for each in range(self.position + 1, len(self._sums)) if self._is_of(request, each)), self.position + 1)
        if self.position >= len(self._sums):
            raise ConfigError(f"{request.statistic}: the plan has {len(self._sums)} sums, and the analysis needs one more")
        planned = self.planned
        if not self._is_of(request, self.position):
            raise ConfigError(f"{request.statistic}: sum {self.position + 1} of the plan is {planned.statistic!r}")
        if request.shape != planned.shape and not _fits(request.shape, planned):
            raise ConfigError(f"{planned.statistic}: the analysis needs numbers of shape {request.shape}, planned are {planned.shape}")
        self.request = request

    def _is_of(self, request: SumRequest[Rows], position: int) -> bool:
        statistic = self._sums[position].statistic
        return request.statistic == statistic or statistic.endswith(f": {request.statistic}")


def _fits(shape: tuple[int, ...], planned: PlannedSum) -> bool:
    """Whether numbers of a shape are the beginning of a vector that may be shorter than planned."""
    return planned.may_be_shorter and len(shape) == len(planned.shape) == 1 and shape[0] < planned.shape[0]
