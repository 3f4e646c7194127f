"""Task on the table that a data contract names: no Python is written, and every institution reads its own table.

Shapes: M rows, D model inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.data.model_inputs import CODINGS, Coding, ModelInputs
from p2pfl.data.preprocessing import Preprocessing
from p2pfl.data.site_rows import site_rows
from p2pfl.data.site_section import SiteSection, site_name
from p2pfl.errors import ConfigError, DataError
from p2pfl.tasks.base import Task
from p2pfl.tasks.metrics import LOSSES
from p2pfl.tasks.new_rows import SITE_FILES, read_new_rows, table_of_file
from p2pfl.tasks.outcomes import HIDDEN, Outcome, outcome_of
from p2pfl.tasks.partition import missing_classes
from p2pfl.tasks.patient_split import TEST_SHARE, AgreedTest, agreed_test, split_by_patient
from p2pfl.tasks.sites import Site
from p2pfl.tasks.time_to_event import TimeToEvent
from p2pfl.yaml_files import load_yaml, nearest, shown

_TABLES = (".csv", ".parquet")
_EXAMPLE = "table: {file: registry.csv}"


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """All that institutions have agreed on about the rows."""

    inputs: ModelInputs
    outcome: Outcome | TimeToEvent
    test: float | AgreedTest
    groups: tuple[str, ...]
    seed: int


def table(
    contract: Mapping[str, Any] | str,
    model: str,
    preprocessing: Mapping[str, Any] | str | None = None,
    outcome: str | Sequence[str] | None = None,
    sites: Sequence[str] | str | None = None,
    coding: str = "treatment",
    hidden: Sequence[int] | None = None,
    test: float | Mapping[str, str] = TEST_SHARE,
    groups: Sequence[str] = (),
    seed: int = 0,
    site_file: str | None = None,
) -> Task:
    """Predict a variable of the data contract from those that it marks as inputs.

    Args:
        contract: the data contract, or its file.
        model: "logistic" for classes, "linear" for a number, "mlp" for either, "cox" for the time to an event.
        preprocessing: the agreed numbers for gaps and scales, or their file; `p2pfl data prepare` makes it.
        outcome: variable to predict, of cox the time and the event; None: the contract's own.
        sites: files of sites whose tables are on this machine, as of `p2pfl stats`; or tables as the contract says; or a folder of either.
        coding: "treatment": categories become columns, but the first; "one-hot": all of them.
        hidden: widths of an mlp's hidden layers; None: (32,).
        test: fraction of each site's patients, or {variable, label} for those rows.
        groups: variables with categories for reports on subgroups of the test rows.
        seed: of the experiment.
        site_file: the site.yaml of the node that reads its own table; no experiment and no study can name it.
    """
    agreed_contract = contract_of(contract)
    agreed = preprocessing_of(preprocessing, agreed_contract)
    found = outcome_of(model, outcome, agreed_contract, agreed)
    if coding not in CODINGS:
        raise ConfigError(f"task.coding = {shown(coding)}: one of {', '.join(CODINGS)}")
    kind: Coding = "one-hot" if coding == "one-hot" else "treatment"
    inputs = ModelInputs(contract=agreed_contract, preprocessing=agreed, coding=kind)
    inputs.check("task.preprocessing")
    widths = _widths(model, hidden)
    rows = _Agreed(
        inputs=inputs,
        outcome=found,
        test=agreed_test(test, agreed_contract),
        groups=_groups(groups, agreed_contract),
        seed=seed,
    )
    made = _sites(rows, sites, site_file)
    is_timed = isinstance(found, TimeToEvent)
    has_classes = not isinstance(found, TimeToEvent) and bool(found.classes)
    return Task(
        name="table",
        model=found.model(len(inputs.names), widths),
        loss=found.loss,
        metrics=found.metrics,
        losses=LOSSES if has_classes else frozenset(),
        sites=made,
        probabilities=found.probabilities,
        read=partial(read_new_rows, inputs),
        dtype="float64" if is_timed else "float32",
        compares_rows=is_timed,
        notes=missing_classes(made) if has_classes and made else (),
    )


def contract_of(given: Mapping[str, Any] | str) -> Contract:
    """Make the contract of a task's option, which is its content or its file."""
    if isinstance(given, str):
        return Contract.load(given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"task.contract = {shown(given)}: expected the data contract's file")
    return Contract.from_mapping(given, "task.contract")


def preprocessing_of(given: Mapping[str, Any] | str | None, contract: Contract) -> Preprocessing:
    """Make the agreed numbers of a task's option, which is their content or their file."""
    if given is None:
        raise ConfigError(
            "task.preprocessing: required, but missing: agree on the numbers for gaps and scales first, by p2pfl data prepare EXPERIMENT"
        )
    if isinstance(given, str):
        return Preprocessing.load(given, contract)
    if not isinstance(given, Mapping):
        raise ConfigError(f"task.preprocessing = {shown(given)}: expected the file that p2pfl data prepare wrote")
    return Preprocessing.from_mapping(given, contract, "task.preprocessing")


