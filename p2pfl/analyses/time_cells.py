"""Agreed cells of time, merged on totals until each hides enough patients of every group.

Shapes: T cells, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from p2pfl.analyses.floors import is_small
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.rows import SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.contract import Contract
from p2pfl.statistics.sums import Numbers, SumRequest
from p2pfl.statistics.survival import LifeTable, SurvivalRows, counts, life_table, merged_ends

Part = TypeVar("Part")
Fit = TypeVar("Fit")

OF_CELLS = "partial likelihood"
"""Beginning of the statistics that have numbers for each cell of time, where one baseline is common to all sites."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeCells:
    """Cells of time on which a result stands."""

    ends_T: Numbers
    num_agreed: int
    """Cells before any were merged."""

    def around(self, time: float) -> tuple[float, float] | None:
        """Ends of the cell that ends at a time; None where none does."""
        places = np.flatnonzero(self.ends_T == time)
        return (float(self._starts[places[0]]), float(time)) if len(places) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        widest = int((self.ends_T - self._starts).argmax())
        ends = [float(self._starts[widest]), float(self.ends_T[widest])]
        return {"number": len(self.ends_T), "agreed": self.num_agreed, "widest": ends, "about": self._sentence(ends)}

    def __str__(self) -> str:
        return str(self.as_dict()["about"])

    @property
    def _starts(self) -> Numbers:
        return np.concatenate([[0.0], self.ends_T[:-1]])

    def _sentence(self, widest: list[float]) -> str:
        number = "1 cell" if len(self.ends_T) == 1 else f"{len(self.ends_T):,} cells"
        merged = "" if len(self.ends_T) == self.num_agreed else f", merged from {self.num_agreed:,}"
        return (
            f"Times are known by their cell alone: {number}{merged}, the widest from {widest[0]:g} to {widest[1]:g}. "
            "Figures equal the pooled ones on these cells, and may be far from those on exact times."
        )


def count_cells(
    spec: AnalysisSpec, contract: Contract, part: Callable[[SiteRows[Part]], SurvivalRows], num_groups: int
) -> Generator[SumRequest[Any], Numbers, LifeTable]:
    """Count events and censored patients of all sites in the agreed cells of time, and merge these forward until the floor of a cell holds.

    Raises:
        ConfigError: a group has too few patients for any cell.
    """
    ends_T = spec.time_cells(contract)

    def own(site: SiteRows[Part]) -> Numbers:
        found = counts(part(site), ends_T, num_groups)
        if spec.cells == "site":
            at_risk = life_table(ends_T, found).at_risk
            if any(is_small(each, spec.patients_per_cell) for each in (found, at_risk)):
                raise FewPatientsHere(
                    f"policy.patients_per_cell: a cell of time has fewer than {spec.patients_per_cell} patients of this site: "
                    "agree on other ends"
                )
        return found

    total = yield SumRequest(statistic="counts by cell of time", shape=(2, len(ends_T), num_groups), contribution=own)
    table = life_table(ends_T, total)
    return merged(table, merged_ends(table, spec.patients_per_cell))


def filled_up(
    analysis: Generator[SumRequest[Part], Numbers, Fit], num_merged: int, num_agreed: int
) -> Generator[SumRequest[Part], Numbers, Fit]:
    """Ask for the numbers of merged cells as for those of all agreed ones, with zeros at the end.

    Members agree on the shapes of all sums before they know how many cells are left.
    """
    try:
        request = next(analysis)
        while True:
            if not request.statistic.startswith(OF_CELLS):
                request = analysis.send((yield request))
                continue
            (size,) = request.shape
            total = yield _wider(request, size // num_merged * num_agreed)
            request = analysis.send(total[:size])
    except StopIteration as end:
        fit: Fit = end.value
        return fit


def _wider(request: SumRequest[Part], size: int) -> SumRequest[Part]:
    def own(rows: Part) -> Numbers:
        numbers = request.contribution(rows)
        return np.concatenate([numbers, np.zeros(size - len(numbers))])

    return SumRequest(statistic=request.statistic, shape=(size,), contribution=own)


def merged(table: LifeTable, ends: Numbers) -> LifeTable:
    """Count the patients in wider cells, which end at some of the table's ends, the last among them."""
    firsts = np.concatenate([[0], np.searchsorted(table.ends_T, ends[:-1], side="right")])
    return LifeTable(
        ends_T=ends,
        events_TG=np.add.reduceat(table.events_TG, firsts, axis=0),
        censored_TG=np.add.reduceat(table.censored_TG, firsts, axis=0),
    )
