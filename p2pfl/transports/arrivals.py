"""Those who wait until something comes over any link of a transport."""

from __future__ import annotations

import asyncio


class Arrivals:
    """Wakes whoever waits when something has come, or when his time is over."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """Note that something has come."""
        for waiting in tuple(self._waiting):
            _wake(waiting)

    async def wait(self, at_most_s: float) -> None:
        """Wait until something comes, so many seconds at most; asyncio.timeout around an event takes three times as long."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        self._waiting.add(waiting)
        timer = loop.call_later(at_most_s, _wake, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            self._waiting.discard(waiting)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