def site_files(given: Sequence[str] | str) -> dict[str, Path]:
    """Find the files of sites that a task's option names, by the sites' names: site files or tables, or all of a folder.

    Raises:
        ConfigError: a file is of another kind, a folder has neither, or two sites have one name.
    """
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(path, str) for path in listed):
        raise ConfigError(f"task.sites = {shown(given)}: expected a list of site files, such as [a/site.yaml, b/site.yaml], or a folder")
    found: dict[str, Path] = {}
    for path in [inner for each in listed for inner in _within(Path(each))]:
        if path.suffix not in (*SITE_FILES, *_TABLES):
            raise ConfigError(
                f"task.sites: {path}: expected a site's file (.yaml), or a table that is as the contract says (.csv, .parquet)"
            )
        name = site_name(load_yaml(path, _EXAMPLE) if path.suffix in SITE_FILES else {}, path)
        if name in found:
            raise ConfigError(f"task.sites: {path} and {found[name]} are both of a site {name}; say member: NAME in the files")
        found[name] = path
    return found


def _within(path: Path) -> list[Path]:
    """A file itself, or the site files of a folder, or its tables where it has none."""
    if not path.is_dir():
        return [path]
    inside = sorted(path.iterdir())
    files = [each for each in inside if each.suffix in SITE_FILES] or [each for each in inside if each.suffix in _TABLES]
    if not files:
        raise ConfigError(f"task.sites: {path}: the folder has no site file (.yaml) and no table (.csv, .parquet)")
    return files


def _sites(agreed: _Agreed, sites: Sequence[str] | str | None, site_file: str | None) -> list[Site]:
    """Read the rows of the sites that are here; none where nobody names any."""
    contract, made = agreed.inputs.contract, list[Site]()
    if site_file is not None and (sites is None or "table" in load_yaml(site_file)):
        raw = load_yaml(site_file, _EXAMPLE)
        section = SiteSection.from_mapping(raw, site_file)
        if section.contract is not None and Contract.load(section.contract).digest != contract.digest:
            raise ConfigError(
                f"contract = {shown(str(section.contract))}: it is not the contract of the study: take that one, or say none", site_file
            )
        return [_site(agreed, site_name(raw, site_file), site_rows(section, contract)[1])]
    findings: list[str] = []
    for name, path in (site_files(sites) if sites is not None else {}).items():
        try:
            section = site_section(path)
            made.append(_site(agreed, name, site_rows(section, contract)[1]))
        except ConfigError as error:
            findings += [f"{error.place or path}: {each}" for each in error.findings]
    if findings:
        raise ConfigError(findings)
    return made


def site_section(path: Path) -> SiteSection:
    """Section `table:` of a site's file, or of a table that is as the contract says."""
    if path.suffix in SITE_FILES:
        return SiteSection.load(path)
    table = table_of_file(path)
    return SiteSection.from_mapping({"table": {"parquet" if table.parquet else "file": str(path.absolute())}}, path)


def _site(agreed: _Agreed, name: str, rows: CheckedTable) -> Site:
    """Make a site of its checked rows; those whose outcome is missing are left out."""
    values = agreed.outcome.values(rows.columns)
    kept = np.flatnonzero(~np.isnan(values).any(axis=tuple(range(1, values.ndim))))
    rows, values = rows.rows(kept.tolist()), values[kept]
    inputs_MD = torch.from_numpy(agreed.inputs.encode(rows)).float()
    train, test = split_by_patient(rows, agreed.outcome.strata(values), agreed.test, agreed.seed, name)
    if not len(train):
        raise DataError(f"no row of {name} is left to train on: {agreed.outcome.name} is missing, or all rows are test rows")
    targets = agreed.outcome.targets(values)
    return Site(
        name=name,
        train=_taken(inputs_MD, targets, train),
        test=_taken(inputs_MD, targets, test) if len(test) else None,
        groups={group: _labels(rows, group, test) for group in agreed.groups} if len(test) else {},
        train_patients=tuple(rows.patients[row] for row in train),
        test_patients=tuple(rows.patients[row] for row in test),
    )


def _taken(inputs_MD: Tensor, targets_M: Tensor, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    chosen = torch.from_numpy(positions)
    return inputs_MD[chosen], targets_M[chosen]


def _labels(rows: CheckedTable, group: str, positions: np.ndarray) -> list[str]:
    """Labels of some rows; a missing one is a group of its own."""
    values = rows.columns[group]
    return [str(values[row]) or "missing" for row in positions]


def _groups(given: Any, contract: Contract) -> tuple[str, ...]:
    """Check the option `groups`; ConfigError where a variable has no categories."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"task.groups = {shown(given)}: expected a list of variables with categories")
    known = [name for name, each in contract.variables.items() if each.type == "category"]
    if strange := [name for name in given if name not in known]:
        raise ConfigError(
            [
                f"task.groups has {shown(name)}: no variable with categories; {nearest(name, known)}expected some of {', '.join(known)}"
                for name in strange
            ]
        )
    return tuple(given)


def _widths(model: str, hidden: Any) -> tuple[int, ...]:
    """Widths of the hidden layers of a model."""
    if model != "mlp":
        if hidden is not None:
            raise ConfigError(f"task.hidden = {shown(hidden)}: only an mlp has hidden layers; leave it out")
        return ()
    widths = HIDDEN if hidden is None else hidden
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
        raise ConfigError(f"task.hidden = {shown(hidden)}: expected a list of widths, such as [32, 16]")
    if not all(type(width) is int and 1 <= width <= 10_000 for width in widths):  # noqa: PLR2004
        raise ConfigError(f"task.hidden = {shown(hidden)}: expected whole numbers from 1 to 10,000")
    return tuple(widths)
