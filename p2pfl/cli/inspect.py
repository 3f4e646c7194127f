"""``p2pfl inspect``: how a run went, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, also while it is in progress.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """How a run went: agreement round by round, every node's metrics, who was skipped, what it cost.

    Example: p2pfl inspect runs/breast-cancer
    """
    from p2pfl.records import read_run

    records = read_run(run)
    if as_json:
        import json
        from dataclasses import asdict

        from p2pfl.inspector.convergence import convergence

        document = {
            "experiment": records.experiment.get("name"),
            "engine": (records.summary or {}).get("engine") or records.environment.get("engine"),
            "rounds": records.rounds,
            "convergence": asdict(convergence(records)),
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
    print_page(records, Console(highlight=False))
