"""Memory that this process holds, and the most that it ever held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def rss_bytes() -> int:
    """Memory that this process holds now, in bytes; its peak where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Peak of the memory that this process held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process that this one was forked from held
        line = next(line for line in status.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
