"""Frozen rows of a site in their file, and the site's key for them in another one, which only its owner can read."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from p2pfl.data.check import CheckedTable
from p2pfl.data.cohort import KEY_BYTES, Freeze, freeze, frozen_rows
from p2pfl.data.contract import Contract
from p2pfl.data.plain_files import is_there
from p2pfl.errors import ConfigError, DataError, store_error
from p2pfl.governance.identity import read_private, write_private

KEY_FILE = "cohort.key"
"""Name of the key's file, beside the private keys of a node."""

_HEX_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenCohort:
    """Rows that a site computes with, as it has frozen them."""

    frozen: Freeze
    rows: CheckedTable
    num_later: int
    """Rows of the table that came later, and are left out."""


def freeze_cohort(table: CheckedTable, contract: Contract, file: Path, keys: Path) -> Freeze:
    """Freeze a table's rows in a new file, under the site's key, which is made where there is none.

    Raises:
        ConfigError: rows are frozen in that file already, or the key is not as it should be; nothing has been done.
        StoreError: the disk refuses.
    """
    if is_there(file):
        raise ConfigError(_frozen_already(file), str(file))
    frozen = freeze(table, contract, _load_key(keys) if is_there(keys / KEY_FILE) else _make_key(keys))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(file, error) from error
    frozen.save(file)
    return frozen


def frozen_cohort(table: CheckedTable, contract: Contract, file: Path, keys: Path) -> FrozenCohort | None:
    """Find the frozen rows in a table; None where no rows are frozen in that file.

    Raises:
        DataError: a frozen row has changed or is gone, or contract, key or file are others; with counts and no id.
        ConfigError: the key cannot be read.
    """
    if not is_there(file):
        return None
    frozen = Freeze.load(file)
    try:
        rows, num_later = frozen_rows(table, frozen, contract, cohort_key(keys))
    except DataError as error:
        raise DataError(error.findings, str(file)) from error
    return FrozenCohort(frozen=frozen, rows=rows, num_later=num_later)


def cohort_key(keys: Path) -> bytes:
    """Read the key that a site's rows were frozen under; ConfigError where it is not there, or others can read it."""
    if not is_there(keys / KEY_FILE):
        raise ConfigError("no such file: the rows were frozen under this key; restore it from its backup", str(keys / KEY_FILE))
    return _load_key(keys)


def _load_key(keys: Path) -> bytes:
    path = keys / KEY_FILE
    content = read_private(path).decode("ascii", "replace").strip()
    if not _HEX_KEY.fullmatch(content):
        raise ConfigError(f"is no key of {2 * KEY_BYTES} hex digits: restore it from its backup", str(path))
    return bytes.fromhex(content)


def _make_key(keys: Path) -> bytes:
    """Make a key from the system's randomness, in a file of mode 0600 in a folder of mode 0700."""
    path, key = keys / KEY_FILE, secrets.token_bytes(KEY_BYTES)
    try:
        write_private(path, key.hex().encode() + b"\n")
    except OSError as error:
        raise store_error(path, error) from error
    return key


def _frozen_already(file: Path) -> str:
    try:
        said = Freeze.load(file).commitment
    except DataError:
        return "exists, and is no freeze file that can be read: restore it, or move it away to freeze the rows anew"
    return (
        f"{said.rows} rows are frozen here already, and nothing has been changed: p2pfl data check compares the table with them; "
        "move the file away to freeze others, which the commitment will show"
    )
