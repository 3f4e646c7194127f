"""Text files from other programs: one way to open them, one rule for numbers, one reader of tables."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from p2pfl.errors import ConfigError, some

_MOST_LINE_SHOWN = 60
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")


def decode(content: bytes, place: str) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: the bytes are another encoding or hold a NUL; the message names the line.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError("cannot be read: line 1 begins with the byte order mark of UTF-16; save it as UTF-8", place)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start
        line, byte = _line_of(content, start), content[start]
        raise ConfigError(
            f"cannot be read: line {line} holds the byte 0x{byte:02x}, which is not UTF-8; save it as UTF-8", place
        ) from error
    if (at := content.find(b"\0")) >= 0:
        raise ConfigError(f"cannot be read: line {_line_of(content, at)} holds a NUL byte; save it as UTF-8 text", place)
    return text


def _line_of(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: the file is missing, a folder, unreadable or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError("no such file", str(path)) from error
    except IsADirectoryError as error:
        raise ConfigError("cannot be read: it is a folder, expected a file", str(path)) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", str(path)) from error
    return decode(content, str(path))


def number(text: str) -> float:
    """A finite number as tables write it, spaces around it allowed.

    Raises:
        ValueError: it is no finite decimal number. Python's float also takes 1_000, nan and infinity.
    """
    text = text.strip(" \t")
    if _NUMBER.fullmatch(text) and abs(value := float(text)) != float("inf"):
        return value
    if _DECIMAL_COMMA.fullmatch(text):
        raise ValueError("expected a number with a decimal point, not a comma")
    raise ValueError("expected a number")


def quoted(line: str) -> str:
    """A line of a file for a message, cut where it is long."""
    line = line.strip("\r\n")
    return repr(line if len(line) <= _MOST_LINE_SHOWN else line[: _MOST_LINE_SHOWN - 1] + "…")


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
            values, wrong = _numbers(row, names, columns, line)
            findings += wrong
            rows.append(values)
            lines.append(line)
    except csv.Error as error:
        findings.append(f"line {reader.line_num}: cannot be read as CSV: {error}")
    if findings:
        raise ConfigError(findings, place)
    if not rows:
        raise ConfigError("has no rows below its header" if header else "is empty: expected a header and rows", place)
    return rows, lines


def _numbers(row: Sequence[str], names: Sequence[str], columns: Sequence[int], line: int) -> tuple[list[float], list[str]]:
    """Numbers of one row, and a finding for each field that holds none."""
    values, wrong = [], []
    for name, column in zip(names, columns, strict=True):
        try:
            values.append(number(row[column]))
        except ValueError as error:
            wrong.append(f"line {line}, column {name}: {error}")
    return values, wrong


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
