"""The folder of a node's state: its owner's alone, and one node's at a time.

It holds models, also those of neighbours. Another account that could read it would have them; one that could open its lock could keep
the node from starting; one that could write into it could put other models there.
"""

from __future__ import annotations

import fcntl
import grp
import logging
import os
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from p2pfl.errors import ConfigError
from p2pfl.runs.status_client import LOCK

log = logging.getLogger(__name__)

_NOBODY_ELSE, _GROUP_READS = 0o077, 0o027
"""Mode bits that files and folders are made without: everything for others, and for the group all or only writing."""
_ELSEWHERE = "name another folder in site.yaml"
"""Remedy for a place that cannot be a state folder, for messages."""
_WAIT_S, _POLL_S = 1.0, 0.05
"""For the lock: a status command that looks whether a node runs holds it for a moment."""


@contextmanager
def held_state(state: Path, group: str | int | None = None) -> Iterator[None]:
    """Make or check a node's state folder, and hold it: two nodes on it would overwrite each other's checkpoints.

    Meanwhile all files that this process makes are its owner's alone, or also readable by the group.

    Args:
        state: the folder.
        group: who besides the owner may read it, by name or number; None: nobody.

    Raises:
        ConfigError: others may enter the folder, it belongs to another account, or a node is at work on it.
    """
    before = os.umask(_NOBODY_ELSE if group is None else _GROUP_READS)
    try:
        _make(state, group)
        check_state_folder(state, group)
        with _only_one(state):
            yield
    finally:
        os.umask(before)


@contextmanager
def unused_state(state: Path, group: str | int | None = None) -> Iterator[None]:
    """Check the state folder that a node has left behind, and keep nodes off it while it is read; nothing in it is changed.

    Args:
        state: the folder.
        group: as in `held_state`.

    Raises:
        ConfigError: there is none, others may enter it, it belongs to another account, or a node is at work on it.
    """
    if not has_folder(state):
        raise ConfigError("no such folder", str(state))
    check_state_folder(state, group)
    try:
        descriptor = os.open(state / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # a copy, on which no node has run
        yield
        return
    except OSError as error:
        raise ConfigError(f"cannot be opened: {error.strerror}", str(state / LOCK)) from error
    with os.fdopen(descriptor, "rb") as file:
        _lock(file, fcntl.LOCK_SH, state)
        yield


def _make(state: Path, group: str | int | None) -> None:
    """Make the folder, where it is not there."""
    if has_folder(state):
        return
    number = _group_id(group) if group is not None else None
    try:
        state.mkdir(parents=True)
        if number is not None:
            os.chown(state, -1, number)
            state.chmod(0o2750)  # what is made in it belongs to the same group
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}; {_ELSEWHERE}", str(state)) from error


def has_folder(state: Path) -> bool:
    """Whether a state's folder is there.

    Raises:
        ConfigError: something else is in its place, or this account cannot see whether anything is.
    """
    try:
        found = state.stat()
    except FileNotFoundError:
        return False
    except PermissionError as error:
        account = os.geteuid()
        raise ConfigError(
            f"account {account} may not enter a folder above it; {_ELSEWHERE}, or let the account enter", str(state)
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot be a folder: {error.strerror}; {_ELSEWHERE}", str(state)) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"is a file, and a folder is needed; {_ELSEWHERE}, or move the file away", str(state))
    return True


def check_state_folder(state: Path, group: str | int | None) -> None:
    """Refuse a folder that others may enter, with the command that mends it."""
    place, found = shlex.quote(str(state)), state.stat()
    mode, own = stat.S_IMODE(found.st_mode), os.geteuid()
    if found.st_uid != own:
        raise ConfigError(
            f"belongs to account {found.st_uid}, and the node runs as {own}: whoever owns the folder reads the models in it; "
            f"start the node as its owner, or run: chown -R {own} {place}",
            str(state),
        )
    if group is None:
        if mode & _NOBODY_ELSE:
            raise ConfigError(
                f"mode {mode:04o}, other accounts may enter, and it holds models; run: chmod -R go= {place}"
                " (state_group in site.yaml lets one group read it)",
                str(state),
            )
    elif mode & _GROUP_READS or found.st_gid != _group_id(group):
        shares = f"chgrp -R {shlex.quote(str(group))} {place} && chmod -R g=rX,o= {place} && chmod g+s {place}"
        raise ConfigError(
            f"mode {mode:04o}, group {found.st_gid}: expected that group {group} may read it, and nobody else; run: {shares}", str(state)
        )
    for parent in state.resolve().parents:
        above = parent.stat().st_mode
        if above & stat.S_IWOTH and not above & stat.S_ISVTX:
            log.warning(
                "every account may write to %s, and so put another folder in the place of the state; run: chmod o-w %s", parent, parent
            )


def _group_id(group: str | int) -> int:
    """Number of a group; ConfigError for a name that this machine does not know."""
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(f"state_group = {group!r}: this machine has no such group") from error


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    """Hold the lock. Only the owner may open it, whoever may read the folder: a reader could hold it, too."""
    try:
        descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot be opened: {error.strerror}", str(state / LOCK)) from error
    with os.fdopen(descriptor, "r+b") as file:
        os.fchmod(file.fileno(), 0o600)  # of an earlier version
        _lock(file, fcntl.LOCK_EX, state)
        yield


def _lock(file: IO[bytes], kind: int, state: Path) -> None:
    """Take a lock of a state folder; ConfigError where somebody else keeps it."""
    until_s = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= until_s:
                holder = holder_of(file.fileno())
                raise ConfigError(f"another node is running on this state folder{holder}: stop it first", str(state)) from error
            time.sleep(_POLL_S)
        else:
            return


def holder_of(descriptor: int) -> str:
    """Process that holds the lock, in brackets; empty where the system does not say."""
    found = os.fstat(descriptor)
    inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    held = [line.split() for line in lines]
    pids = [words[4] for words in held if len(words) > 5 and words[1] == "FLOCK" and words[5] == inode]  # noqa: PLR2004  # as proc(5) has them
    return f" (process {pids[0]})" if pids and pids[0].isdigit() else ""
