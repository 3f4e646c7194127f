"""Columns of a Parquet file, read by pyarrow and written as texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pfl.data.contract import Contract
from p2pfl.data.header import column_positions
from p2pfl.data.plain_files import check_plain_file
from p2pfl.data.raw_table import RawTable
from p2pfl.data.table_format import SiteTable
from p2pfl.data.typed_columns import typed_table
from p2pfl.errors import DataError, MissingExtraError

_READABLE = (
    *("is_integer", "is_float32", "is_float64", "is_decimal", "is_boolean", "is_date32", "is_null"),
    *("is_string", "is_large_string", "is_string_view"),
)
"""Tests of pyarrow's types, of which older versions lack some."""


def read_parquet(path: Path | str, contract: Contract, site: SiteTable) -> RawTable:
    """Read a site's Parquet file, the contract's columns alone.

    Raises:
        DataError: it is not there, no Parquet file, or not as contract and site say it is; every finding, without a value of a patient.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("table.parquet needs pyarrow: pip install 'p2pfl-mesh[parquet]'") from error
    path, place = Path(path), str(path)
    check_plain_file(path)
    try:
        with path.open("rb") as content:  # and not by its name, which pyarrow may take for an address
            file = parquet.ParquetFile(content)
            header = list(file.schema_arrow.names)
            positions = column_positions(header, contract, site, place)
            is_plain = len(set(header)) == len(header) and not any("." in name for name in header)
            table = file.read(columns=[header[each] for each in positions.values()] if is_plain else None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"is no Parquet file that can be read ({type(error).__name__})", place) from None  # it may quote a value
    values: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, position in positions.items():
        column = table.column(header[position] if is_plain else position)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if _is_readable(kind, pa.types):
            values[name] = column.to_pylist()
        else:
            refused[name] = "dates with a time of day" if pa.types.is_timestamp(kind) else f"values of type {kind}"
    return typed_table(values, refused, contract, site, place)


def _is_readable(kind: Any, types: Any) -> bool:
    """Whether a column of pyarrow's type has values that Python has exactly."""
    return any(hasattr(types, test) and getattr(types, test)(kind) for test in _READABLE)
