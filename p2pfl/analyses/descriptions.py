"""Descriptions of variables over all sites, without a count, a total or an extreme that is a few patients.

Shapes: M rows of one site.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

from p2pfl.analyses.floors import is_small
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import count, figure, text_table
from p2pfl.analyses.variables import cell_labels, coded, range_magnitude, unit
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.data.values import EPOCH
from p2pfl.data.variables import Variable
from p2pfl.errors import ConfigError
from p2pfl.statistics.cross_table import shown
from p2pfl.statistics.describe import MOST_CELLS, QUANTILES, Description, describe
from p2pfl.statistics.sums import Numbers, SumRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedVariable:
    """One variable over all sites; None stands for a number that is not shown."""

    name: str
    unit: str | None
    is_date: bool
    num_values: int | None
    num_missing: int | None
    description: Description | None
    """Figures of numbers; None for categories, and where too few patients have a value."""
    counts: dict[str, int | None] | None
    """Patients of each category."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and CSV."""
        content: dict[str, Any] = {"name": self.name, "unit": self.unit, "values": self.num_values, "missing": self.num_missing}
        if self.counts is not None:
            return {**content, "counts": self.counts}
        if self.description is None:
            return {**content, "mean": None, "sd": None, **{f"q{100 * each:g}": None for each in QUANTILES}}
        mean, quantiles = self.description.mean, {each: self.description.quantile(each) for each in QUANTILES}
        found = {f"q{100 * each:g}": self._said(value) for each, value in quantiles.items()}
        return {**content, "mean": self._said(mean), "sd": math.sqrt(self.description.variance), **found}

    def _said(self, value: float) -> float | str:
        return (EPOCH + timedelta(days=round(value))).isoformat() if self.is_date else value


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptionResult:
    """Descriptions of several variables over all sites."""

    spec: AnalysisSpec
    variables: tuple[DescribedVariable, ...]

    def records(self) -> list[dict[str, Any]]:
        """One row for each variable, or each category of it, for CSV."""
        found = []
        empty = dict.fromkeys(["category", "count", "mean", "sd", *(f"q{100 * each:g}" for each in QUANTILES)])
        for each in self.variables:
            content = each.as_dict()
            counts = content.pop("counts", None)
            if counts is None:
                found.append({**content, **{key: content.get(key) for key in empty}})
            else:
                found += [{**content, **empty, "category": label, "count": number} for label, number in counts.items()]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"analysis": self.spec.as_dict(), "variables": [each.as_dict() for each in self.variables]}

    def summary(self) -> str:
        """Tables for people, at most 80 columns wide."""
        fewest = self.spec.patients_per_cell
        numbers, dates, categories = list[tuple[str, ...]](), list[tuple[str, ...]](), list[tuple[str, ...]]()
        for each in self.variables:
            counted = self._counts(each)
            if each.counts is not None:
                categories.append((each.name, *counted))
                categories += [(f"  {label}", "-" if number is None else f"{number:,}", "") for label, number in each.counts.items()]
                continue
            said = each.as_dict()
            if each.is_date:
                dates.append((each.name, *counted, *(str(said[key] or "-") for key in ("mean", "q5", "q50", "q95"))))
                continue
            figures = ("-" if said[key] is None else figure(said[key], 4) for key in ("mean", "sd", "q5", "q25", "q50", "q75", "q95"))
            numbers.append((each.name if each.unit in (None, "1") else f"{each.name} [{each.unit}]", *counted, *figures))
        tables = [
            (("", "n", "missing", "mean", "SD", "5 %", "25 %", "50 %", "75 %", "95 %"), numbers),
            (("", "n", "missing", "mean", "5 %", "50 %", "95 %"), dates),
            (("", "patients", "missing"), categories),
        ]
        lines = [line for header, rows in tables if rows for line in (*text_table(header, rows), "")]
        return "\n".join([*lines, f"- and <: not shown, as fewer than {fewest} patients could be told apart"])

    def _counts(self, each: DescribedVariable) -> tuple[str, str]:
        """Patients with a value and without, or what may be said of them."""
        if each.num_values is None and each.num_missing is None and each.description is None and not _is_counted(each):
            return f"<{self.spec.patients_per_sum}", "-"
        fewest = self.spec.patients_per_cell
        return "-" if each.num_values is None else f"{each.num_values:,}", count(each.num_missing, fewest)


