"""`p2pfl sweep`: a grid of experiments, and which of them is best on validation rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.long_runs import pausable, terminal_bar
from p2pfl.cli.options import AllowTask, Json, Nodes, Rounds, Set
from p2pfl.cli.run import of_file, overrides_from
from p2pfl.errors import P2PFLError, Paused
from p2pfl.runs.events import DEPARTED

if TYPE_CHECKING:
    from p2pfl.sweeps import Grid, Sweep
    from p2pfl.sweeps.engine import Progress
    from p2pfl.sweeps.table import CellResult, SeedStatistics
    from p2pfl.sweeps.work import Job

_WIDEST_NOTE = 34  # what 80 columns leave beside the bar
_MOST_LISTED = 20


def sweep(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment, a YAML file; see examples/.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key, such as topology.name=ring,torus; can be repeated: all combinations run."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs of each cell, with the experiment's seed and those after it.")] = 1,
    nodes: Nodes = None,
    rounds: Rounds = None,
    assignments: Set = None,
    jobs: Annotated[int | None, typer.Option(help="Number of runs at a time.  [default: one per core]")] = None,
    executor: Annotated[str, typer.Option(help="Where runs go: processes, on this machine, or ray, on a Ray cluster.")] = "processes",
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: runs/NAME-sweep, by the experiment's name.")] = None,
    allow_task: AllowTask = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every cell, say what would run, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate a grid of experiments in parallel. It writes table.csv and plot.png; after a stop, the same command continues.

    A cell is one combination of values. Validation rows rank cells: a fifth of a site's training rows, or the experiment's `validation`.

    Example: p2pfl sweep examples/breast_cancer.yaml --vary topology.name=ring,star,complete --seeds 3
    """
    from p2pfl.sweeps import make_grid, parse_variations
    from p2pfl.sweeps import sweep as run_sweep
    from p2pfl.sweeps.engine import check_executor
    from p2pfl.sweeps.grid import checked

    varied, overrides = parse_variations(vary or []), overrides_from(nodes, rounds, assignments)
    check_executor(executor, jobs)
    if dry_run:
        with of_file(experiment), redirect_stdout(sys.stderr):
            grid = checked(make_grid(experiment, varied, seeds, overrides), allow_task or ())
        _say_grid(grid, as_json=as_json)
        return
    # what a task or Ray prints is none of our output
    with of_file(experiment), pausable(hears=True), _progress(enabled=not as_json) as progress, redirect_stdout(sys.stderr):
        try:
            done = run_sweep(
                experiment,
                vary=varied,
                seeds=seeds,
                overrides=overrides,
                out=out,
                jobs=jobs,
                executor=executor,
                progress=progress,
                allow_tasks=allow_task or (),
            )
        except KeyboardInterrupt:
            raise Paused("the same command goes on where it stopped") from None
    if as_json:
        sys.stdout.write(json.dumps(_document(done), indent=2, allow_nan=False, default=str) + "\n")
    else:
        _say_result(done)
    if done.failed:
        fault = (
            f"{len(done.failed)} of {len(done.grid.runs)} runs have no result; {done.path / 'table.csv'} says why, and the same command"
            " tries those again that failed"
        )
        if any(row["status"] == "failed" for row in done.failed):
            raise P2PFLError(fault)
        sys.stderr.write(f"p2pfl: {fault}\n")
    for row in done.departed[:_MOST_LISTED]:
        sys.stderr.write(f"p2pfl: not as agreed: cell {row['cell']}, seed {row['seed']}: {row['departures']}\n")
    if len(done.departed) > _MOST_LISTED:
        sys.stderr.write(f"p2pfl: not as agreed: {len(done.departed) - _MOST_LISTED} more in {done.path / 'table.csv'}\n")
    if done.departed:
        raise typer.Exit(DEPARTED)


def inspect_sweep(folder: Path, folders: Mapping[str, Path | None], *, as_json: bool) -> None:
    """Print a sweep's table, or write it into folders by the kind of file, "csv" or "parquet"."""
    from p2pfl.inspector.tables import write_csv, write_parquet
    from p2pfl.sweeps import read_sweep
    from p2pfl.sweeps.table import flat_tables

    found = read_sweep(folder)
    if any(folders.values()):
        for kind, place in folders.items():
            if place is None:
                continue
            for name, rows in flat_tables(found.grid, found.rows).items():
                place.mkdir(parents=True, exist_ok=True)
                (write_csv if kind == "csv" else write_parquet)(place / f"{name}.{kind}", rows)
                sys.stdout.write(f"{place / f'{name}.{kind}'}\n")
    elif as_json:
        sys.stdout.write(json.dumps(_document(found), indent=2, allow_nan=False, default=str) + "\n")
    else:
        _say_result(found)


