"""State of the process that writes a run folder, from process.json, which stays there until its clean end.

A process is named by its number, the moment of its start and the boot of its machine, so a number that is used again names nobody else.
This needs Linux's /proc. Elsewhere, on another machine and in another container nothing is known.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from p2pfl.errors import StoreError

MARK = "process.json"

ProcessState = Literal["alive", "stopped", "paused", "gone"]
"""stopped: a signal keeps it from doing anything, as SIGSTOP does. paused: it has left the run and said so."""

_PROC = Path("/proc")
_BOOT = _PROC / "sys/kernel/random/boot_id"
_STATE, _BEGAN = 0, 19
"""Places in /proc/PID/stat, behind the command's name."""
_HALTED, _ENDED = frozenset("Tt"), frozenset("ZXx")


def mark_process(folder: Path) -> None:
    """Name this process in a folder as its writer; no mark where it could not be recognised later.

    Raises:
        StoreError: the disk refuses.
    """
    place = folder / MARK
    try:
        if (surroundings := _surroundings()) is None or (found := _stat(os.getpid())) is None:
            place.unlink(missing_ok=True)
            return
        # after a power cut the boot is another one: it need not be on the disk
        place.write_text(json.dumps({"pid": os.getpid(), "began": found[_BEGAN], **surroundings}) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror}") from error


def mark_pause(folder: Path) -> None:
    """Mark a folder as paused: its writer was interrupted and left."""
    with suppress(OSError):  # a full disk: the process is gone then, which is true as well
        (folder / MARK).write_text(json.dumps({"paused": True}) + "\n", encoding="utf-8")


def process_state(folder: Path) -> ProcessState | None:
    """Tell the state of a folder's writer; None: not known here, or it came to a clean end."""
    surroundings = _surroundings()
    try:
        mark: Any = json.loads((folder / MARK).read_bytes())
        if mark.get("paused") is True:
            return "paused"
        pid, began = int(mark["pid"]), str(mark["began"])
        is_here = surroundings is not None and all(mark[key] == value for key, value in surroundings.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no mark, or half of one
        return None
    if not is_here or pid < 1:
        return None
    found = _stat(pid)
    if found is None:
        return None if _is_hidden(pid) else "gone"
    if found[_BEGAN] != began or found[_STATE] in _ENDED:
        return "gone"
    return "stopped" if found[_STATE] in _HALTED else "alive"


def _surroundings() -> dict[str, str] | None:
    """Boot and container in which a process's number is its own; None where that is not known."""
    try:
        if str((_PROC / "self").readlink()) != str(os.getpid()):
            return None  # this /proc counts processes of another container
        return {"boot": _BOOT.read_text(encoding="ascii").strip(), "container": str((_PROC / "self/ns/pid").readlink())}
    except (OSError, ValueError):
        return None


def _stat(pid: int) -> list[str] | None:
    """Read state, start and more of a process; None where there is none to be seen."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except (OSError, ValueError):
        return None
    return fields if len(fields) > _BEGAN else None


def _is_hidden(pid: int) -> bool:
    """Tell whether there is a process of which /proc shows nothing, as it may of other users' processes."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _stat(pid) is None  # it may have come in between
