"""Columns of texts from a CSV file as hospitals have it, in the format that the contract or the site says.

The standard library's reader splits the fields, in its strict dialect; it reads no number and no date, so that none becomes another value
on the way. Fields are read without the spaces around them.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path

from p2pfl.data.contract import Contract
from p2pfl.data.header import column_positions, sign_name
from p2pfl.data.plain_files import check_plain_file
from p2pfl.data.raw_table import RawTable
from p2pfl.data.table_format import SIGNS, SiteTable, TableFormat
from p2pfl.errors import DataError

_CODECS = {"utf-8": "utf-8-sig", "utf-16": "utf-16", "latin-1": "latin-1", "windows-1252": "cp1252"}
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_OTHERS = {b"PAR1": "parquet", b"SQLite format 3\0": "sql"}
"""First bytes of files that are no texts, and the key of a site's table that is meant for them."""
_CONTROLS = re.compile("[\x80-\x9f]")
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
_MOST_LINES_NAMED = 5


def read_csv(path: Path | str, contract: Contract, site: SiteTable) -> RawTable:
    """Read a site's CSV file.

    Raises:
        DataError: the file is not there, or not as contract and site say it is; every finding, without a value of a patient.
    """
    place = str(path)
    if faults := list(contract.faults_of_site(site)):
        raise DataError(faults, f"{place}, table")
    form = contract.table.overridden(site.format)
    text, first_line = _without_separator_line(_text(Path(path), form), form, place)
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    wrong: dict[str, list[int]] = {}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=SIGNS[form.separator or "comma"], strict=True)
    positions: dict[str, int] = {}
    try:
        for fields in reader:
            row, line = [field.strip() for field in fields], reader.line_num + first_line
            if not row:
                continue
            if header is None:
                header = row
                positions = column_positions(header, contract, site, place)
            elif not any(row):
                wrong.setdefault("all fields are empty: leave the line out", []).append(line)
            elif len(row) != len(header):
                wrong.setdefault(f"not {len(header)} fields, as the header has: {_hint(len(row) > len(header))}", []).append(line)
            else:
                rows.append(row)
                lines.append(line)
    except csv.Error as error:
        remedy = "a quoted field ends with a quote, and a quote within it is written twice"
        wrong.setdefault(f"cannot be read as CSV ({error}): {remedy}", []).append(reader.line_num + first_line)
    if wrong:
        raise DataError([f"{_lines(found)}: {what}" for what, found in wrong.items()], place)
    if not rows:
        raise DataError("has no rows below its header" if header else "is empty: expected a header and rows", place)
    columns = {name: tuple([row[position] for row in rows]) for name, position in positions.items()}
    return RawTable(place=place, columns=columns, lines=tuple(lines), form=form)


def _content(path: Path) -> bytes:
    """Bytes of the file, which is a text and no other kind of table."""
    place = str(path)
    check_plain_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", place) from error
    if other := next((key for mark, key in _OTHERS.items() if content.startswith(mark)), None):
        raise DataError(f"is no CSV file: say it as table.{other}", place)
    return content


def _text(path: Path, form: TableFormat) -> str:
    """Decode the file in the encoding that is said; bytes that contradict it are refused."""
    place, content = str(path), _content(path)
    said = form.encoding or "utf-8"
    marked = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)
    if marked is not None and marked != said:
        raise DataError(
            f"begins with the byte order mark of {marked}, and table.encoding is {form.encoding or 'not said'}: say {marked}", place
        )
    if said == "utf-16" and marked is None:
        raise DataError("has no byte order mark, which says how UTF-16 is meant: save it with one, or as UTF-8", place)
    try:
        text = content.decode(_CODECS[said])
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        advice = "; say table.encoding, such as latin-1 or windows-1252" if form.encoding is None else ""
        raise DataError(f"line {line} holds the byte 0x{content[error.start]:02x}, which is not {said}{advice}", place) from error
    if "\0" in text:
        raise DataError(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a NUL: it is no text in {said}", place)
    if said == "latin-1" and (found := _CONTROLS.search(text)):
        line = text.count("\n", 0, found.start()) + 1
        byte = ord(found[0])
        raise DataError(f"line {line} holds the byte 0x{byte:02x}, which is no letter of latin-1: is it windows-1252 or utf-8?", place)
    if said in ("latin-1", "windows-1252") and not content.isascii() and _is_utf8(content):
        raise DataError(f"all its bytes are UTF-8, and table.encoding is {said}: say utf-8", place)
    return text


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _without_separator_line(text: str, form: TableFormat, place: str) -> tuple[str, int]:
    """The text without the first line sep=; of a spreadsheet, and how many lines that are, if it says what contract and site say."""
    found = _SEPARATOR_LINE.match(text)
    if found is None:
        return text, 0
    if found[1] != SIGNS[form.separator or "comma"]:
        raise DataError(f"line 1: it says that fields are separated by {sign_name(found[1])}: say it as table.separator", place)
    return text[found.end() :], 1


def _hint(is_longer: bool) -> str:
    if is_longer:
        return "a separator within a field, such as a decimal comma, needs quotes around the field"
    return "a field is lost, or a line end within a field has no quotes around the field"


def _lines(found: list[int]) -> str:
    """Name lines in a sentence, the first few where they are many."""
    if len(found) == 1:
        return f"line {found[0]}"
    named = ", ".join(map(str, found[:_MOST_LINES_NAMED]))
    return f"lines {named}" + (f" and {len(found) - _MOST_LINES_NAMED} more" if len(found) > _MOST_LINES_NAMED else "")
