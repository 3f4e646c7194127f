"""Metrics that say what they measure, so that an interval can be given whoever wrote the function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from p2pfl.tasks import metrics
from p2pfl.tasks.base import MetricFunction

KINDS = ("auroc", "accuracy", "balanced_accuracy", "mean", "other")
"""Kinds of metrics: an area under a ROC curve, a fraction of rows, a mean of such over classes, a mean over rows, another figure."""

_KIND_OF: dict[Any, str] = {
    metrics.auroc: "auroc",
    metrics.accuracy: "accuracy",
    metrics.balanced_accuracy: "balanced_accuracy",
    metrics.log_loss: "mean",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with its kind, which decides the confidence interval; usable wherever a plain function is.

    Raises:
        ValueError: the kind is none of KINDS, or the function is none.
    """

    function: Callable[[Tensor, Tensor], float]
    """(outputs, targets) -> a figure, NaN where it is undefined."""

    kind: str = "other"
    """One of KINDS. "mean": the figure of some rows is the mean of the figures of each row alone."""

    less_is_better: bool = False
    """Whether it measures what is wrong."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: expected one of {', '.join(KINDS)}")
        function: object = self.function
        if not callable(function):
            raise ValueError(f"function is {type(function).__name__}: expected a function of outputs and targets")  # noqa: TRY004

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """The function's figure."""
        return self.function(outputs, targets)


def unwrapped(function: Any) -> Any:
    """The function inside of partial(), functools.wraps and Metric."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, Metric):
            function = function.function
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def kind_of(metric: MetricFunction) -> str:
    """One of KINDS: as a Metric says, of built-in functions also where they are wrapped; "other" where nobody says."""
    if isinstance(metric, Metric):
        return metric.kind if metric.kind != "other" else kind_of(metric.function)
    if isinstance(metric, functools.partial):
        return kind_of(metric.func)
    if hasattr(metric, "__wrapped__"):
        return kind_of(metric.__wrapped__)
    return _KIND_OF.get(metric, "other") if callable(metric) and metric.__hash__ is not None else "other"
