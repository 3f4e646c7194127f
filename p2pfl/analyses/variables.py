"""Variables of a formula as the contract has them: types that an analysis can use, groups, events, and magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from p2pfl.data.contract import INDICATOR, Contract
from p2pfl.data.variables import Variable as ContractVariable
from p2pfl.statistics.formula import CURVES, POLY, SPLINE, Formula, Term, Variable
from p2pfl.statistics.splines import natural_spline
from p2pfl.statistics.sums import Numbers
from p2pfl.statistics.survival import Integers
from p2pfl.yaml_files import nearest

TWO = 2
MOST_GROUPS = 20

MOST_WHOLE_NUMBERS = 5
"""Whole numbers in a range up to which each is taken for a category, such as 0 and 1, or a score from 0 to 4."""

_LARGEST_LOGARITHM = 745.0
"""Magnitude of the logarithm of any float64 that is not 0."""

Columns = Mapping[str, Numbers | tuple[str, ...]]


def is_survival(formula: Formula) -> bool:
    """Whether the outcome is a time and an event."""
    return len(formula.outcome) == TWO


def absent_names(contract: Contract) -> list[str]:
    """Columns that say at which sites a variable is absent."""
    return [f"{name}.{INDICATOR}" for name, each in contract.variables.items() if each.absent == "indicator"]


def group_labels(name: str, contract: Contract) -> tuple[str, ...] | None:
    """Labels of a variable with few values, in their order: its categories, or its whole numbers; None where it has others."""
    variable = contract.variables.get(name)
    if variable is None:
        return ("0", "1") if name in absent_names(contract) else None
    if variable.type == "category":
        return variable.labels
    if variable.type != "integer" or variable.range is None or variable.range[1] - variable.range[0] >= MOST_GROUPS:
        return None
    return tuple(str(value) for value in range(int(variable.range[0]), int(variable.range[1]) + 1))


def cell_labels(name: str, contract: Contract) -> tuple[str, ...] | None:
    """Labels of a variable that is categorical for the floor of patients in a cell: with categories, or few whole numbers."""
    labels = group_labels(name, contract)
    variable = contract.variables.get(name)
    is_factor = variable is not None and variable.type == "category"
    return labels if labels is not None and (is_factor or len(labels) <= MOST_WHOLE_NUMBERS) else None


def coded(name: str, columns: Columns, contract: Contract, labels: Sequence[str]) -> Integers:
    """Positions of the rows' labels, -1 where a value is missing; (M,)."""
    values = columns[name]
    variable = contract.variables.get(name)
    if variable is not None and variable.type == "category":
        places = {label: place for place, label in enumerate(labels)}
        return np.array([places.get(str(value), -1) for value in values], dtype=np.int64)
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.isnan(numbers), -1, np.nan_to_num(numbers) - int(labels[0])).astype(np.int64)


def outcome_numbers(name: str, columns: Columns, contract: Contract) -> Numbers:
    """An outcome as numbers: of two categories 0 is the first and 1 the second; NaN where it is missing; (M,)."""
    variable = contract.variables[name]
    if variable.type != "category":
        return np.asarray(columns[name], dtype=np.float64)
    places = coded(name, columns, contract, variable.labels)
    return np.where(places < 0, np.nan, places.astype(np.float64))


def faults_of_variables(formula: Formula, contract: Contract, known: Sequence[str], family: str | None) -> Iterator[str]:
    """Find names that are none, and variables that cannot stand where the formula has them."""
    for name in formula.columns:
        if name not in known:
            yield f"formula: {name}: no variable of the contract; {nearest(name, list(known))}expected one of {', '.join(known)}"
    inputs = [each for term in formula.terms for each in term]
    for each in dict.fromkeys([*inputs, *formula.offsets]):
        variable = contract.variables.get(each.column)
        if each.column in formula.outcome:
            yield f"formula: {each.column} is the outcome, and stands on the right side as well"
        if variable is not None:
            yield from _faults_of_input(each, variable, is_offset=each in formula.offsets)
        elif each.function in CURVES and each.column in known:
            yield f"formula: {each}: {each.column} is 0 or 1; a curve needs a number"
    if is_survival(formula):
        yield from _faults_of_survival(formula, contract)
    elif (outcome := contract.variables.get(formula.outcome[0])) is not None:
        yield from _faults_of_outcome(formula.outcome[0], outcome, family)


