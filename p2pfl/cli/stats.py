"""``p2pfl stats``: statistics over simulated sites or between institutions, equal to those of the pooled rows."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.new_files import write_new
from p2pfl.cli.options import Json
from p2pfl.cli.released import released

if TYPE_CHECKING:
    from p2pfl.analyses.run import Result

app = typer.Typer(no_args_is_help=True, help="Describe, fit and compare over sites, as if their rows were pooled.")

Sites = Annotated[list[Path], typer.Argument(metavar="SITE...", help="Each site's file, with its section `table`.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the result's rows to a new CSV file.")]
Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and pictures to a new file.")]


def _number(option: str, help: str, **more: Any) -> Any:
    return Annotated[float | None, typer.Option(option, help=help, **more)]


def _whole(option: str, help: str) -> Any:
    return Annotated[int | None, typer.Option(option, help=help)]


def _text(option: str, metavar: str, help: str) -> Any:
    return Annotated[str | None, typer.Option(option, metavar=metavar, help=help)]


_PARAMETERS: dict[str, Any] = {
    "formula": Annotated[str, typer.Argument(metavar="FORMULA", help="In R's notation, such as 'died ~ age + sex'.")],
    "survival": Annotated[str, typer.Argument(metavar="FORMULA", help="Such as 'Surv(days, event) ~ treatment'.")],
    "sites": Sites,
    "contract": Annotated[Path, typer.Option("--contract", metavar="FILE", help="The data contract, contract.yaml.")],
    "variables": _text("--variables", "A,B,...", "Variables to describe.  [default: all]"),
    "by": _text("--by", "NAME", "Describe the groups of this variable apart."),
    "family": _text("--family", "NAME", "gaussian, binomial, poisson, gamma or negative-binomial."),
    "theta": _number("--theta", "Parameter of a negative-binomial model.  [default: estimated]"),
    "coefficient": _text("--coefficient", "NAME", "Coefficient to compare between sites."),
    "strata": _text("--strata", "site|none", "site: a baseline each.  [default: site without a grid]"),
    "grid": _number("--grid", "Width of a cell of time, in the contract's unit.", metavar="WIDTH"),
    "ends": _text("--ends", "T1,T2,...", "Ends of the cells of time, instead of a width."),
    "risks": _text("--ends", "R1,R2,...,1", "Ends of the cells of predicted risk."),
    "ties": _text("--ties", "NAME", "efron or breslow.  [default: efron]"),
    "patients_per_cell": _whole("--patients-per-cell", "Fewest patients in a cell.  [default: 5]"),
    "patients_per_sum": _whole("--patients-per-sum", "Fewest patients in a sum.  [default: 10]"),
    "parameters_per_patient": _number("--parameters-per-patient", "Most coefficients for each.  [default: 0.33]"),
    "cells": _text("--cells", "total|site", "Where cells hold enough patients.  [default: total]"),
    "level": _number("--level", "Level of confidence intervals.  [default: 0.95]"),
    "common": _text("--common", "A,B,...", "Take rows alone in which none of these variables is missing."),
    "releases": Annotated[
        Path | None, typer.Option("--releases", metavar="FOLDER", help="Keep each site's log of releases there, and ask it first.")
    ],
    "csv_file": Csv,
    "page": Page,
    "as_json": Json,
}
"""Parameters of the kinds of analysis, by the key of the analysis where it has one."""

_CELLS = ("patients_per_cell", "patients_per_sum", "cells")
_FLOORS = ("patients_per_cell", "patients_per_sum", "parameters_per_patient", "cells")
_OUTPUT = ("common", "releases", "csv_file", "page", "as_json")
_DEFAULTS = {
    "sites": Parameter.empty,
    "contract": Parameter.empty,
    "formula": Parameter.empty,
    "survival": Parameter.empty,
    "as_json": False,
}
_KEYS = {"survival": "formula", "risks": "ends"}


def _add(kind: str, help: str, *names: str) -> None:
    """Add the command of one kind of analysis with its parameters, of which those for the output are common to all."""

    def command(**given: Any) -> None:
        _answer(kind, **given)

    parameters = [
        Parameter(_KEYS.get(name, name), Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=_PARAMETERS[name])
        for name in (*names, *_OUTPUT)
    ]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    app.command(kind, help=help)(command)


_SITES = "--contract contract.yaml site-a.yaml site-b.yaml site-c.yaml"
_add(
    "describe",
    f"""Describe variables: patients, missing values, mean, spread, quantiles and categories. No number is a few patients.

    Example: p2pfl stats describe {_SITES}
    """,
    *("sites", "contract", "variables", "by", *_CELLS),
)
_add(
    "glm",
    f"""Fit a regression to the rows of all sites: linear, logistic, Poisson, negative binomial, or gamma with a logarithmic link.

    Example: p2pfl stats glm 'died ~ age + sex' --family binomial {_SITES}
    """,
    *("formula", "sites", "family", "theta", "contract", *_FLOORS, "level"),
)
_add(
    "calibration",
    f"""Fit a logistic regression and hold its risks against the outcomes: groups of risk, slope, Brier score, area under the curve.

    Example: p2pfl stats calibration 'died ~ age + sex' {_SITES}
    """,
    *("formula", "sites", "contract", "risks", *_FLOORS, "level"),
)
_add(
    "mixed",
    f"""Fit a linear regression with a random intercept for each site, where every site's policy has may_release: [site_means].

    Example: p2pfl stats mixed 'los ~ age + sex' {_SITES}
    """,
    *("formula", "sites", "contract", *_FLOORS[:-1], "level"),
)
_add(
    "cox",
    f"""Fit a Cox model: with a baseline for each site on exact times, or with one baseline for all on a grid.

    Example: p2pfl stats cox 'Surv(days, event) ~ age + sex' {_SITES}
    """,
    *("survival", "sites", "contract", "strata", "grid", "ends", "ties", *_FLOORS, "level"),
)
_add(
    "km",
    f"""Estimate survival curves by Kaplan and Meier on an agreed grid, for groups or for all.

    Example: p2pfl stats km 'Surv(days, event) ~ treatment' --grid 30 {_SITES}
    """,
    *("survival", "sites", "contract", "grid", "ends", *_CELLS, "level"),
)
_add(
    "compare",
    f"""Compare the survival of groups by a log-rank test, or a coefficient between the sites' own models by a meta-analysis.

    Example: p2pfl stats compare 'Surv(days, event) ~ treatment' {_SITES}
    """,
    *("formula", "sites", "contract", "family", "theta", "coefficient", "strata", "grid", "ends", *_FLOORS),
)


@app.command()
def together(
    analysis: Annotated[
        str, typer.Argument(metavar="ANALYSIS", help="Name of an analysis in the study; or a file, the same at all members.")
    ],
    site: Annotated[Path, typer.Argument(metavar="SITE", help="This institution's site.yaml, with its table and its policy.")],
    *,
    confirm: Annotated[str | None, typer.Option(metavar="DIGEST", help="Digest of the study. Default: `confirmed` in site.yaml.")] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="End the analysis where a member is away for longer.")
    ] = 300.0,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Run an analysis with the other members of a study, by secure sums. Every member runs this at the same time, with its own rows.

    Where the study lists its analyses, these alone are run. Where its card has a commitment, the site's frozen rows must be unchanged.

    Example: p2pfl stats together age-and-sex site.yaml
    """
    from p2pfl.node.own_analysis import analyse_together

    _check_new(csv_file, page)
    found = analyse_together(analysis, site, confirmed=confirm, patience_s=patience)
    _give(found, csv_file, page, as_json=as_json, over="the members of a study, by secure sums")