def describe_variables(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[CheckedTable], Numbers, DescriptionResult]:
    """Describe each variable that the analysis names; ConfigError where no site has a row."""
    names = spec.described(contract)

    def given(table: CheckedTable) -> Numbers:
        return np.array([[_is_given(table.columns[name]).sum(), len(table.patients)] for name in names], dtype=np.float64)

    totals = yield SumRequest(statistic="patients with a value", shape=(len(names), 2), contribution=given)
    if not totals[:, 1].any():
        raise ConfigError("no site has a row")
    found = []
    for name, (num_values, num_rows) in zip(names, totals, strict=True):
        found.append((yield from _described(spec, contract, name, num_values, num_rows - num_values)))
    return DescriptionResult(spec=spec, variables=tuple(found))


def _described(
    spec: AnalysisSpec, contract: Contract, name: str, num_values: float, num_missing: float
) -> Generator[SumRequest[CheckedTable], Numbers, DescribedVariable]:
    """Describe one variable, if enough patients have a value."""
    variable, labels = contract.variables.get(name), cell_labels(name, contract)
    whole = shown(np.array([[num_values], [num_missing]]), spec.patients_per_cell).cells_RC[:, 0]
    said = DescribedVariable(
        name=name,
        unit=None if variable is None else variable.unit,
        is_date=variable is not None and variable.type == "date",
        num_values=_shown(whole[0]),
        num_missing=_shown(whole[1]),
        description=None,
        counts=None,
    )
    if num_values < spec.patients_per_sum:
        hidden = None if labels is None else dict.fromkeys(labels)
        return replace(said, num_values=None, num_missing=None, counts=hidden)
    if labels is None:
        return replace(said, description=(yield from _of_numbers(spec, contract, name)))

    def own(table: CheckedTable) -> Numbers:
        places = coded(name, table.columns, contract, labels)
        counts = np.bincount(np.where(places < 0, len(labels), places), minlength=len(labels) + 1).astype(np.float64)
        _check_cells(spec, name, counts)
        return counts

    counts = yield SumRequest(statistic=f"counts of {name}", shape=(len(labels) + 1,), contribution=own)
    cells = shown(counts[:, None], spec.patients_per_cell).cells_RC[:, 0]
    missing = _shown(cells[-1])
    return replace(
        said,
        # all rows minus the patients with a value are those without
        num_values=None if missing is None else round(num_values),
        num_missing=missing,
        counts={label: _shown(number) for label, number in zip(labels, cells, strict=False)},
    )


def grid_of(variable: Variable) -> Numbers:
    """Edges of the cells in which values are counted: a cell for each whole number, or the range in as many as there may be."""
    assert variable.range is not None
    least, largest = variable.range
    if variable.type == "integer" and largest - least < MOST_CELLS:
        return np.arange(least - 0.5, largest + 1)
    return np.linspace(least, largest, MOST_CELLS + 1)


def _of_numbers(spec: AnalysisSpec, contract: Contract, name: str) -> Generator[SumRequest[CheckedTable], Numbers, Description]:
    """Describe a variable of numbers on the grid that the contract's range gives."""
    scale, edges = unit(range_magnitude(name, contract)), grid_of(contract.variables[name])
    analysis = describe((edges / scale).tolist(), spec.patients_per_cell)
    try:
        request = next(analysis)
        while True:
            request = analysis.send((yield _of_column(request, spec, name, scale, (edges / scale))))
    except StopIteration as end:
        found: Description = end.value
    return replace(found, mean=found.mean * scale, variance=found.variance * scale**2, edges=found.edges * scale)


def _of_column(request: SumRequest[Numbers], spec: AnalysisSpec, name: str, scale: float, edges: Numbers) -> SumRequest[CheckedTable]:
    def own(table: CheckedTable) -> Numbers:
        values = np.asarray(table.columns[name], dtype=np.float64) / scale
        _check_cells(spec, name, np.histogram(values[~np.isnan(values)], edges)[0])
        return request.contribution(values)

    return SumRequest(statistic=f"{name}: {request.statistic}", shape=request.shape, contribution=own)


def _check_cells(spec: AnalysisSpec, name: str, counts: Numbers) -> None:
    if spec.cells == "site" and is_small(counts, spec.patients_per_cell):
        raise FewPatientsHere(f"policy.patients_per_cell: a cell of {name} has fewer than {spec.patients_per_cell} patients of this site")


def _is_given(values: Numbers | tuple[str, ...]) -> Numbers:
    return ~np.isnan(values) if isinstance(values, np.ndarray) else np.array([value != "" for value in values], dtype=bool)


def _shown(value: float) -> int | None:
    return None if math.isnan(value) else round(value)


def _is_counted(each: DescribedVariable) -> bool:
    return each.counts is not None and any(number is not None for number in each.counts.values())
