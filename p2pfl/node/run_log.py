"""A node's own run folder: its events, and writing that waits where the disk is full."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pfl.errors import DiskFull
from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import LoopClock
from p2pfl.protocol.event_throttle import EventThrottle
from p2pfl.runs.events import EventKind, event_row, kind_of
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.text import Row, utc_now

log = logging.getLogger(__name__)

ROOM_AFTER_S = 1.0
"""A full disk is tried again after so long, then after twice as long, and so on."""
ROOM_AT_MOST_S = 30.0


class RunLog:
    """Events of one node, which is in *round_now*; those about neighbours are written when their time has come."""

    def __init__(self, me: str, clock: LoopClock, round_now: Callable[[], int]) -> None:
        self._me, self._clock, self._round_now = me, clock, round_now
        self._throttle = EventThrottle()
        self._folder: RunFolder | None = None
        self.disk_full: str | None = None
        """Why nothing can be written; None where it can."""

    @property
    def folder(self) -> RunFolder:
        """The run folder, once it has been opened."""
        assert self._folder is not None
        return self._folder

    def open(self, place: Path, plan: Plan) -> bool:
        """Open the run folder, or make it; returns whether it was there."""
        if place.exists() and not (place / "experiment.yaml").exists():
            shutil.rmtree(place)  # a start that was killed while it made the folder
        again = place.exists()
        if again:
            self._folder = RunFolder.open(place)
        else:
            experiment, topology = plan.experiment.as_dict(), plan.graph_record()
            self._folder = RunFolder.create(place, experiment, topology=topology, engine="daemons", member=self._me)
        self._folder.waits_for_room = True
        return again

    def event(self, kind: str, detail: str, about: str = "") -> None:
        """Log an event and write it down; of one about a neighbour only when its time has come."""
        row = self._row(kind, detail)
        written = self._throttle.offer(kind, about, row, self._clock.now_s()) if about else row
        if written is not None:
            self._say(written)

    def write_settled(self, kind: str, detail: str, about: str) -> None:
        """Write down what has lasted about a link, which has been logged in other words."""
        row = self._throttle.offer(kind, about, self._row(kind, detail), self._clock.now_s(), has_lasted=True)
        if row is not None:
            self.folder.append_event(row)

    def num_held_back(self, about: str) -> int:
        """Events about a neighbour that wait for their time."""
        return self._throttle.num_held_back(about)

    def say_due(self) -> None:
        """Write events that were held back and whose time has come."""
        self._say(*self._throttle.due(self._clock.now_s()))

    def say_rest(self) -> None:
        """Write all events that are held back."""
        self._say(*self._throttle.rest(self._clock.now_s()))

    async def write(self, write: Callable[..., object], *arguments: Any) -> None:
        """Write a file, and the rows that were kept while the disk was full; what is not on the disk is not acknowledged.

        Raises:
            StoreError: the disk failed, or it is full and the node is to stop.
        """
        clock, pause_s = self._clock, ROOM_AFTER_S
        while True:
            try:
                if self.folder.num_waiting:  # first: a checkpoint that has room tells of rounds that are recorded
                    self.folder.write_waiting()
                if self.folder.num_waiting:
                    raise DiskFull(f"{self.folder.path}: {self.folder.num_waiting} rows wait for room")
                await asyncio.to_thread(write, *arguments)
            except DiskFull as error:
                if clock.is_stopping:
                    raise
                if self.disk_full is None:
                    self.disk_full = str(error)
                    self.event(EventKind.DISK_FULL, f"this node waits until there is room: {error}")
                    pause_s = ROOM_AFTER_S
            else:
                break
            until_s = clock.now_s() + pause_s
            while clock.now_s() < until_s and not clock.is_stopping:
                await clock.wait(until_s)
            pause_s = min(2 * pause_s, ROOM_AT_MOST_S)
        if self.disk_full is not None:
            self.disk_full = None
            self.event(EventKind.DISK_FREE, "there is room again, and this node goes on")

    def leave(self) -> None:
        """Write what was held back, and that this process came to a clean end."""
        self.say_rest()
        self.folder.leave()

    def _row(self, kind: str, detail: str) -> Row:
        return {"time": utc_now(), **event_row(kind, self._round_now(), self._me, detail)}

    def _say(self, *rows: Row) -> None:
        for row in rows:
            kind = kind_of(row)
            level = logging.WARNING if kind is not None and kind.is_alarming else logging.INFO
            log.log(level, "%s %s", row["event"], row["detail"])
            if self._folder is not None:
                self._folder.append_event(row)