@app.command()
def up(
    analysis: Annotated[Path, typer.Argument(metavar="ANALYSIS", help="The analysis with its contract, as a file.")],
    sites: Sites,
    *,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Keep the nodes' files in this new folder.")] = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Rehearse an analysis between institutions: a node for each site on this machine, and secure sums over encrypted links.

    Example: p2pfl stats up analysis.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    from tempfile import TemporaryDirectory

    from p2pfl.cli.long_runs import pausable
    from p2pfl.errors import ConfigError
    from p2pfl.launcher.analysis_rehearsal import rehearse_analysis

    _check_new(csv_file, page)
    if out is not None and out.exists():
        raise ConfigError(f"--out = '{out}': it exists already; expected a new folder")
    options = ["--json"] if as_json else []
    files = [
        part for option, file in (("--csv", csv_file), ("--html", page)) if file is not None for part in (option, str(file.absolute()))
    ]
    with pausable(hears=True), TemporaryDirectory(prefix="p2pfl-") as folder:
        said = rehearse_analysis(analysis, sites, Path(folder) if out is None else out.absolute(), options=options, first=files)
    sys.stdout.write(said)


app.command()(released)


def _answer(
    kind: str,
    *,
    sites: list[Path],
    contract: Path,
    common: str | None,
    releases: Path | None,
    csv_file: Path | None,
    page: Path | None,
    as_json: bool,
    variables: str | None = None,
    ends: str | None = None,
    **asked: Any,
) -> None:
    """Run what is asked over simulated sites and give the result."""
    from p2pfl.analyses.spec import AnalysisSpec
    from p2pfl.analyses.stats import run

    _check_new(csv_file, page)
    asked |= {"variables": _names(variables) or None, "ends": _times(ends)}
    if common is not None:
        asked |= {"rows": "common", "common": _names(common)}
    content = {"kind": kind, **{key: value for key, value in asked.items() if value is not None}}
    spec = AnalysisSpec.from_mapping(content, f"stats {kind}")
    _give(run(spec, contract, sites, releases=releases), csv_file, page, as_json=as_json)


def _give(found: Result, csv_file: Path | None, page: Path | None, *, as_json: bool, over: str = "simulated sites") -> None:
    """Print a result, and write the files that are asked for; a page says *over* whom the sums are."""
    from p2pfl.cli.terminal import open_console
    from p2pfl.inspector.statistics_page import statistics_page

    rows = None if csv_file is None else _as_csv(found.records())
    html = None if page is None else statistics_page(found.as_dict(), over)
    for path, text in ((csv_file, rows), (page, html)):
        if path is not None and text is not None:
            write_new(path, text)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
        return
    open_console(markup=False, highlight=False).print(found.summary(), soft_wrap=True)


def _check_new(csv_file: Path | None, page: Path | None) -> None:
    """Refuse files that exist, that cannot be written, or that are one, before anything is computed."""
    from p2pfl.errors import ConfigError

    for option, file in (("--csv", csv_file), ("--html", page)):
        if file is None:
            continue
        if file.exists():
            raise ConfigError(f"{option} = '{file}': it exists already; expected a new file")
        if not file.parent.is_dir():
            raise ConfigError(f"{option} = '{file}': its folder does not exist; make the folder first")
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{option} = '{file}': nothing can be written in its folder; expected another folder")
    if csv_file is not None and page is not None and csv_file.resolve() == page.resolve():
        raise ConfigError(f"--html = '{page}': --csv names the same file; expected another one")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    from p2pfl.inspector.tables import harmless

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _names(text: str | None) -> list[str]:
    """Names of variables as an option has them."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _times(text: str | None) -> list[float] | None:
    """Ends of cells of time as an option has them."""
    from p2pfl.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ends = {text!r}: expected numbers with commas between them, such as 90,210,300") from error