def _document(done: Sweep) -> dict[str, Any]:
    cells = [
        {
            "cell": result.cell.name,
            "values": result.cell.values,
            "done": result.done,
            "asked": result.asked,
            "rank": done.choice.ranks.get(result.cell.name),
            "left_out": result.left_out,
            "figures": {key: asdict(found) for key, found in result.statistics.items()},
        }
        for result in done.cells
    ]
    return {
        "path": str(done.path),
        "seeds": done.grid.seeds,
        "validation": done.grid.validation,
        "best": done.choice.best,
        "tied_with_best": done.choice.tied,
        "chosen_by": done.choice.column,
        "no_best": done.choice.no_best,
        "cells": cells,
        "rows": done.rows,
        "plot": str(done.plot) if done.plot is not None else None,
    }


def _say_grid(grid: Grid, *, as_json: bool) -> None:
    """Say what a sweep would run."""
    if as_json:
        cells = [
            {"cell": cell.name, "values": cell.values, "left_out": grid.left_out.get(cell.name), "runs": len(grid.seeds)}
            for cell in grid.cells
        ]
        said = {"validation": grid.validation, "no_validation": grid.no_validation}
        document = {"experiment": grid.experiment, "seeds": grid.seeds, **said, "cells": cells, "runs": len(grid.runs)}
        sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
        return
    for cell in grid.cells[:_MOST_LISTED]:
        reason = grid.left_out.get(cell.name)
        sys.stdout.write(f"{_label(cell.values)}{f': left out: {reason}' if reason else ''}\n")
    if len(grid.cells) > _MOST_LISTED:
        sys.stdout.write(f"... {len(grid.cells) - _MOST_LISTED} more\n")
    sys.stdout.write(
        f"{_count(len(grid.cells), 'cell')}, {len(grid.left_out)} left out; {_count(len(grid.seeds), 'seed')}: "
        f"{_count(len(grid.runs), 'run')}\n"
    )
    if grid.validation is not None:
        sys.stdout.write(f"validation: {grid.validation:g} of each site's training rows, to rank by; validation=0 takes none\n")
    elif len(grid.cells) > 1 and grid.no_validation is not None:
        sys.stdout.write(f"No cell will be called best: there are no validation rows: {grid.no_validation}\n")


def _say_result(done: Sweep) -> None:
    from rich.text import Text

    from p2pfl.cli.terminal import open_console

    console = open_console(highlight=False)
    shown = [result for result in done.cells if result.left_out is None]
    if any(result.done for result in shown):
        console.print(_table(done, shown))
        for line in _of_choice(done):
            console.print(Text(line))
    for result in done.cells:
        if result.left_out is not None:
            console.print(Text(f"left out: {_label(result.cell.values)}: {result.left_out}"))
    by_name = {cell.name: cell for cell in done.grid.cells}
    for row in done.failed[:_MOST_LISTED]:
        console.print(Text(f"{row['status']}: {_label(by_name[row['cell']].values)}, seed {row['seed']}: {row['reason']}"))
    if len(done.failed) > _MOST_LISTED:
        console.print(f"... {len(done.failed) - _MOST_LISTED} more in {done.path / 'table.csv'}", soft_wrap=True)
    if done.no_plot is not None:
        console.print(Text(done.no_plot), soft_wrap=True)
    drawn = f" and {done.plot.name}" if done.plot is not None else ""
    ended = sum(row["status"] == "done" for row in done.rows)
    console.print(
        f"{ended} of {_count(len(done.grid.runs), 'run')} done; all of them in {done.path / 'table.csv'}{drawn}",
        soft_wrap=True,
        markup=False,
    )


def _of_choice(done: Sweep) -> list[str]:
    """Say what the order of the table is, and which cell is best."""
    from p2pfl.runs.summary_fields import NOT_FOR_CHOOSING
    from p2pfl.sweeps.table import UNDEFINED

    choice, by_name = done.choice, {result.cell.name: result for result in done.cells}
    if len(done.grid.cells) == 1:
        return []
    if choice.column is None:
        return [f"No cell is called best: {choice.no_best}."]
    of_mean_model = choice.column.startswith("validation.mean_model.")
    shares = sorted({done.grid.validation_of(cell) for cell in done.grid.cells if cell.name not in done.grid.left_out})
    said = f"{shares[0]:.0%}" if len(shares) == 1 else f"{shares[0]:.0%} to {shares[-1]:.0%}"
    whose = "the mean model's" if of_mean_model else "the sites' mean"
    direction = "lower" if choice.lower_is_better else "higher"
    lines = [
        f"validation: {whose} {choice.metric} on validation rows, which are {said} of each site's training rows; {direction} is better.",
        *([f"test: on test rows, {NOT_FOR_CHOOSING}."] if _has_test(done.cells) else []),
    ]
    if choice.best is None:
        return [*lines, f"No cell is called best: {choice.no_best}."]
    best = by_name[choice.best]
    tied = f"; tied with {choice.tied} more; fewer rounds, then closer models, decided" if choice.tied else ""
    score = f"{choice.metric} {_spread(best.statistics.get(choice.column, UNDEFINED))}"
    return [*lines, f"Best on validation rows: {_label(best.cell.values)} ({score}){tied}."]


