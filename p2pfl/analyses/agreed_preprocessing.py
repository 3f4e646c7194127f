"""Agreed numbers for gaps and scales of a table task, from a description of its variables over all sites."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.contract import Contract
from p2pfl.data.preprocessing import AgreedVariable, Preprocessing, Scale
from p2pfl.data.table_format import TableFormat
from p2pfl.data.values import read_date
from p2pfl.data.variables import Variable
from p2pfl.errors import ConfigError
from p2pfl.statistics.moments import Moments
from p2pfl.yaml_files import shown

IQR_OF_NORMAL = 1.3489795003921634
"""Distance of the quartiles of a normal distribution of standard deviation 1."""

_ISO = TableFormat()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Variables whose numbers a table task needs, and the rows that they are of."""

    contract: Contract
    outcome: str | None = None
    """Outcome that is a number, and needs a scale as well; None: it is classes."""
    by: str | None = None
    """Variable that names the test rows, which count for nothing here; None: all rows count."""
    test_label: str | None = None
    """Its label for test rows."""
    scales_categories: bool = False
    """Whether the columns of categories are scaled as well."""

    @property
    def variables(self) -> tuple[str, ...]:
        """Variables that the description is of."""
        return (*self.contract.inputs, *((self.outcome,) if self.outcome is not None else ()))

    @property
    def analysis(self) -> AnalysisSpec:
        """Description that gives the numbers, with the default floors."""
        asked: dict[str, Any] = {"kind": "describe", "variables": list(self.variables)}
        return AnalysisSpec.from_mapping(asked | ({"by": self.by} if self.by is not None else {}))


def agreed_preprocessing(wanted: Wanted, result: Mapping[str, Any], place: str) -> Preprocessing:
    """Make the agreed numbers of the result of a description, as `DescriptionResult.as_dict` and `--json` have it.

    A number's centre and scale are its mean and standard deviation. Where the floors hide them, they are the median and the distance of the
    quartiles over 1.349. What is missing takes the contract's agreed value, else the centre, or the most common category.

    Args:
        wanted: variables and rows.
        result: of simulated sites, or of institutions by secure sums.
        place: of the result, for messages.

    Raises:
        ConfigError: it is another analysis, or nothing is shown of a variable; every finding.
    """
    by_variable = _described(wanted, result, place)
    findings: list[str] = []
    agreed = {}
    for name in wanted.variables:
        variable = wanted.contract.variables[name]
        try:
            if variable.type == "category":
                agreed[name] = _of_categories(variable, by_variable[name], scales=wanted.scales_categories)
            else:
                agreed[name] = _of_numbers(variable, by_variable[name], is_outcome=name == wanted.outcome)
        except _NothingShown as error:
            findings.append(f"{name}: {error}")
    if findings:
        raise ConfigError(findings, place)
    content = {"contract": wanted.contract.digest, "variables": {name: each.as_dict() for name, each in agreed.items()}}
    return Preprocessing.from_mapping(content, wanted.contract, place)


class _NothingShown(ValueError):
    """A description shows too little of a variable."""


def _described(wanted: Wanted, result: Mapping[str, Any], place: str) -> dict[str, list[Mapping[str, Any]]]:
    """Find what the result says of each variable, in the groups that are not test rows."""
    analysis, variables = result.get("analysis"), result.get("variables")
    if not isinstance(analysis, Mapping) or analysis.get("kind") != "describe" or not isinstance(variables, Sequence):
        raise ConfigError("is no result of a description: expected what p2pfl stats prints with --json for kind: describe", place)
    if analysis.get("by") != wanted.by:
        expected = "none" if wanted.by is None else f"by: {wanted.by}, which names the test rows"
        raise ConfigError(f"analysis.by = {shown(analysis.get('by'))}: expected {expected}", place)
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in variables:
        if not isinstance(each, Mapping) or not isinstance(each.get("name"), str):
            raise ConfigError(f"variables: {shown(each)}: expected a mapping with a name", place)
        if wanted.by is None or each.get("group") != wanted.test_label:
            found.setdefault(each["name"], []).append(each)
    if missing := [name for name in wanted.variables if name not in found]:
        raise ConfigError(f"variables: {', '.join(missing)} not described, and the model needs them", place)
    return found


def _of_numbers(variable: Variable, said: Sequence[Mapping[str, Any]], *, is_outcome: bool) -> AgreedVariable:
    """Agreed numbers of a number or a date, from what is said of each group."""
    try:
        parts = [_moments(each, is_date=variable.type == "date") for each in said]
    except _NothingShown:
        raise
    except (TypeError, ValueError) as error:
        raise _NothingShown(f"the description cannot be read: {error}") from error
    if len(parts) == 1:
        centre, spread = parts[0][1], parts[0][2]
    else:
        if any(number is None for number, _, _ in parts):
            raise _NothingShown("a group of the training rows is too small to be shown: " + _BY_HAND)
        merged = Moments.merged(Moments(samples=int(number or 0), means=(mean,), deviations=(sd,)) for number, mean, sd in parts)
        centre, spread = merged.means[0], merged.deviations[0]
    scale = spread if spread > 0 else 1.0
    if is_outcome:
        return AgreedVariable(centre=centre, scale=scale)
    return AgreedVariable(centre=centre, scale=scale, missing=centre if variable.absent_value is None else variable.absent_value)


_BY_HAND = "agree on centre, scale and missing by hand, and write them into the file"


def _moments(said: Mapping[str, Any], *, is_date: bool) -> tuple[int | None, float, float]:
    """Number of values, centre and spread that a description shows."""
    mean, sd = said.get("mean"), said.get("sd")
    if mean is not None and sd is not None:
        return said.get("values"), _number(mean, is_date=is_date), float(sd)
    low, middle, high = (said.get(key) for key in ("q25", "q50", "q75"))
    if low is None or middle is None or high is None:
        raise _NothingShown(f"neither mean nor quartiles are shown, as too few patients could be told apart: {_BY_HAND}")
    spread = (_number(high, is_date=is_date) - _number(low, is_date=is_date)) / IQR_OF_NORMAL
    return None, _number(middle, is_date=is_date), spread


def _number(value: Any, *, is_date: bool) -> float:
    """A number as JSON has it, or the days of a date."""
    found = read_date(str(value), _ISO) if is_date else float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value} is no number")
    return found


def _of_categories(variable: Variable, said: Sequence[Mapping[str, Any]], *, scales: bool) -> AgreedVariable:
    """Agreed numbers of a category, from the counts of each group."""
    counts = [dict(each.get("counts") or {}) for each in said]
    known = {
        label: sum(int(each[label]) for each in counts) for label in variable.labels if all(each.get(label) is not None for each in counts)
    }
    missing = variable.absent_value
    if missing is None:
        # the counts that are hidden are small; where all are, the reference stands for them
        missing = max(known, key=lambda label: known[label]) if any(known.values()) else variable.labels[0]
    levels = dict(_scales(variable, known)) if scales else {}
    return AgreedVariable(missing=missing, levels=levels)


def _scales(variable: Variable, known: Mapping[str, int]) -> Iterator[tuple[str, Scale]]:
    """Mean and standard deviation (ddof 1) of the column of each label, among patients who have a value."""
    if len(known) < len(variable.labels):
        raise _NothingShown("not all categories are shown, as too few patients could be told apart: leave --scale all out")
    total = sum(known.values())
    for label in variable.labels:
        fraction = known[label] / total
        variance = fraction * (1 - fraction) * total / (total - 1)
        yield label, Scale(centre=fraction, scale=math.sqrt(variance) if variance > 0 else 1.0)
