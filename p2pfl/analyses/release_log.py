"""A site's log of all that was released about its rows: which analyses, of which patients, and how many numbers.

It belongs to the site's keys and not to one study, so that it spans all studies of the same patients. Patients stand in it as HMAC tags
under a key of the log's own; their ids do not. An analysis is on the disk before the first of its sums leaves.

Files: `releases/log.jsonl` beside the folder of the site's keys; in that folder `releases.key` (32 random bytes) and `releases.last` (the
newest line). A log that is gone, changed, or older than the newest line is found.

Shapes: N patients that the log knows.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from p2pfl.analyses.released_cells import CountedCells
from p2pfl.analyses.released_rows import CountedPatients, CountedSet, Counts
from p2pfl.errors import ConfigError, store_error
from p2pfl.governance.encoding import canonical
from p2pfl.governance.identity import read_private
from p2pfl.runs.chained_log import ChainedLog, DamagedLog
from p2pfl.runs.open_files import replacing

KEY_BYTES: Final = 32
FOLDER: Final = "releases"
"""Name of the folder, beside that of the keys."""

_KEY_FILE, _LAST_FILE, _LOG_FILE = "releases.key", "releases.last", "log.jsonl"
_TAG_DIGITS = 32
_REMEDY = "restore the log and its key from their newest backup; without them this site must answer no analysis of these patients"
_BUSY = "another process of this site runs an analysis with this log: wait until it has ended"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, kw_only=True)
class ReleasedAnalysis:
    """One analysis to which the site has given numbers."""

    study: str
    """Digest of the study; empty for simulated sites."""
    name: str
    """Kind and formula, for people."""
    question: str
    """Digest of what was asked, the same in every study."""
    rows: str
    """HMAC of the sets of patients who counted."""
    cohort: str | None
    """Commitment of the frozen rows; None: they were not frozen."""
    variables: tuple[str, ...]
    columns: tuple[str, ...]
    """Names of the columns about which numbers were released."""
    at: str
    """Time in UTC."""
    sets: tuple[CountedSet, ...]
    """Sets of patients, over those that the log knew at the time."""
    cells: tuple[CountedCells, ...] = ()
    """Cells in which patients were counted by a number, by time or by risk."""
    codings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Label of each code, by variable with categories."""
    numbers: int = 0
    """Numbers that are no counts of patients, so far."""

    @property
    def num_patients(self) -> int:
        """Patients of the site who counted."""
        return int(np.maximum.reduce([each.rows_N for each in self.sets]).astype(bool).sum())

    @property
    def statistic(self) -> tuple[str, str]:
        """Question with the patients of whom it was asked: asked once more, it tells nothing more."""
        return self.question, self.rows


