"""A site's table as texts, as every reader gives it: nothing in it has been taken for a number or a date yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pfl.data.table_format import TableFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class RawTable:
    """A site's table as texts, with the contract's variables alone."""

    place: str
    columns: dict[str, tuple[str, ...]]
    """Variable to its texts; absent ones are not there."""
    lines: tuple[int, ...]
    """Line of the file that each row ends at, or number of the row where there are no lines; it stays at the site."""
    form: TableFormat
    """Format that numbers and dates are written in."""
    typed: Mapping[str, TableFormat] = field(default_factory=dict)
    """Format of columns whose values had a type of their own, and are written in one way."""
    has_lines: bool = True
    """Whether `lines` are those of a text file."""

    def form_of(self, name: str) -> TableFormat:
        """Format of one column."""
        return self.typed.get(name, self.form)
