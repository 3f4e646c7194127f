"""Seconds of a run by part, from the moment when its user began to wait, and memory of its process."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_IMPORTED_S = time.monotonic()
_STAT = Path("/proc/self/stat")
_STARTED = 19  # which field behind the command's name: clock ticks from the machine's start to the process's


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds spent by part of a run; their sum is all that has passed."""

    waited_s: float = 0.0
    """Seconds that had passed before, booked as `start`: of a command, those of its process's start and its imports."""

    spent: dict[str, float] = field(default_factory=dict)
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        if self.waited_s:
            self.spent["start"] = self.waited_s

    def lap(self, name: str) -> float:
        """Book the time since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        return seconds

    def book(self, name: str) -> Mapping[str, float]:
        """Book the time since the last lap, and give the seconds of all parts."""
        self.lap(name)
        return self.spent

    def so_far_s(self) -> float:
        """Give all seconds until now, booked or not."""
        return math.fsum(self.spent.values()) + time.perf_counter() - self._since

    def resume(self, earlier: Mapping[str, float]) -> None:
        """Add what an earlier process has spent on the same run."""
        for name, seconds in earlier.items():
            self.spent[name] = self.spent.get(name, 0.0) + seconds


def with_rest(parts: Mapping[str, float], total_s: float) -> dict[str, float]:
    """Add the time that no part has, as `other`, so that the sum is the total."""
    return {**parts, "other": max(0.0, total_s - math.fsum(parts.values()))}


def process_age_s() -> float:
    """Seconds since this process began; since this module was imported where the system does not tell."""
    try:
        ticks = int(_STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[_STARTED])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # not a Linux
        return time.monotonic() - _IMPORTED_S


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
