"""`p2pfl data prepare`: the agreed numbers of a table task, from a description of its variables over all sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.new_files import write_new
from p2pfl.cli.options import Json
from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.analyses.agreed_preprocessing import Wanted
    from p2pfl.data.contract import Contract
    from p2pfl.data.preprocessing import Preprocessing

FILE = "preprocessing.yaml"
"""Name of the file where the experiment names none."""


def prepare(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="An experiment with task: {name: table, ...}.")],
    result: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="What p2pfl stats together printed with --json. Default: the experiment's own sites."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write. Default: as the experiment says.")] = None,
    scale: Annotated[str, typer.Option(metavar="numbers|all", help="Whether the columns of categories are scaled as well.")] = "numbers",
    as_json: Json = False,
) -> None:
    """Agree on the numbers for gaps and scales of a table task, and write them to a file. No patient's value is in them.

    Simulated sites are added up here. Institutions describe the variables by secure sums first, and give the result with --from.

    Example: p2pfl data prepare experiment.yaml

    Example: p2pfl data prepare experiment.yaml --from described.json
    """
    from p2pfl.analyses.agreed_preprocessing import agreed_preprocessing
    from p2pfl.experiment.table_files import file_beside, is_table
    from p2pfl.governance.encoding import grouped
    from p2pfl.yaml_files import dump_yaml, load_yaml, shown

    if scale not in ("numbers", "all"):
        raise ConfigError(f"--scale = {scale!r}: one of numbers, all")
    task = load_yaml(experiment, "task: {name: table}").get("task")
    if not isinstance(task, dict) or not is_table(task):
        raise ConfigError(f"task = {shown(task)}: only task: {{name: table, ...}} has agreed numbers", str(experiment))
    named = task.get("preprocessing")
    if out is None:
        out = experiment.parent / named if isinstance(named, str) else experiment.parent / FILE
    if out.exists():
        raise ConfigError(f"'{out}': it exists already, and may be agreed on; move it away to agree on other numbers")
    if not isinstance(task.get("contract"), str | dict):
        raise ConfigError("task.contract: required, the data contract's file", str(experiment))
    contract = task["contract"]
    found = _contract(str(file_beside(experiment.parent, contract)) if isinstance(contract, str) else contract)
    wanted = _wanted(task, found, scales_categories=scale == "all")
    if result is None:
        agreed = agreed_preprocessing(wanted, _over_sites(task, found, wanted, experiment), str(experiment))
    else:
        agreed = agreed_preprocessing(wanted, _read(result), str(result))
    text = "# Public: the same file for every member. Its numbers are over all sites, and fixed before anybody trains.\n"
    write_new(out, text + dump_yaml(agreed.as_dict()))
    if as_json:
        typer.echo(json.dumps({"file": str(out), "digest": agreed.digest, **agreed.as_dict()}))
        return
    _say(agreed, found)
    typer.echo(f"digest  {grouped(agreed.digest)}\n{out}   public: a study holds these numbers")
    if named is None:
        typer.echo(f"write it into the experiment: task: {{..., preprocessing: {out.name}}}")


def _contract(given: str | dict[str, Any]) -> Contract:
    from p2pfl.tasks.contract_table import contract_of

    return contract_of(given)


def _wanted(task: dict[str, Any], contract: Contract, *, scales_categories: bool) -> Wanted:
    """Variables of a table task whose numbers are to be agreed on, and its rows."""
    from p2pfl.analyses.agreed_preprocessing import Wanted
    from p2pfl.tasks.outcomes import scaled_outcome
    from p2pfl.tasks.patient_split import TEST_SHARE, AgreedTest, agreed_test

    outcome = scaled_outcome(str(task.get("model", "")), task.get("outcome"), contract)
    test = agreed_test(task.get("test", TEST_SHARE), contract)
    by = {"by": test.variable, "test_label": test.label} if isinstance(test, AgreedTest) else {}
    return Wanted(contract=contract, outcome=outcome, scales_categories=scales_categories, **by)


def _over_sites(task: dict[str, Any], contract: Contract, wanted: Wanted, experiment: Path) -> dict[str, Any]:
    """Describe the variables over the sites that an experiment names, each within its policy."""
    from p2pfl.analyses.run import run_analysis
    from p2pfl.analyses.site_files import AnalysisSite, load_sites
    from p2pfl.data.site_rows import site_rows
    from p2pfl.experiment.table_files import with_table_contents
    from p2pfl.tasks.contract_table import site_files, site_section

    if task.get("sites") is None:
        raise ConfigError(
            "task.sites: required, the files of the sites to simulate; institutions give the result of p2pfl stats together with --from",
            str(experiment),
        )
    own = with_table_contents({"task": {"name": task["name"], "sites": task["sites"]}}, experiment.parent)["task"]["sites"]
    sites = []
    for name, path in site_files(own).items():
        section = site_section(path)
        if path.suffix in (".csv", ".parquet"):
            sites.append(AnalysisSite(name=name, table=site_rows(section, contract)[1]))
        else:
            sites += load_sites([path], contract)
    spec = wanted.analysis
    spec.check(contract)
    found: dict[str, Any] = run_analysis(spec, contract, sites).as_dict()
    return found


def _read(path: Path) -> dict[str, Any]:
    """Read the result of an analysis from its file; ConfigError where it holds none."""
    from p2pfl.yaml_files import read_text

    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}; expected what p2pfl stats prints with --json", str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError("is no result of an analysis: expected what p2pfl stats prints with --json", str(path))
    return content


def _say(agreed: Preprocessing, contract: Contract) -> None:
    """Print the agreed numbers, a line for each variable."""
    width = max(map(len, agreed.variables))
    for name, each in agreed.variables.items():
        unit = contract.variables[name].unit
        of = "" if unit in (None, "1") else f" {unit}"
        parts = [f"centre {each.centre:.6g}{of}, scale {each.scale:.6g}"] if each.centre is not None and each.scale is not None else []
        if each.missing is not None:
            parts.append(f"missing: {each.missing if isinstance(each.missing, str) else format(each.missing, '.6g')}")
        typer.echo(f"{name:<{width}}  {', '.join(parts)}")
