"""``p2pfl inspect``: how a run went, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, also while it is in progress.")],
    *,
    reach: Annotated[
        list[str] | None,
        typer.Option(help="FIGURE=VALUE: when a metric's mean over the nodes, or relative_consensus, was first so good."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """How a run went: agreement round by round, every node's metrics, who was skipped, what it cost.

    Example: p2pfl inspect runs/breast-cancer --reach accuracy=0.9
    """
    from p2pfl.inspector.reached import reached
    from p2pfl.records import read_run

    records = read_run(run)
    goals = [reached(records, *_goal(text)) for text in reach or ()]
    if as_json:
        import json
        from dataclasses import asdict

        from p2pfl.inspector.convergence import convergence

        document = {
            "experiment": records.experiment.get("name"),
            "engine": (records.summary or {}).get("engine") or records.environment.get("engine"),
            "rounds": records.rounds,
            "convergence": asdict(convergence(records)),
            "reached": [asdict(goal) for goal in goals],
            "summary": records.summary,
        }
        typer.echo(json.dumps(document, allow_nan=False))
        return

    import io
    import sys

    from rich.console import Console

    from p2pfl.inspector.terminal import print_page

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a node's name may have letters that this terminal lacks
    print_page(records, Console(highlight=False), goals)


def _goal(text: str) -> tuple[str, float]:
    """("accuracy", 0.9) from "accuracy=0.9"."""
    from p2pfl.errors import ConfigError

    figure, _, value = text.partition("=")
    try:
        return figure.strip(), float(value)
    except ValueError:
        raise ConfigError(f"{text!r}: expected FIGURE=VALUE, such as accuracy=0.9", "--reach") from None
