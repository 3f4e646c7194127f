"""Contract, analyses and frozen cohorts of a study, as its commands read them from files and show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from p2pfl.cli.agreed import say_table, written
from p2pfl.cli.new_files import write_new
from p2pfl.errors import ConfigError
from p2pfl.yaml_files import shown

if TYPE_CHECKING:
    from p2pfl.governance.study import Study


def with_analyses(study: Study, contract: Path | None, analyses: Sequence[Path]) -> Study:
    """Add contract and analyses from their files to a new study; analyses without a contract are about that of its table task.

    Raises:
        ConfigError: a file is wrong, an analysis cannot be run by these members, a card's cohort is of another contract, or the
            study's table task has another one.
    """
    from p2pfl.experiment.table_files import contract_of_task

    own = contract_of_task(study.experiment.get("task"))
    chosen = contract if contract is not None else own
    if chosen is None and analyses:
        raise ConfigError("--analysis: needs --contract, the table that the analyses are about")
    if chosen is None:
        return study
    from p2pfl.analyses.agreed import AgreedAnalyses, faults_of_cohorts

    if contract is None and own is not None and not analyses:
        if faults := list(faults_of_cohorts(study, own)):
            raise ConfigError(faults)
        return study
    from p2pfl.node.own_analysis import terms_of

    agreed, faults = AgreedAnalyses.load(chosen, analyses), list[str]()
    if own is not None and own.digest != agreed.contract.digest:
        raise ConfigError(
            f"--contract = {shown(str(contract))}: another contract than that of the experiment's table task, {own.name}; "
            "a study has one contract: name the same file at both, or leave --contract out"
        )
    for name, spec in agreed.specs.items():
        try:
            terms_of(study, spec, agreed.contract)
        except ConfigError as error:
            faults += [f"analyses.{name}: {finding}" for finding in error.findings]
    if faults:
        raise ConfigError(faults)
    return agreed.added_to(study)


def say_analyses(study: Study) -> None:
    """Print the data contract, the analyses, and which members have frozen their rows; nothing where the study has none of them."""
    if study.contract is not None:
        say_table("the data contract and the analyses", _rows(study, study.contract))
    if study.contract is not None or any(card.cohort is not None for card in study.members):
        say_table("rows that are frozen", _cohorts(study))


def shown_analyses(study: Study) -> dict[str, Any]:
    """Plain values of a study's contract and analyses, for JSON; None where it has none."""
    digest = None if study.contract is None else _digest(study)
    return {"contract": study.contract, "contract_digest": digest, "analyses": study.analyses}


def write_contract(study: Study, path: Path) -> None:
    """Write a study's data contract to a new file; ConfigError where it has none."""
    from p2pfl.yaml_files import dump_yaml

    if study.contract is None:
        raise ConfigError(f"--contract = {str(path)!r}: the study has no data contract")
    write_new(path, dump_yaml(study.contract))
    typer.echo(f"{path}   the study's data contract", err=True)


def _digest(study: Study) -> str:
    from p2pfl.data.contract import Contract

    return Contract.from_mapping(study.contract or {}, "contract").digest


def _rows(study: Study, contract: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from p2pfl.governance.encoding import grouped

    yield "contract", str(contract["name"])
    yield "  digest", grouped(_digest(study))
    for key, value in contract.items():
        if key not in ("name", "variables"):
            yield f"  {key}", written(value)
    for name, variable in contract["variables"].items():
        yield f"variable {name}", written({key: value for key, value in variable.items() if value not in (None, "", [], {})})
    for name, analysis in (study.analyses or {}).items():
        yield f"analysis {name}", written(analysis)
    if study.analyses is None:
        yield "analyses", "none is listed: members agree on a file for each"


def _cohorts(study: Study) -> Iterator[tuple[str, str]]:
    from p2pfl.governance.encoding import grouped

    for card in study.members:
        if card.cohort is None:
            yield card.name, "not said: its rows may change"
        else:
            yield card.name, f"{card.cohort.rows:,} rows of {card.cohort.patients:,} patients, {grouped(card.cohort.hmac)}"
