"""Values that have a type of their own, as Parquet and SQL have them, written as the texts that the contract's rules read.

Each value becomes its text exactly, or its column is refused: 7.0 is no id, and a time of day is not cut off.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

from p2pfl.data.contract import Contract
from p2pfl.data.raw_table import RawTable
from p2pfl.data.table_format import SiteTable, TableFormat
from p2pfl.data.variables import Variable
from p2pfl.errors import DataError

WRITTEN = TableFormat(decimal="point")
"""Format in which values with a type are written, whatever the site says of its texts."""

_NUMBERS, _LABELS = ("number", "integer"), ("id", "category")
_WHOLE = (*_NUMBERS, *_LABELS)
_CAST = "cast it in the query, or where the file is made, to"
_WRITE: dict[type, tuple[str, tuple[str, ...], Callable[[Any], str]]] = {
    bool: ("true or false", ("category",), lambda value: str(value).lower()),
    int: ("whole numbers", _WHOLE, str),
    float: ("floating-point numbers", _NUMBERS, repr),
    Decimal: ("decimal numbers", _WHOLE, lambda value: format(value, "f")),
    str: ("texts", (*_WHOLE, "date"), lambda value: value.strip()),
    dt.date: ("dates", ("date",), dt.date.isoformat),
    dt.datetime: ("dates with a time of day", (), str),
    UUID: ("UUIDs", _LABELS, str),
}
"""Type to its word, the types of variables that may have it, and how a value is written."""
_WANTED = {
    "number": "a number",
    "integer": "a whole number",
    "category": "a text or a whole number",
    "id": "a text or a whole number",
    "date": "a date",
}


def typed_table(
    values: Mapping[str, Sequence[Any]], refused: Mapping[str, str], contract: Contract, site: SiteTable, place: str
) -> RawTable:
    """Write columns of values as a table of texts.

    Args:
        values: for each variable that is there its values, None where one is missing.
        refused: variables whose columns have a type that no variable has, and its word.
        contract: what type each variable is of.
        site: whose formats hold for columns of texts.
        place: where they come from, for messages.

    Raises:
        DataError: a column's type is not that of its variable, or it has several, or there are no rows; every finding, without a value.
    """
    num_rows = max(map(len, values.values()), default=0)
    findings = [_refusal(name, contract.variables[name], word) for name, word in refused.items()]
    columns, typed = {}, {}
    for name, column in values.items():
        kinds = {type(value) for value in column if value is not None}
        variable = contract.variables[name]
        fault = _fault(name, variable, kinds)
        if fault is None and Decimal in kinds and variable.type in _LABELS and not all(map(_is_whole, column)):
            fault = _refusal(name, variable, "decimal numbers with decimals")
        if fault is not None:
            findings.append(fault)
            continue
        columns[name] = tuple(["" if value is None else _WRITE[type(value)][2](value) for value in column])
        if str not in kinds:
            typed[name] = WRITTEN
    if not findings and not num_rows:
        findings.append("has no rows")
    if findings:
        raise DataError(findings, place)
    form = contract.table.overridden(site.format)
    return RawTable(place=place, columns=columns, lines=tuple(range(1, num_rows + 1)), form=form, typed=typed, has_lines=False)


def _fault(name: str, variable: Variable, kinds: set[type]) -> str | None:
    """Find why values of these types cannot be the variable's."""
    for kind in sorted(kinds, key=lambda each: each.__name__):
        word, types, _ = _WRITE.get(kind, (f"values of type {kind.__name__}", (), str))
        if variable.type not in types:
            return _refusal(name, variable, word)
    if str in kinds and len(kinds) > 1:
        others = sorted(_WRITE[kind][0] for kind in kinds - {str})
        return f"{name}: the column has texts and {' and '.join(others)}, which need not be written alike: {_CAST} one type"
    return None


def _is_whole(value: Any) -> bool:
    """Whether a decimal number is written without decimals; 7.0 is not, as 7 and 7.0 are two texts."""
    return not isinstance(value, Decimal) or (value.is_finite() and int(value.as_tuple().exponent) >= 0)


def _refusal(name: str, variable: Variable, word: str) -> str:
    return f"{name}: the column has {word}, and the variable is of type {variable.type}: {_CAST} {_WANTED[variable.type]}"
