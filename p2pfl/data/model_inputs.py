"""Inputs of a model from a checked table: categories coded, gaps filled and numbers scaled, the same at every institution.

Shapes: M rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import INDICATOR, Contract
from p2pfl.data.preprocessing import AgreedVariable, Preprocessing
from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers

Coding = Literal["treatment", "one-hot"]
"""treatment: a column for each category but the first, which is the reference; one-hot: a column for each."""

CODINGS: tuple[Coding, ...] = get_args(Coding)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """The contract's inputs as columns of numbers, with the agreed numbers."""

    contract: Contract
    preprocessing: Preprocessing
    coding: Coding = "treatment"

    def check(self, place: str) -> None:
        """Refuse a contract without inputs, and inputs without agreed numbers; ConfigError with every fault."""
        if not self.contract.inputs:
            raise ConfigError("inputs: the contract names no variable that a model takes, such as inputs: [age, sex]", place)
        if faults := list(self.preprocessing.lacking(self.contract.inputs, self.contract)):
            raise ConfigError(faults, place)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, as in a regression: the variable's, followed by the label of a category."""
        return tuple(name for variable in self.contract.inputs for name in self._names_of(variable))

    def encode(self, table: CheckedTable) -> Numbers:
        """Code, fill and scale the rows of a table, (M, D)."""
        columns = [column for name in self.contract.inputs for column in self._columns_of(name, table)]
        return np.stack(columns, axis=-1)

    def _levels(self, name: str) -> tuple[str, ...]:
        return self.contract.variables[name].labels[0 if self.coding == "one-hot" else 1 :]

    def _names_of(self, name: str) -> list[str]:
        variable = self.contract.variables[name]
        found = [f"{name}{level}" for level in self._levels(name)] if variable.type == "category" else [name]
        return [*found, *([f"{name}.{INDICATOR}"] if variable.absent == "indicator" else [])]

    def _columns_of(self, name: str, table: CheckedTable) -> list[Numbers]:
        variable, agreed, values = self.contract.variables[name], self.preprocessing.variables[name], table.columns[name]
        columns = self._of_labels(name, agreed, values) if variable.type == "category" else [_scaled(agreed, values)]
        if variable.absent == "indicator":
            columns.append(np.asarray(table.columns[f"{name}.{INDICATOR}"], dtype=np.float64))
        return columns

    def _of_labels(self, name: str, agreed: AgreedVariable, values: Any) -> list[Numbers]:
        texts = np.asarray(values, dtype=str)
        texts = np.where(texts == "", str(agreed.missing), texts)
        found = []
        for level in self._levels(name):
            column, scale = (texts == level).astype(np.float64), agreed.levels.get(level)
            found.append(column if scale is None else (column - scale.centre) / scale.scale)
        return found


def _scaled(agreed: AgreedVariable, values: Any) -> Numbers:
    """Fill and scale the numbers of a variable, (M,)."""
    assert agreed.centre is not None
    assert agreed.scale is not None
    numbers = np.asarray(values, dtype=np.float64)
    filled = np.where(np.isnan(numbers), float(agreed.missing or 0.0), numbers)
    return np.asarray((filled - agreed.centre) / agreed.scale)
