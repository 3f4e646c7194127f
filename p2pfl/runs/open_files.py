"""Files of records, opened and replaced whatever else goes on: a reader never meets half a file.

Where the limit of open files is reached, connections of unknown peers are closed so that records can be written.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from p2pfl.errors import store_error

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

log = logging.getLogger(__name__)

NO_MORE_FILES = frozenset({errno.EMFILE, errno.ENFILE})
"""The process, or the whole machine, has no more file descriptors."""

PATIENCE_S = 5.0
RETRY_S = 0.005
SPARE_FILES = 8

when_out_of_files: list[Callable[[], None]] = []
"""Called, from any thread, when a file cannot be opened for lack of a descriptor; each frees one soon."""

_spare: list[int] = []
_keeps_spare: list[bool] = []


def raise_file_limit() -> None:
    """Allow this process as many open files as its hard limit says, and keep a few descriptors for its records."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays as it is: %s", error)
    _keeps_spare[:] = [True]
    _take_spare()


def open_patiently(open_file: Callable[[], T]) -> T:
    """Open a file; where descriptors have run out, free some and try again.

    Raises:
        OSError: the file cannot be opened for another reason, or descriptors were short for PATIENCE_S.
    """
    until_s: float | None = None
    while True:
        try:
            opened = open_file()
        except OSError as error:
            if error.errno not in NO_MORE_FILES:
                raise
            now_s = time.monotonic()
            until_s = now_s + PATIENCE_S if until_s is None else until_s
            if now_s >= until_s:
                raise
            for free_one in tuple(when_out_of_files):
                free_one()
            if _spare:
                os.close(_spare.pop())
                continue  # at once: a stranger may take the descriptor
            time.sleep(RETRY_S)
        else:
            if until_s is None and _keeps_spare and len(_spare) < SPARE_FILES:
                _take_spare()
            return opened


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: a reader, or a crash, meets the old one or the new one.

    Raises:
        StoreError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with replacing(path, temporary, lambda: temporary.open("w", encoding="utf-8")) as file:
        file.write(text)


@contextmanager
def replacing(path: Path, temporary: Path, open_file: Callable[[], IO[Any]]) -> Iterator[IO[Any]]:
    """Write a temporary file that takes the place of another one: fsync, rename, fsync of the folder.

    Raises:
        StoreError: the disk refuses; the file that was there is untouched.
    """
    try:
        with open_patiently(open_file) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)  # the new name itself must survive a power cut
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file only takes room
        raise store_error(path, error) from error


def sync_file(path: Path, *, with_name: bool = True) -> None:
    """Wait until a file that was written without waiting is on the disk, with its name: its process may have been killed before it waited.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        _sync(path)
        if with_name:
            _sync(path.parent)
    except OSError as error:
        raise store_error(path, error) from error


def _sync(place: Path) -> None:
    handle = open_patiently(lambda: os.open(place, os.O_RDONLY))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_spare() -> None:
    with suppress(OSError):
        while len(_spare) < SPARE_FILES:
            _spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
