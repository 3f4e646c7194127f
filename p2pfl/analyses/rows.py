"""A site's checked table as the rows of one analysis: complete cases alone, with their patients and their cells.

Shapes: M complete rows of one site, P columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.variables import (
    Columns,
    absent_names,
    cell_labels,
    coded,
    group_labels,
    is_survival,
    outcome_numbers,
    range_magnitude,
    unit,
    units,
)
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.cox import CoxRows
from p2pfl.statistics.design import DesignColumns, design
from p2pfl.statistics.formula import Variable
from p2pfl.statistics.glm import DesignRows
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.sums import Numbers
from p2pfl.statistics.survival import Integers, SurvivalRows

MOST_CROSS_CELLS = 4096

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRows(Generic[Part]):
    """One site's complete rows of an analysis."""

    part: Part
    """Rows as the statistic takes them."""
    patients_M: Integers
    """Number of each row's patient, from 0 in the order of the rows."""
    cells_M: Integers
    """Cell of the cross table of all categorical variables."""
    num_missing: int
    """Rows that were left out because a value is missing."""
    inputs_MK: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    """Number that each polynomial or spline is of."""
    place: int = 0
    """Place of the site among all, for analyses that take a summary of each."""

    @property
    def num_patients(self) -> int:
        """Patients who have a complete row."""
        return len(np.unique(self.patients_M))

    def patients_by_cell(self, num_cells: int) -> Numbers:
        """Patients in each cell of the cross table, (cells,)."""
        size = int(self.patients_M.max(initial=0)) + 1
        pairs = np.unique(self.cells_M * size + self.patients_M)
        return np.bincount(pairs // size, minlength=num_cells).astype(np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelColumns:
    """Columns that a formula has over any table of the contract."""

    names: tuple[str, ...]
    units_P: Numbers
    """Powers of two near the largest magnitudes."""
    outcome_unit: float
    """Power of two by which a gaussian outcome is divided in sums; 1 elsewhere."""
    curves: tuple[Variable, ...] = ()
    """Polynomials and splines of the formula, each once, K of them."""
    powers: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Place of a polynomial among the curves and its degree, for each column that it is a factor of."""

    @classmethod
    def of(cls, spec: AnalysisSpec, contract: Contract) -> ModelColumns:
        """Columns of an analysis, from its formula and the contract's levels."""
        empty: dict[str, Numbers | tuple[str, ...]] = {
            name: () if each.type in ("category", "id") else np.zeros(0) for name, each in contract.variables.items()
        }
        empty |= dict.fromkeys(absent_names(contract), np.zeros(0))
        found = _without_intercept(design(spec.parsed, empty, contract.levels), spec)
        is_scaled = spec.outcome_family == "gaussian"
        return cls(
            names=found.names,
            units_P=units(found.terms, contract),
            outcome_unit=unit(range_magnitude(spec.parsed.outcome[0], contract)) if is_scaled else 1.0,
            curves=found.curves,
            powers=found.powers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossTable:
    """Categorical variables of an analysis, its outcome included, and all combinations of their labels."""

    names: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, spec: AnalysisSpec, contract: Contract) -> CrossTable:
        """Cross table of an analysis.

        Raises:
            ConfigError: it has too many cells to see that each is common to enough patients.
        """
        named = set() if spec.kind not in ("km", "compare") or not is_survival(spec.parsed) else {groups_of(spec, contract)[0]}
        labels_of = {name: (group_labels if name in named else cell_labels)(name, contract) for name in spec.parsed.columns}
        found = {name: labels for name, labels in labels_of.items() if labels is not None}
        table = cls(names=tuple(found), labels=tuple(found.values()))
        if table.num_cells > MOST_CROSS_CELLS:
            raise ConfigError(
                f"{', '.join(found)} have {table.num_cells:,} combinations: too many to see that each has enough patients; "
                f"{MOST_CROSS_CELLS:,} are the most"
            )
        return table

    def holds_all(self, spec: AnalysisSpec) -> bool:
        """Whether every column of an analysis is categorical, so that the cells of this table hold the floor for all that it releases."""
        return all(name in self.names for name in spec.parsed.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of labels of each variable."""
        return tuple(len(each) for each in self.labels)

    @property
    def num_cells(self) -> int:
        """Number of combinations of labels."""
        return math.prod(self.shape)

    def cells(self, columns: Columns, contract: Contract) -> Integers:
        """Cell of each row, (M,); a row with a missing value has any."""
        num_rows = len(next(iter(columns.values())))
        if not self.names:
            return np.zeros(num_rows, dtype=np.int64)
        places = [coded(name, columns, contract, labels) for name, labels in zip(self.names, self.labels, strict=True)]
        return np.ravel_multi_index([np.clip(each, 0, size - 1) for each, size in zip(places, self.shape, strict=True)], self.shape).astype(
            np.int64
        )

    def empty_labels(self, counts: Numbers) -> Iterator[tuple[str, str]]:
        """Find variables and labels that no patient has."""
        table = counts.reshape(self.shape)
        for axis, (name, labels) in enumerate(zip(self.names, self.labels, strict=True)):
            by_label = table.sum(axis=tuple(other for other in range(table.ndim) if other != axis))
            yield from ((name, label) for label, count in zip(labels, by_label, strict=True) if count < 1)


def design_rows(spec: AnalysisSpec, contract: Contract, table: CheckedTable) -> SiteRows[DesignRows]:
    """Rows of a generalised linear model."""
    columns, found, outcome = table.columns, _design(spec, contract, table), spec.parsed.outcome[0]
    outcome_unit = ModelColumns.of(spec, contract).outcome_unit
    outcomes_M = outcome_numbers(outcome, columns, contract)
    is_complete = np.isfinite(found.columns_MP).all(axis=1) & np.isfinite(outcomes_M) & np.isfinite(found.offsets_M)
    num_missing = int((~is_complete).sum())
    rows = DesignRows(
        columns_MP=found.columns_MP[is_complete],
        outcomes_M=outcomes_M[is_complete] / outcome_unit,
        offsets_M=found.offsets_M[is_complete] / outcome_unit,
        weights_M=np.ones(int(is_complete.sum())),
        num_missing=num_missing,
    )
    return _with_inputs(_site_rows(spec, contract, table, rows, is_complete), found, is_complete)


def cox_rows(spec: AnalysisSpec, contract: Contract, table: CheckedTable) -> SiteRows[CoxRows]:
    """Rows of a Cox model."""
    found = _design(spec, contract, table)
    times_M, events_M = _times_and_events(spec, contract, table.columns)
    is_complete = np.isfinite(found.columns_MP).all(axis=1) & np.isfinite(times_M) & np.isfinite(events_M)
    rows = CoxRows(columns_MP=found.columns_MP[is_complete], times_M=times_M[is_complete], events_M=events_M[is_complete] > 0)
    _check_times(rows.times_M, spec)
    return _with_inputs(_site_rows(spec, contract, table, rows, is_complete), found, is_complete)


def survival_rows(spec: AnalysisSpec, contract: Contract, table: CheckedTable) -> SiteRows[SurvivalRows]:
    """Rows of survival curves and log-rank tests."""
    times_M, events_M = _times_and_events(spec, contract, table.columns)
    name, labels = groups_of(spec, contract)
    groups_M = np.zeros(len(times_M), dtype=np.int64) if name is None else coded(name, table.columns, contract, labels)
    is_complete = np.isfinite(times_M) & np.isfinite(events_M) & (groups_M >= 0)
    rows = SurvivalRows(times_M=times_M[is_complete], events_M=events_M[is_complete] > 0, groups_M=groups_M[is_complete])
    _check_times(rows.times_M, spec)
    return _site_rows(spec, contract, table, rows, is_complete)


def part_of(site: SiteRows[Part]) -> Part:
    """Rows of one site as the statistic has them, without its patients and cells."""
    return site.part


def groups_of(spec: AnalysisSpec, contract: Contract) -> tuple[str | None, tuple[str, ...]]:
    """Variable of the groups with its labels; None and one label where there are no groups."""
    named = [term[0].column for term in spec.parsed.terms if term]
    if not named:
        return None, ("all",)
    labels = group_labels(named[0], contract)
    assert labels is not None
    return named[0], labels


def _design(spec: AnalysisSpec, contract: Contract, table: CheckedTable) -> DesignColumns:
    return _without_intercept(design(spec.parsed, table.columns, contract.levels), spec)


def _without_intercept(found: DesignColumns, spec: AnalysisSpec) -> DesignColumns:
    """Columns as they are, but a Cox model's without the intercept, which its baseline holds."""
    if not is_survival(spec.parsed):
        return found
    kept = [place for place, name in enumerate(found.names) if name != INTERCEPT]
    return replace(
        found,
        names=tuple(found.names[place] for place in kept),
        columns_MP=found.columns_MP[:, kept],
        terms=tuple(found.terms[place] for place in kept),
        powers=tuple(found.powers[place] for place in kept),
    )


def _with_inputs(rows: SiteRows[Part], found: DesignColumns, is_complete: NDArray[np.bool_]) -> SiteRows[Part]:
    return replace(rows, inputs_MK=found.inputs_MK[is_complete]) if found.curves else rows


def _times_and_events(spec: AnalysisSpec, contract: Contract, columns: Columns) -> tuple[Numbers, Numbers]:
    time, event = spec.parsed.outcome
    return np.asarray(columns[time], dtype=np.float64), outcome_numbers(event, columns, contract)


def _check_times(times_M: Numbers, spec: AnalysisSpec) -> None:
    if not (times_M > 0).all():
        raise ConfigError(f"{spec.parsed.outcome[0]} is 0 or less in some rows: whoever is not followed cannot be counted; say missing")


def _site_rows(spec: AnalysisSpec, contract: Contract, table: CheckedTable, rows: Part, is_complete: NDArray[np.bool_]) -> SiteRows[Part]:
    if contract.rows == "one-per-patient":
        patients = np.arange(len(table.patients))
    else:
        patients = np.unique(np.array(table.patients, dtype=str), return_inverse=True)[1].reshape(-1)
    return SiteRows(
        part=rows,
        patients_M=patients[is_complete].astype(np.int64),
        cells_M=CrossTable.of(spec, contract).cells(table.columns, contract)[is_complete],
        num_missing=int((~is_complete).sum()),
    )
