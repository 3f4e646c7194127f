"""Lead an analysis over sites whose rows are all here, adding as nodes do: in fixed point, exactly, in any order.

A node adds masks that cancel. The sums here are the same to the last bit, without them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import reduce
from typing import TypeVar

from p2pfl.errors import ConfigError
from p2pfl.privacy.fixed_point import FixedPoint, added
from p2pfl.statistics.sums import Numbers, SumRequest

STATISTICS_FORMAT = FixedPoint(bits=128, fraction_bits=60)
"""Numbers of all statistics: a total of S sites is wrong by at most S 2^-61."""

_COUNTS_BOUND, _OTHERS_BOUND = 2.0**40, 2.0**56
_COUNTS = ("patients", "cross table", "events", "counts")

Rows = TypeVar("Rows")
Result = TypeVar("Result")


class FewPatientsHere(ConfigError):
    """A site's own cells hold too few patients for it to contribute; *site* is its name, where that is known."""

    def __init__(self, reason: str, site: str = "") -> None:
        self.site, self.reason = site, reason
        super().__init__(f"{site}: {reason}" if site else reason)


class SiteFault(ConfigError):
    """A site cannot contribute to a sum; the finding begins with its name."""


def bound_of(statistic: str) -> float:
    """Agreed bound on the magnitude of a site's numbers in a sum."""
    return _COUNTS_BOUND if statistic.startswith(_COUNTS) else _OTHERS_BOUND


def total_of(request: SumRequest[Rows], names: Sequence[str], sites: Sequence[Rows]) -> Numbers:
    """Total of one sum over all sites, exact in fixed point and rounded once.

    Raises:
        SiteFault: a site's numbers are out of bounds, or its rows allow no number.
        FewPatientsHere: a site keeps its own cells back.
    """
    bound, terms = bound_of(request.statistic), []
    for name, rows in zip(names, sites, strict=True):
        try:
            numbers = request.contribution(rows)
            STATISTICS_FORMAT.check(numbers, bound, len(sites), statistic=request.statistic)
        except FewPatientsHere as error:
            raise FewPatientsHere(error.reason, name) from error
        except ConfigError as error:
            raise SiteFault([f"{name}: {each}" for each in error.findings]) from error
        if numbers.shape != request.shape:
            raise ValueError(f"{request.statistic}: numbers of shape {numbers.shape} where {request.shape} is agreed")
        terms.append(STATISTICS_FORMAT.encode(numbers))
    return STATISTICS_FORMAT.decode(reduce(added, terms))


def lead(analysis: Generator[SumRequest[Rows], Numbers, Result], names: Sequence[str], sites: Sequence[Rows]) -> Result:
    """Lead an analysis to its result; for what it raises see `total_of`."""
    try:
        request = next(analysis)
        while True:
            request = analysis.send(total_of(request, names, sites))
    except StopIteration as end:
        result: Result = end.value
        return result
