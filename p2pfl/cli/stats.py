"""``p2pfl stats``: statistics over simulated sites or between institutions, equal to those of the pooled rows."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import Json
from p2pfl.cli.released import released

if TYPE_CHECKING:
    from p2pfl.analyses.run import Result

app = typer.Typer(no_args_is_help=True, help="Describe, fit and compare over sites, as if their rows were pooled.")

Formula = Annotated[str, typer.Argument(metavar="FORMULA", help="In R's notation, such as 'died ~ age + sex'.")]
Survival = Annotated[str, typer.Argument(metavar="FORMULA", help="Such as 'Surv(days, event) ~ treatment'.")]
Sites = Annotated[list[Path], typer.Argument(metavar="SITE...", help="Each site's file, with its section `table`.")]
ContractFile = Annotated[Path, typer.Option("--contract", metavar="FILE", help="The data contract, contract.yaml.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the result's rows to a new CSV file.")]
Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and pictures to a new file.")]
Cell = Annotated[int | None, typer.Option("--patients-per-cell", help="Fewest patients in a cell.  [default: 5]")]
Sum = Annotated[int | None, typer.Option("--patients-per-sum", help="Fewest patients in a sum.  [default: 10]")]
Parameters = Annotated[float | None, typer.Option("--parameters-per-patient", help="Most coefficients for each.  [default: 0.33]")]
Cells = Annotated[str | None, typer.Option("--cells", metavar="total|site", help="Where cells hold enough patients.  [default: total]")]
Level = Annotated[float | None, typer.Option("--level", help="Level of confidence intervals.  [default: 0.95]")]
Family = Annotated[str | None, typer.Option("--family", metavar="NAME", help="gaussian, binomial, poisson, gamma or negative-binomial.")]
Theta = Annotated[float | None, typer.Option("--theta", help="Parameter of a negative-binomial model.  [default: estimated]")]
Grid = Annotated[float | None, typer.Option("--grid", metavar="WIDTH", help="Width of a cell of time, in the contract's unit.")]
Ends = Annotated[str | None, typer.Option("--ends", metavar="T1,T2,...", help="Ends of the cells of time, instead of a width.")]
Common = Annotated[
    str | None, typer.Option("--common", metavar="A,B,...", help="Take rows alone in which none of these variables is missing.")
]
Releases = Annotated[
    Path | None, typer.Option("--releases", metavar="FOLDER", help="Keep each site's log of releases there, and ask it first.")
]
Strata = Annotated[str | None, typer.Option("--strata", metavar="site|none", help="site: a baseline each.  [default: site without a grid]")]


@app.command()
def describe(
    sites: Sites,
    *,
    contract: ContractFile,
    variables: Annotated[str, typer.Option("--variables", metavar="A,B,...", help="Variables to describe.  [default: all]")] = "",
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Describe the groups of this variable apart.")] = None,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    cells: Cells = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Describe variables: patients, missing values, mean, spread, quantiles and categories. No number is a few patients.

    Example: p2pfl stats describe --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    named = _names(variables)
    asked = {
        "variables": named or None,
        "by": by,
        "patients_per_cell": patients_per_cell,
        "patients_per_sum": patients_per_sum,
        "cells": cells,
    }
    _answer({"kind": "describe", **asked}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def glm(
    formula: Formula,
    sites: Sites,
    *,
    family: Family = None,
    theta: Theta = None,
    contract: ContractFile,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    parameters_per_patient: Parameters = None,
    cells: Cells = None,
    level: Level = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Fit a regression to the rows of all sites: linear, logistic, Poisson, negative binomial, or gamma with a logarithmic link.

    Example: p2pfl stats glm 'died ~ age + sex' --family binomial --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    asked = {"formula": formula, "family": family, "theta": theta}
    more: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum}
    more |= {"parameters_per_patient": parameters_per_patient, "cells": cells, "level": level}
    _answer({"kind": "glm", **asked, **more}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def calibration(
    formula: Formula,
    sites: Sites,
    *,
    contract: ContractFile,
    ends: Annotated[str | None, typer.Option("--ends", metavar="R1,R2,...,1", help="Ends of the cells of predicted risk.")] = None,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    parameters_per_patient: Parameters = None,
    cells: Cells = None,
    level: Level = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Fit a logistic regression and hold its risks against the outcomes: groups of risk, slope, Brier score, area under the curve.

    Example: p2pfl stats calibration 'died ~ age + sex' --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    asked = {"formula": formula, "ends": _times(ends), "level": level}
    floors: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum, "cells": cells}
    floors["parameters_per_patient"] = parameters_per_patient
    _answer({"kind": "calibration", **asked, **floors}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def mixed(
    formula: Formula,
    sites: Sites,
    *,
    contract: ContractFile,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    parameters_per_patient: Parameters = None,
    level: Level = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Fit a linear regression with a random intercept for each site, where every site's policy has may_release: [site_means].

    Example: p2pfl stats mixed 'los ~ age + sex' --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    floors: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum}
    floors["parameters_per_patient"] = parameters_per_patient
    asked = {"kind": "mixed", "formula": formula, "level": level, **floors}
    _answer(asked, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def cox(
    formula: Survival,
    sites: Sites,
    *,
    contract: ContractFile,
    strata: Strata = None,
    grid: Grid = None,
    ends: Ends = None,
    ties: Annotated[str | None, typer.Option("--ties", metavar="NAME", help="efron or breslow.  [default: efron]")] = None,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    parameters_per_patient: Parameters = None,
    cells: Cells = None,
    level: Level = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Fit a Cox model: with a baseline for each site on exact times, or with one baseline for all on a grid.

    Example: p2pfl stats cox 'Surv(days, event) ~ age + sex' --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    asked = {"formula": formula, "strata": strata, "grid": grid, "ends": _times(ends), "ties": ties, "level": level}
    floors: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum, "cells": cells}
    floors["parameters_per_patient"] = parameters_per_patient
    _answer({"kind": "cox", **asked, **floors}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def km(
    formula: Survival,
    sites: Sites,
    *,
    contract: ContractFile,
    grid: Grid = None,
    ends: Ends = None,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    cells: Cells = None,
    level: Level = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Estimate survival curves by Kaplan and Meier on an agreed grid, for groups or for all.

    Example: p2pfl stats km 'Surv(days, event) ~ treatment' --grid 30 --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    asked = {"formula": formula, "grid": grid, "ends": _times(ends), "level": level}
    floors: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum, "cells": cells}
    _answer({"kind": "km", **asked, **floors}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


@app.command()
def compare(
    formula: Formula,
    sites: Sites,
    *,
    contract: ContractFile,
    family: Family = None,
    theta: Theta = None,
    coefficient: Annotated[str | None, typer.Option("--coefficient", metavar="NAME", help="Coefficient to compare between sites.")] = None,
    strata: Strata = None,
    grid: Grid = None,
    ends: Ends = None,
    patients_per_cell: Cell = None,
    patients_per_sum: Sum = None,
    parameters_per_patient: Parameters = None,
    cells: Cells = None,
    common: Common = None,
    releases: Releases = None,
    csv_file: Csv = None,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Compare the survival of groups by a log-rank test, or a coefficient between the sites' own models by a meta-analysis.

    Example: p2pfl stats compare 'Surv(days, event) ~ treatment' --contract contract.yaml site-a.yaml site-b.yaml site-c.yaml
    """
    asked: dict[str, Any] = {"formula": formula, "family": family, "theta": theta, "coefficient": coefficient}
    asked |= {"strata": strata, "grid": grid, "ends": _times(ends)}
    floors: dict[str, Any] = {"patients_per_cell": patients_per_cell, "patients_per_sum": patients_per_sum, "cells": cells}
    floors["parameters_per_patient"] = parameters_per_patient
    _answer({"kind": "compare", **asked, **floors}, contract, sites, csv_file, page, as_json=as_json, common=common, releases=releases)


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


