"""A sweep on disk.

sweep.yaml              the grid, with what was left out and why
CELL/seed-N/            an ordinary run folder
table.csv  plot.png     what came out so far
logs/                   what the processes said
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, StoreError
from p2pfl.runs.open_files import replace_file
from p2pfl.sweeps.grid import Cell, Grid
from p2pfl.yaml_files import check, dump_yaml, load_yaml, shown

GRID = "sweep.yaml"
_LOCK = ".lock"
_ORPHANS_END_S = 10.0
"""So long processes of a sweep that was killed may take to see that they are alone."""


def place_of(folder: Path, cell: Cell, seed: int) -> Path:
    """Where a run lies."""
    return folder / cell.name / f"seed-{seed}"


def read_grid(folder: Path) -> Grid | None:
    """The grid of a sweep's folder; None where there is no sweep yet.

    Raises:
        ConfigError: the folder is something else.
    """
    path = folder / GRID
    if path.exists():
        return check(Grid, load_yaml(path), str(path))
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file: choose another --out", str(folder))
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ConfigError(f"exists already and holds no {GRID}: choose another --out", str(folder))
    return None


def write_grid(folder: Path, grid: Grid) -> None:
    """Write a new sweep's grid into its folder."""
    replace_file(folder / GRID, dump_yaml(asdict(grid)))


def refuse_another(folder: Path, there: Grid, asked: Grid) -> None:
    """Refuse a folder that holds another sweep than the one that is asked for.

    Raises:
        ConfigError: it is another one; the message names what differs.
    """
    wanted = {key: value for key, value in asked.experiment.items() if key != "schema" or key in there.experiment}  # it goes on as it began
    found = _differences("experiment.", there.experiment, wanted)
    found += _differences("--vary ", there.vary, asked.vary)
    if list(there.vary) != list(asked.vary) and not found:
        found.append(f"--vary in the order {', '.join(there.vary)}, asked: {', '.join(asked.vary)}")
    if there.seeds != asked.seeds:
        found.append(f"seeds {_span(there.seeds)}, asked: {_span(asked.seeds)}")
    if found:
        raise ConfigError(["holds another sweep: choose another --out, or ask for what it has:", *found], str(folder))


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Keep other sweeps out of a folder; the open file may be handed to processes, which then hold it as well.

    Raises:
        ConfigError: another sweep is at work there.
        StoreError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made: {error.strerror}") from error
    try:
        last = time.monotonic() + _ORPHANS_END_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > last:
                    raise ConfigError(
                        "another sweep is at work here, or processes of one that was killed still are: wait for them", str(folder)
                    ) from None
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


def _differences(prefix: str, there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    keys = [*there, *(key for key in asked if key not in there)]
    return [
        f"{prefix}{key} = {_said(there, key)}, asked: {_said(asked, key)}"
        for key in keys
        if dump_yaml({key: there.get(key)}) != dump_yaml({key: asked.get(key)}) or (key in there) != (key in asked)
    ]


def _said(values: dict[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "nothing"


def _span(seeds: list[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
