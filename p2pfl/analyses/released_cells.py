"""Cells of numbers and of time in which an analysis counts patients, and the rule that other cells later on tell apart no few of them.

Two counts up to ends that lie close together differ by the patients between: whoever could choose the ends would find a patient by halving.

Shapes: E edges, M rows of one site.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from p2pfl.analyses.descriptions import grid_of
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.variables import cell_labels, is_survival
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.statistics.calibration import RISK_ENDS
from p2pfl.statistics.sums import Numbers


@dataclass(frozen=True, kw_only=True)
class CountedCells:
    """Cells of one variable, before any are merged."""

    variable: str
    """Variable that is counted; for risks all that the model reads, in one text."""
    kind: Literal["values", "time", "risk"]
    """time: a cell has its end and not its start; values: the other way round; risk: as the model predicts it."""
    edges_E: Numbers
    fewest: int | None = None
    """Patients that a cell must have, until which cells of time and risk are merged; None: they are not merged, or it is unknown."""

    @classmethod
    def of(cls, spec: AnalysisSpec, contract: Contract) -> tuple[CountedCells, ...]:
        """All cells in which an analysis counts patients by a number or by time."""
        if spec.kind == "describe":
            names = [name for name in spec.described(contract) if cell_labels(name, contract) is None and name in contract.variables]
            return tuple(cls(variable=name, kind="values", edges_E=grid_of(contract.variables[name])) for name in names)
        if spec.kind == "calibration":
            read = ", ".join(sorted(spec.names_used(contract)))
            return (cls(variable=read, kind="risk", edges_E=np.array(spec.ends or RISK_ENDS), fewest=spec.patients_per_cell),)
        if not is_survival(spec.parsed) or spec.is_by_site:
            return ()
        edges_E = spec.time_cells(contract)
        return (cls(variable=spec.parsed.outcome[0], kind="time", edges_E=edges_E, fewest=spec.patients_per_cell),)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> CountedCells:
        """Read cells from an entry of a log."""
        edges_E = np.frombuffer(zlib.decompress(base64.b64decode(content["edges"])), dtype="<f8")
        return cls(variable=content["variable"], kind=content["kind"], edges_E=edges_E, fewest=content.get("fewest"))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the edges as little-endian float64, zlib, base64."""
        edges = base64.b64encode(zlib.compress(self.edges_E.astype("<f8").tobytes())).decode()
        fewest = {} if self.fewest is None else {"fewest": self.fewest}
        return {"variable": self.variable, "kind": self.kind, "edges": edges, **fewest}

    def refusal(self, fewest: int) -> str:
        """Say why an analysis with these cells is refused, and what can be asked instead."""
        if self.kind == "risk":
            return (
                f"the risk by {self.variable} was counted in other cells or with another patients_per_cell before, and fewer than {fewest} "
                "patients may be between their ends: ask with the same ones"
            )
        return (
            f"{self.variable} was counted in other cells before, and fewer than {fewest} patients may be between their ends: "
            "ask on the same cells with the same patients_per_cell"
        )

    def tells_few_apart(self, other: CountedCells, table: CheckedTable, fewest: int) -> bool:
        """Whether fewer patients of a site than *fewest* are in one cell here and in one there, each of which holds others as well.

        Cells that are merged until each has so many patients end at places that no site knows beforehand, also where one grid is made of
        cells of the other. A risk is known after the fit alone. So other cells than the same ones may tell few apart.
        """
        if (self.variable, self.kind) != (other.variable, other.kind):
            return False
        if None not in (self.fewest, other.fewest) and self.fewest != other.fewest:
            return True
        is_merged = self.kind == "time" and self.fewest != 1
        if self.kind == "risk" or is_merged:
            return not np.array_equal(self.edges_E, other.edges_E)
        if self.variable not in table.columns:
            return False
        values_M = np.asarray(table.columns[self.variable], dtype=np.float64)
        is_there_M = ~np.isnan(values_M)
        patients_M = np.unique(np.array(table.patients, dtype=str), return_inverse=True)[1].reshape(-1)[is_there_M]
        side: Literal["left", "right"] = "left" if self.kind == "time" else "right"
        places = [np.searchsorted(each.edges_E, values_M[is_there_M], side=side) for each in (self, other)]
        triples = np.unique(np.stack([*places, patients_M], axis=1), axis=0)  # a patient counts once in each pair of cells
        pairs, counts = np.unique(triples[:, :2], axis=0, return_counts=True)
        ours, theirs = (np.bincount(pairs[:, axis], weights=counts)[pairs[:, axis]] for axis in (0, 1))
        return bool(((counts < fewest) & (counts < ours) & (counts < theirs)).any())


def cells_told_apart(
    new: tuple[CountedCells, ...], released: Iterator[CountedCells], table: CheckedTable, fewest: int
) -> CountedCells | None:
    """Find cells of an analysis that, with some that were released, tell few patients of a site apart; None where none do."""
    earlier = list({(each.variable, each.kind, each.fewest, each.edges_E.tobytes()): each for each in released}.values())
    return next((each for each in new for other in earlier if each.tells_few_apart(other, table, fewest)), None)
