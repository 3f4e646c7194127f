"""Tables of figures as text of at most 80 columns, for terminals and logs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

WIDTH = 80
_LEAST_SHOWN = 0.0001
_LEAST_ROOM = 8
_GAP = "  "


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right.

    A long name has lines of its own. Columns that have no room beside each other make two tables.
    """
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(1, len(header))]
    room = WIDTH - sum(len(_GAP) + width for width in widths)
    if room < min(_LEAST_ROOM, max(len(row[0]) for row in (header, *rows))) and len(widths) > 1:
        middle = 1 + len(widths) // 2
        tables = [[[row[0], *row[1:middle]] for row in (header, *rows)], [[row[0], *row[middle:]] for row in (header, *rows)]]
        return [*text_table(tables[0][0], tables[0][1:]), "", *text_table(tables[1][0], tables[1][1:])]
    first = min(max(len(row[0]) for row in (header, *rows)), room)
    lines = []
    for row in (header, *rows):
        name, rest = row[0], "".join(f"{_GAP}{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))
        if len(name) > first:
            lines += textwrap.wrap(name, WIDTH, drop_whitespace=False)
            name = ""
        lines.append(f"{name:<{first}}{rest}".rstrip())
    return lines


def figure(value: float, digits: int = 5) -> str:
    """A number with some significant digits; "-" where there is none."""
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:.{digits}g}"


def p_value(value: float) -> str:
    """A p-value as journals print it."""
    return "-" if math.isnan(value) else "<0.0001" if value < _LEAST_SHOWN else f"{value:.4f}"


def count(value: float | None, fewest: int) -> str:
    """A count of patients, or that it is too small to be shown."""
    return f"<{fewest}" if value is None else f"{value:,.0f}"


def wrapped(words: str) -> list[str]:
    """A sentence on as many lines as it takes."""
    return textwrap.wrap(words, WIDTH)
