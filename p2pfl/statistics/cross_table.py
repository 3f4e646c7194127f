"""Tables of counts that are shown without small cells, and without a way to compute them from the rest.

Shapes: R rows, C columns; a whole table has one of each more, which hold the totals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from p2pfl.statistics.sums import Numbers

Flags = NDArray[np.bool_]

_NOT_KNOWN = 0.5
"""Least width of what is known of a hidden count: whole numbers less than this apart are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownTable:
    """A table of counts as readers may see it; NaN stands for a number that is not shown."""

    cells_RC: Numbers
    rows_R: Numbers
    """Totals of the rows."""
    columns_C: Numbers
    """Totals of the columns."""
    total: float


def shown(counts_RC: Numbers, fewest: int) -> ShownTable:
    """Hide counts of 1 to *fewest* - 1 patients, totals included, and as many others as it takes that none of them can be computed.

    In each row and each column, its total included, none or at least two numbers are hidden. Then each small count is sought by linear
    programming from all that is still shown, and more is hidden while one is found.
    """
    cells = np.asarray(counts_RC, dtype=np.float64)
    whole = np.block([[cells, cells.sum(axis=1, keepdims=True)], [cells.sum(axis=0, keepdims=True), cells.sum()]])
    is_small = (whole > 0) & (whole < fewest)
    is_hidden = is_small.copy()
    _hide_partners(whole, is_hidden)
    while (found := _computable(whole, is_small, is_hidden)) is not None:
        row, column = found
        near = np.zeros_like(is_hidden)
        near[row], near[:, column] = True, True
        place = _next(whole, near & ~is_hidden)
        is_hidden[place if place is not None else _next(whole, ~is_hidden) or (-1, -1)] = True
        _hide_partners(whole, is_hidden)
    table = np.where(is_hidden, np.nan, whole)
    return ShownTable(cells_RC=table[:-1, :-1], rows_R=table[:-1, -1], columns_C=table[-1, :-1], total=float(table[-1, -1]))


def _hide_partners(whole: Numbers, is_hidden: Flags) -> None:
    """Hide a second number in each row and column that hides one, until there is no such line."""
    changed = True
    while changed:
        changed = False
        for numbers, hidden in ((whole, is_hidden), (whole.T, is_hidden.T)):
            for line in np.flatnonzero(hidden.sum(axis=1) == 1):
                place = _next(numbers[line : line + 1], ~hidden[line : line + 1])
                if place is not None:
                    hidden[line, place[1]] = changed = True  # a view: the table's own flags change


def _next(whole: Numbers, may_be_hidden: Flags) -> tuple[int, int] | None:
    """The smallest number that hides something, preferably not 0, which hides the least; None: there is none."""
    places = np.argwhere(may_be_hidden)
    if not len(places):
        return None
    row, column = min(places.tolist(), key=lambda place: (whole[tuple(place)] == 0, whole[tuple(place)]))
    return row, column


def _computable(whole: Numbers, is_small: Flags, is_hidden: Flags) -> tuple[int, int] | None:
    """A small count that follows from what is shown, or None."""
    unknown = np.full(whole.shape, -1)
    unknown[is_hidden] = np.arange(is_hidden.sum())
    equations, right = [], []
    for numbers, places in ((whole, unknown), (whole.T, unknown.T)):
        for line, places_in_line in zip(numbers, places, strict=True):
            is_out = places_in_line >= 0
            if is_out.any():
                signs = np.append(np.ones(len(line) - 1), -1.0)  # the parts minus their total are 0
                row = np.zeros(is_hidden.sum())
                row[places_in_line[is_out]] = signs[is_out]
                equations.append(row)
                right.append(-(signs * line)[~is_out].sum())
    for place in np.argwhere(is_small).tolist():
        goal = np.zeros(is_hidden.sum())
        goal[unknown[tuple(place)]] = 1.0
        least, most = (linprog(sign * goal, A_eq=np.array(equations), b_eq=np.array(right), bounds=(0, None)) for sign in (1, -1))
        if most.status == 0 and least.status == 0 and -most.fun - least.fun < _NOT_KNOWN:
            return place[0], place[1]
    return None
