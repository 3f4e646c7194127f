"""A site's memory of secure sums in a folder: what it has sent and heard of, its sessions, and totals that are final.

The log is append-only, over all studies of the site. Each line carries an HMAC of itself and of the line before it under the site's own
key, so that damage and lines that were taken out are found. An entry is on the disk before the first masked byte of its sum leaves. A log
that has lost its last lines is one from a backup: no file can show that, but neighbours tell it (`signed_history`). Only what a killed
process leaves, the beginning of one line, is cut off.

Files: `key` (32 random bytes), `log.jsonl`, `totals/STUDY/SUM`, `signed/STUDY`.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import secrets
import stat
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import msgpack
import numpy as np

from p2pfl.errors import BadMessage, ConfigError, StoreError, store_error
from p2pfl.governance.encoding import canonical
from p2pfl.governance.identity import read_private
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.protocol.sent_sums import HeardSet, SentSum
from p2pfl.runs.chained_log import MAC_BYTES, ChainedLog
from p2pfl.runs.open_files import open_patiently, replacing, sync_file
from p2pfl.wire.secure_messages import Opening, SignedTotal
from p2pfl.wire.sum_codec import SumAssembly, encode_sum

log = logging.getLogger(__name__)

KEY_BYTES: Final = 32
_REMEDY = "restore the folder from its newest backup; without it this site must not answer these statistics again"
_WORD_BYTES = 8
_MOST_HEAD_BYTES = 64
"""More than the shape of a total takes."""
_BUSY = "another process of this site makes sums with this folder: stop it first"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_COPY_REMEDY = "remove the file: neighbours that hold it as well send it again"


class SumFolder:
    """The files of one site's sums, open inside `with`; implements `SumStore`.

    Args:
        folder: of this site alone, the same for all its studies; it is made where it is not there.

    Raises:
        ConfigError: another process is at work on the folder, or others may use it or its key.
        StoreError: a file in it is damaged or missing, or the disk failed; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = ChainedLog(folder / "log.jsonl", remedy=_REMEDY, busy=_BUSY)
        self._key = b""
        self._sent: list[SentSum] = []
        self._heard: list[HeardSet] = []
        self._sessions: dict[str, int] = {}
        self._blocks: dict[str, int] = {}
        self._to_sync: list[Path] = []
        """Totals that have been written and may not be on the disk yet."""
        self._at_work = threading.Lock()  # a thread that a cancelled node has left behind may still be writing

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_there()
        except OSError as error:
            raise store_error(self._log.path, error) from error
        with ExitStack() as undone:
            undone.callback(self._log.close)
            has_log = self._log.open()
            if not has_log and any(path.is_file() for name in ("totals", "signed") for path in (self.folder / name).rglob("*")):
                raise StoreError(f"{self._log.path}: is empty, but sums have been made with this folder; {_REMEDY}")
            self._key = self._read_key(has_log=has_log)
            for entry in self._log.read(self._key):
                self._take(entry)
            undone.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._sync_totals()
        finally:
            self._log.close()

    def _sync_totals(self) -> None:
        """Wait until all totals are on the disk, with their names; StoreError where that fails."""
        with self._at_work:
            paths, self._to_sync = self._to_sync, []
        for path in paths:
            sync_file(path, with_name=False)
        for folder in {path.parent for path in paths}:
            sync_file(folder)

    # ---- the log

    @property
    def key(self) -> bytes:
        """Secret of the site for `SentSum.integers`."""
        return self._key

    def sent(self) -> Sequence[SentSum]:
        """All sums into which this site has sent, the oldest first."""
        return self._sent

    def append_sent(self, entry: SentSum) -> None:
        """Write an entry durably; StoreError where that fails, and then nothing may be sent."""
        of_set = sorted(entry.participants)
        head = {"sum": entry.sum_id, "statistic": entry.statistic_id, "plan": entry.plan, "integers": entry.integers.hex()}
        self._append({"kind": "sent", **head, "set": of_set})
        self._sent.append(entry)

    def heard(self) -> Sequence[HeardSet]:
        """All sets of others that this site has heard of."""
        return self._heard

    def append_heard(self, entry: HeardSet) -> None:
        """Write a set of others durably; StoreError where that fails."""
        self._append({"kind": "heard", "question": entry.question_id, "set": sorted(entry.participants)})
        self._heard.append(entry)

    def last_session(self, study: str) -> int:
        """Number of the last session of a study that this site has opened; 0 where there is none."""
        return self._sessions.get(study, 0)

    def append_session(self, study: str, number: int) -> None:
        """Write durably that a session is opened; StoreError where that fails, and then it may not be opened."""
        self._append({"kind": "session", "study": study, "number": number})
        self._sessions[study] = number

    def blocked_until(self, study: str) -> int:
        """Position of the last sum of a study into which this site may not send; -1 where there is none."""
        return self._blocks.get(study, -1)

    @property
    def was_restored(self) -> bool:
        """Whether neighbours have told this site, in any study, that its files come from a backup."""
        return bool(self._blocks)

    def append_block(self, study: str, position: int) -> None:
        """Write durably that nothing may be sent up to a position; StoreError where that fails."""
        self._append({"kind": "block", "study": study, "position": position})
        self._blocks[study] = position

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._log.append(canonical(entry))

    def _check_there(self) -> None:
        """Refuse a folder that others may use, and a key whose log was taken away: the log is made before the key."""
        if self.folder.stat().st_mode & _OTHERS:
            raise ConfigError(f"others may use the folder of sums; run: chmod 700 {self.folder}", str(self.folder))
        if (self.folder / "key").exists() and not self._log.path.exists():
            raise StoreError(f"{self._log.path}: no such file, but its key is there; {_REMEDY}")

    def _read_key(self, *, has_log: bool) -> bytes:
        path = self.folder / "key"
        if not path.exists() and not has_log:
            with _replaced(path) as file:
                file.write(secrets.token_bytes(KEY_BYTES))
        if not path.exists():
            raise StoreError(f"{path}: no such file; {_REMEDY}")
        key = read_private(path)
        if len(key) != KEY_BYTES:
            raise StoreError(f"{path}: {len(key)} bytes where {KEY_BYTES} are expected; {_REMEDY}")
        return key

    def _take(self, entry: Mapping[str, Any]) -> None:
        match entry["kind"]:
            case "sent":
                self._sent.append(
                    SentSum(
                        sum_id=entry["sum"],
                        statistic_id=entry["statistic"],
                        participants=frozenset(entry["set"]),
                        plan=entry["plan"],
                        integers=bytes.fromhex(entry["integers"]),
                    )
                )
            case "heard":
                self._heard.append(HeardSet(question_id=entry["question"], participants=frozenset(entry["set"])))
            case "session":
                self._sessions[entry["study"]] = entry["number"]
            case "block":
                self._blocks[entry["study"]] = entry["position"]
            case kind:
                raise StoreError(f"{self._log.path}: an entry of kind {kind!r}, which this version does not know; use the newer one again")

    # ---- copies of what others hold as well

    def totals(self, study: str) -> dict[str, Limbs]:
        """Confirmed totals of a study by their sum ids; StoreError where a file is damaged."""
        folder = self.folder / "totals" / study
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        found = {path.name: self._read_total(path) for path in paths if not path.name.endswith(".tmp")}
        return {sum_id: total for sum_id, total in found.items() if total is not None}

    def keep_total(self, study: str, sum_id: str, total: Limbs) -> None:
        """Write a confirmed total; it is on the disk when the folder is closed. StoreError where that fails."""
        path = self.folder / "totals" / study / sum_id
        content = canonical([*total.shape]) + b"\n" + total.astype("<u8").tobytes()
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open_patiently(lambda: _opened(temporary)) as file:
                file.write(self._mac(path, content))
                file.write(content)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise store_error(path, error) from error
        with self._at_work:
            self._to_sync.append(path)

    def _read_total(self, path: Path) -> Limbs | None:
        try:
            is_torn = _is_torn(path.read_bytes())
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        if is_torn:
            log.info("%s: was not on the disk when the power went; others have this total, or the sum is made again", path)
            return None
        shape, _, words = self._read(path).partition(b"\n")
        return np.frombuffer(words, dtype="<u8").astype(np.uint64).reshape(json.loads(shape))

    def signed(self, study: str) -> list[Opening | SignedTotal]:
        """The newest that members of a study have signed, as it was kept; StoreError where the file is damaged."""
        path = self.folder / "signed" / study
        if not path.exists():
            return []
        try:
            found = [SumAssembly(0).receive([header]) for header in msgpack.unpackb(self._read(path))]
        except (BadMessage, ValueError) as error:
            raise StoreError(f"{path}: is not of this version; {_COPY_REMEDY}") from error
        return [each for each in found if isinstance(each, (Opening, SignedTotal))]

    def keep_signed(self, study: str, messages: Sequence[Opening | SignedTotal]) -> None:
        """Write the newest that members have signed, in place of what was kept; StoreError where that fails."""
        self._keep(self.folder / "signed" / study, msgpack.packb([bytes(next(encode_sum(each))[0]) for each in messages]))

    def _keep(self, path: Path, content: bytes) -> None:
        with _replaced(path) as file:
            file.write(self._mac(path, content))
            file.write(content)

    def _mac(self, path: Path, content: bytes) -> bytes:
        return hmac.digest(self._key, f"{path.parent.name}/{path.name}/".encode() + content, "sha256")

    def _read(self, path: Path) -> bytes:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        if not hmac.compare_digest(content[:MAC_BYTES], self._mac(path, content[MAC_BYTES:])):
            raise StoreError(f"{path}: is damaged; {_COPY_REMEDY}")
        return content[MAC_BYTES:]


def _is_torn(content: bytes) -> bool:
    """Whether the file of a total is what a loss of power leaves: its beginning, which may be nothing, or zeros in its place."""
    if not any(content):
        return True
    shape, newline, words = content[MAC_BYTES:].partition(b"\n")
    if not newline:
        return len(content) < MAC_BYTES + _MOST_HEAD_BYTES
    try:
        return bool(len(words) < math.prod(json.loads(shape)) * _WORD_BYTES)
    except (ValueError, TypeError):
        return False


def _replaced(path: Path) -> AbstractContextManager[IO[Any]]:
    """Replace a private file as a whole, durably."""
    temporary = path.with_name(path.name + ".tmp")
    return replacing(path, temporary, lambda: _opened(temporary))


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        path.unlink()  # one that a killed process left
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123  # Path.open takes no mode
