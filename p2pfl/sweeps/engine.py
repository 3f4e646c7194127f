"""A sweep from its grid to its table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.evaluation.results import Run
from p2pfl.experiment.spec import Experiment
from p2pfl.runs.text import Row
from p2pfl.sweeps.drawing import draw_curves
from p2pfl.sweeps.folder import held, place_of, read_grid, refuse_another, write_grid
from p2pfl.sweeps.grid import Grid, Vary, as_text, check_tasks, checked, make_grid
from p2pfl.sweeps.on_ray import import_ray, run_on_ray
from p2pfl.sweeps.processes import run_in_processes
from p2pfl.sweeps.table import VALIDATION_PREFIX, CellResult, Choice, choice_of, metric_of, over_seeds, row_of, with_choice, write_table
from p2pfl.sweeps.work import Executor, Job

EXECUTORS: dict[str, Executor] = {"processes": run_in_processes, "ray": run_on_ray}

Progress = Callable[[Job, Row | None, int, int], None]
"""Called with each run that is farther, its row once it has ended, how many runs have ended, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A finished sweep: its cells and where its files are."""

    path: Path
    grid: Grid
    rows: list[Row]
    """One dict a cell and seed, as in table.csv; `pandas.DataFrame(sweep.rows)` takes them."""
    plot: Path | None
    """None where there is nothing to draw."""
    no_plot: str | None = None
    """Sentence on the extra that is missing for the plot."""

    @cached_property
    def cells(self) -> list[CellResult]:
        """Each cell over its seeds, the best on validation rows first; without them in the grid's order."""
        return over_seeds(self.grid, self.rows)

    @cached_property
    def choice(self) -> Choice:
        """Which cell is best on validation rows, or why none is."""
        return choice_of(self.grid, self.rows)

    @property
    def failed(self) -> list[Row]:
        """Rows of the runs that have no result, though they could have had one."""
        return [row for row in self.rows if row["status"] in ("failed", "diverged")]

    @property
    def departed(self) -> list[Row]:
        """Rows of the runs that have ended, and not as agreed."""
        return [row for row in self.rows if row.get("departures")]

    def runs(self) -> Iterator[Run]:
        """Those that have a result."""
        return (Run(self.path / row["run"]) for row in self.rows if row["status"] == "done")


def sweep(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    vary: Vary,
    seeds: int = 1,
    overrides: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    jobs: int | None = None,
    executor: str = "processes",
    progress: Progress | None = None,
    allow_tasks: Collection[str] = (),
) -> Sweep:
    """Run a grid of experiments, or go on with it.

    Args:
        experiment: its file, a mapping as the file would hold, or an Experiment.
        vary: dotted keys to the values of each: all combinations are run.
        seeds: each with so many seeds, the experiment's own and those that follow it.
        overrides: dotted keys to values, for all cells.
        out: the sweep's folder; None: runs/NAME-sweep. Where it holds this sweep, runs that have ended are kept and the others go on.
        jobs: at most so many runs at a time; None: as many as there are cores.
        executor: "processes" or "ray".
        progress: called with each run that is farther.
        allow_tasks: tasks that may run beside the built-in ones, as distribution:entry or module:function.

    Raises:
        TaskNotAllowed: a cell asks for another task; nothing of it has been imported.
        ConfigError: what is asked is wrong, with all findings; nothing has been started.
        StoreError: the disk failed.
    """
    check_executor(executor, jobs)
    grid = make_grid(experiment, vary, seeds, overrides)
    folder = Path(out) if out is not None else Path("runs") / f"{grid.experiment['name']}-sweep"
    there = read_grid(folder)
    if there is not None:
        refuse_another(folder, there, grid)
        grid = there
        check_tasks(grid, allow_tasks)
    else:
        grid = checked(grid, allow_tasks)
    with held(folder) as lock:
        if there is None:
            write_grid(folder, grid)
        return _run(folder, grid, EXECUTORS[executor], jobs, lock, progress, tuple(allow_tasks))


def read_sweep(folder: Path | str) -> Sweep:
    """The results of a sweep as its folder holds them now, also while it is in progress or made by an earlier version.

    Raises:
        ConfigError: the folder holds no sweep.
        StoreError: a file of it is damaged.
    """
    folder = Path(folder)
    grid = read_grid(folder)
    if grid is None:
        raise ConfigError("holds no sweep: give the folder that `p2pfl sweep` made", str(folder))
    rows = [row_of(grid, folder, cell, seed) for cell in grid.cells for seed in grid.seeds]
    plot = folder / "plot.png"
    return Sweep(path=folder, grid=grid, rows=with_choice(grid, rows), plot=plot if plot.exists() else None)


def check_executor(executor: str, jobs: int | None) -> None:
    """Refuse an executor that is unknown or not installed, and a number of jobs that is none.

    Raises:
        ConfigError: naming the option; for an executor that is not installed it is a MissingExtraError.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"--executor {executor}: expected {' or '.join(EXECUTORS)}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be >= 1")
    if executor == "ray":
        import_ray()


def _run(
    folder: Path, grid: Grid, execute: Executor, workers: int | None, lock: int, progress: Progress | None, allow_tasks: tuple[str, ...]
) -> Sweep:
    rows = {(cell.number, seed): row_of(grid, folder, cell, seed) for cell in grid.cells for seed in grid.seeds}
    jobs = [Job(cell.number, seed, allow_tasks) for cell, seed in grid.runs if rows[cell.number, seed]["status"] == "unfinished"]
    total, done = len(grid.runs), len(grid.runs) - len(jobs)
    write_table(folder / "table.csv", with_choice(grid, list(rows.values())))
    if jobs:
        # closed here and now, also where an interruption comes from the progress: no process may be left behind
        with closing(execute(folder, jobs, workers, lock)) as farther:
            for job in farther:
                row = None
                if job.ended:
                    row = row_of(grid, folder, grid.cells[job.cell], job.seed, job.failure)
                    rows[job.cell, job.seed] = row
                    write_table(folder / "table.csv", with_choice(grid, list(rows.values())))
                    done += 1
                if progress is not None:
                    progress(job, row, done, total)
    return _drawn(Sweep(path=folder, grid=grid, rows=with_choice(grid, list(rows.values())), plot=None))


def _drawn(result: Sweep) -> Sweep:
    """With its picture, if there is anything to draw and something to draw with."""
    runs: dict[str, list[Path]] = {}
    for of_cell in result.cells:
        label = ", ".join(short(value) for value in of_cell.cell.values.values()) or "as written"
        if places := [
            place_of(result.path, of_cell.cell, row["seed"])
            for row in result.rows
            if row["cell"] == of_cell.cell.name and row["status"] == "done"
        ]:
            runs[label if label not in runs else of_cell.cell.name] = places
    if not runs:
        return result
    try:
        word = "validation rows" if any(key.startswith(VALIDATION_PREFIX) for row in result.rows for key in row) else "test rows"
        keys = ", ".join(key.removesuffix(".name") for key in result.grid.vary)
        draw_curves(result.path / "plot.png", runs, metric_of(result.rows), str(result.grid.experiment["name"]), keys, word)
    except MissingExtraError as error:
        return replace(result, no_plot=str(error))
    return replace(result, plot=result.path / "plot.png")


def short(value: object) -> str:
    """A value in a label: of a path, the file."""
    return as_text(value).rsplit("/", 1)[-1]
