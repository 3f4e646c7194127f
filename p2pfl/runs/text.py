"""Rows and documents as JSON text: written, and read from files in which the last line may be torn."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from p2pfl.errors import StoreError

Row = dict[str, Any]
"""One record, as it stands in a line of JSON."""


def read_lines(path: Path) -> list[Row]:
    """Read a file with one JSON object a line; a last line without its newline is not there yet."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_object(line, path, number) for number, line in enumerate(lines, start=1)]


def read_document(path: Path) -> Row | None:
    """Read the object of a JSON file; None where there is no file."""
    return _object(path.read_bytes(), path) if path.exists() else None


def _object(text: bytes, path: Path, line: int = 0) -> Row:
    where = f", line {line}" if line else ""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise StoreError(f"{path}{where}: expected an object, got {type(row).__name__}")
    return row


def line_of(row: Mapping[str, Any]) -> str:
    """Write one row as a line of JSON; most rows are plain already, and what is not is converted."""
    try:
        return _LINES.encode(row) + "\n"
    except ValueError:  # a number that is not finite
        return _LINES.encode(plain(row)) + "\n"


def document_of(value: Mapping[str, Any]) -> str:
    """Write a mapping as an indented JSON document."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def plain(value: Any) -> Any:
    """Convert numbers of any library to Python's own, and numbers that are not finite to None, as JSON needs it."""
    kind = type(value)  # mostly Python's own: asking abstract classes takes longer than writing a row
    if value is None or kind in (str, bool, int) or isinstance(value, str):
        return value
    if kind is float or (isinstance(value, Real) and not isinstance(value, Integral)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # arrays, and scalars that are not registered as numbers
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be recorded: expected numbers, texts, lists and mappings of them")


_LINES = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=plain)


def utc_now() -> str:
    """Format this moment as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
