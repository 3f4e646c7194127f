"""Find out which process of this machine a connection belongs to, from the system's table of sockets; on Linux alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def dialler_at(port: int, pids: Mapping[str, int]) -> str | None:
    """Name the process that holds a port of this machine; None: none of these, or the system does not tell."""
    ours = {int(line.split()[9]) for line in _sockets() if int(line.split()[1].rpartition(":")[2], 16) == port}
    return next((name for name, pid in pids.items() if ours & _sockets_of(pid)), None)


def _sockets() -> list[str]:
    """Lines of the system's table of IPv4 connections."""
    try:
        return Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []


def _sockets_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process has open."""
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            kind, _, number = str(entry.readlink()).partition(":")
            if kind == "socket":
                found.add(int(number.strip("[]")))
    except OSError:  # it has ended, or the file is closed by now
        pass
    return found
