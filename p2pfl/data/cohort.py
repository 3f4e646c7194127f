"""Cohort commitment: which rows a site computes with, bound under a key of its own, and frozen so that they stay the same.

The commitment is an HMAC-SHA256 (RFC 2104) over the sorted patient ids and row digests. Without the site's key nobody can tell from it
whether a patient is in the cohort; with it the site can show later that it has changed no row. A freeze file has no id and no value either,
only tags under the same key. It stays at the site.
"""

from __future__ import annotations

import hmac
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError, DataError, StoreError, store_error
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.encoding import canonical
from p2pfl.runs.text import document_of, read_document
from p2pfl.yaml_files import check

KEY_BYTES = 32

_COHORT, _PATIENT, _ROW, _KEY = (b"p2pfl cohort 1 " + part + b"\n" for part in (b"commitment", b"patient", b"row", b"key"))
_TAG_DIGITS = 32
_Tag = Annotated[str, Field(pattern=f"^[0-9a-f]{{{_TAG_DIGITS}}}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """Rows that a site has fixed, by tags under its key. Made by `freeze` and load."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: Literal[1] = 1
    key: _Tag
    """Tag of the key itself, so that another key is told from other rows."""
    commitment: CohortCommitment
    tags: tuple[tuple[_Tag, _Tag], ...]
    """Tag of the patient and of the row, for each row in its order."""

    @classmethod
    def load(cls, path: Path | str) -> Freeze:
        """Read a freeze from its file; DataError where it is not there or is none."""
        try:
            content = read_document(Path(path))
        except StoreError as error:
            raise DataError("is no freeze file, or not whole: restore it, or freeze the rows anew", str(path)) from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", str(path)) from error
        if content is None:
            raise DataError("no such file: freeze the rows first", str(path))
        try:
            return check(cls, content, str(path))
        except ConfigError as error:
            raise DataError(error.findings, str(path)) from error

    def save(self, path: Path | str) -> None:
        """Write the freeze to a new file that its owner alone can read.

        Raises:
            ConfigError: the file exists: rows are frozen once.
            StoreError: it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise ConfigError(
                "exists: the rows are frozen already; remove it to freeze others, which the others' records will show", str(path)
            )
        content = {
            "schema": self.schema,
            "key": self.key,
            "commitment": self.commitment.as_dict(),
            "tags": [list(each) for each in self.tags],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as file:
                file.write(document_of(content))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise store_error(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)


def commit(table: CheckedTable, contract: Contract, key: bytes) -> CohortCommitment:
    """Commit to a table's rows; neither their order nor that of the columns counts.

    Args:
        table: checked against the contract.
        contract: whose digest is bound as well.
        key: of the site, at least `KEY_BYTES` random bytes.
    """
    digests = _row_digests(table)
    rows, patients = len(digests), len(set(table.patients))
    content = [contract.digest, rows, patients, sorted(zip(table.patients, digests, strict=True))]
    return CohortCommitment(contract=contract.digest, rows=rows, patients=patients, hmac=_hmac(key, _COHORT, content))


def freeze(table: CheckedTable, contract: Contract, key: bytes) -> Freeze:
    """Fix the rows of a table, in their order."""
    return Freeze(key=_tag(key, _KEY, ""), commitment=commit(table, contract, key), tags=tuple(_tags(table, key)))


def frozen_rows(table: CheckedTable, frozen: Freeze, contract: Contract, key: bytes) -> tuple[CheckedTable, int]:
    """Find the frozen rows in a table, in the frozen order; later rows are left out.

    Returns:
        The rows, and how many later ones there are.

    Raises:
        DataError: contract or key are others, or a frozen row has changed or is gone; the message has counts and no id.
    """
    if not hmac.compare_digest(frozen.key, _tag(key, _KEY, "")):
        raise DataError("the rows were frozen under another key of this site: use that key, or freeze them anew")
    if frozen.commitment.contract != contract.digest:
        raise DataError("the data contract has changed since the rows were frozen: use that contract, or freeze them anew")
    places = _places(table, key)
    positions, lost = [], list[str]()
    for patient, row in frozen.tags:
        if places[patient, row]:
            positions.append(places[patient, row].pop(0))
        else:
            lost.append(patient)
    if lost:
        num_changed = _num_changed(lost, places)
        raise DataError(_lost(num_changed, len(lost) - num_changed, len(frozen.tags)))
    rows = table.rows(positions)
    if not hmac.compare_digest(commit(rows, contract, key).hmac, frozen.commitment.hmac):
        raise DataError("the freeze file itself has been changed: restore it, or freeze the rows anew")
    return rows, len(table.patients) - len(positions)


def changed_lines(table: CheckedTable, frozen: Freeze, key: bytes) -> tuple[int, ...]:
    """Lines of rows of frozen patients that are not as frozen, for the site's own terminal."""
    remaining = Counter(frozen.tags)
    known = {patient for patient, _ in frozen.tags}
    lines = []
    for (patient, row), line in zip(_tags(table, key), table.lines, strict=True):
        if remaining[patient, row]:
            remaining[patient, row] -= 1
        elif patient in known:
            lines.append(line)
    return tuple(lines)


def _places(table: CheckedTable, key: bytes) -> defaultdict[tuple[str, str], list[int]]:
    """Positions of the rows by their tags."""
    places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for position, tags in enumerate(_tags(table, key)):
        places[tags].append(position)
    return places


def _num_changed(lost: list[str], places: Mapping[tuple[str, str], list[int]]) -> int:
    """Count lost rows whose patient has another row in their place."""
    others = Counter[str]()
    for (patient, _), positions in places.items():
        others[patient] += len(positions)
    return sum(min(count, others[patient]) for patient, count in Counter(lost).items())


def _lost(num_changed: int, num_gone: int, num_frozen: int) -> str:
    what = [f"{num} {'has' if num == 1 else 'have'} {word}" for num, word in ((num_changed, "changed"), (num_gone, "gone")) if num]
    return f"of {num_frozen} frozen rows {' and '.join(what)}: restore them, or freeze the rows anew and tell the other institutions"


def _row_digests(table: CheckedTable) -> list[str]:
    """SHA-256 of each row's values, columns sorted by name: numbers as JSON has them, null where one is missing."""
    names = sorted(table.columns)
    columns = [_plain(table.columns[name]) for name in names]
    return [sha256(canonical([names, list(values)])).hexdigest() for values in zip(*columns, strict=True)]


def _plain(values: Any) -> list[Any]:
    return [None if np.isnan(value) else float(value) for value in values] if isinstance(values, np.ndarray) else list(values)


def _tags(table: CheckedTable, key: bytes) -> list[tuple[str, str]]:
    """Tags of the patient and of the row, for each row."""
    digests = _row_digests(table)
    return [(_tag(key, _PATIENT, who), _tag(key, _ROW, [who, digest])) for who, digest in zip(table.patients, digests, strict=True)]


def _tag(key: bytes, domain: bytes, value: Any) -> str:
    return _hmac(key, domain, value)[:_TAG_DIGITS]


def _hmac(key: bytes, domain: bytes, value: Any) -> str:
    if len(key) < KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes: at least {KEY_BYTES} are needed")
    return hmac.new(key, domain + canonical(value), sha256).hexdigest()
