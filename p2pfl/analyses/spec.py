"""An analysis as people ask for it: its kind, its formula and the floors that it keeps, held against the data contract.

It holds names and numbers alone. The formula is read by the project's own grammar, and nothing in it is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from p2pfl.analyses.policy import MOST_PARAMETERS_PER_PATIENT, Kind
from p2pfl.analyses.variables import MOST_GROUPS, absent_names, faults_of_variables, group_labels, is_survival
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.families import NEGATIVE_BINOMIAL
from p2pfl.statistics.formula import CURVES, Formula, parse_formula
from p2pfl.statistics.sums import Numbers
from p2pfl.statistics.survival import grid
from p2pfl.yaml_files import check, nearest, shown

FamilyName = Literal["gaussian", "binomial", "poisson", "gamma", "negative-binomial"]

MOST_GRID_CELLS = 20_000

_KEYS_OF_KIND = {
    "family": ("glm", "compare"),
    "theta": ("glm", "compare"),
    "coefficient": ("compare",),
    "ties": ("cox",),
    "strata": ("cox", "compare"),
    "grid": ("cox", "km", "compare"),
    "ends": ("cox", "km", "compare", "calibration"),
    "variables": ("describe",),
    "by": ("describe",),
    "formula": ("glm", "calibration", "mixed", "cox", "km", "compare"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisSpec:
    """One analysis over all sites. Made by from_mapping, which checks it; `faults` holds it against a contract."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    kind: Kind
    formula: str | None = None
    """In R's notation: outcome ~ age + sex, or Surv(days, event) ~ treatment."""
    variables: tuple[str, ...] = ()
    """Variables to describe; none: all that are not ids."""
    by: str | None = None
    """Variable of groups that are described apart."""
    family: FamilyName | None = None
    """Family of a generalised linear model."""
    theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Parameter of a negative binomial model, whose variance is mean + mean^2 / theta; None: it is estimated."""
    coefficient: str | None = None
    """Coefficient of which the sites' own estimates are compared."""
    ties: Literal["efron", "breslow"] | None = None
    """Treatment of events at one time in a Cox model; None: efron."""
    strata: Literal["site", "none"] | None = None
    """site: each site has its own baseline, on exact times; none: one baseline for all, on a grid. None: site where there is no grid."""
    grid: Annotated[float, Field(gt=0)] | None = None
    """Width of a cell of time; cells are merged until each hides enough patients."""
    ends: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Ends of the cells of time, instead of a width; for a calibration ends of the cells of risk, the last of them 1."""
    patients_per_cell: Annotated[int, Field(ge=1)] = 5
    """Fewest patients in a cell that holds any."""
    patients_per_sum: Annotated[int, Field(ge=1)] = 10
    """Fewest patients in a sum over all sites."""
    parameters_per_patient: Annotated[float, Field(gt=0, le=MOST_PARAMETERS_PER_PATIENT)] = MOST_PARAMETERS_PER_PATIENT
    """Most coefficients for each patient."""
    cells: Literal["total", "site"] = "total"
    """Whether cells are counted over all sites, or must hold nobody or enough at each single site."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of confidence intervals."""
    rows: Literal["own", "common"] = "own"
    """common: only rows in which no variable of `common` is missing, the same ones in all analyses of a study."""
    common: tuple[str, ...] = ()
    """Variables of all analyses of the study, for rows: common."""

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], place: str = "analysis") -> AnalysisSpec:
        """Check an analysis as a file or a command line has it.

        Raises:
            ConfigError: every fault at once, each with key, value given and what is allowed.
        """
        spec = check(cls, raw, place)
        faults = list(spec.faults_of_keys())
        if faults:
            raise ConfigError(faults, place)
        return spec

    def as_dict(self) -> dict[str, Any]:
        """All that is said, defaults of the kind written out."""
        content: dict[str, Any] = {"kind": self.kind}
        for key in ("formula", "variables", "by", "family", "theta", "coefficient", "ties", "strata", "grid", "ends"):
            value = getattr(self, key)
            if value not in (None, ()):
                content[key] = list(value) if isinstance(value, tuple) else value
        for key in ("patients_per_cell", "patients_per_sum", "parameters_per_patient", "cells", "level"):
            content[key] = getattr(self, key)
        if self.rows == "common":  # left out elsewhere: digests of analyses that do without stay as they are
            content |= {"rows": self.rows, "common": list(self.common)}
        return content

    @property
    def parsed(self) -> Formula:
        """The formula's terms; ConfigError where there is none."""
        return parse_formula(self.formula or "")

    @property
    def outcome_family(self) -> FamilyName | None:
        """Family of the outcome, which the kind may say; None: it is a time and an event."""
        return {"calibration": "binomial", "mixed": "gaussian"}.get(self.kind, self.family)  # type: ignore[return-value]

    @property
    def is_by_site(self) -> bool:
        """Whether each site has its own baseline or stratum."""
        return self.strata == "site" or (self.strata is None and self.grid is None and not self.ends)

    def check(self, contract: Contract) -> None:
        """Hold the analysis against a contract; ConfigError with every fault at once."""
        faults = list(self.faults(contract))
        if faults:
            raise ConfigError(list(dict.fromkeys(faults)), self.kind)

    def described(self, contract: Contract) -> tuple[str, ...]:
        """Variables that are described, in the order given or in the contract's."""
        return self.variables or tuple(name for name, each in contract.variables.items() if each.type != "id" and name != self.by)

    def names_used(self, contract: Contract) -> tuple[str, ...]:
        """Variables of the contract that the analysis reads, each once."""
        if self.kind == "describe":
            return (*self.described(contract), *((self.by,) if self.by else ()))
        return self.parsed.columns

    def time_cells(self, contract: Contract) -> Numbers:
        """Ends of the agreed cells of time, before any are merged."""
        if self.ends:
            return np.array(self.ends)
        time = contract.variables[self.parsed.outcome[0]]
        assert self.grid is not None
        assert time.range is not None
        return grid(self.grid, time.range[1])

    def faults(self, contract: Contract) -> Iterator[str]:
        """Find names that the contract does not have, variables of another type than is needed, and what the kind cannot do."""
        known = [*contract.variables, *absent_names(contract)]
        yield from (f"common: {name}: no variable of the contract" for name in self.common if name not in known)
        if contract.rows != "one-per-patient" and self.kind != "glm":
            yield f"{self.kind} counts patients by their rows, and the contract has rows: several-per-patient; expected one-per-patient"
        if self.kind == "describe":
            yield from self._faults_of_names(contract, known)
            return
        try:
            formula = self.parsed
        except ConfigError as error:
            yield from error.findings
            return
        yield from faults_of_variables(formula, contract, known, self.outcome_family if not is_survival(formula) else None)
        if any(name not in known for name in formula.columns) or not is_survival(formula):
            return
        if self.kind in ("km", "compare"):
            yield from _faults_of_groups(formula, contract)
        if not self.is_by_site:
            yield from self._faults_of_grid(contract, formula)

    def _faults_of_names(self, contract: Contract, known: Sequence[str]) -> Iterator[str]:
        for name in self.variables:
            if name not in known:
                yield f"variables: {name}: no variable of the contract; {nearest(name, list(known))}expected one of {', '.join(known)}"
            elif name in contract.variables and contract.variables[name].type == "id":
                yield f"variables: {name} is of type id: each value is one patient"
        if self.by in self.variables:
            yield f"by = {shown(self.by)}: it is described as well; expected another variable, or leave it out of the variables"
        if self.by is not None and self.by not in known:
            yield f"by: {self.by}: no variable of the contract; {nearest(self.by, list(known))}expected one of {', '.join(known)}"
        elif self.by is not None and group_labels(self.by, contract) is None:
            yield f"by: {self.by} makes no groups: expected categories, or whole numbers with a range of at most {MOST_GROUPS} values"

    def faults_of_keys(self) -> Iterator[str]:
        """Find keys that the kind does not have, those that it lacks, and those that contradict each other."""
        for key, kinds in _KEYS_OF_KIND.items():
            if getattr(self, key) not in (None, ()) and self.kind not in kinds:
                yield f"{key} = {shown(_plain(getattr(self, key)))}: {self.kind} has none; it belongs to {', '.join(kinds)}"
        if self.common and self.rows != "common":
            yield f"common = {shown(list(self.common))}: it counts only with rows: common"
        if self.kind == "describe":
            return
        if self.formula is None:
            yield f"formula: required for {self.kind}, such as {_EXAMPLES[self.kind]!r}"
            return
        if self.grid is not None and self.ends:
            yield "grid and ends: both say where cells of time end; keep one of them"
        if any(after <= before for before, after in zip(self.ends, self.ends[1:], strict=False)):
            what = "risks" if self.kind == "calibration" else "times"
            yield f"ends = {shown(list(self.ends))}: expected {what} that increase"
        try:
            formula = self.parsed
        except ConfigError as error:
            yield from error.findings
            return
        yield from self._faults_of_kind(formula)

    def _faults_of_kind(self, formula: Formula) -> Iterator[str]:
        yield from self._faults_of_survival(formula) if is_survival(formula) else self._faults_of_one_outcome()
        groups = [term for term in formula.terms if term]
        is_one_group = len(groups) == 1 and len(groups[0]) == 1 and not groups[0][0].function
        if self.kind == "km" and groups and not is_one_group:
            yield f"formula = {shown(self.formula)}: km has one variable of groups on the right side, or 1 for none"
        if self.kind == "compare" and is_survival(formula) and not is_one_group:
            yield f"formula = {shown(self.formula)}: a log-rank test has one variable of groups on the right side"
        if self.kind == "compare" and (curves := [each for term in groups for each in term if each.function in CURVES]):
            yield f"formula: {curves[0]}: sites are compared by models without curves; leave it out, or use glm"
        if self.kind == "mixed" and () not in formula.terms:
            yield f"formula = {shown(self.formula)}: a mixed model has an intercept, around which those of the sites lie"
        if self.kind == "mixed" and formula.offsets:
            yield f"formula = {shown(self.formula)}: mixed takes no offset"
        if self.kind == "cox" and not groups:
            yield f"formula = {shown(self.formula)}: a Cox model needs a variable on the right side"

    @property
    def _has_grid(self) -> bool:
        return self.grid is not None or bool(self.ends)

    def _faults_of_survival(self, formula: Formula) -> Iterator[str]:
        if self.kind in _OF_ONE_OUTCOME:
            yield f"formula = {shown(self.formula)}: {self.kind} has one outcome; Surv(time, event) is for cox, km and compare"
        if self.theta is not None and self.kind != "glm":
            yield f"theta = {self.theta:g}: it counts only where the outcome is one variable"
        if self.family is not None and self.kind != "glm":
            yield f"family = {shown(self.family)}: it counts only where the outcome is one variable"
        if self.coefficient is not None:
            yield f"coefficient = {shown(self.coefficient)}: curves are compared by a log-rank test, which has none"
        if self.strata == "site" and self._has_grid:
            yield "strata = 'site': each site has its own exact times; leave the grid out, or say strata: none"
        if not self._has_grid and (self.kind == "km" or self.strata == "none"):
            yield "grid: required, the width of a cell of time, such as 30: one curve for all sites needs times that all agree on"
        if self.kind == "cox" and () not in formula.terms:
            yield f"formula = {shown(self.formula)}: a Cox model has no intercept that could be left out"
        if formula.offsets:
            yield f"formula = {shown(self.formula)}: {self.kind} takes no offset"

    def _faults_of_one_outcome(self) -> Iterator[str]:
        if self.kind in ("cox", "km"):
            yield f"formula = {shown(self.formula)}: expected Surv(time, event) on the left side, such as {_EXAMPLES[self.kind]!r}"
            return
        if self.kind == "calibration" and self.ends and self.ends[-1] != 1:
            yield f"ends = {shown(list(self.ends))}: expected risks of which the last is 1"
        if self.family is None and self.outcome_family is None:
            yield f"family: required, one of {', '.join(get_args(FamilyName))}"
        if self.theta is not None and self.family != NEGATIVE_BINOMIAL:
            yield f"theta = {self.theta:g}: it belongs to family {NEGATIVE_BINOMIAL}"
        if self.kind == "compare" and self.coefficient is None:
            yield "coefficient: required: which coefficient of the sites' own models is compared"
        if self.kind == "compare" and (self._has_grid or self.strata is not None):
            yield "grid, ends and strata: they count only for Surv(time, event)"

    def _faults_of_grid(self, contract: Contract, formula: Formula) -> Iterator[str]:
        time = contract.variables.get(formula.outcome[0])
        if time is None or time.range is None:
            return
        last = time.range[1]
        if self.grid is not None and last / self.grid > MOST_GRID_CELLS:
            yield f"grid = {self.grid:g}: more than {MOST_GRID_CELLS} cells up to {last:g}, the contract's last time; expected wider ones"
        if self.ends and self.ends[-1] < last:
            yield f"ends = {shown(list(self.ends))}: {formula.outcome[0]} goes up to {last:g} in the contract; expected a last end there"


_OF_ONE_OUTCOME = ("glm", "calibration", "mixed")
_EXAMPLES = {
    "glm": "died ~ age + sex",
    "calibration": "died ~ age + sex",
    "mixed": "los ~ age + sex",
    "cox": "Surv(days, event) ~ age + sex",
    "km": "Surv(days, event) ~ treatment",
    "compare": "Surv(days, event) ~ treatment",
}


def _faults_of_groups(formula: Formula, contract: Contract) -> Iterator[str]:
    for name in [term[0].column for term in formula.terms if term]:
        if group_labels(name, contract) is None:
            yield f"formula: {name} makes no groups: expected categories, or whole numbers with a range of at most {MOST_GROUPS} values"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
