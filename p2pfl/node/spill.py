"""Room for neighbours' updates, in memory or, where they would take too much of it, in files of the state folder.

A flow takes the place of the update that it came of, so that open flows lie where their updates lay. A file has no name: nothing of it
is left after a node has ended, however it ended.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.params import tensor_over
from p2pfl.runs.events import EventKind
from p2pfl.wire.update import in_memory

_FREE_AT_LEAST_BYTES = 64 * 2**20
"""Room that stays on the disk for records and other things of the node."""


def is_spilled(update_bytes: int, num_neighbours: int, spill_mb: float | None) -> bool:
    """Tell whether updates of so many neighbours are kept in files; *spill_mb*: what they may take of memory, None: everything."""
    return spill_mb is not None and num_neighbours * update_bytes > spill_mb * 1e6


class UpdateRoom:
    """Room for updates, made anew for each.

    Args:
        folder: of the files; None: updates lie in memory.
        on_event: takes the kind of an event and a sentence about it.
    """

    def __init__(self, folder: Path | None, on_event: Callable[[EventKind, str], None]) -> None:
        self._folder, self._on_event = folder, on_event
        self._failed = False

    def make(self, size_bytes: int) -> NDArray[np.uint8]:
        """Make room for so many bytes, to be written to. Where the disk gives none, it lies in memory, and an event says so once."""
        if self._folder is None:
            return in_memory(size_bytes)
        try:
            room = _file_of(self._folder, size_bytes)
        except OSError as error:
            if not self._failed:
                why = f"{self._folder}: {error.strerror or error}; updates of neighbours lie in memory until there is room again"
                self._on_event(EventKind.NOT_SPILLED, why)
            self._failed = True
            return in_memory(size_bytes)
        self._failed = False
        return room

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into room of its own."""
        array = self.make(tensor.nbytes).view(tensor.numpy().dtype).reshape(tuple(tensor.shape))
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
