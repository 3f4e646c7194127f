"""Tables of figures as text of at most 80 columns, for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 80
_LEAST_SHOWN = 0.0001
_GAP = "  "


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; a long name has a line of its own."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(1, len(header))]
    room = WIDTH - sum(len(_GAP) + width for width in widths)
    first = min(max(len(row[0]) for row in (header, *rows)), max(room, len(header[0]), 4))
    lines = []
    for row in (header, *rows):
        name, rest = row[0], "".join(f"{_GAP}{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))
        if len(name) > first:
            lines.append(name)
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
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
