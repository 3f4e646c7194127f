"""Memory of updates that nobody reads any more, for the next updates of their size.

The system makes memory zero before it hands it out, which takes as long as the digest of what is then written there. So room that has
become free is kept for the next update. That takes no more memory: rooms in use and rooms kept are together at most as many as the node has
neighbours, of each of which it holds an update or a flow anyway.
"""

from __future__ import annotations

from threading import RLock

import numpy as np
from numpy.typing import NDArray

from p2pfl.wire.update import in_memory

WORTH_KEEPING_BYTES = 4 * 2**20
"""Smaller room is left to the C library, which keeps it by itself."""


class _Lease:
    """Room in use: every view of it leads here, and the last one that goes takes this object along."""

    def __init__(self, rooms: UsedRooms, room: NDArray[np.uint8]) -> None:
        self.__array_interface__ = room.__array_interface__
        self._rooms, self._room = rooms, room

    def __del__(self) -> None:
        self._rooms.take_back(self._room)


class UsedRooms:
    """Makes rooms, and keeps those that have become free.

    Args:
        most: rooms in use and kept together, beyond which none is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_used = 0
        self._kept: list[NDArray[np.uint8]] = []
        self._lock = RLock()  # the last view may go in any thread, and inside of what is done here

    def make(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make room for so many bytes, to be written to; what lies there is of no meaning."""
        if not self._most or size_bytes < WORTH_KEEPING_BYTES:
            return in_memory(size_bytes)
        with self._lock:
            self._kept = [room for room in self._kept if room.size == size_bytes]  # of another size: it would come on top
            room = self._kept.pop() if self._kept else in_memory(size_bytes)
            self._num_used += 1
        return np.asarray(_Lease(self, room))

    def take_back(self, room: NDArray[np.uint8]) -> None:
        """Keep room that has become free, or give it back to the system."""
        with self._lock:
            self._num_used -= 1
            if self._num_used + len(self._kept) < self._most:
                self._kept.append(room)
