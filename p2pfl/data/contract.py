"""Data contract: the table that every institution of a study must have, which its file `contract.yaml` names.

A contract holds names, texts and numbers. It holds no query and no expression, and nothing in it is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.data.table_format import SiteTable, TableFormat
from p2pfl.data.variables import Variable, plain_text, texts_of_missing
from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import canonical
from p2pfl.statistics.formula import FUNCTIONS
from p2pfl.yaml_files import check, load_yaml, nearest, shown, strange_keys, text_keys

INDICATOR = "absent"
"""Ending of the column that says at which sites a variable is absent."""

_DOMAIN = b"p2pfl data contract 1\n"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")
_TAKEN = ("Surv", "offset", "poly", "spline", *FUNCTIONS)
_RUNS_NOTHING = ("query", "sql", "expression", "formula", "where", "filter", "select", "compute", "derive", "eval", "python", "code")
_MOST_BYTES = 4 * 1024**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The agreed table. Made by load and from_mapping only, which check it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: Literal[1] = 1
    """Number of this file's format."""
    name: Annotated[str, Field(min_length=1)]
    patient: str
    """Variable that tells patients apart, of type id."""
    rows: Literal["one-per-patient", "several-per-patient"] = "one-per-patient"
    outcome: tuple[str, ...]
    """One variable, or a time and an event."""
    inputs: tuple[str, ...] = ()
    """Variables that a model may take, in its order."""
    variables: dict[str, Variable]
    missing: tuple[str, ...] = ()
    """Texts that stand for a missing value in every column; an empty cell does so always."""
    table: TableFormat = field(default_factory=TableFormat)
    """Format of the sites' files, where a site says nothing else."""

    @classmethod
    def load(cls, path: Path | str) -> Contract:
        """Read a contract from its file; ConfigError with every fault at once."""
        return cls.from_mapping(load_yaml(path, "name: stroke-registry", _MOST_BYTES), str(path))

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], place: str) -> Contract:
        """Check a mapping as a contract's file holds it.

        Raises:
            ConfigError: every fault at once, each with key, value given and what is allowed.
        """
        content, findings = dict(raw), list[str]()
        variables = _variables(content.get("variables"), findings)
        if isinstance(content.get("outcome"), str):
            content["outcome"] = [content["outcome"]]
        if isinstance(content.get("name"), str):
            plain_text(content["name"], "name", findings)
        if "missing" in content:
            content["missing"] = texts_of_missing(content["missing"], findings)
        given = text_keys(content.get("variables"))
        names = list(given) if isinstance(given, dict) else []
        content["variables"] = variables
        said = {finding.partition(" = ")[0].split(".")[0] for finding in findings}
        contract: Contract | None = None
        try:
            contract = check(cls, content, place)
        except ConfigError as error:
            findings += [each for each in map(_without_query, error.findings) if re.split(r"[.: ]", each)[0] not in said]
        missing = contract.missing if contract else ()
        findings += [f"variables.{name}.{fault}" for name, variable in variables.items() for fault in variable.faults(missing)]
        if contract is not None:
            findings += contract.faults(names)
        if findings or contract is None:
            raise ConfigError(list(dict.fromkeys(findings)), place)
        return contract

    def as_dict(self) -> dict[str, Any]:
        """The content of the contract's file, defaults written out."""
        return {
            "schema": self.schema,
            "name": self.name,
            "patient": self.patient,
            "rows": self.rows,
            "outcome": list(self.outcome),
            "inputs": list(self.inputs),
            "missing": list(self.missing),
            "table": self.table.as_dict(),
            "variables": {name: variable.as_dict() for name, variable in self.variables.items()},
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the content, 64 hex digits; the order of the variables does not count, that of the categories does."""
        return sha256(_DOMAIN + canonical(self.as_dict())).hexdigest()

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """Labels of each variable with categories, the reference first."""
        return {name: variable.labels for name, variable in self.variables.items() if variable.type == "category"}

    def faults_of_site(self, site: SiteTable) -> Iterator[str]:
        """Find what a site's section `table:` says of variables, units and signs that the contract does not have."""
        for key, names in (("columns", site.columns), ("units", site.units), ("absent", site.absent)):
            for name in names:
                if name not in self.variables:
                    yield f"{key}.{name}: {_no_variable(name, self.variables)}"
        for name in site.absent:
            if name in site.columns or name in site.units:
                yield f"absent: {name} has a column or a unit here as well; expected one of both"
            if name in self.variables and self.variables[name].absent == "refuse":
                yield f"absent: {name}: the contract refuses a site without it"
        for name, variable in self.variables.items():
            if name not in site.absent:
                yield from _faults_of_unit(name, variable, site)
        yield from self.table.overridden(site.format).faults()

    def faults(self, names: list[str]) -> Iterator[str]:
        """Find names that are none, and names of nothing."""
        for key, given in (("patient", (self.patient,)), ("outcome", self.outcome), ("inputs", self.inputs)):
            yield from (f"{key} = {shown(name)}: {_no_variable(name, names)}" for name in given if name not in names)
            yield from (f"{key}: {name} is given twice" for name in dict.fromkeys(given) if given.count(name) > 1)
        patient = self.variables.get(self.patient)
        if patient is not None and patient.type != "id":
            yield f"patient = {shown(self.patient)}: the variable is of type {patient.type}; expected type id"
        if len(self.outcome) not in (1, 2):
            yield f"outcome = {shown(list(self.outcome))}: expected one variable, or a time and an event"
        for key, given in (("outcome", self.outcome), ("inputs", self.inputs)):
            for name in given:
                if name in self.variables and self.variables[name].type == "id":
                    yield f"{key}: {name} is of type id, which no model takes"
        yield from (f"inputs: {name} is the outcome as well; expected one of both" for name in self.inputs if name in self.outcome)
        for name, variable in self.variables.items():
            if variable.absent == "indicator" and f"{name}.{INDICATOR}" in names:
                yield f"variables.{name}.{INDICATOR}: the indicator of {name} has this name; expected another one"
            if name in self.outcome and variable.absent != "refuse":
                yield f"variables.{name}.absent = {shown(variable.absent)}: a site without the outcome has nothing to tell; use refuse"
        yield from self.table.faults()


def _variables(raw: Any, findings: list[str]) -> dict[str, Variable]:
    """Make the variables that have no fault; the others' faults are findings."""
    if not isinstance(raw, dict) or not raw:
        if raw is not None:
            findings.append(f"variables = {shown(raw)}: expected at least one name with its type, such as age: {{type: integer}}")
        else:
            findings.append("variables: required, but missing")
        return {}
    findings += strange_keys(raw, "variables")
    found = {}
    for name, content in text_keys(raw).items():
        if not _NAME.fullmatch(name) or name in _TAKEN:
            findings.append(
                f"variables.{name}: {'formulae use this name' if name in _TAKEN else 'not a name'}; "
                "expected a letter, then letters, digits, _ or ., at most 64; a site's table may have another header"
            )
        if not isinstance(content, dict):
            findings.append(f"variables.{name} = {shown(content)}: expected a mapping (key: value), such as {{type: integer}}")
            continue
        if strange := strange_keys(content, f"variables.{name}"):
            findings += strange
        try:
            found[name] = Variable.from_mapping(text_keys(content), f"variables.{name}")
        except ConfigError as error:
            findings += [f"variables.{name}.{_without_query(each)}" for each in error.findings]
    return found


def _without_query(finding: str) -> str:
    """Say where a query belongs, if a key looks like one."""
    key = finding.partition(" = ")[0].split(".")[-1]
    if "unknown key" in finding and key.lower() in _RUNS_NOTHING:
        return f"{finding}; a contract holds no query and no expression"
    return finding


def _no_variable(name: str, names: Any) -> str:
    return f"no variable of the contract; {nearest(name, list(names))}expected one of {', '.join(names)}"


def _faults_of_unit(name: str, variable: Variable, site: SiteTable) -> Iterator[str]:
    unit = site.units.get(name)
    known = [str(variable.unit), *variable.convert] if variable.is_numeric else []
    if unit is None:
        if variable.convert:
            yield f"units.{name}: required, but missing: sites have it in different units; expected one of {', '.join(known)}"
    elif not known:
        yield f"units.{name} = {shown(unit)}: a variable of type {variable.type} has no unit"
    elif unit not in known:
        yield f"units.{name} = {shown(unit)}: the contract has no conversion for it; expected one of {', '.join(known)}"
