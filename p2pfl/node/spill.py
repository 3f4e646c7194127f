"""Room for neighbours' updates, in memory or, where they would take too much of it, in files of the state folder.

A neighbour has one place in memory: for its update, then for the flow that comes of it, until the neighbour's next update settles that. An
update that comes before its exchange finds the place taken. Large ones then lie in files, so that no order of events takes more memory.
A flow takes the place of the update that it came of, so that open flows lie where their updates lay. A file has no name: nothing of it is
left after a node has ended, however it ended.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.node.used_room import UsedRooms
from p2pfl.params import tensor_over
from p2pfl.runs.events import EventKind
from p2pfl.wire.update import in_memory

_COPIES_IN_MEMORY_BYTES = 64 * 10**6
_EARLY_IN_MEMORY_BYTES = 8 * 10**6
"""Bytes of updates that may come early and be in memory; the forecast does not count them."""

_FREE_AT_LEAST_BYTES = 64 * 2**20
"""Room that stays on the disk for records and other things of the node."""

_SAID_AGAIN_AFTER_S = 600.0
_ALIGNED_BYTES = 64  # where a tensor begins in the file of a copy


def is_spilled(update_bytes: int, num_neighbours: int, spill_mb: float | None) -> bool:
    """Tell whether updates of so many neighbours are kept in files; *spill_mb*: what they may take of memory, None: everything."""
    return spill_mb is not None and num_neighbours * update_bytes > spill_mb * 1e6


def is_kept_in_files(num_bytes: int) -> bool:
    """Tell whether copies of so many bytes in all, which are read once, lie in files wherever updates lie."""
    return num_bytes > _COPIES_IN_MEMORY_BYTES


def early_in_files(update_bytes: int, num_neighbours: int) -> bool:
    """Tell whether updates of so many neighbours that come before their exchange lie in files wherever the others lie."""
    return num_neighbours * update_bytes > _EARLY_IN_MEMORY_BYTES


class UpdateRoom:
    """Room for updates and for copies of models.

    Args:
        folder: of the files.
        spills: whether updates lie in files.
        num_neighbours: neighbours whose updates may be here at the same time.
        on_event: takes the kind of an event and a sentence about it.
        num_reused: updates that lie in memory at the same time anyway, whose room is used again; 0: it is made anew for each.
    """

    def __init__(
        self, folder: Path, *, spills: bool, num_neighbours: int = 1, num_reused: int = 0, on_event: Callable[[EventKind, str], None]
    ) -> None:
        self._folder, self.spills, self._num_neighbours, self._on_event = folder, spills, num_neighbours, on_event
        self._used = UsedRooms(num_reused)
        self._said_s = float("-inf")
        self._has_worked = True

    def make(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make room for an update of so many bytes, to be written to."""
        return self._in_file(size_bytes) if self.spills else self._used.make(size_bytes)

    def make_early(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make room for an update that comes before its exchange, while the neighbour's place in memory may be taken."""
        return self._in_file(size_bytes) if self.spills or early_in_files(size_bytes, self._num_neighbours) else in_memory(size_bytes)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, into one file where updates lie in files or where the copies are large."""
        if not (self.spills or is_kept_in_files(sum(tensor.nbytes for tensor in tensors.values()))):
            return {name: _copied(tensor, in_memory(tensor.nbytes)) for name, tensor in tensors.items()}
        begins, end = {}, 0
        for name, tensor in tensors.items():
            begins[name] = end
            end += -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        room = self._in_file(end)
        return {name: _copied(tensor, room[begins[name] : begins[name] + tensor.nbytes]) for name, tensor in tensors.items()}

    def _in_file(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make room in a file; where the disk gives none, it lies in memory, and an event says so, seldom and not twice in a row."""
        if size_bytes == 0:  # of which no file can be mapped
            return in_memory(0)
        try:
            room = _file_of(self._folder, size_bytes)
        except OSError as error:
            now_s = time.monotonic()
            if self._has_worked and now_s - self._said_s >= _SAID_AGAIN_AFTER_S:
                why = f"{self._folder}: {error.strerror or error}; updates of neighbours lie in memory until there is room again"
                self._on_event(EventKind.NOT_SPILLED, why)
                self._said_s = now_s
                self._has_worked = False
            return in_memory(size_bytes)
        self._has_worked = True
        return room


def _copied(tensor: Tensor, room: NDArray[np.uint8]) -> Tensor:
    """Copy a tensor into room of its size."""
    array = room.view(tensor.numpy().dtype).reshape(tuple(tensor.shape))
    np.copyto(array, tensor.numpy())
    return tensor_over(array)


def _file_of(folder: Path, size_bytes: int) -> NDArray[np.uint8]:
    """Map a new file without a name; raises OSError where the disk has no room for it, and some more."""
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize < size_bytes + _FREE_AT_LEAST_BYTES:
        raise OSError(f"{disk.f_bavail * disk.f_frsize / 1e6:,.0f} MB are free: too few for {size_bytes / 1e6:,.0f} MB more")
    with tempfile.TemporaryFile(dir=folder) as file:
        # all of it now: a page that finds no room when it is written to ends the process
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        return np.frombuffer(mmap.mmap(file.fileno(), size_bytes), dtype=np.uint8)
