"""A rate in bytes a second that several tunnels share fairly: who sends little does not wait behind who sends much.

Source: Goyal, Vin & Cheng 1996, start-time fair queueing. Each piece is tagged with the sum of bytes at which its tunnel would begin with
it, had every tunnel a line of its own; the least tag goes next. A tunnel that was silent begins at the tag that is being served.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Hashable
from typing import Any

MOST_BEHIND_S = 0.1
"""A loop that was held up for longer does not make up for all of it at once."""


class FairQueue:
    """Pieces of several tunnels, in the order in which they may pass."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        """Tag of the piece that was served last."""
        self._free_at: dict[Hashable, float] = {}
        """By tunnel, the tag of its next piece."""

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, tunnel: Hashable, size_bytes: int, item: Any) -> None:
        """Add a piece of a tunnel."""
        tag = max(self._now, self._free_at.get(tunnel, 0.0))
        self._free_at[tunnel] = tag + size_bytes
        heapq.heappush(self._heap, (tag, next(self._numbers), item))

    def take(self) -> Any:
        """Take the next piece out."""
        self._now, _, item = heapq.heappop(self._heap)
        return item


class FairRate:
    """Lets pieces of several tunnels pass at a rate, each in its turn; `run` must be running."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._queue = FairQueue()
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Hand out turns until cancelled."""
        loop, free_s = asyncio.get_running_loop(), 0.0
        while True:
            if not self._queue:
                self._asked.clear()
                await self._asked.wait()
                free_s = loop.time()  # what was not used is not saved up
            size_bytes, turn = self._queue.take()
            if turn.done():  # whoever asked has gone
                continue
            free_s = max(free_s, loop.time() - MOST_BEHIND_S) + size_bytes / self._bytes_per_s
            await asyncio.sleep(free_s - loop.time())
            if not turn.done():
                turn.set_result(None)
                await asyncio.sleep(0)  # so that it can ask again before the next piece is chosen

    async def take(self, tunnel: Hashable, size_bytes: int) -> None:
        """Wait until so many bytes more of a tunnel may pass."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put(tunnel, size_bytes, (size_bytes, turn))
        self._asked.set()
        await turn
