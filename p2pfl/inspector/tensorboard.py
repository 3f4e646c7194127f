"""A run's numbers for TensorBoard: the network as one run, every node as a run of its own. Needs tensorboard (extra `tensorboard`)."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from p2pfl.errors import MissingExtraError, StoreError
from p2pfl.inspector.gaps import jumps
from p2pfl.inspector.tables import FlatRow, tables_of
from p2pfl.runs.records import RunRecords

_FILE = "events.out.tfevents.p2pfl"  # TensorBoard's own name would have this machine's in it, and pile up with each export
_BOUNDS = ("bound_low", "bound_high", "rms_disagreement", "consensus_distance")
_NO_SCALARS = frozenset({"round", "kind", "node"})


def write_events(run: RunRecords, folder: Path) -> list[Path]:
    """Every number of every round as a scalar, in network/ and in nodes/NAME/; what was written there before is replaced.

    Scalars are called as in `p2pfl.inspector.read`, with strokes for dots (metrics/auroc); their step is the round. TensorBoard keeps them
    in float32. Their wall time is the run's start with all rounds' seconds up to then, where the records have both.

    The folder is made where it is not there. The answer is the files written.

    Raises:
        MissingExtraError: tensorboard is not installed.
        StoreError: a file cannot be written.
    """
    tables = tables_of(run)
    times = _wall_times(run.environment.get("started"), tables.rounds)
    by_node: dict[str, list[FlatRow]] = {}
    for row in tables.nodes:
        by_node.setdefault(str(row["node"]), []).append(row)
    places = {
        "network": tables.rounds,
        **{f"nodes/{name}": rows for name, rows in zip(_file_names(by_node), by_node.values(), strict=True)},
    }
    try:
        return [_write(folder / place, rows, times) for place, rows in places.items() if rows]
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}") from error


def _write(place: Path, rows: Sequence[FlatRow], times: dict[int, float]) -> Path:
    try:
        from tensorboard.summary import Writer  # an extra
    except ImportError as error:
        raise MissingExtraError("--tensorboard needs tensorboard: pip install 'p2pfl-mesh[tensorboard]'") from error
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        writer = Writer(temporary)
        for row in _with_gaps(rows):
            number = int(row["round"] or 0)
            for key, value in _scalars(row):
                writer.add_scalar(key.replace(".", "/"), value, number, wall_time=times.get(number))
        writer.close()
        [written] = Path(temporary).iterdir()
        return written.replace(place / _FILE)


def _with_gaps(rows: Sequence[FlatRow]) -> Iterator[FlatRow]:
    """The rows, and one of NaN after each from which on rounds are missing or a bound is not known: TensorBoard's lines break there."""
    broken = jumps([int(row["round"] or 0) for row in rows])
    before: FlatRow = {}
    for place, row in enumerate(rows):
        if place in broken:
            missing: FlatRow = dict.fromkeys((key for key, _ in _scalars(before)), math.nan)
            yield {**missing, "round": int(before["round"] or 0) + 1}
        lost: FlatRow = {key: math.nan for key in _BOUNDS if before.get(key) is not None and row.get(key) is None}
        yield row | lost
        before = row


def _scalars(row: FlatRow) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key not in _NO_SCALARS and isinstance(value, int | float):
            yield key, float(value)


def _wall_times(started: str | None, rounds: Sequence[FlatRow]) -> dict[int, float]:
    """By round, in seconds since 1970; empty where the start is not known."""
    if started is None:
        return {}
    spent = (sum(float(value or 0) for key, value in row.items() if key.startswith("seconds.")) for row in rounds)
    ends = accumulate(spent, initial=datetime.fromisoformat(started).timestamp())
    next(ends)
    return {int(row["round"] or 0): end for row, end in zip(rounds, ends, strict=True)}


def _file_names(nodes: Iterable[str]) -> list[str]:
    """File names of nodes, whose names come from other machines: none leads to another folder, and no two are alike."""
    found: list[str] = []
    for node in nodes:
        plain = re.sub(r"[^\w.-]", "_", node).strip(".")[:100] or "node"
        same = sum(name == plain or name.startswith(f"{plain}~") for name in found)
        found.append(f"{plain}~{same}" if same else plain)
    return found
