"""A process of a rehearsal whose clock of the day is off, or for which names of other nodes have no address.

The rehearsal writes what is so now into a file, which the process looks at whenever it asks for the time or for a name. A node that is no
rehearsal's has no such file.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfl.runs.open_files import replace_file

DOMAIN = ".rehearsal.localhost"
"""Host names of nodes of a rehearsal end so; by RFC 6761 they are this machine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Clock and names that one process of a rehearsal meets."""

    clock_offset_s: float = 0.0
    unknown_hosts: tuple[str, ...] = ()
    """Host names that have no address."""


def write_conditions(path: Path, *, clock_offset_s: float, unknown_hosts: Collection[str]) -> None:
    """Tell a process what it meets from now on."""
    replace_file(path, json.dumps({"clock_offset_s": clock_offset_s, "unknown_hosts": sorted(unknown_hosts)}))


def disturb(path: Path) -> None:
    """From now on, this process's clock and resolver are as the file says."""
    watch = _Watch(path)
    real_time, real_look_up = time.time, socket.getaddrinfo

    def shifted_time() -> float:
        return real_time() + watch.now().clock_offset_s

    def look_up(host: Any, *arguments: Any, **more: Any) -> Any:
        if isinstance(host, str) and host.endswith(DOMAIN):
            if host in watch.now().unknown_hosts:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return real_look_up(host, *arguments, **more)

    time.time = shifted_time
    socket.getaddrinfo = look_up


class _Watch:
    """The content of a file, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._known = path, (0, 0), Conditions()

    def now(self) -> Conditions:
        """Conditions in the file; undisturbed where there is none."""
        try:
            stat = os.stat(self._path)  # noqa: PTH116  # asked often
            if (stat.st_mtime_ns, stat.st_ino) != self._read:
                content = json.loads(self._path.read_bytes())
                hosts = tuple(content["unknown_hosts"])
                self._known = Conditions(clock_offset_s=float(content["clock_offset_s"]), unknown_hosts=hosts)
                self._read = (stat.st_mtime_ns, stat.st_ino)
        except FileNotFoundError:
            return Conditions()
        return self._known
