"""Test rows of a table, chosen by patient: no patient has rows both to train on and to test on.

Shapes: M rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError, DataError
from p2pfl.tasks.partition import chosen_patients
from p2pfl.tasks.streams import generator_of
from p2pfl.yaml_files import check, nearest, shown

TEST_SHARE = 0.2
"""Fraction of a site's patients that it tests on, unless the experiment says otherwise."""

_PATIENTS = 6  # the streams of tasks/partition.py end before


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedTest:
    """Test rows that the table itself names: those with one label of a variable."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    variable: str
    label: str


def agreed_test(test: Any, contract: Contract) -> float | AgreedTest:
    """Check the option `test` of a table task: a fraction of the patients, or a variable and its label for test rows.

    Raises:
        ConfigError: it is neither, or the contract has no such variable or label.
    """
    if isinstance(test, int | float) and not isinstance(test, bool):
        if not 0 <= test < 1:
            raise ConfigError(f"task.test = {test}: expected a fraction from 0 to below 1, or a variable with its label for test rows")
        return float(test)
    if not isinstance(test, Mapping):
        raise ConfigError(f"task.test = {shown(test)}: expected a fraction such as 0.2, or {{variable: part, label: test}}")
    try:
        agreed = check(AgreedTest, test, "task.test")
    except ConfigError as error:
        raise ConfigError([f"task.test.{finding}" for finding in error.findings]) from error
    variable = contract.variables.get(agreed.variable)
    if variable is None or variable.type != "category":
        known = [name for name, each in contract.variables.items() if each.type == "category"]
        raise ConfigError(
            f"task.test.variable = {shown(agreed.variable)}: no variable with categories; "
            f"{nearest(agreed.variable, known)}expected one of {', '.join(known)}"
        )
    if agreed.label not in variable.labels:
        raise ConfigError(f"task.test.label = {shown(agreed.label)}: expected one of {', '.join(variable.labels)}")
    if agreed.variable in contract.inputs:
        raise ConfigError(f"task.test.variable = {shown(agreed.variable)}: it is a model input as well; expected another variable")
    return agreed


def split_by_patient(
    table: CheckedTable, classes_M: np.ndarray, test: float | AgreedTest, seed: int, site: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a site's training rows and test rows, each sorted.

    Args:
        table: of the site; rows whose outcome is missing have been left out.
        classes_M: by which a fraction of patients is stratified, whole numbers.
        test: fraction or variable.
        seed: of the experiment.
        site: name; with the seed it decides, whatever the order of the rows.

    Raises:
        DataError: patients have rows in both parts that a variable names.
    """
    patients = np.array(table.patients, dtype=str)
    if isinstance(test, AgreedTest):
        labels = np.array(table.columns[test.variable], dtype=str)
        is_test, is_there = labels == test.label, labels != ""
        if not set(patients[is_test]).isdisjoint(patients[is_there & ~is_test]):
            raise DataError(
                f"{test.variable}: patients have test rows and other rows: no patient is trained on and tested on; give each one label"
            )
        return np.flatnonzero(is_there & ~is_test), np.flatnonzero(is_test)
    if test == 0 or not len(patients):
        return np.arange(len(patients)), np.arange(0)
    is_test = chosen_patients(patients, classes_M, test, generator_of(seed, _PATIENTS, zlib.crc32(site.encode())))
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
