"""An append-only log whose lines are chained by a secret key, so that damage and lines that were taken out are found.

Each line carries an HMAC of itself and of the line before it. An entry is on the disk before `append` returns. Only what a killed process
leaves, the beginning of one line, is cut off. A log that has lost its last lines is one from a backup, and looks whole.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, StoreError, store_error
from p2pfl.runs.open_files import open_patiently, sync_file

MAC_BYTES = 32
_MAC_DIGITS = 2 * MAC_BYTES
_LATER_LINE = re.compile(rb"(?<=.)[0-9a-f]{%d} \{" % _MAC_DIGITS, re.DOTALL)
"""A line that begins within another one."""


class DamagedLog(StoreError):
    """A log is not as it was written: restore it; nothing of it counts until then."""


class ChainedLog:
    """One file of entries, held by one process at a time.

    Args:
        path: of the file, in a folder that is there; it is made where it is not there, for its owner alone.
        remedy: for the message of a damaged file.
        busy: sentence for another process that holds the file.
    """

    def __init__(self, path: Path, *, remedy: str, busy: str) -> None:
        self.path = path
        self._remedy, self._busy = remedy, busy
        self._descriptor: int | None = None
        self._key, self._content = b"", b""
        self._last_mac, self._size_bytes = b"", 0
        self._macs: set[str] = set()
        self._is_broken = False
        self._at_work = threading.Lock()  # a thread that a cancelled task has left behind may still be writing

    def open(self) -> bool:
        """Open the file and take hold of it; gives whether anything is in it.

        Raises:
            ConfigError: another process holds it.
            StoreError: the disk refuses.
        """
        try:
            descriptor = open_patiently(
                lambda: os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            )
        except OSError as error:
            raise store_error(self.path, error) from error
        self._descriptor = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ConfigError(self._busy, str(self.path.parent)) from error
        self._content = self.path.read_bytes()
        return bool(self._content)

    def close(self) -> None:
        """Let go of the file."""
        with self._at_work:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def read(self, key: bytes) -> list[dict[str, Any]]:
        """Check all lines of the open file under a key, and give their entries; half a line at the end is cut off.

        Raises:
            DamagedLog: a line is damaged or missing.
            StoreError: the disk refuses.
        """
        self._key = key
        lines, torn = self._lines()
        found = [self._taken(line) for line in lines]
        if torn:
            found += self._mended(torn, len(lines) + 1)
        self._content = b""
        sync_file(self.path)  # what it says decides what may be done
        return found

    def look(self, key: bytes) -> list[dict[str, Any]]:
        """Check all lines and give their entries without a hold on the file, and without changing it; StoreError as `read`."""
        self._key = key
        try:
            self._content = self.path.read_bytes()
        except OSError as error:
            raise store_error(self.path, error) from error
        lines, torn = self._lines()
        found = [self._taken(line) for line in lines]
        return [*found, *([self._taken(torn)] if torn and self._has_mac(torn) else [])]

    def has(self, mac: str) -> bool:
        """Whether a line with this HMAC is in the log: one from a backup lacks the newest."""
        return mac in self._macs

    @property
    def last_mac(self) -> str:
        """HMAC of the newest line, which stands for all before it; empty where there is none."""
        return self._last_mac.hex()

    def append(self, text: bytes) -> None:
        """Write an entry, JSON on one line, so that it is there after a loss of power; StoreError where that fails."""
        with self._at_work:
            self._append_now(text)

    def _append_now(self, text: bytes) -> None:
        if self._descriptor is None:
            raise ValueError("the log is not open")
        if self._is_broken:
            raise StoreError(f"{self.path}: the disk has refused an entry before, and what is on it is not known; start again")
        mac = hmac.digest(self._key, self._last_mac + text, "sha256")
        line = mac.hex().encode() + b" " + text + b"\n"
        try:
            self._write(line)
        except OSError as error:
            try:
                os.ftruncate(self._descriptor, self._size_bytes)  # half a line would look like damage
            except OSError:
                self._is_broken = True
            raise store_error(self.path, error) from error
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._is_broken = True  # the system may have dropped the pages that it could not write
            raise store_error(self.path, error) from error
        self._last_mac, self._size_bytes = mac, self._size_bytes + len(line)
        self._macs.add(mac.hex())

    def _write(self, line: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def _lines(self) -> tuple[list[bytes], bytes]:
        """Whole lines, each checked where it is taken, and what stands behind the last end of a line."""
        *lines, torn = self._content.split(b"\n")
        self._size_bytes = len(self._content) - len(torn)
        self._last_mac = b""
        self._macs.clear()
        return lines, torn

    def _taken(self, line: bytes) -> dict[str, Any]:
        if not self._has_mac(line):
            raise DamagedLog(f"{self.path}: line {len(self._macs) + 1} is damaged, or lines before it are missing; {self._remedy}")
        self._last_mac = bytes.fromhex(line[:_MAC_DIGITS].decode())
        self._macs.add(self._last_mac.hex())
        entry: dict[str, Any] = json.loads(line[_MAC_DIGITS + 1 :])
        return entry

    def _mended(self, torn: bytes, number: int) -> list[dict[str, Any]]:
        assert self._descriptor is not None
        if self._was_whole(torn):
            raise DamagedLog(f"{self.path}: line {number} has been written whole, and is damaged; {self._remedy}")
        try:
            if self._has_mac(torn):  # only its end is missing: nothing is lost where it counts
                self._write(b"\n")
                self._size_bytes = len(self._content) + 1
                return [self._taken(torn)]
            os.ftruncate(self._descriptor, self._size_bytes)  # its writer died before it was on the disk: nothing has followed from it
        except OSError as error:
            raise store_error(self.path, error) from error
        return []

    def _has_mac(self, line: bytes) -> bool:
        expected = hmac.digest(self._key, self._last_mac + line[_MAC_DIGITS + 1 :], "sha256")
        return hmac.compare_digest(line[:_MAC_DIGITS], expected.hex().encode())

    def _was_whole(self, torn: bytes) -> bool:
        """Whether the end of the log is more than the beginning of a line: a line whose end was changed, or several."""
        if _LATER_LINE.search(torn):
            return True
        text = torn[_MAC_DIGITS + 1 :].decode("latin-1")  # one character a byte
        try:
            _, size_bytes = json.JSONDecoder().raw_decode(text)
        except ValueError:
            return False
        whole = torn[: _MAC_DIGITS + 1 + size_bytes]
        return whole != torn and self._has_mac(whole)
