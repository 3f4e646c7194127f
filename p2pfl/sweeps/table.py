"""The results of a sweep: a row for each run, the cells over their seeds, and which cell is best on validation rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfl.errors import visible
from p2pfl.inspector.tables import FlatRow
from p2pfl.runs.events import departures_in
from p2pfl.runs.open_files import replace_file
from p2pfl.runs.records import read_summary
from p2pfl.runs.summary_fields import lower_is_better, primary_metric
from p2pfl.runs.text import Row
from p2pfl.sweeps.folder import place_of
from p2pfl.sweeps.grid import Cell, Grid, as_text

VALIDATION_PREFIX = "validation."
_LOWER, _HIGHER = "lower is better", "higher is better"
_KINDS = ("mean_model.", "mean.", "worst.")
_OF_CHOICE = ("rank", "chosen_by", "not_used_for_choosing", "no_best")

DIVERGED = "at every node the last training became non-finite: lower optimizer.lr or set optimizer.clip_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedStatistics:
    """Mean and deviation of one column over the seeds of a cell."""

    mean: float | None
    deviation: float | None
    """Standard deviation of the sample; None for less than two."""
    number: int
    """Number of runs in which it is defined."""


UNDEFINED = SeedStatistics(mean=None, deviation=None, number=0)
"""Statistics of a column that no run has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """One cell over its seeds. Statistics are of the runs that have a result."""

    cell: Cell
    done: int
    asked: int
    left_out: str | None
    statistics: dict[str, SeedStatistics]
    """By the table's column."""


def row_of(grid: Grid, folder: Path, cell: Cell, seed: int, failure: str | None = None) -> Row:
    """A run's row: what was varied, how it ended, its final metrics as its own summary has them.

    status is "done", "diverged", "failed", "left out" or "unfinished"; NAME stands for each of the task's metrics in mean_model.NAME,
    mean.NAME and worst.NAME, the last two over the sites, on test rows. With `validation.` before them they are on validation rows.
    "departures" says what was not as agreed, where anything was not.
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
    lower = frozenset(summary["lower_is_better"]) if "lower_is_better" in summary else None
    measured = [(VALIDATION_PREFIX, summary), ("", summary.get("test") or {})] if grid.validation_of(cell) else [("", summary)]
    for prefix, found in measured:
        row |= _metrics(prefix, found, lower)
    if departed := departures_in(summary):
        row["departures"] = "; ".join(departed)
    if summary.get("mean_model_reason") is not None:
        row["reason"] = row["reason"] or f"no mean model: {summary['mean_model_reason']}"
    if len(grid.cells) > 1 and (deciding := primary_metric(summary["metrics"])) is not None:
        row["direction"] = _LOWER if is_lower_better(deciding, lower) else _HIGHER
    row |= {key: summary[key] for key in ("consensus_distance", "relative_consensus", "bytes_sent")}
    return {**row, "seconds": summary["seconds"]["total"], "run": str(place.relative_to(folder))}


def _metrics(prefix: str, measured: Mapping[str, Any], lower: frozenset[str] | None) -> Row:
    """Values of every metric on one kind of rows."""
    found: Row = {}
    for name, over_sites in (measured.get("metrics") or {}).items():
        found[f"{prefix}mean_model.{name}"] = (measured["mean_model"] or {}).get(name)
        found[f"{prefix}mean.{name}"] = over_sites["mean"]
        found[f"{prefix}worst.{name}"] = over_sites["max" if is_lower_better(name, lower) else "min"]
    return found


def is_lower_better(metric: str, lower: frozenset[str] | None) -> bool:
    """Whether less of a metric is better: as the run's summary says, of older ones as its name does."""
    return metric in lower if lower is not None else lower_is_better(metric)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All that any row has; the reasons last."""
    fixed_last = ("run", "reason", *(key for key in _OF_CHOICE if any(key in row for row in rows)))
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
    replace_file(path, visible(text.getvalue()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Column by which the cells of a sweep are ranked, or why no cell is called best."""

    metric: str | None
    column: str | None
    """A column of validation rows; None: the cells are not ranked."""
    lower_is_better: bool
    ranks: dict[str, int]
    """From 1, by the name of each cell all of whose runs have a result; empty while runs are unfinished."""
    no_best: str | None
    """Why no cell is called best; None also where there is only one."""
    tied: int = 0
    """How many other cells have exactly the best one's value; fewer rounds, then closer models, decided between them."""

    @property
    def best(self) -> str | None:
        """The name of the cell that is best on validation rows."""
        return next((name for name, rank in self.ranks.items() if rank == 1), None)


