"""`p2pfl doctor`: what is wrong at a site, each fault with its remedy, before its node runs and while it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import AllowTask, Json

if TYPE_CHECKING:
    from p2pfl.node.doctor.checks import Report

FOUND = 2
"""Exit code where there is something to mend: a node that is started now would refuse to, or lack a neighbour."""


def doctor(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="This institution's site.yaml.")],
    confirm: Annotated[str | None, typer.Option(metavar="DIGEST", help="Digest of the study. Default: `confirmed` in site.yaml.")] = None,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long neighbours have to answer.")] = 5.0,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Examine a site before round 1, or while its node runs. Every fault is one sentence with its remedy; exit code 2 where there is one.

    It looks at keys, study, versions, rows, memory, disk and ports, trains one round for trial, and measures the edges to neighbours
    whose node or doctor answers. Nothing is changed, and nothing of the rows leaves the site.

    Example: p2pfl doctor site.yaml
    """
    from p2pfl.node.doctor.checks import examine
    from p2pfl.node.doctor.examination import Examination

    report = examine(Examination(path=site, confirmed=confirm, allow_tasks=tuple(allow_task or ()), wait_s=wait))
    if as_json:
        sys.stdout.write(json.dumps(_document(report), indent=2) + "\n")
    else:
        _say(report)
    if report.findings:
        raise typer.Exit(FOUND)


def _document(report: Report) -> dict[str, Any]:
    is_unseen = any(not fact.is_known for name, fact in report.facts if name == "edges")
    return {
        "healthy": False if report.findings else None if is_unseen else True,
        "unknown": sum(not fact.is_known for _, fact in report.facts),
        "findings": [{"check": name, "fault": found.fault, "remedy": found.remedy} for name, found in report.findings],
        "facts": [
            {"check": name, "what": fact.what, "known": fact.is_known, "said": fact.said, "figures": dict(fact.figures)}
            for name, fact in report.facts
        ],
    }


def _say(report: Report) -> None:
    from p2pfl.cli.terminal import open_console

    console = open_console(markup=False, highlight=False)
    for _, fact in report.facts:
        mark, style = ("ok ", "green") if fact.is_known else ("?  ", "yellow")
        console.print(mark, style=style, end=" ")
        console.print(f"{fact.what}: {fact.said}" if fact.is_known else f"{fact.what}: unknown: {fact.said}", soft_wrap=True)
    for _, found in report.findings:
        console.print("bad", style="bold red", end=" ")
        console.print(f"{found.fault}", soft_wrap=True)
        console.print(f"    → {found.remedy}", soft_wrap=True)
    unseen = sum(not fact.is_known for _, fact in report.facts)
    rest = f"; {unseen} thing{'s' if unseen > 1 else ''} could not be seen" if unseen else ""
    number = len(report.findings)
    console.print(f"{number} finding{'s' if number > 1 else ''}{rest}" if number else f"no finding{rest}", soft_wrap=True)
