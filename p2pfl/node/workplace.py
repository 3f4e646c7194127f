"""Where a node does its work on tensors: in a thread, so that its loops go on meanwhile, or at once where the work is short."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from statistics import median_low
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SHORT_S = 0.002
"""Work that mostly takes less than so long is done at once: of a small model it takes less than the way into a thread and back. So long the
loops may stand still at any time."""
WATCHED = 9
"""How many of the last pieces of work of a kind decide."""


class Workplace:
    """Does a node's work, kind by kind, in the place that its last pieces of that kind suggest."""

    def __init__(self) -> None:
        self._took_s: dict[str, deque[float]] = {}

    async def do(self, kind: str, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Do a piece of work of a kind, and return what it returns."""
        took_s = self._took_s.setdefault(kind, deque(maxlen=WATCHED))

        def timed() -> T:
            began_s = time.perf_counter()
            found = work(*arguments, **options)
            took_s.append(time.perf_counter() - began_s)
            return found

        if len(took_s) == WATCHED and median_low(took_s) < SHORT_S:
            return timed()
        return await asyncio.to_thread(timed)
