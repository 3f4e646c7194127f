"""What came out of a sweep: a row a run, and the cells over their seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfl.departures import departures_in
from p2pfl.inspector.verdict import lower_is_better
from p2pfl.records import Row, primary_metric, read_summary, replace_file
from p2pfl.sweeps.folder import place_of
from p2pfl.sweeps.grid import Cell, Grid, as_text

DIVERGED = "at every node the last training left the finite numbers: lower optimizer.lr or set optimizer.clip_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure over the seeds of a cell."""

    mean: float | None
    deviation: float | None
    """Of the sample; None for less than two."""
    number: int
    """Of the runs in which it is defined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """One cell over its seeds. Figures are of the runs that have a result."""

    cell: Cell
    done: int
    asked: int
    left_out: str | None
    figures: dict[str, Figure]
    """By the table's column."""


def row_of(grid: Grid, folder: Path, cell: Cell, seed: int, failure: str | None = None) -> Row:
    """A run's row: what was varied, how it ended, its final figures as its own summary has them.

    status is "done", "diverged", "failed", "left out" or "unfinished"; NAME stands for each of the task's metrics in mean_model.NAME,
    mean.NAME and worst.NAME, the last two over the sites. "departures" says what was not as agreed, where anything was not.
    """
    place = place_of(folder, cell, seed)
    start = {"cell": cell.name, **cell.values, "seed": seed}
    if cell.name in grid.left_out:
        return {**start, "status": "left out", "reason": grid.left_out[cell.name]}
    if failure is not None:
        return {**start, "status": "failed", "reason": failure}
    summary = read_summary(place)
    if summary is None:
        return {**start, "status": "unfinished"}
    diverged = summary["stop_reason"] == "diverged"
    row = {**start, "status": "diverged" if diverged else "done", "reason": DIVERGED if diverged else None}
    row |= {"stop_reason": summary["stop_reason"], "rounds_run": summary["rounds"]}
    for name, over_sites in summary["metrics"].items():
        row[f"mean_model.{name}"] = (summary["mean_model"] or {}).get(name)
        row[f"mean.{name}"] = over_sites["mean"]
        row[f"worst.{name}"] = over_sites["max" if lower_is_better(name) else "min"]
    if departed := departures_in(summary):
        row["departures"] = "; ".join(departed)
    if summary.get("mean_model_reason") is not None:
        row["reason"] = row["reason"] or f"no mean model: {summary['mean_model_reason']}"
    row |= {key: summary[key] for key in ("consensus_distance", "relative_consensus", "bytes_sent")}
    return {**row, "seconds": summary["seconds"]["total"], "run": str(place.relative_to(folder))}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All that any row has; the reason last."""
    fixed_last = ("run", "reason")
    found = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row if key not in fixed_last)
    return [*found, *fixed_last]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """As CSV with a header; what is not known is empty, what is neither text nor number is JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    varied = ("cell", "seed")
    for row in rows:
        results = row.keys() - varied
        writer.writerow({key: "" if value is None and key in results else as_text(value) for key, value in row.items()})
    replace_file(path, text.getvalue())


def over_seeds(grid: Grid, rows: Sequence[Row]) -> list[CellResult]:
    """Every cell, the best first: by the primary metric of the mean model, where there is none by rounds and then by disagreement."""
    results = []
    for cell in grid.cells:
        mine = [row for row in rows if row["cell"] == cell.name]
        done = [row for row in mine if row["status"] == "done"]
        numbers = [
            key
            for key in columns_of(done)
            if key not in {*cell.values, "cell", "seed", "status", "stop_reason", "run", "reason", "departures"}
        ]
        results.append(
            CellResult(
                cell=cell,
                done=len(done),
                asked=len(mine),
                left_out=grid.left_out.get(cell.name),
                figures={key: figure_of([row.get(key) for row in done]) for key in numbers},
            )
        )
    metric = metric_of(rows)
    return sorted(results, key=lambda result: _rank(result, metric))


def metric_of(rows: Sequence[Row]) -> str | None:
    """The metric that decides, if the task has any."""
    return primary_metric(dict.fromkeys(key.removeprefix("mean.") for row in rows for key in row if key.startswith("mean.")))


def figure_of(values: Sequence[float | None]) -> Figure:
    """Mean and standard deviation of those that are defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return Figure(mean=None, deviation=None, number=0)
    mean = math.fsum(defined) / len(defined)
    squares = math.fsum((value - mean) ** 2 for value in defined)
    return Figure(mean=mean, deviation=math.sqrt(squares / (len(defined) - 1)) if len(defined) > 1 else None, number=len(defined))


def quality(figures: Mapping[str, Figure], metric: str) -> Figure | None:
    """The metric of the mean model; of the sites on average where no mean model was evaluated."""
    of_mean_model = figures.get(f"mean_model.{metric}")
    return of_mean_model if of_mean_model is not None and of_mean_model.number else figures.get(f"mean.{metric}")


def _rank(result: CellResult, metric: str | None) -> tuple[Any, ...]:
    """Smaller is better; cells without a result come last."""
    best = quality(result.figures, metric) if metric is not None else None
    value = best.mean if best is not None and best.mean is not None else math.inf
    if metric is not None and not lower_is_better(metric):
        value = -value if math.isfinite(value) else value
    rounds, apart = (_mean(result.figures.get(key)) for key in ("rounds_run", "relative_consensus"))
    return (result.done == 0, value, rounds, apart, result.cell.number)


def _mean(figure: Figure | None) -> float:
    return figure.mean if figure is not None and figure.mean is not None else math.inf
