"""Format of a table in a text file, as the contract or the site says it: what nobody has said is refused, never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.data.sql_source import SqlSource
from p2pfl.errors import ConfigError
from p2pfl.yaml_files import check, shown, text_keys

Encoding = Literal["utf-8", "utf-16", "latin-1", "windows-1252"]
Separator = Literal["comma", "semicolon", "tab", "bar"]
Decimal = Literal["point", "comma"]
Thousands = Literal["none", "point", "comma", "space", "apostrophe"]
DateOrder = Literal["year-month-day", "day-month-year", "month-day-year"]

SIGNS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "point": "."}


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFormat:
    """Signs and orders of a CSV file; None where nobody has said it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    encoding: Encoding | None = None
    """None: UTF-8, with a byte order mark or without; other bytes are refused."""
    separator: Separator | None = None
    """Sign between two fields; None: a comma."""
    decimal: Decimal | None = None
    """Sign before the decimals; None: a number with a point or a comma in it is refused."""
    thousands: Thousands | None = None
    """Sign between groups of three digits; None: none."""
    dates: DateOrder | None = None
    """Order of the parts of a date; None: only 2026-03-09, as ISO 8601 has it."""

    def overridden(self, other: TableFormat) -> TableFormat:
        """This format with all that another one says in its place."""
        said = {each.name: getattr(other, each.name) or getattr(self, each.name) for each in fields(TableFormat)}
        return TableFormat(**said)

    def faults(self, key: str = "table") -> Iterator[str]:
        """Find signs that contradict each other."""
        if self.thousands not in (None, "none") and self.decimal is None:
            yield f"{key}.thousands = {shown(self.thousands)}: say {key}.decimal as well"
        if self.decimal is not None and self.thousands == self.decimal:
            yield f"{key}.thousands = {shown(self.thousands)}: it is the decimal sign as well; expected another one, or none"

    def as_dict(self) -> dict[str, str]:
        """All that is said, by key."""
        return {each.name: said for each in fields(self) if (said := getattr(self, each.name)) is not None}


KINDS = ("file", "parquet", "sql")
"""Keys of a site's table that say where it is, one of which is given."""

FORMAT_KEYS = tuple(each.name for each in fields(TableFormat))


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteTable:
    """Section `table:` of a site: where it is, and how it differs from what the contract says."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    file: Annotated[str, Field(min_length=1)] | None = None
    """Path of the CSV file."""
    parquet: Annotated[str, Field(min_length=1)] | None = None
    """Path of the Parquet file instead."""
    sql: SqlSource | None = None
    """Database and query instead."""
    format: TableFormat = TableFormat()
    """Signs and orders in which this file differs from the contract; in site.yaml its keys stand beside the others."""
    columns: dict[str, str | int] = field(default_factory=dict)
    """Variable to the header of its column, or to the column's position from 1; the others have the variable's name."""
    units: dict[str, str] = field(default_factory=dict)
    """Variable to the unit that this site measures it in."""
    absent: tuple[str, ...] = ()
    """Variables that this site does not have."""

    def paths(self) -> dict[str, str]:
        """Paths that the section names, by key."""
        found = {"file": self.file, "parquet": self.parquet}
        if self.sql is not None:
            found |= {"sql.password_file": self.sql.password_file, "sql.url": self.sql.sqlite_file if self.sql.is_sqlite else None}
        return {key: path for key, path in found.items() if path is not None}

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], place: str) -> SiteTable:
        """Check the section as the site's file holds it; ConfigError with every fault."""
        apart: dict[str, Any] = {key: value for key, value in raw.items() if key not in (*FORMAT_KEYS, "format")}
        units = text_keys(apart.get("units"))
        if isinstance(units, dict):
            apart["units"] = {key: "1" if type(unit) is int and unit == 1 else unit for key, unit in units.items()}
        findings = [f"format: unknown key; say {', '.join(FORMAT_KEYS)} beside the other keys"] if "format" in raw else []
        if raw.get("sql") is not None:
            try:
                apart["sql"] = SqlSource.from_mapping(raw["sql"])
            except ConfigError as error:
                apart["sql"] = None
                findings += error.findings
        form = TableFormat()
        try:
            form = check(TableFormat, {key: raw[key] for key in FORMAT_KEYS if key in raw}, place)
            findings += [fault.replace("table.", "") for fault in form.faults() if form.decimal is not None]
        except ConfigError as error:
            findings += error.findings
        findings += _faults_of_kind(raw)
        try:
            table = check(cls, {**apart, "format": form}, place)
            findings += [
                f"columns.{name} = {column}: positions begin at 1"
                for name, column in table.columns.items()
                if isinstance(column, int) and column < 1
            ]
        except ConfigError as error:
            findings += error.findings
        if findings:
            raise ConfigError(findings, place)
        return table


def _faults_of_kind(raw: Mapping[str, Any]) -> Iterator[str]:
    """Find a section that says several places for the table or none, or signs that its kind does not have."""
    kinds = [key for key in KINDS if raw.get(key) is not None]
    if not kinds:
        yield f"file: required, or one of {', '.join(KINDS[1:])}"
    elif len(kinds) > 1:
        yield f"{' and '.join(kinds)}: expected one of them"
    elif kinds != ["file"]:
        yield from (f"{key}: only a CSV file has one; leave it out" for key in ("encoding", "separator") if raw.get(key) is not None)
