"""Descriptions of variables over all sites, without a count, a total or an extreme that is a few patients.

Shapes: M rows of one site, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.floors import is_small
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import count, figure, text_table, wrapped
from p2pfl.analyses.variables import cell_labels, coded, group_labels, range_magnitude, unit
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.data.values import EPOCH
from p2pfl.data.variables import Variable
from p2pfl.errors import ConfigError
from p2pfl.statistics.cross_table import shown
from p2pfl.statistics.describe import MOST_CELLS, QUANTILES, Description, describe
from p2pfl.statistics.sums import Numbers, SumRequest, relayed
from p2pfl.statistics.survival import Integers

OF_CELLS = "Quantiles come from counts in cells; one whose cell is wider than the SD is not shown."


_DIGITS = 6  # of an edge: more are rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedVariable:
    """One variable over all sites; None stands for a number that is not shown."""

    name: str
    unit: str | None
    is_date: bool
    is_whole: bool
    """Whether all values are whole numbers."""
    group: str | None
    """Label of the patients' group; None: they are not in groups."""
    num_values: int | None
    num_missing: int | None
    description: Description | None
    """Figures of numbers; None for categories, and where too few patients have a value."""
    counts: dict[str, int | None] | None
    """Patients of each category."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and CSV."""
        content: dict[str, Any] = {"name": self.name, **({} if self.group is None else {"group": self.group}), "unit": self.unit}
        content |= {"values": self.num_values, "missing": self.num_missing}
        if self.counts is not None:
            return {**content, "counts": self.counts}
        found = {f"q{100 * each:g}": self._quantile(each) for each in QUANTILES}
        if self.description is None or self.num_values is None:  # a mean of known digits tells of how many values it is
            return {**content, "mean": None, "sd": None, **found}
        return {**content, "mean": self._said(self.description.mean), "sd": math.sqrt(self.description.variance), **found}

    def _quantile(self, fraction: float) -> float | str | None:
        """A quantile, or the middle of its cell where values are not counted; None: the cell is wider than the values' spread."""
        if self.description is None:
            return None
        low, high = self.description.cell(fraction)
        is_one_number = self.is_whole and high - low <= 1
        if high - low > math.sqrt(self.description.variance) and not is_one_number:
            return None
        value = (low + high) / 2 if self.num_values is None else self.description.quantile(fraction)
        if self.is_whole:  # cells of whole numbers begin half a number before them
            least, largest = (round(float(edge), _DIGITS) for edge in self.description.edges[[0, -1]])
            value = min(max(value, math.ceil(least)), math.floor(largest))
        return self._said(float(value))

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
            name = each.name if each.group is None else f"{each.name}, {each.group}"
            if each.counts is not None:
                categories.append((name, *counted))
                categories += [(f"  {label}", "-" if number is None else f"{number:,}", "") for label, number in each.counts.items()]
                continue
            said = each.as_dict()
            if each.is_date:
                dates.append((name, *counted, *(str(said[key] or "-") for key in ("mean", "q5", "q50", "q95"))))
                continue
            figures = ("-" if said[key] is None else figure(said[key], 4) for key in ("mean", "sd", "q5", "q25", "q50", "q75", "q95"))
            numbers.append((name if each.unit in (None, "1") else f"{name} [{each.unit}]", *counted, *figures))
        tables = [
            (("", "n", "missing", "mean", "SD", "5 %", "25 %", "50 %", "75 %", "95 %"), numbers),
            (("", "n", "missing", "mean", "5 %", "50 %", "95 %"), dates),
            (("", "patients", "missing"), categories),
        ]
        lines = [line for header, rows in tables if rows for line in (*text_table(header, rows), "")]
        return "\n".join([*lines, *wrapped(f"- and <: not shown, as fewer than {fewest} patients could be told apart. {OF_CELLS}")])

    def _counts(self, each: DescribedVariable) -> tuple[str, str]:
        """Patients with a value and without, or what may be said of them."""
        if each.num_values is None and each.num_missing is None and each.description is None and not _is_counted(each):
            return f"<{self.spec.patients_per_sum}", "-"
        fewest = self.spec.patients_per_cell
        return "-" if each.num_values is None else f"{each.num_values:,}", count(each.num_missing, fewest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Groups of patients that are described apart; one of all patients where nobody asks for others."""

    by: str | None
    labels: tuple[str, ...]

    @classmethod
    def of(cls, spec: AnalysisSpec, contract: Contract) -> Groups:
        """Groups of an analysis that has passed its check."""
        labels = ("all",) if spec.by is None else group_labels(spec.by, contract)
        assert labels is not None
        return cls(by=spec.by, labels=labels)

    def places(self, table: CheckedTable, contract: Contract) -> Integers:
        """Group of each row, (M,); -1 where it has none."""
        if self.by is None:
            return np.zeros(len(table.patients), dtype=np.int64)
        return coded(self.by, table.columns, contract, self.labels)

    def named(self, name: str, group: int | None = None) -> str:
        """Name of a variable with the groups, or with one of them, for the record of what a site has released."""
        if self.by is None:
            return name
        return f"{name} by {self.by}" if group is None else f"{name} where {self.by} is {self.labels[group]}"


def values_of(names: Sequence[str]) -> str:
    """Name of the first sum of a description."""
    return f"patients with a value of {', '.join(names)}"


def describe_variables(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[CheckedTable], Numbers, DescriptionResult]:
    """Describe each variable that the analysis names, in each group; ConfigError where no site has a row."""
    names, groups = spec.described(contract), Groups.of(spec, contract)
    num_groups = len(groups.labels)

    def given(table: CheckedTable) -> Numbers:
        places = groups.places(table, contract)
        is_in = places >= 0
        is_given_VM = [_is_given(table.columns[name]) for name in names]
        counts = [[np.bincount(places[is_in & each], minlength=num_groups) for each in (is_given, ~is_given)] for is_given in is_given_VM]
        return np.array(counts, dtype=np.float64)

    totals = yield SumRequest(statistic=groups.named(values_of(names)), shape=(len(names), 2, num_groups), contribution=given)
    if not totals.any():
        raise ConfigError("no site has a row" if groups.by is None else f"no site has a row with a value of {groups.by}")
    found: list[DescribedVariable] = []
    for name, counts in zip(names, totals, strict=True):
        found += yield from _described(spec, contract, groups, name, counts)
    return DescriptionResult(spec=spec, variables=tuple(found))


def _described(
    spec: AnalysisSpec, contract: Contract, groups: Groups, name: str, given: Numbers
) -> Generator[SumRequest[CheckedTable], Numbers, list[DescribedVariable]]:
    """Describe one variable in each group in which enough patients have a value.

    Args:
        spec: the analysis.
        contract: of all sites.
        groups: of patients, G.
        name: of the variable.
        given: patients with a value and without, (2, G).
    """
    variable, labels = contract.variables.get(name), cell_labels(name, contract)
    whole = shown(given, spec.patients_per_cell).cells_RC
    is_enough = given[0] >= spec.patients_per_sum
    cells = None
    if labels is not None and is_enough.any():
        cells = shown((yield _counts_of(spec, contract, groups, name, labels)), spec.patients_per_cell).cells_RC
    found = []
    for group, label in enumerate(groups.labels):
        said = DescribedVariable(
            name=name,
            unit=None if variable is None else variable.unit,
            is_date=variable is not None and variable.type == "date",
            is_whole=variable is not None and variable.type == "integer",
            group=None if groups.by is None else label,
            num_values=None,
            num_missing=None,
            description=None,
            counts=None if labels is None else dict.fromkeys(labels),
        )
        if not is_enough[group]:
            found.append(said)
        elif labels is None or cells is None:
            description = yield from _of_numbers(spec, contract, groups, name, group)
            found.append(replace(said, num_values=_shown(whole[0, group]), num_missing=_shown(whole[1, group]), description=description))
        else:
            counts = {category: _shown(number) for category, number in zip(labels, cells[:, group], strict=False)}
            missing = _shown(cells[-1, group])
            # all rows minus the patients with a value are those without
            num_values = None if missing is None else round(given[0, group])
            found.append(replace(said, num_values=num_values, num_missing=missing, counts=counts))
    return found


def _counts_of(spec: AnalysisSpec, contract: Contract, groups: Groups, name: str, labels: tuple[str, ...]) -> SumRequest[CheckedTable]:
    """Ask for the patients of each category and group, those without a value last."""
    shape = (len(labels) + 1, len(groups.labels))

    def own(table: CheckedTable) -> Numbers:
        places, columns = coded(name, table.columns, contract, labels), groups.places(table, contract)
        counts = np.zeros(shape)
        np.add.at(counts, (np.where(places < 0, len(labels), places)[columns >= 0], columns[columns >= 0]), 1.0)
        _check_cells(spec, name, counts)
        return counts

    return SumRequest(statistic=f"counts of {groups.named(name)}", shape=shape, contribution=own)


def grid_of(variable: Variable) -> Numbers:
    """Edges of the cells in which values are counted: a cell for each whole number, or the range in as many as there may be."""
    assert variable.range is not None
    least, largest = variable.range
    if variable.type == "integer" and largest - least < MOST_CELLS:
        return np.arange(least - 0.5, largest + 1)
    return np.linspace(least, largest, MOST_CELLS + 1)


def _of_numbers(
    spec: AnalysisSpec, contract: Contract, groups: Groups, name: str, group: int
) -> Generator[SumRequest[CheckedTable], Numbers, Description]:
    """Describe a variable of numbers in one group, on the grid that the contract's range gives."""
    scale, edges = unit(range_magnitude(name, contract)), grid_of(contract.variables[name])
    analysis = describe((edges / scale).tolist(), spec.patients_per_cell)

    def own(table: CheckedTable) -> Numbers:
        column: Numbers = np.asarray(table.columns[name], dtype=np.float64)
        values: Numbers = column[groups.places(table, contract) == group] / scale
        _check_cells(spec, name, np.histogram(values[~np.isnan(values)], edges / scale)[0])
        return values

    found = yield from relayed(analysis, lambda request: _of_column(request, groups.named(name, group), own))
    return replace(found, mean=found.mean * scale, variance=found.variance * scale**2, edges=found.edges * scale)


def _of_column(request: SumRequest[Numbers], named: str, values: Callable[[CheckedTable], Numbers]) -> SumRequest[CheckedTable]:
    return SumRequest(
        statistic=f"{named}: {request.statistic}", shape=request.shape, contribution=lambda table: request.contribution(values(table))
    )


def _check_cells(spec: AnalysisSpec, name: str, counts: Numbers) -> None:
    if spec.cells == "site" and is_small(counts, spec.patients_per_cell):
        raise FewPatientsHere(f"policy.patients_per_cell: a cell of {name} has fewer than {spec.patients_per_cell} patients of this site")


def _is_given(values: Numbers | tuple[str, ...]) -> NDArray[np.bool_]:
    return ~np.isnan(values) if isinstance(values, np.ndarray) else np.array([value != "" for value in values], dtype=bool)


def _shown(value: float) -> int | None:
    return None if math.isnan(value) else round(value)


def _is_counted(each: DescribedVariable) -> bool:
    return each.counts is not None and any(number is not None for number in each.counts.values())
