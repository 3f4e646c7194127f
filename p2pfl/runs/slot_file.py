"""A file with two slots that are written in turns, in place: the newest whole slot counts, so a write that is torn leaves the one before.

A new name on the disk takes two waits, for the file and for its folder; a write into room that is there already takes one, and no journal.

    head      4096 bytes, which never change: eight of length, then JSON that names the size of a slot
    slot 0    number (8 bytes), length (8 bytes), SHA-256 of both and of the content (32 bytes), content; then room
    slot 1    the same

Numbers are little-endian. A version of p2pfl that knows no slots takes the head for that of a safetensors file, refuses it, and prints what
stands there for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from p2pfl.errors import store_error
from p2pfl.runs.open_files import open_patiently, replacing

HEAD_BYTES = 4096
CONTENT_AT_MOST_BYTES = 2**20
"""Larger content is not written in slots: its writing takes longer than what a new name costs."""

_BLOCK_BYTES = 4096  # slots begin where a block of the disk does, so that a torn write harms one slot alone
_LEAST_BYTES = 4 * _BLOCK_BYTES
_NUMBER_BYTES = 8
_MARK_BYTES = 2 * _NUMBER_BYTES + hashlib.sha256().digest_size
_READS = 5
"""A file that a node is just writing to is read so often before neither slot is whole."""
_BEGIN = b'{"__metadata__":{"bytes of each slot":"'
_TOLD = "two slots, by a newer version of p2pfl: go on with that version"
"""Stands where a version without slots expects the dtype of a tensor."""


class _Place(NamedTuple):
    """The file on the disk that this process has made."""

    device: int
    inode: int
    size_bytes: int


class SlotFile:
    """Writer of one file of slots, the only one; its first write replaces whatever lies there.

    Args:
        open_new: opens a new file at a path to be written to, with the mode that it shall have.
    """

    def __init__(self, path: Path, open_new: Callable[[Path], IO[bytes]]) -> None:
        self._path, self._open_new = path, open_new
        self._made: _Place | None = None
        self._number = 0
        self._slot_bytes = 0

    def write(self, content: bytes) -> None:
        """Write content durably; it is on the disk when this returns.

        Raises:
            StoreError: the disk refused; what was there before counts.
            ValueError: the content is larger than CONTENT_AT_MOST_BYTES.
        """
        if len(content) > CONTENT_AT_MOST_BYTES:
            raise ValueError(f"{len(content)} bytes: slots hold at most {CONTENT_AT_MOST_BYTES}")
        if self._made is None or _MARK_BYTES + len(content) > self._slot_bytes or not self._write_in_place(content):
            self._replace(content)

    def forget(self) -> None:
        """Write no more into the file that lies there: something else takes its place."""
        self._made = None

    def _write_in_place(self, content: bytes) -> bool:
        """Write into the slot with the older content; False: the file is no longer the one that this process has made."""
        made, number = self._made, self._number + 1
        self._made = None  # after a failure nothing is known of what lies there: the next write makes a new file
        try:
            handle = open_patiently(lambda: os.open(self._path, os.O_WRONLY))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise store_error(self._path, error) from error
        try:
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino, found.st_size) != made or found.st_nlink > 1:  # a second name is somebody's copy
                return False
            marked = _marked(number, content)
            if os.pwrite(handle, marked, HEAD_BYTES + (number % 2) * self._slot_bytes) < len(marked):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _sync(handle)
        except OSError as error:
            raise store_error(self._path, error) from error
        finally:
            os.close(handle)
        self._made, self._number = made, number
        return True

    def _replace(self, content: bytes) -> None:
        """Make a new file with room for twice the content, which takes the place of whatever lies there."""
        self._made, self._number = None, self._number + 1
        wanted_bytes = max(_LEAST_BYTES, 2 * (_MARK_BYTES + len(content)))
        self._slot_bytes = -(-wanted_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        slots = [b"", b""]
        slots[self._number % 2] = _marked(self._number, content)
        temporary = self._path.with_name(self._path.name + ".tmp")
        with replacing(self._path, temporary, lambda: self._open_new(temporary)) as file:
            file.write(_head(self._slot_bytes))
            for slot in slots:
                file.write(slot.ljust(self._slot_bytes, b"\0"))  # room that is only promised would go through the journal later
            file.flush()
            found = os.fstat(file.fileno())
        self._made = _Place(found.st_dev, found.st_ino, found.st_size)


def read_slots(path: Path) -> bytes | None:
    """Read the newest content of a file of slots; None where the file is of another kind.

    Raises:
        OSError: it cannot be read.
        ValueError: neither slot is whole.
    """
    for _ in range(_READS):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if not head[_NUMBER_BYTES:].startswith(_BEGIN):
                return None
            rest = file.read()
        content = _newest(head, rest)
        if content is not None:
            return content
    raise ValueError("neither of its two slots is whole")


def _newest(head: bytes, rest: bytes) -> bytes | None:
    """The content of the newest whole slot."""
    said = head[_NUMBER_BYTES + len(_BEGIN) :].partition(b'"')[0]
    slot_bytes = int(said) if said.isdigit() else 0
    whole: dict[int, bytes] = {}
    for begin in (0, slot_bytes) if slot_bytes > 0 else ():
        numbers = rest[begin : begin + 2 * _NUMBER_BYTES]
        number, length = (int.from_bytes(numbers[at : at + _NUMBER_BYTES], "little") for at in (0, _NUMBER_BYTES))
        content = rest[begin + _MARK_BYTES : begin + _MARK_BYTES + length]
        if number and _MARK_BYTES + length <= slot_bytes and rest[begin : begin + _MARK_BYTES] == _marked(number, content)[:_MARK_BYTES]:
            whole[number] = content
    return whole[max(whole)] if whole else None


def _marked(number: int, content: bytes) -> bytes:
    """Content behind its number, its length and the digest of all three."""
    numbers = number.to_bytes(_NUMBER_BYTES, "little") + len(content).to_bytes(_NUMBER_BYTES, "little")
    return numbers + hashlib.sha256(numbers + content).digest() + content


def _head(slot_bytes: int) -> bytes:
    told = json.dumps({"dtype": _TOLD, "shape": [0], "data_offsets": [0, 0]})
    text = _BEGIN + f'{slot_bytes}"}},"slots":{told}}}'.encode()
    return (HEAD_BYTES - _NUMBER_BYTES).to_bytes(_NUMBER_BYTES, "little") + text.ljust(HEAD_BYTES - _NUMBER_BYTES)


def _sync(handle: int) -> None:
    """Wait until what was written is on the disk; the file's times need not be."""
    getattr(os, "fdatasync", os.fsync)(handle)