app.command()(released)


def _answer(
    asked: dict[str, Any],
    contract: Path,
    sites: list[Path],
    csv_file: Path | None,
    page: Path | None,
    *,
    as_json: bool,
    common: str | None,
    releases: Path | None,
) -> None:
    """Run what is asked over simulated sites and give the result."""
    from p2pfl.analyses.spec import AnalysisSpec
    from p2pfl.analyses.stats import run

    _check_new(csv_file, page)
    if common is not None:
        asked |= {"rows": "common", "common": _names(common)}
    spec = AnalysisSpec.from_mapping({key: value for key, value in asked.items() if value is not None}, f"stats {asked['kind']}")
    _give(run(spec, contract, sites, releases=releases), csv_file, page, as_json=as_json)


def _give(found: Result, csv_file: Path | None, page: Path | None, *, as_json: bool, over: str = "simulated sites") -> None:
    """Print a result, and write the files that are asked for; a page says *over* whom the sums are."""
    from p2pfl.cli.terminal import open_console
    from p2pfl.inspector.statistics_page import statistics_page

    rows = None if csv_file is None else _as_csv(found.records())
    html = None if page is None else statistics_page(found.as_dict(), over)
    for path, text in ((csv_file, rows), (page, html)):
        if path is not None and text is not None:
            _write(path, text)
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


def _write(path: Path, text: str) -> None:
    """Write a new file."""
    from p2pfl.errors import store_error

    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise store_error(path, error) from error


def _names(text: str) -> list[str]:
    """Names of variables as an option has them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _times(text: str | None) -> list[float] | None:
    """Ends of cells of time as an option has them."""
    from p2pfl.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ends = {text!r}: expected numbers with commas between them, such as 90,210,300") from error
