"""Orthogonal polynomials over the rows of all institutions, as R's poly gives them for the pooled rows.

Their recurrence has two coefficients for each degree, and each of these is a sum over institutions. A first centre and spread are near the
pooled ones, as far as the number format allows over the contract's range; degree 1 then gets its own. Each polynomial is scaled before the
next is formed, so that no sum grows with the degree.

Shapes: M rows of one site, K polynomials. Source: Stieltjes' procedure, Gautschi 2004, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.formula import Variable
from p2pfl.statistics.sums import Numbers, Rows, SumRequest

_FLAT = 1e-20
"""Mean square of a polynomial whose values are rounding: the number has too few different values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Polynomials:
    """Polynomials of one number, of degrees 1, 2 and so on, that are orthogonal over all rows."""

    num_rows: int
    centre: float
    spread: float
    shifts: tuple[float, ...] = ()
    """Weighted mean that is taken off, for each degree from 1 on."""
    norms: tuple[float, ...] = ()
    """Root mean square before scaling, for each degree from 1 on."""

    def columns(self, values_M: Numbers) -> Numbers:
        """Columns of length 1 over all rows, in ascending degree; (M, degrees)."""
        found = self.scaled(values_M)[1:]
        return np.stack(found, axis=-1) / math.sqrt(self.num_rows)

    def scaled(self, values_M: Numbers) -> list[Numbers]:
        """Polynomials with mean square 1 over all rows, that of degree 0 first."""
        scaled_M = (values_M - self.centre) / self.spread
        found, below, before = [np.ones_like(scaled_M)], np.zeros_like(scaled_M), 0.0
        for shift, norm in zip(self.shifts, self.norms, strict=True):
            found.append(((scaled_M - shift) * found[-1] - before * below) / norm)
            below, before = found[-2], norm
        return found


def agree_on_polynomials(
    variables: Sequence[Variable], ranges: Sequence[tuple[float, float]], inputs_of: Callable[[Rows], Numbers]
) -> Generator[SumRequest[Rows], Numbers, tuple[Polynomials, ...]]:
    """Agree on polynomials by sums over institutions.

    Args:
        variables: polynomials of a formula, K, with their degrees.
        ranges: ends between which each number may lie.
        inputs_of: a site's numbers, (M, K), none missing.

    Raises:
        ConfigError: no row, or a number has too few different values for its degree.
    """
    middles, halves = np.mean(ranges, axis=1), np.ptp(ranges, axis=1) / 2

    def units(rows: Rows) -> Numbers:
        return np.asarray((inputs_of(rows) - middles) / halves)

    def first(rows: Rows) -> Numbers:
        units_MK = units(rows)
        return np.array([len(units_MK), *units_MK.sum(axis=0)])

    num_rows, *totals = yield SumRequest(statistic="polynomials: rows and means", shape=(1 + len(variables),), contribution=first)
    if num_rows < 1:
        raise ConfigError("no site has a complete row of these variables")
    means = np.array(totals) / num_rows
    spreads = np.sqrt(
        (
            yield SumRequest(
                statistic="polynomials: squares around the means",
                shape=(len(variables),),
                contribution=lambda rows: np.asarray(((units(rows) - means) ** 2).sum(axis=0)),
            )
        )
        / num_rows
    )
    for variable, spread in zip(variables, spreads, strict=True):
        if spread <= math.sqrt(_FLAT):
            raise ConfigError(f"{variable}: {variable.column} is the same in all rows and tells nothing: leave it out")
    found = [
        Polynomials(num_rows=round(num_rows), centre=middle + half * mean, spread=half * spread)
        for middle, half, mean, spread in zip(middles, halves, means, spreads, strict=True)
    ]
    for degree in range(1, max(int(each.numbers[0]) for each in variables) + 1):
        found = yield from _raised(variables, found, inputs_of, degree)
    return tuple(found)


def _raised(
    variables: Sequence[Variable], found: Sequence[Polynomials], inputs_of: Callable[[Rows], Numbers], degree: int
) -> Generator[SumRequest[Rows], Numbers, list[Polynomials]]:
    """Add one degree to the polynomials that have it."""
    places = [place for place, each in enumerate(variables) if each.numbers[0] >= degree]

    def shifts(rows: Rows) -> Numbers:
        inputs_MK, sums = inputs_of(rows), []
        for place in places:
            scaled = found[place].scaled(inputs_MK[:, place])
            sums.append(np.sum((inputs_MK[:, place] - found[place].centre) / found[place].spread * scaled[-1] ** 2))
        return np.array(sums)

    shifts_K = yield SumRequest(statistic=f"polynomials: shift of degree {degree}", shape=(len(places),), contribution=shifts)
    raised = list(found)
    for place, total in zip(places, shifts_K, strict=True):
        own = found[place]
        raised[place] = replace(own, shifts=(*own.shifts, float(total) / own.num_rows), norms=(*own.norms, 1.0))

    def squares(rows: Rows) -> Numbers:
        inputs_MK = inputs_of(rows)
        return np.array([np.sum(raised[place].scaled(inputs_MK[:, place])[-1] ** 2) for place in places])

    squares_K = yield SumRequest(statistic=f"polynomials: squares of degree {degree}", shape=(len(places),), contribution=squares)
    for place, total in zip(places, squares_K, strict=True):
        own = raised[place]
        norm = math.sqrt(float(total) / own.num_rows)
        if norm <= math.sqrt(_FLAT):
            variable = variables[place]
            raise ConfigError(f"{variable}: {variable.column} has too few different values for a polynomial of degree {degree}")
        raised[place] = replace(own, norms=(*own.norms[:-1], norm))
    return raised
