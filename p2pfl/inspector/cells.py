"""Names, numbers and tables as text of a terminal: nothing in them is read as markup or as a control sequence."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from p2pfl.inspector.verdict import SAME

MAX_NODES = 40
"""Nodes that a table of nodes has a row for."""
_REGULAR = 3  # steps of the same size that are no chance
_MAX_RANGES = 12


def table_of(first: str, *others: str) -> Table:
    """Two blanks between columns, a line under the heading; long words fold instead of being cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for column in (first, *others):
        table.add_column(column, overflow="fold")
    return table


def more_lines(hidden: int, what: str) -> list[RenderableType]:
    """A line that says how many rows are not shown; none where all are."""
    return [Text(f"({hidden} more {what})", style="dim")] if hidden > 0 else []


def name_cell(text: str) -> Text:
    """Cell with a name, which folds where it is too long."""
    return Text(printable(text), overflow="fold")


def printable(text: str) -> str:
    """Replace control signs by question marks: a name or a detail may come from an unknown peer."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def ranges_text(rounds: Sequence[int]) -> str:
    """4, 5, 6, 9, 20, 22, 24, 26 as "4-6, 9, every 2nd of 20-26"; some of many."""
    found, place = list[str](), 0
    while place < len(rounds):
        step = rounds[place + 1] - rounds[place] if place + 1 < len(rounds) else 1
        last = place
        while last + 1 < len(rounds) and rounds[last + 1] == rounds[last] + step:
            last += 1
        if step > 1 and last - place < _REGULAR:
            last = place
        between = f"{rounds[place]}-{rounds[last]}"
        found.append(str(rounds[place]) if last == place else between if step == 1 else f"every {_ordinal(step)} of {between}")
        place = last + 1
    return ", ".join(found[:_MAX_RANGES]) + (f" and {len(found) - _MAX_RANGES} more" if len(found) > _MAX_RANGES else "")


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def number_text(value: float | None) -> str:
    """Write a number in at most six signs; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or SAME <= abs(value) < 1000 else f"{value:.1e}"  # noqa: PLR2004  # what six signs can show


def seconds_text(value: float | None) -> str:
    """Write a duration in seconds or milliseconds."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def clock_text(value: float | None) -> str:
    """Write a time on the network's clock in seconds."""
    return "-" if value is None else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"  # noqa: PLR2004  # three digits say enough


def bytes_text(value: float | None) -> str:
    """Write a number of bytes with its unit."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:  # noqa: PLR2004
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
