"""One run of a sweep, wherever it is computed."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pfl.errors import P2PFLError
from p2pfl.evaluation.progress import Progress
from p2pfl.simulator import simulate
from p2pfl.sweeps.folder import place_of, read_grid


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep, a cell's number and a seed, and how far it is."""

    cell: int
    seed: int
    allow_tasks: tuple[str, ...] = ()
    """Tasks that may run beside the built-in ones; as the person says who runs the sweep, never its folder."""
    round: int = 0
    most: int = 0
    """The last round that there can be."""
    ended: bool = False
    failure: str | None = None
    """Why it has no result."""


Executor = Callable[[Path, Sequence[Job], int | None, int], Generator[Job, None, None]]
"""(folder, jobs, workers, lock) -> each job anew whenever it is farther. Jobs begin in their order; closed before its end, it leaves none.

At most so many workers run at a time; None: as many as there is room for. The lock is the open file that keeps other sweeps out.
"""


def run_one(folder: Path, job: Job, progress: Progress | None = None) -> str | None:
    """Run a cell with a seed, or go on with it from its last checkpoint; returns why it failed, None where it has a result."""
    try:
        grid = read_grid(folder)
        if grid is None:
            return f"{folder}: holds no sweep that this process can see; all of them need the same folder"
        cell = grid.cells[job.cell]
        place = place_of(folder, cell, job.seed)
        if (place / "rounds.jsonl").exists():
            simulate({}, resume=place, progress=progress, allow_tasks=job.allow_tasks)
            return None
        if place.exists():  # killed before its first round: there is nothing to go on from
            shutil.rmtree(place)
        simulate(grid.experiment_of(cell, job.seed), out=place, progress=progress, allow_tasks=job.allow_tasks)
    except P2PFLError as error:
        traceback.print_exception(error)
        return str(error)
    except MemoryError as error:
        traceback.print_exception(error)
        return "out of memory: fewer --jobs at a time"
    return None
