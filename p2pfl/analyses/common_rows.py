"""Common complete cases: rows in which no variable of any analysis of a study is missing, so that all analyses count the same patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers


def with_common(specs: Mapping[str, AnalysisSpec], contract: Contract) -> dict[str, AnalysisSpec]:
    """Write into each analysis with rows: common the variables that all of these analyses use, in the contract's order.

    Args:
        specs: all analyses of a study, by name.
        contract: of the study.
    """
    used = {name for spec in specs.values() for name in (*spec.names_used(contract), *spec.common)}
    common = (*(name for name in contract.variables if name in used), *sorted(used - set(contract.variables)))
    return {name: replace(spec, common=common) if spec.rows == "common" else spec for name, spec in specs.items()}


def counted_rows(spec: AnalysisSpec, table: CheckedTable) -> CheckedTable:
    """Rows of a site that an analysis looks at: all, or those without a missing value in the study's variables.

    Raises:
        ConfigError: the analysis does not say which variables these are.
    """
    if spec.rows != "common":
        return table
    if not spec.common:
        raise ConfigError("rows = 'common': the variables of all analyses of the study are not known; name them, as common: [age, sex]")
    is_complete = np.logical_and.reduce([is_given(table.columns[name]) for name in spec.common])
    return table.rows(np.flatnonzero(is_complete).tolist())


def is_given(values: Numbers | tuple[str, ...]) -> NDArray[np.bool_]:
    """Whether a row has a value of a column, (M,)."""
    return ~np.isnan(values) if isinstance(values, np.ndarray) else np.array([value != "" for value in values], dtype=np.bool_)