class ReleaseLog:
    """The log of one site, open inside `with`.

    Args:
        folder: of the log; it is made where it is not there.
        keys: folder of the log's key.

    Raises:
        ConfigError: another process is at work on the log, others may use its folder or its key, or a file is damaged, missing or
            older than it should be; the message has the file and the remedy.
        StoreError: the disk failed.
    """

    def __init__(self, folder: Path, keys: Path) -> None:
        self.folder, self.keys = folder, keys
        self._log = ChainedLog(folder / _LOG_FILE, remedy=_REMEDY, busy=_BUSY)
        self._key = b""
        self._tags: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._analyses: list[ReleasedAnalysis] = []

    @classmethod
    def beside(cls, keys: Path) -> ReleaseLog:
        """Log of the site that has these keys."""
        return cls(keys.with_name(FOLDER), keys)

    def __enter__(self) -> Self:
        try:
            for folder in (self.keys, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder.stat().st_mode & _OTHERS:
                    raise ConfigError(f"others may use the folder; run: chmod 700 {folder}", str(folder))
        except OSError as error:
            raise store_error(self.folder, error) from error
        self._check_there()
        with ExitStack() as undone:
            undone.callback(self._log.close)
            self._make_key(has_log=self._log.open())
            self._take_all(self._log.read)
            undone.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._log.close()

    def look(self) -> Self:
        """Read the log without a hold on it, to show it; ConfigError where it is damaged, or older than it should be."""
        self._check_there()
        if self._log.path.exists():
            self._take_all(self._log.look)
        return self

    @property
    def analyses(self) -> Sequence[ReleasedAnalysis]:
        """All analyses, the oldest first."""
        return self._analyses

    @property
    def num_patients(self) -> int:
        """Patients that the log knows, N."""
        return len(self._places)

    def known(self, counted: CountedPatients) -> tuple[CountedSet, ...]:
        """Sets of an analysis over the patients that the log knows and, behind them, those that it does not know yet."""
        places = dict(self._places)
        positions = np.array([places.setdefault(self._tag(who), len(places)) for who in counted.patients], dtype=np.intp)
        return tuple(replace(each, rows_N=_placed(each.rows_N, positions, len(places))) for each in counted.sets)

    def rows_of(self, counted: CountedPatients) -> str:
        """HMAC of the sets of patients who count in an analysis, 64 hex digits."""
        tags = np.array([self._tag(who) for who in counted.patients], dtype=f"S{_TAG_DIGITS}")
        places = np.flatnonzero(np.maximum.reduce([each.rows_N for each in counted.sets]))
        places = places[np.argsort(tags[places])]
        content = [canonical([list(each.variables) for each in counted.sets]), tags[places].tobytes()]
        content += [each.rows_N[places].astype("<u2").tobytes() for each in counted.sets]
        return hmac.digest(self._key, b"p2pfl released rows 1\n" + b"\n".join(content), "sha256").hex()

    def append(self, analysis: ReleasedAnalysis, counted: CountedPatients) -> ReleasedAnalysis:
        """Write an analysis durably, with the site's new patients; StoreError where that fails, and then nothing may leave."""
        new = [tag for tag in map(self._tag, counted.patients) if tag not in self._places]
        if new:
            self._write({"kind": "patients", "tags": new})
            self._take_patients(new)
        analysis = replace(analysis, sets=self.known(counted))
        self._write(_entry(analysis))
        self._analyses.append(analysis)
        return analysis

    def append_numbers(self, place: int, numbers: int) -> None:
        """Write durably how many numbers an analysis has released so far; *place* is its place among all."""
        self._write({"kind": "numbers", "analysis": place, "numbers": numbers})
        self._analyses[place] = replace(self._analyses[place], numbers=numbers)

    # ---- the files

    def _check_there(self) -> None:
        """Refuse a log without its key, and a key without its log: the log is made first."""
        key, log = self.keys / _KEY_FILE, self._log.path
        if key.exists() and not log.exists():
            raise ConfigError(f"no such file, but its key is there; {_REMEDY}", str(log))
        if not key.exists() and log.exists() and log.stat().st_size:
            raise ConfigError(f"no such file, but its log is there; {_REMEDY}", str(key))

    def _make_key(self, *, has_log: bool) -> None:
        if not has_log and not (self.keys / _KEY_FILE).exists():
            _replace_private(self.keys / _LAST_FILE, b"\n")
            _replace_private(self.keys / _KEY_FILE, secrets.token_bytes(KEY_BYTES))

    def _read_key(self) -> bytes:
        path = self.keys / _KEY_FILE
        self._key = read_private(path) if path.exists() else b""
        if len(self._key) != KEY_BYTES:
            raise ConfigError(f"is not whole; {_REMEDY}", str(path))
        return self._key

    def _take_all(self, read: Callable[[bytes], Sequence[Mapping[str, Any]]]) -> None:
        try:
            entries = read(self._read_key())
        except DamagedLog as error:
            raise ConfigError(str(error)) from error
        path = self.keys / _LAST_FILE
        if not path.exists():
            raise ConfigError(f"no such file, but its log is there; {_REMEDY}", str(path))
        last = read_private(path).decode("ascii", "replace").strip()
        if last and not self._log.has(last):
            raise ConfigError(f"lacks what was released last, as one from an older backup does; {_REMEDY}", str(self._log.path))
        for entry in entries:
            self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        match entry["kind"]:
            case "patients":
                self._take_patients(entry["tags"])
            case "analysis":
                self._analyses.append(_analysis(entry))
            case "numbers":
                place = entry["analysis"]
                self._analyses[place] = replace(self._analyses[place], numbers=entry["numbers"])
            case kind:
                raise ConfigError(
                    f"an entry of kind {kind!r}, which this version does not know; use the newer one again", str(self._log.path)
                )

    def _take_patients(self, tags: Sequence[str]) -> None:
        for tag in tags:
            self._places.setdefault(tag, len(self._places))

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._log.append(canonical(entry))
        _replace_private(self.keys / _LAST_FILE, self._log.last_mac.encode() + b"\n")

    def _tag(self, patient: str) -> str:
        if patient not in self._tags:
            self._tags[patient] = self._tag_of(patient)
        return self._tags[patient]

    def _tag_of(self, patient: str) -> str:
        return hmac.digest(self._key, b"p2pfl released patient 1\n" + patient.encode(), "sha256").hex()[:_TAG_DIGITS]


def _placed(rows_N: Counts, positions: Any, num: int) -> Counts:
    found = np.zeros(num, dtype=np.uint16)
    found[positions] = rows_N
    return found


_PLAIN = ("study", "name", "question", "rows", "cohort", "at", "numbers")


def _entry(analysis: ReleasedAnalysis) -> dict[str, Any]:
    """Plain values of an analysis; the rows of each patient in each set as little-endian 16-bit words, zlib, base64."""
    sets = [
        {
            "variables": list(each.variables),
            "analysis": each.is_analysis,
            "rows": base64.b64encode(zlib.compress(each.rows_N.astype("<u2").tobytes())).decode(),
        }
        for each in analysis.sets
    ]
    plain = {key: getattr(analysis, key) for key in _PLAIN}
    names = {"variables": list(analysis.variables), "columns": list(analysis.columns)}
    codings = {"codings": {name: dict(each) for name, each in analysis.codings.items()}} if analysis.codings else {}
    return {"kind": "analysis", **plain, **names, "sets": sets, "cells": [each.as_dict() for each in analysis.cells], **codings}


def _analysis(entry: Mapping[str, Any]) -> ReleasedAnalysis:
    sets = tuple(
        CountedSet(
            variables=tuple(each["variables"]),
            is_analysis=each["analysis"],
            rows_N=np.frombuffer(zlib.decompress(base64.b64decode(each["rows"])), dtype="<u2").astype(np.uint16),
        )
        for each in entry["sets"]
    )
    plain = {key: entry[key] for key in _PLAIN}
    cells = tuple(map(CountedCells.from_mapping, entry["cells"]))
    variables, columns, codings = tuple(entry["variables"]), tuple(entry["columns"]), entry.get("codings", {})
    return ReleasedAnalysis(**plain, variables=variables, columns=columns, sets=sets, cells=cells, codings=codings)


def _replace_private(path: Path, content: bytes) -> None:
    """Replace a file of the owner alone as a whole, durably."""
    temporary = path.with_name(path.name + ".tmp")

    def opened() -> IO[bytes]:
        with suppress(FileNotFoundError):
            temporary.unlink()  # one that a killed process left
        return open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123  # Path.open takes no mode

    with replacing(path, temporary, opened) as file:
        file.write(content)
