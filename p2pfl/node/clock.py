"""Time and wake-ups of a node's loops, and the wish that it should stop."""

from __future__ import annotations

import asyncio
import time


class LoopClock:
    """Clock that all loops of one node share; whoever waits on it is woken when something was heard or sent."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._stopped_why: str | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether the loops are to leave."""
        return self._stopped_why is not None

    @property
    def stopped_why(self) -> str:
        """Reason that was given for it."""
        return self._stopped_why or ""

    def now_s(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._woken.set()

    def stop(self, why: str) -> None:
        """Ask the loops to leave after what is in hand."""
        self._stopped_why = why
        self.wake()

    async def wait(self, until_s: float) -> None:
        """Wait until something was heard or sent, at most until a time and never long."""
        self._woken.clear()
        try:
            async with asyncio.timeout(max(0.0, min(until_s - self.now_s(), 1.0))):
                await self._woken.wait()
        except TimeoutError:
            return
