"""Describe a variable over institutions: number, missing values, mean, spread and quantiles, none of which is a single patient.

Smallest and largest values are not given: they are patients. Quantiles come from counts in the cells of an agreed grid, which are merged
until each holds nobody or enough.

Shapes: M values of one site, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers, SumRequest

MOST_CELLS = 64
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A variable over all sites."""

    num_values: int
    num_missing: int
    mean: float
    variance: float
    """With n - 1 below; NaN for one value."""
    edges: Numbers
    """Ends of the merged cells, (C + 1,)."""
    counts: Numbers
    """Values in each merged cell, (C,): none, or at least as many as were asked for."""

    def quantile(self, fraction: float) -> float:
        """Value below which a fraction of all values lie, interpolated inside a cell; NaN where there is no value."""
        if not self.num_values:
            return math.nan
        below = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.num_values
        cell = self._place(fraction)
        inside = (fraction - below[cell]) / (below[cell + 1] - below[cell])
        return float(self.edges[cell] + inside * (self.edges[cell + 1] - self.edges[cell]))

    def cell(self, fraction: float) -> tuple[float, float]:
        """Ends of the cell in which a quantile lies; NaN where there is no value."""
        if not self.num_values:
            return math.nan, math.nan
        place = self._place(fraction)
        return float(self.edges[place]), float(self.edges[place + 1])

    def _place(self, fraction: float) -> int:
        return int(np.searchsorted(np.cumsum(self.counts) / self.num_values, fraction, side="left"))


def describe(edges: Sequence[float], fewest: int) -> Generator[SumRequest[Numbers], Numbers, Description]:
    """Describe one variable, whose values a site gives as (M,) with NaN where one is missing.

    Args:
        edges: of the agreed grid's cells, from the contract's range; a value outside of it is an error at its site.
        fewest: values in a cell that holds any.

    Raises:
        ConfigError: the grid is none or has too many cells, or a value lies outside of it.
    """
    grid = np.asarray(edges, dtype=np.float64)
    if not 1 < len(grid) <= MOST_CELLS + 1 or not (np.diff(grid) > 0).all():
        raise ConfigError(f"a grid of {len(grid) - 1} cells: 1 to {MOST_CELLS} are needed, whose ends increase")
    middle = (grid[0] + grid[-1]) / 2

    def first(values: Numbers) -> Numbers:
        known = _known(values, grid)
        cells = np.histogram(known, grid)[0]
        return np.array([len(known), len(values) - len(known), np.sum(known - middle), *cells])

    num_values, num_missing, total, *counts = yield SumRequest(
        statistic="number, mean and cells", shape=(3 + len(grid) - 1,), contribution=first
    )
    mean = middle + total / num_values if num_values else math.nan

    def second(values: Numbers) -> Numbers:
        return np.array([np.sum((_known(values, grid) - mean) ** 2)])

    (squares,) = (yield SumRequest(statistic="squares around the mean", shape=(1,), contribution=second)) if num_values else (math.nan,)
    merged_edges, merged = merged_cells(grid, np.array(counts), fewest)
    return Description(
        num_values=round(num_values),
        num_missing=round(num_missing),
        mean=float(mean),
        variance=float(squares / (num_values - 1)) if num_values > 1 else math.nan,
        edges=merged_edges,
        counts=merged,
    )


def merged_cells(edges: Numbers, counts: Numbers, fewest: int) -> tuple[Numbers, Numbers]:
    """Merge neighbouring cells, from the first on, until each holds nobody or at least *fewest*; what is left joins the one before.

    Raises:
        ConfigError: all cells together hold somebody, and fewer.
    """
    ends, found, so_far = [edges[0]], [], 0.0
    for end, count in zip(edges[1:], counts, strict=True):
        so_far += count
        if so_far == 0 or so_far >= fewest:
            ends.append(end)
            found.append(so_far)
            so_far = 0.0
    while so_far and so_far < fewest:
        if not found:
            raise ConfigError(f"fewer than {fewest} values: nothing is said of them")
        so_far += found.pop()
        ends.pop()
    if so_far:
        ends.append(edges[-1])
        found.append(so_far)
    return np.array(ends), np.array(found)


def _known(values: Numbers, grid: Numbers) -> Numbers:
    known = values[~np.isnan(values)]
    if len(known) and not (known.min() >= grid[0] and known.max() <= grid[-1]):
        raise ConfigError(f"a value outside of {grid[0]:g} to {grid[-1]:g}, the range in the contract")
    return known
