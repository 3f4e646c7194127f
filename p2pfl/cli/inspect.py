"""``p2pfl inspect`` and ``p2pfl dashboard``: how a run goes, on one page in a terminal, or in a browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import AllowTask, Json

if TYPE_CHECKING:
    from p2pfl.inspector.convergence import Reached
    from p2pfl.runs.records import RunRecords


def inspect(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SWEEP|STATUS.URL",
            help="Folder of a run or a sweep, ended or in progress, or the file state/status.url of a running node.",
        ),
    ],
    *,
    reach: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Print when a mean metric, or relative consensus distance (relative_consensus), first reached a value; can be repeated.",
        ),
    ] = None,
    to_html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page, which needs no other file.")] = None,
    to_csv: Annotated[Path | None, typer.Option("--csv", metavar="DIR", help="Write the records as CSV tables.")] = None,
    to_parquet: Annotated[Path | None, typer.Option("--parquet", metavar="DIR", help="Write the records as Parquet tables.")] = None,
    to_png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Write each figure as a PNG for a paper, 85 mm wide.")] = None,
    to_tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write each round's metrics for TensorBoard, each node as a run.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Refresh the output every second until the run has ended or Ctrl-C.")] = False,
    allow_task: AllowTask = None,  # noqa: ARG001  # accepted by every command that takes a run; this one reads records only
    as_json: Json = False,
) -> None:
    """Show how a run or a sweep went. For a run it shows disagreement in each round, every node's metrics, skipped neighbours and costs.

    Example: p2pfl inspect runs/breast-cancer --reach accuracy=0.9

    Example: p2pfl inspect runs/breast-cancer --live

    Example: p2pfl inspect runs/breast-cancer --html report.html

    Example: p2pfl inspect state/status.url --live
    """
    from p2pfl.runs.records import damage_told

    tables = {"csv": to_csv, "parquet": to_parquet}
    with damage_told(run):
        if (Path(run) / "sweep.yaml").is_file():
            from p2pfl.cli.sweep import inspect_sweep
            from p2pfl.errors import ConfigError

            if reach or live or to_html or to_png or to_tensorboard:
                raise ConfigError(
                    "holds a sweep, which has a table: give the folder of one of its runs, CELL/seed-N, for anything else", run
                )
            inspect_sweep(Path(run), tables, as_json=as_json)
            return
        from p2pfl.cli.terminal import open_console
        from p2pfl.inspector.sources import read_source
        from p2pfl.inspector.terminal import follow, print_page

        read = partial(read_source, run)
        records = follow(read, open_console(highlight=False), every_s=1.0, pause=time.sleep) if live else read()
        if to_html or to_csv or to_parquet or to_png or to_tensorboard:
            for path in _written(records, to_html, tables, to_png, to_tensorboard):
                typer.echo(path)
            return
        from p2pfl.inspector.convergence import reached

        goals = [reached(records, *_goal(text)) for text in reach or ()]
        if as_json:
            typer.echo(json.dumps(_document(records, goals), allow_nan=False))
            return
        print_page(records, open_console(highlight=False), goals)


def dashboard(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|STATUS.URL...", help="Folders of runs, or files state/status.url of running nodes; the page compares several."
        ),
    ],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in your browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help='Print the address as one JSON object, {"url": ...}.')] = False,
) -> None:
    """Show runs on a browser page that refreshes itself. The page shows the graph, disagreement, late and lost nodes, and every site.

    It listens on 127.0.0.1 only, until Ctrl-C. The address that it prints holds a token, and opens the page for whoever has it.

    Example: p2pfl dashboard runs/breast-cancer

    Example: p2pfl dashboard runs/ring runs/torus --port 8080
    """
    from p2pfl.inspector.dashboard.server import serve

    def say(url: str) -> None:
        typer.echo(json.dumps({"url": url}) if as_json else url)

    try:
        serve(sources, port=port, opens=opens, say=say)
    except KeyboardInterrupt:
        return


def _document(records: RunRecords, goals: list[Reached]) -> dict[str, Any]:
    """A run as one JSON object; a state for each node has room where one value for each has in a summary."""
    from p2pfl.inspector.bottleneck import bottleneck
    from p2pfl.inspector.convergence import convergence
    from p2pfl.inspector.health import node_health
    from p2pfl.inspector.run_state import run_state
    from p2pfl.inspector.utilisation import utilisation
    from p2pfl.runs.summary_fields import MAX_PER_NODE

    course = convergence(records)
    is_small = len((records.topology or {}).get("nodes") or ()) <= MAX_PER_NODE
    return {
        "experiment": records.experiment.get("name"),
        "state": asdict(run_state(records)),
        "nodes": {name: asdict(health) for name, health in node_health(records).items()} if is_small else None,
        "engine": (records.summary or {}).get("engine") or records.environment.get("engine"),
        "rounds": records.rounds,
        "utilisation": {name: asdict(own) for name, own in utilisation(records).items()} if is_small else None,
        "bottleneck": asdict(costs) if (costs := bottleneck(records)) is not None else None,
        "convergence": asdict(course) | {"slowest": [slow.as_row() for slow in course.slowest]},
        "reached": [asdict(goal) for goal in goals],
        "summary": records.summary,
    }


def _written(
    records: RunRecords, page: Path | None, tables: dict[str, Path | None], figures: Path | None, events: Path | None
) -> Iterator[Path]:
    """Write the files that were asked for, and give their paths."""
    if page is not None:
        from p2pfl.inspector.report import report
        from p2pfl.runs.open_files import replace_file

        replace_file(page, report(records))
        yield page
    for kind, folder in tables.items():
        if folder is not None:
            from p2pfl.inspector.tables import tables_of, write_tables

            yield from write_tables(tables_of(records), folder, kind)
    if figures is not None:
        from p2pfl.inspector.print_figures import write_figures

        yield from write_figures(records, figures)
    if events is not None:
        from p2pfl.inspector.tensorboard import write_events

        yield from write_events(records, events)


def _goal(text: str) -> tuple[str, float]:
    """("accuracy", 0.9) from "accuracy=0.9"."""
    from p2pfl.errors import ConfigError

    metric, _, value = text.partition("=")
    try:
        return metric.strip(), float(value)
    except ValueError:
        raise ConfigError(f"{text!r}: expected METRIC=VALUE, such as accuracy=0.9", "--reach") from None
