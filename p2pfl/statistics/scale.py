"""Pooled centres and spreads of a design's columns, agreed by two sums, and the way back from scaled coefficients.

Shapes: M rows of one site, P columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers, Rows, SumRequest

MEANS, SQUARES = "rows and means", "squares around the means"
"""Statistics of the two sums."""

INTERCEPT = "(Intercept)"
"""Name of the column that is all ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Pooled moments by which columns are centred and scaled."""

    num_rows: int
    centres_P: Numbers
    spreads_P: Numbers
    is_centred: bool
    """Whether a shift of a column changes no other coefficient than the intercept's."""

    def scaled(self, columns_MP: Numbers) -> Numbers:
        """Columns with mean 0 and spread 1 over all sites, (M, P)."""
        scaled_MP = np.asarray(columns_MP - self.centres_P)
        scaled_MP /= self.spreads_P  # in place: room for a second large array takes longer than the division
        return scaled_MP

    def back(self, names: Sequence[str]) -> Numbers:
        """Matrix that makes coefficients of the columns from those of the scaled ones, (P, P)."""
        matrix = np.diag(1 / self.spreads_P)
        if INTERCEPT in names:
            matrix[names.index(INTERCEPT)] -= self.centres_P / self.spreads_P
        return matrix


def agree_on_scale(
    names: Sequence[str], columns_of: Callable[[Rows], Numbers], *, may_centre: bool = False, units_P: Numbers | None = None
) -> Generator[SumRequest[Rows], Numbers, Scale]:
    """Agree on centres and spreads: means first and squares around them second, so that no digits cancel.

    Args:
        names: of the columns, P.
        columns_of: a site's columns, (M, P).
        may_centre: whether columns are centred also without an intercept, because a shift changes nothing.
        units_P: powers of two near the largest magnitudes, by which columns are divided in the sums, so that those fit a number format;
            None: 1 everywhere. They change no digit of a floating-point sum.

    Raises:
        ConfigError: no site has a row, or a column that an intercept or a shift makes useless is the same in all rows.
    """
    num_columns, is_centred = len(names), may_centre or INTERCEPT in names
    units = np.ones(num_columns) if units_P is None else units_P

    def sums(rows: Rows) -> Numbers:
        columns_MP = columns_of(rows)
        return np.array([len(columns_MP), *(columns_MP / units).sum(axis=0)])

    num_rows, *totals = yield SumRequest(statistic=MEANS, shape=(1 + num_columns,), contribution=sums)
    if num_rows < 1:
        raise ConfigError("no site has a complete row of these variables")
    means_P = np.array(totals) / num_rows

    def squares(rows: Rows) -> Numbers:
        return np.asarray(((columns_of(rows) / units - means_P) ** 2).sum(axis=0))

    spreads_P = np.sqrt((yield SumRequest(statistic=SQUARES, shape=(num_columns,), contribution=squares)) / num_rows)
    is_constant_P = spreads_P <= np.finfo(np.float64).eps * np.abs(means_P) * math.sqrt(num_rows)
    constant = [name for name, is_constant in zip(names, is_constant_P, strict=True) if is_constant and name != INTERCEPT]
    if constant and is_centred:
        raise ConfigError(f"{', '.join(constant)} is the same in all rows and tells nothing: leave it out")
    means_P, spreads_P = means_P * units, spreads_P * units
    spreads_P[is_constant_P] = 1.0
    is_shifted = [is_centred and name != INTERCEPT for name in names]
    return Scale(num_rows=round(num_rows), centres_P=np.where(is_shifted, means_P, 0.0), spreads_P=spreads_P, is_centred=is_centred)


def involved_in(direction_P: Numbers, names: Sequence[str]) -> str:
    """Names of the columns that a direction is made of, for a message."""
    large = np.abs(direction_P) > 1e-3 * np.abs(direction_P).max()
    return ", ".join(name for name, is_in in zip(names, large, strict=True) if is_in)