def flat_tables(grid: Grid, rows: Sequence[Row]) -> dict[str, list[FlatRow]]:
    """A sweep for other programs: "table", a row for each run, and "cells", one for each cell: means and deviations over seeds."""
    table = [{key: value if isinstance(value, str | int | float | None) else as_text(value) for key, value in row.items()} for row in rows]
    columns, (results, choice) = columns_of(rows), _ranked(grid, rows)
    own = ("no_best", "chosen_by", "not_used_for_choosing")
    cells: list[FlatRow] = []
    for result in results:
        values = {key: value if isinstance(value, str | int | float) else as_text(value) for key, value in result.cell.values.items()}
        row: FlatRow = {"cell": result.cell.name, **values, "done": result.done, "asked": result.asked}
        for key, found in result.statistics.items():
            row |= {key: found.mean, f"{key}.deviation": found.deviation}
        marks = {key: next((each[key] for each in rows if each.get(key) is not None), None) for key in own if key in columns}
        cells.append(row | ({"rank": choice.ranks.get(result.cell.name)} if "rank" in columns else {}) | marks)
    return {"table": [{key: row.get(key) for key in columns} for row in table], "cells": cells}


def over_seeds(grid: Grid, rows: Sequence[Row]) -> list[CellResult]:
    """Every cell, the best on validation rows first; without them in the grid's order, or, where nothing is measured, by rounds."""
    return _ranked(grid, rows)[0]


def choice_of(grid: Grid, rows: Sequence[Row]) -> Choice:
    """Rank the cells by the primary metric on validation rows: the mean model's, or the sites' mean where a cell has no mean model."""
    return _ranked(grid, rows)[1]


def with_choice(grid: Grid, rows: Sequence[Row]) -> list[Row]:
    """The rows as table.csv has them: with their cell's rank and what decided it; of a single cell as they are."""
    if len(grid.cells) == 1:
        return list(rows)
    choice = choice_of(grid, rows)
    if choice.column is None:
        return [{**row, "no_best": choice.no_best} for row in rows]
    test = sorted({key for row in rows for key in row if key.startswith(_KINDS)})
    decided = f"{'lowest' if choice.lower_is_better else 'highest'} {choice.column}"
    marked = {"chosen_by": decided, "not_used_for_choosing": " ".join(test), "no_best": choice.no_best}
    return [{**row, "rank": choice.ranks.get(row["cell"]), **marked} for row in rows]


def _ranked(grid: Grid, rows: Sequence[Row]) -> tuple[list[CellResult], Choice]:
    results = [_result_of(grid, cell, [row for row in rows if row["cell"] == cell.name]) for cell in grid.cells]
    metric = metric_of(rows)
    lower = any(row.get("direction") == _LOWER for row in rows)
    # where nothing is measured by how soon the nodes agree, which is no choice by test rows
    results.sort(key=_by_agreement if metric is None else lambda result: result.done == 0)
    no_best = _why_no_best(grid, metric)
    if metric is None or no_best is not None or len(grid.cells) == 1:
        return results, Choice(metric=metric, column=None, lower_is_better=lower, ranks={}, no_best=no_best)
    of_mean_model = f"{VALIDATION_PREFIX}mean_model.{metric}"  # one kind of value for all cells: two kinds could not be compared
    has_all = all(result.statistics.get(of_mean_model, UNDEFINED).number == result.done for result in results)
    column = of_mean_model if has_all else f"{VALIDATION_PREFIX}mean.{metric}"
    results.sort(key=lambda result: _rank(result, column, lower=lower))
    if any(row["status"] == "unfinished" for row in rows):
        return results, Choice(metric=metric, column=column, lower_is_better=lower, ranks={}, no_best="runs are unfinished")
    complete = [result for result in results if _is_comparable(result, column)]
    ranks = {result.cell.name: number for number, result in enumerate(complete, 1)}
    means = [result.statistics[column].mean for result in complete]
    tied = max(means.count(means[0]) - 1, 0) if means else 0
    none = None if ranks else "no cell has a result of every seed on validation rows"
    return results, Choice(metric=metric, column=column, lower_is_better=lower, ranks=ranks, no_best=none, tied=tied)