def _has_test(results: list[CellResult]) -> bool:
    return any(key.startswith("mean.") for result in results for key in result.statistics)


def _table(done: Sweep, results: list[CellResult]) -> Any:
    """The cells over their seeds, in the order of `Sweep.cells`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from p2pfl.sweeps.table import UNDEFINED, metric_of, quality

    metric, column = metric_of(done.rows), done.choice.column
    has_test = _has_test(results)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for key in done.grid.vary:
        table.add_column(Text(key.removesuffix(".name").replace(".", ".\n")), overflow="fold", vertical="bottom")
    numbers = ["rounds", "relative\nconsensus\ndistance", "MB"]
    if column is not None:
        numbers = [f"{metric},\nvalidation", *(["test", "test,\nworst\nsite"] if has_test else []), *numbers]
    elif metric is not None and has_test:
        numbers = [metric, "worst site", *numbers]
    missing = any(result.done < result.asked for result in results)
    for heading in [*numbers, *(["runs"] if missing else [])]:
        table.add_column(Text(heading), justify="right", no_wrap=True, vertical="bottom")
    for result in results:
        columns = result.statistics
        cells = [Text(_short(value)) for value in result.cell.values.values()]
        if column is not None:
            cells.append(Text(_spread(columns.get(column, UNDEFINED))))
        if metric is not None and has_test:
            worst = columns.get(f"worst.{metric}", UNDEFINED)
            cells += [Text(_spread(quality(columns, metric), short=column is not None)), Text(_spread(worst, short=column is not None))]
        for key, form, unit in (("rounds_run", ".0f", 1.0), ("relative_consensus", ".1e", 1.0), ("bytes_sent", ".3g", 1e-6)):
            cells.append(Text(_mean(columns.get(key, UNDEFINED), form, unit)))
        table.add_row(*cells, *([Text(f"{result.done}/{result.asked}")] if missing else []))
    return table


def _spread(found: SeedStatistics, *, short: bool = False) -> str:
    """Mean and standard deviation; the mean alone where room is short."""
    if found.mean is None:
        return "-"
    form = ".3f" if 1e-3 <= abs(found.mean) < 1e3 or found.mean == 0 else ".1e"  # noqa: PLR2004  # what six signs can show
    return f"{found.mean:{form}}" + (f" ±{found.deviation:{form}}" if found.deviation is not None and not short else "")


def _mean(found: SeedStatistics, form: str, unit: float) -> str:
    return "-" if found.mean is None else f"{found.mean * unit:{form}}"


def _label(values: Mapping[str, Any]) -> str:
    """The values of a cell in one line."""
    return ", ".join(_short(value) for value in values.values()) or "as written"


def _short(value: object) -> str:
    from p2pfl.sweeps.engine import short

    return "".join(sign if sign.isprintable() else "?" for sign in short(value))


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Progress]:
    """A bar on a terminal, a line for each run that has ended otherwise; nothing where the output is for a machine."""
    with terminal_bar("{task.completed}/{task.total} runs", width=20, enabled=enabled) as show:

        def tell(job: Job, row: Mapping[str, Any] | None, done: int, total: int) -> None:
            if show is not None:
                how_far = str(row["status"]) if row else f"round {job.round} of {job.most}"
                show(done, total, f"cell {job.cell}, seed {job.seed}: {how_far}"[:_WIDEST_NOTE])
            elif enabled and row is not None:
                sys.stderr.write(f"{done}/{total} {row['cell']}, seed {row['seed']}: {_ending(row)}\n")

        yield tell


def _ending(row: Mapping[str, Any]) -> str:
    """How a run ended, on one line."""
    if row["status"] != "done":
        return f"{row['status']}: {' '.join(str(row['reason']).split())}"
    return f"{'converged after ' if row['stop_reason'] == 'converged' else ''}{_count(row['rounds_run'], 'round')}"
