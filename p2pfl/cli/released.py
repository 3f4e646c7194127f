"""`p2pfl stats released`: a site's own log of what has been released about its rows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import Json

if TYPE_CHECKING:
    from p2pfl.analyses.policy import Policy
    from p2pfl.analyses.release_log import ReleaseLog

_STUDY_DIGITS = 8


def released(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="The site's file, with its table and its policy.")],
    *,
    releases: Annotated[
        Path | None,
        typer.Option("--releases", metavar="FOLDER", help="Folder of simulated sites' logs.  [default: beside the site's keys]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what has been released about this site's rows: analyses, patients who counted, and numbers. It is for the site's own eyes.

    Example: p2pfl stats released site.yaml
    """
    from p2pfl.analyses.release_log import ReleaseLog
    from p2pfl.analyses.site_files import load_settings
    from p2pfl.cli.terminal import open_console

    own = load_settings(site)
    log = ReleaseLog.beside(own.section.keys) if releases is None else ReleaseLog(releases / own.name, releases / own.name)
    content = _as_dict(log.look(), own.policy)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    open_console(markup=False, highlight=False).print(_summary(own.name, content), soft_wrap=True)


def _as_dict(log: ReleaseLog, policy: Policy) -> dict[str, Any]:
    """Plain values of a log, without its patients' tags."""
    uses = Counter(name for name, _ in {(name, each.statistic) for each in log.analyses for name in each.variables})
    analyses = [
        {
            "at": each.at,
            "study": each.study or None,
            "analysis": each.name,
            "question": each.question,
            "rows": each.rows,
            "cohort": each.cohort,
            "variables": list(each.variables),
            "patients": each.num_patients,
            "numbers": each.numbers,
        }
        for each in log.analyses
    ]
    return {
        "patients": log.num_patients,
        "analyses": analyses,
        "analyses_of_variables": dict(sorted(uses.items())),
        "most_analyses": policy.most_analyses,
    }


def _summary(name: str, content: dict[str, Any]) -> str:
    """Tables for people, at most 80 columns wide."""
    from p2pfl.analyses.text_tables import text_table, wrapped

    analyses = content["analyses"]
    if not analyses:
        return f"{name}: nothing has been released."
    number = f"{len(analyses)} analys{'is' if len(analyses) == 1 else 'es'}"
    head = f"{name}: {number} of {content['patients']:,} patients in all. Show this to nobody else."
    lines = [*wrapped(head), ""]
    for place, each in enumerate(analyses, start=1):
        study = "simulated sites" if each["study"] is None else f"study {each['study'][:_STUDY_DIGITS]}"
        lines += wrapped(f"{place}. {each['analysis']}")
        lines += wrapped(f"   {each['at'][:16].replace('T', ' ')}, {study}: {each['patients']:,} patients, {each['numbers']:,} numbers")
    most = content["most_analyses"]
    rows = [
        (variable, f"{number}" if most is None else f"{number} of {most}") for variable, number in content["analyses_of_variables"].items()
    ]
    return "\n".join([*lines, "", *text_table(("", "analyses"), rows)])
