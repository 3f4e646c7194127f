"""Columns of numbers from a table in a text file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from p2pfl.errors import ConfigError, some
from p2pfl.topology.sketch import number
from p2pfl.yaml_files import read_text


def read_columns(path: Path, names: Sequence[str]) -> tuple[list[list[float]], list[int]]:
    """Columns of numbers from a CSV file with a header; other columns are left out of account.

    Args:
        path: the file; blank lines in it do not count.
        names: columns wanted, in this order.

    Returns:
        One list for each row, and the line that each row ends at.

    Raises:
        ConfigError: all that is wrong, each with its line.
    """
    place = str(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[list[float]] = []
    lines: list[int] = []
    findings: list[str] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                if len(row) > 1:
                    findings.append(f"line {reader.line_num}: all fields are empty: expected numbers, or leave the line out")
                continue
            if header is None:
                header = [cell.strip() for cell in row]
                _check_header(header, names, reader.line_num, place)
                columns = [header.index(name) for name in names]
                continue
            line = reader.line_num
            if len(row) != len(header):
                hint = "; is a comma a decimal comma? write decimals with a point" if len(row) > len(header) else ""
                findings.append(f"line {line}: {len(row)} fields, the header has {len(header)}{hint}")
                continue
            rows.append(_numbers(row, names, columns, line, findings))
            lines.append(line)
    except csv.Error as error:
        findings.append(f"line {reader.line_num}: cannot be read as CSV: {error}")
    if findings:
        raise ConfigError(findings, place)
    if not rows:
        raise ConfigError("has no rows below its header" if header else "is empty: expected a header and rows", place)
    return rows, lines


def _numbers(row: Sequence[str], names: Sequence[str], columns: Sequence[int], line: int, findings: list[str]) -> list[float]:
    """Numbers of one row; each field that holds none is a finding."""
    values = []
    for name, column in zip(names, columns, strict=True):
        try:
            values.append(number(row[column]))
        except ValueError as error:
            findings.append(f"line {line}, column {name}: {error}")
    return values


def _check_header(header: Sequence[str], names: Sequence[str], line: int, place: str) -> None:
    """Refuse a header with a wanted column missing or there twice."""
    twice = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if twice:
        raise ConfigError([f"line {line}: the header has {name} {header.count(name)} times; expected once" for name in twice], place)
    missing = [name for name in names if name not in header]
    if not missing:
        return
    for sign, word in ((";", "';'"), ("\t", "tabs")):
        if len(header) == 1 and sign in header[0]:
            raise ConfigError(
                f"line {line}: the columns are separated by {word}: expected commas; save it with commas and decimal points", place
            )
    raise ConfigError(f"line {line}: the header lacks {some(missing)}; expected {some(names)}", place)
