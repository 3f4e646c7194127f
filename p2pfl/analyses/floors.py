"""Floors of an analysis, held by everybody on the same totals before anything of substance is asked.

Shapes: P columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.rows import CrossTable, SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import count
from p2pfl.analyses.variables import is_survival
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.newton import MOST_ITERATIONS
from p2pfl.statistics.sums import Numbers, SumRequest, relayed

_USUAL_ITERATIONS = 6
"""After so many a model that has a fit has mostly found it."""

Part = TypeVar("Part")
Result = TypeVar("Result")
Site = TypeVar("Site")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Numbers of an analysis over all sites."""

    num_patients: int
    num_rows: int
    num_missing: int | None
    """Rows left out because a value is missing; None: some, and fewer than may be shown."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        if self.num_missing is None:  # all rows are known from elsewhere, and those left out would follow
            return {"patients": None, "rows": None, "missing": None}
        return {"patients": self.num_patients, "rows": self.num_rows, "missing": self.num_missing}


def shown_count(count: float, fewest: int) -> int | None:
    """Show a count of patients that is 0 or large enough; None stands for another one."""
    return None if 0 < count < fewest else round(count)


def counted(counts: Counts, spec: AnalysisSpec) -> str:
    """Say how many patients an analysis counts, and how many rows it leaves out."""
    if counts.num_missing is None:
        return f"rows left out for missing values: <{spec.patients_per_cell}; the patients are not counted here, as these would follow"
    missing = count(counts.num_missing, spec.patients_per_cell)
    rows = "" if counts.num_rows == counts.num_patients else f", {counts.num_rows:,} rows"
    return f"{counts.num_patients:,} patients{rows}; rows left out for missing values: {missing}"


def count_patients(spec: AnalysisSpec, num_parameters: int = 0) -> Generator[SumRequest[Any], Numbers, Counts]:
    """Count the patients of all sites, and hold the floors of the sum and of the parameters.

    Raises:
        ConfigError: there are too few of them.
    """

    def own(site: SiteRows[Any]) -> Numbers:
        return np.array([site.num_patients, len(site.patients_M), site.num_missing], dtype=np.float64)

    patients, rows, missing = yield SumRequest(statistic="patients and rows", shape=(3,), contribution=own)
    if patients < 1:
        raise ConfigError("no site has a complete row of these variables")
    if patients < spec.patients_per_sum:
        raise ConfigError(
            f"fewer than {spec.patients_per_sum} patients have a complete row, and patients_per_sum is {spec.patients_per_sum}"
        )
    if num_parameters >= spec.parameters_per_patient * patients:
        raise ConfigError(
            f"{num_parameters} coefficients from {patients:.0f} patients: fewer than {spec.parameters_per_patient:g} for each are needed"
        )
    return Counts(num_patients=round(patients), num_rows=round(rows), num_missing=shown_count(missing, spec.patients_per_cell))


def check_cross_table(spec: AnalysisSpec, contract: Contract, *, is_at_sites: bool = False) -> Generator[SumRequest[Any], Numbers, None]:
    """Hold the floor of a cell for all combinations of the categorical variables, the outcome's included.

    Args:
        spec: says whether each single site holds it as well.
        contract: of all sites.
        is_at_sites: whether each single site holds it whatever *spec* says.

    Raises:
        ConfigError: a combination has too few patients, or no patient has a category.
    """
    table = CrossTable.of(spec, contract)
    if not table.names:
        return
    fewest, size = spec.patients_per_cell, table.num_cells
    named = " and ".join(table.names) if len(table.names) > 1 else table.names[0]

    def own(site: SiteRows[Any]) -> Numbers:
        counts = site.patients_by_cell(size)
        if (is_at_sites or spec.cells == "site") and is_small(counts, fewest):
            raise FewPatientsHere(f"policy.patients_per_cell: a combination of {named} has fewer than {fewest} patients of this site")
        return counts

    counts = yield SumRequest(statistic=f"cross table of {', '.join(table.names)}", shape=(size,), contribution=own)
    empty = [(name, label) for name, label in table.empty_labels(counts) if _is_factor(name, contract)]
    if empty:
        raise ConfigError(
            [
                f"{name}: no complete row of any site has {label!r}: leave the variable out, or agree on other categories"
                for name, label in empty
            ]
        )
    outcome = spec.parsed.outcome[0]
    if not is_survival(spec.parsed) and (one := [label for name, label in table.empty_labels(counts) if name == outcome]):
        raise ConfigError(f"{outcome}: no complete row of any site has {one[0]!r}: there is nothing to tell apart")
    if is_small(counts, fewest):
        raise ConfigError(
            f"a combination of {named} has fewer than {fewest} patients, and patients_per_cell is {fewest}: leave a variable out"
            if len(table.names) > 1
            else f"a category of {named} has fewer than {fewest} patients, and patients_per_cell is {fewest}"
        )


def is_small(counts: Numbers, fewest: int) -> bool:
    """Whether a cell holds somebody and too few."""
    return bool(((counts > 0) & (counts < fewest)).any())


def at_sites(
    analysis: Generator[SumRequest[Part], Numbers, Result], part: Callable[[Site], Part], most_numbers: float = math.inf
) -> Generator[SumRequest[Site], Numbers, Result]:
    """Ask an analysis of a part of each site's rows.

    Args:
        analysis: over the parts.
        part: of a site.
        most_numbers: that the iterations may release about the same rows.

    Raises:
        ConfigError: the iterations would release more numbers, or there are too many of them.
    """
    released = num_iterations = 0

    def asked(request: SumRequest[Part]) -> SumRequest[Site]:
        nonlocal released, num_iterations
        released += math.prod(request.shape) if "iteration" in request.statistic else 0
        num_iterations += "iteration" in request.statistic
        if released > most_numbers and num_iterations > _USUAL_ITERATIONS:
            raise ConfigError(
                f"no fit in the {num_iterations - 1} iterations that so few patients allow: "
                "the outcome may be separated by a variable; leave that one out, or use fewer variables"
            )
        if num_iterations > MOST_ITERATIONS:
            raise ConfigError(f"no fit in {MOST_ITERATIONS} iterations: the outcome may be separated, or a column far too large")
        if released > most_numbers:
            raise ConfigError(
                f"the iterations would release {released} numbers about the same patients, and {int(most_numbers)} are the most: "
                "use fewer variables"
            )
        return _of_part(request, part)

    return relayed(analysis, asked)


def _of_part(request: SumRequest[Part], part: Callable[[Site], Part]) -> SumRequest[Site]:
    def own(site: Site) -> Numbers:
        with np.errstate(all="ignore"):
            numbers = request.contribution(part(site))
        if "iteration" in request.statistic and not np.isfinite(numbers).all():
            raise ConfigError("the coefficients grew beyond all numbers: a column is far too large, or the outcome is separated")
        return numbers

    return SumRequest(statistic=request.statistic, shape=request.shape, contribution=own)


def _is_factor(name: str, contract: Contract) -> bool:
    return name in contract.variables and contract.variables[name].type == "category"
