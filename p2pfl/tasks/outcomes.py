"""Outcomes of a data contract as targets, with the model, the loss and the metrics that fit them.

Shapes: M rows, D model inputs, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.data.contract import Contract
from p2pfl.data.preprocessing import Preprocessing, Scale
from p2pfl.data.variables import Variable
from p2pfl.errors import ConfigError
from p2pfl.tasks.base import MetricFunction
from p2pfl.tasks.metrics import CLASSIFICATION, Metric
from p2pfl.tasks.tables import class_targets, column_targets
from p2pfl.tasks.time_to_event import COX, TimeToEvent, time_to_event
from p2pfl.yaml_files import nearest, shown

MODELS = ("logistic", "linear", "mlp", COX)
HIDDEN = (32,)
"""Widths of the hidden layers of an mlp, unless the experiment says otherwise."""

_TWO = 2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome that a model predicts: classes, or a number on an agreed scale."""

    name: str
    classes: tuple[str, ...] = ()
    """Labels in the contract's order; empty for a number."""
    scale: Scale | None = None
    """Agreed scale of a number; None for classes."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the model for each row: one logit of two classes, one for each of more, or one number."""
        return len(self.classes) if len(self.classes) > _TWO else 1

    def values(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Classes by number, or numbers, (M,) float64; NaN where the outcome is missing."""
        column = columns[self.name]
        if not isinstance(column, np.ndarray):
            places = {label: float(place) for place, label in enumerate(self.classes)}
            return np.array([places.get(label, math.nan) for label in column], dtype=np.float64)
        return np.asarray(column, dtype=np.float64)

    def strata(self, values_M: np.ndarray) -> np.ndarray:
        """Classes by which test rows are drawn, (M,); one of a number."""
        return values_M if self.classes else np.zeros(len(values_M))

    def targets(self, values_M: np.ndarray) -> Tensor:
        """Targets of rows whose outcome is not missing: (M,) of more than two classes, else (M, 1)."""
        return class_targets(values_M) if len(self.classes) > _TWO else column_targets(values_M)

    def model(self, num_inputs: int, hidden: Sequence[int]) -> Callable[[], nn.Module]:
        """Make the function that makes the model: linear without hidden layers."""
        make = partial(_layers, num_inputs, tuple(hidden), self.num_outputs)
        return make if self.scale is None else partial(_in_units, make, self.scale)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Loss of the model: cross entropy, or squared error in squares of the agreed scale."""
        if self.scale is not None:
            return partial(_squared_error, scale=self.scale.scale)
        return F.cross_entropy if len(self.classes) > _TWO else F.binary_cross_entropy_with_logits

    @property
    def metrics(self) -> Mapping[str, MetricFunction]:
        """Metrics of classes, or of a number in its own unit."""
        return CLASSIFICATION if self.scale is None else REGRESSION

    @property
    def probabilities(self) -> Callable[[Tensor], Tensor] | None:
        """Function from outputs to probabilities; None for a number, which is predicted as it is."""
        if self.scale is not None:
            return None
        return partial(torch.softmax, dim=-1) if len(self.classes) > _TWO else torch.sigmoid


def outcome_of(model: str, name: str | Sequence[str] | None, contract: Contract, preprocessing: Preprocessing) -> Outcome | TimeToEvent:
    """Find the outcome of a table task.

    Args:
        model: one of MODELS.
        name: of the variable, for cox of time and event; None: the contract's outcome.
        contract: of the table.
        preprocessing: with the agreed scale of a number.

    Raises:
        ConfigError: the model has no such outcome, or there is no agreed scale for it.
    """
    if model == COX:
        return time_to_event(name, contract)
    named, classes = _predicted(model, name, contract)
    if classes:
        return Outcome(name=named, classes=classes)
    agreed = preprocessing.variables.get(named)
    if agreed is None or agreed.centre is None or agreed.scale is None:
        raise ConfigError(f"task.preprocessing: no centre and scale of the outcome {named}: agree on the numbers again: p2pfl data prepare")
    return Outcome(name=named, scale=Scale(centre=agreed.centre, scale=agreed.scale))


def scaled_outcome(model: str, name: str | Sequence[str] | None, contract: Contract) -> str | None:
    """Name the outcome that needs an agreed scale; None where it is classes or a time. For arguments and errors see `outcome_of`."""
    if model == COX:
        time_to_event(name, contract)
        return None
    named, classes = _predicted(model, name, contract)
    return None if classes else named


def _predicted(model: str, name: str | Sequence[str] | None, contract: Contract) -> tuple[str, tuple[str, ...]]:
    """Name of the variable that a model predicts, and its classes; none of a number."""
    if model not in MODELS:
        raise ConfigError(f"task.model = {shown(model)}: one of {', '.join(MODELS)}")
    if not isinstance(name, str | None):
        raise ConfigError(f"task.outcome = {shown(name)}: expected one variable; only cox takes a time and an event")
    if name is None and len(contract.outcome) != 1:
        raise ConfigError(f"task.outcome: required, as the contract's outcome is {' and '.join(contract.outcome)}: expected one variable")
    named = contract.outcome[0] if name is None else name
    variable = contract.variables.get(named)
    if variable is None:
        known = list(contract.variables)
        raise ConfigError(
            f"task.outcome = {shown(named)}: no variable of the contract; {nearest(named, known)}expected one of {', '.join(known)}"
        )
    if named in contract.inputs:
        raise ConfigError(f"task.outcome = {shown(named)}: it is one of the contract's inputs as well; expected another variable")
    classes = _classes_of(variable)
    if model == "linear" or (model == "mlp" and not classes):
        if not variable.is_numeric:
            raise ConfigError(f"task.outcome = {shown(named)}: {model} predicts a number, and the variable is of type {variable.type}")
        return named, ()
    if not classes:
        raise ConfigError(
            f"task.outcome = {shown(named)}: {model} predicts classes, and the variable is of type {variable.type}; "
            "expected categories, or whole numbers with range [0, 1]; linear and mlp take numbers"
        )
    return named, classes


def _classes_of(variable: Variable) -> tuple[str, ...]:
    if variable.type == "category" and len(variable.categories) >= _TWO:
        return variable.labels
    return ("0", "1") if variable.type == "integer" and variable.range == (0.0, 1.0) else ()


def _layers(num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> nn.Module:
    widths = (num_inputs, *hidden)
    layers = [layer for one, other in pairwise(widths) for layer in (nn.Linear(one, other), nn.ReLU())]
    last = nn.Linear(widths[-1], num_outputs)
    return nn.Sequential(*layers, last) if layers else last


def _in_units(make: Callable[[], nn.Module], scale: Scale) -> nn.Module:
    return InUnits(make(), scale)


class InUnits(nn.Module):
    """A model of standardised outcomes, whose outputs are in the outcome's own unit."""

    def __init__(self, standardised: nn.Module, scale: Scale) -> None:
        super().__init__()
        self.standardised, self._centre, self._scale = standardised, scale.centre, scale.scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (M, 1) in the outcome's unit."""
        outputs: Tensor = self.standardised(inputs)
        return self._centre + self._scale * outputs


def _squared_error(outputs: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    return F.mse_loss(outputs / scale, targets / scale)


def _differences(outputs: Tensor, targets: Tensor) -> np.ndarray | None:
    """Predicted minus observed numbers, (M,) float64; None without rows, or where a prediction is not finite."""
    found = outputs.double().numpy().reshape(-1) - targets.double().numpy().reshape(-1)
    return found if len(found) and np.isfinite(found).all() else None


def absolute_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean distance of predicted from observed numbers, in the outcome's unit."""
    found = _differences(outputs, targets)
    return math.nan if found is None else float(np.abs(found).mean())


def root_mean_square(outputs: Tensor, targets: Tensor) -> float:
    """Root of the mean squared distance of predicted from observed numbers, in the outcome's unit."""
    found = _differences(outputs, targets)
    return math.nan if found is None else float(np.sqrt((found**2).mean()))


def explained(outputs: Tensor, targets: Tensor) -> float:
    """Fraction of the variance of observed numbers that the model explains, R squared; NaN where they do not vary."""
    found = _differences(outputs, targets)
    spread = ((observed := targets.double().numpy().reshape(-1)) - observed.mean()) ** 2 if found is not None else np.zeros(1)
    return math.nan if found is None or not spread.sum() else float(1 - (found**2).sum() / spread.sum())


REGRESSION: Mapping[str, MetricFunction] = MappingProxyType(
    {
        "mae": Metric(absolute_error, kind="mean", less_is_better=True),
        "rmse": Metric(root_mean_square, less_is_better=True),
        "r2": Metric(explained),
    }
)
"""Metrics of a task whose outcome is a number."""