def _faults_of_input(used: Variable, agreed: ContractVariable, *, is_offset: bool) -> Iterator[str]:
    if agreed.type == "id":
        yield f"formula: {used.column} is of type id, which no model takes"
    elif agreed.type == "category" and (used.function or is_offset):
        yield f"formula: {used}: {used.column} has categories, and a number is needed"
    elif used.function == SPLINE and agreed.range is not None and not _spans(agreed.range, used.numbers):
        yield f"formula: {used}: {used.column} goes from {agreed.range[0]:g} to {agreed.range[1]:g}; expected knots between these"


def _faults_of_survival(formula: Formula, contract: Contract) -> Iterator[str]:
    name, event_name = formula.outcome
    time, event = contract.variables.get(name), contract.variables.get(event_name)
    if time is not None and not time.is_numeric:
        yield f"formula: {name} is of type {time.type}; expected a number, the time until the event or the last visit"
    if event is not None and not _is_binary(event):
        yield f"formula: {event_name} is no event: expected whole numbers with range [0, 1], or two categories, the second the event"


def _faults_of_outcome(name: str, outcome: ContractVariable, family: str | None) -> Iterator[str]:
    needed = {
        "binomial": (
            "numbers with range [0, 1], or two categories",
            _is_binary(outcome) or (outcome.is_numeric and _within(outcome, 0, 1)),
        ),
        "poisson": ("a number with a range from 0 on", outcome.is_numeric and _within(outcome, 0, math.inf)),
        "gaussian": ("a number", outcome.is_numeric),
        "gamma": ("a number with a range from 0 on", outcome.is_numeric and _within(outcome, 0, math.inf)),
        "negative-binomial": ("a number with a range from 0 on", outcome.is_numeric and _within(outcome, 0, math.inf)),
    }
    if family in needed and not needed[family][1]:
        what = f"of type {outcome.type}" + (f" with range [{outcome.range[0]:g}, {outcome.range[1]:g}]" if outcome.range else "")
        yield f"formula: {name} is {what}; an outcome of family {family} has {needed[family][0]}"


def _is_binary(variable: ContractVariable) -> bool:
    if variable.type == "category":
        return len(variable.categories) == TWO
    return variable.type == "integer" and _within(variable, 0, 1)


def _within(variable: ContractVariable, least: float, largest: float) -> bool:
    return variable.range is not None and least <= variable.range[0] and variable.range[1] <= largest


def _spans(ends: tuple[float, float], knots: Sequence[float]) -> bool:
    return ends[0] < knots[0] and knots[-1] < ends[1]


def units(terms: Sequence[Term], contract: Contract) -> Numbers:
    """Powers of two that are no smaller than the largest magnitude of each column, from the contract's ranges; (P,)."""
    return np.array([unit(math.prod(_magnitude(each, contract) for each in term)) for term in terms])


def unit(magnitude: float) -> float:
    """The power of two at or above a magnitude, within what float64 can invert."""
    if not magnitude > 0:
        return 1.0
    return float(2.0 ** min(max(math.ceil(math.log2(min(magnitude, 2.0**500))), -500), 500))


def range_magnitude(name: str, contract: Contract) -> float:
    """Largest magnitude of a variable in the contract; 1 for categories."""
    variable = contract.variables.get(name)
    return 1.0 if variable is None or variable.range is None else max(abs(variable.range[0]), abs(variable.range[1]))


def _magnitude(variable: Variable, contract: Contract) -> float:
    agreed = contract.variables.get(variable.column)
    if agreed is None or agreed.range is None:
        return 1.0
    least, largest = agreed.range
    if variable.function == SPLINE:
        return float(np.abs(natural_spline(np.array([least, largest]), variable.numbers)).max())
    ends = {
        "log": (_largest_logarithm(each) for each in (least, largest)),
        "exp": (math.exp(min(largest, _LARGEST_LOGARITHM - 100)),),
        "sqrt": (math.sqrt(max(largest, 0.0)),),
        POLY: (1.0,),
    }
    return max(ends.get(variable.function, (abs(least), abs(largest))))


def _largest_logarithm(end: float) -> float:
    return abs(math.log(end)) if end > 0 else _LARGEST_LOGARITHM