def _result_of(grid: Grid, cell: Cell, mine: Sequence[Row]) -> CellResult:
    done = [row for row in mine if row["status"] == "done"]
    texts = {*cell.values, "cell", "seed", "status", "stop_reason", "direction", "run", "reason", "departures", *_OF_CHOICE}
    return CellResult(
        cell=cell,
        done=len(done),
        asked=len(mine),
        left_out=grid.left_out.get(cell.name),
        statistics={key: statistics_of([row.get(key) for row in done]) for key in columns_of(done) if key not in texts},
    )


def _why_no_best(grid: Grid, metric: str | None) -> str | None:
    """Why cells cannot be ranked."""
    if len(grid.cells) == 1:
        return None
    if grid.no_validation is not None:
        return f"there are no validation rows: {grid.no_validation}"
    without = [cell for cell in grid.cells if cell.name not in grid.left_out and not grid.validation_of(cell)]
    if without and ("validation" in grid.experiment or "validation" in grid.vary):
        of = "" if len(without) == len(grid.cells) else f" in cell {without[0].name}"
        return f"there are no validation rows: validation = 0{of}"
    if without:
        return "there are no validation rows: the sweep was made before sweeps took any; start it again with another --out"
    return "no run has measured anything" if metric is None else None


def _is_comparable(result: CellResult, column: str) -> bool:
    """Whether every seed of a cell has a value: a mean over other seeds is another value."""
    return result.done == result.asked > 0 and result.statistics.get(column, UNDEFINED).number == result.asked


def metric_of(rows: Sequence[Row]) -> str | None:
    """The metric that decides, if the task has any."""
    names = (key.removeprefix(VALIDATION_PREFIX) for row in rows for key in row)
    return primary_metric(dict.fromkeys(name.removeprefix("mean.") for name in names if name.startswith("mean.")))


def statistics_of(values: Sequence[float | None]) -> SeedStatistics:
    """Mean and standard deviation of those that are defined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return UNDEFINED
    mean = math.fsum(defined) / len(defined)
    squares = math.fsum((value - mean) ** 2 for value in defined)
    return SeedStatistics(mean=mean, deviation=math.sqrt(squares / (len(defined) - 1)) if len(defined) > 1 else None, number=len(defined))


def quality(columns: Mapping[str, SeedStatistics], metric: str) -> SeedStatistics:
    """The metric of the mean model; of the sites on average where no mean model was evaluated."""
    of_mean_model = columns.get(f"mean_model.{metric}", UNDEFINED)
    return of_mean_model if of_mean_model.number else columns.get(f"mean.{metric}", UNDEFINED)


def _rank(result: CellResult, column: str, *, lower: bool) -> tuple[Any, ...]:
    """Smaller is better; cells without all their results come last."""
    mean = result.statistics.get(column, UNDEFINED).mean
    value = math.inf if mean is None else mean if lower else -mean
    return (result.done == 0, not _is_comparable(result, column), value, *_by_agreement(result)[1:])


def _by_agreement(result: CellResult) -> tuple[Any, ...]:
    means = (result.statistics.get(key, UNDEFINED).mean for key in ("rounds_run", "relative_consensus"))
    return (result.done == 0, *(math.inf if mean is None else mean for mean in means), result.cell.number)
