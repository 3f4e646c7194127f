"""Writing to a disk that may be full for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from p2pfl.errors import DiskFull
from p2pfl.node.clock import LoopClock
from p2pfl.node.run_log import RunLog
from p2pfl.runs.events import EventKind

ROOM_AFTER_S = 1.0
"""A full disk is tried again after so long, then after twice as long, and so on."""
ROOM_AT_MOST_S = 30.0


class PatientDisk:
    """Writes files, and waits for room where there is none: what is not on the disk is not acknowledged, and no further round begins."""

    def __init__(self, log: RunLog, clock: LoopClock) -> None:
        self._log, self._clock = log, clock
        self.full: str | None = None
        """Why nothing can be written; None where it can."""

    async def write(self, write: Callable[..., object], *arguments: Any) -> None:
        """Write a file, and the rows that were kept while the disk was full.

        Raises:
            StoreError: the disk failed, or it is full and the node is to stop.
        """
        clock, pause_s = self._clock, ROOM_AFTER_S
        while True:
            try:
                await asyncio.to_thread(write, *arguments)
                self._flush_rows()
            except DiskFull as error:
                if clock.is_stopping:
                    raise
                if self.full is None:
                    self.full = str(error)
                    self._log.event(EventKind.DISK_FULL, f"this node waits until there is room: {error}")
                    pause_s = ROOM_AFTER_S
            else:
                break
            until_s = clock.now_s() + pause_s
            while clock.now_s() < until_s and not clock.is_stopping:
                await clock.wait(until_s)
            pause_s = min(2 * pause_s, ROOM_AT_MOST_S)
        if self.full is not None:
            self.full = None
            self._log.event(EventKind.DISK_FREE, "there is room again, and this node goes on")

    def _flush_rows(self) -> None:
        folder = self._log.folder
        folder.write_waiting()
        if folder.num_waiting:
            raise DiskFull(f"{folder.path}: {folder.num_waiting} rows wait for room")
