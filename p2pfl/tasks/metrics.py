"""How good outputs are: scikit-learn's figures on logits, to rounding, without its checks, which take longer than small sites' figures.

Each takes (outputs, targets), detached CPU tensors of one site's test rows: two classes as one logit a row, (M, 1) or (M,), with targets 0
and 1; more as one logit a class, (M, C), with targets in range(C). Other targets are refused with a TaskError. Each is NaN where it is
undefined: no rows, outputs that are not finite, and for balanced accuracy and AUROC rows of one class only.

Shapes: M rows, C classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from p2pfl.errors import TaskError
from p2pfl.tasks.base import MetricFunction

_MOST_NAMED = 5  # classes in a message
_AT_ONCE = 2**18  # rows
_EPS = np.finfo(np.float64).eps


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Fraction of rows whose class is right; of two classes, the second is chosen above probability 0.5."""
    rows = logits_and_classes(outputs, targets)
    if rows is None:
        return math.nan
    logits, classes = rows
    return float((chosen(logits) == classes).mean())


def balanced_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Mean, over the classes that the rows have, of the fraction that is right."""
    rows = logits_and_classes(outputs, targets)
    if rows is None:
        return math.nan
    logits, classes = rows
    there, right = np.bincount(classes), np.bincount(classes, weights=chosen(logits) == classes)
    present = there > 0
    return float((right[present] / there[present]).mean()) if present.sum() > 1 else math.nan


def auroc(outputs: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve; of more than two classes the mean, over those that the rows have, of one against the rest."""
    rows = logits_and_classes(outputs, targets)
    if rows is None:
        return math.nan
    logits, classes = rows
    present = np.unique(classes)
    if len(present) < 2:  # noqa: PLR2004
        return math.nan
    if logits.shape[1] == 1:
        return _area(logits[:, 0], classes > 0)
    probabilities = probabilities_of(logits)
    return float(np.mean([_area(probabilities[:, label], classes == label) for label in present]))


def log_loss(outputs: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of the right class, in nats; no row counts more than 36.04, the logarithm of float64's precision."""
    rows = logits_and_classes(outputs, targets)
    if rows is None:
        return math.nan
    logits, classes = rows
    return float(losses_of(logits, classes).mean())


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Fraction of (positive, negative) pairs whose scores are in order, ties counting half: Mann and Whitney's U, counted exactly."""
    high, low = np.sort(scores[positive]), np.sort(scores[~positive])
    twice = low.searchsorted(high, "left").sum() + low.searchsorted(high, "right").sum()
    return float(twice / 2 / (len(high) * len(low)))


CLASSIFICATION: MappingProxyType[str, MetricFunction] = MappingProxyType(
    {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "auroc": auroc, "log_loss": log_loss}
)
"""Metrics of the classification tasks."""

LOSSES = frozenset({"log_loss"})
"""Those of which less is better."""

KINDS = ("auroc", "accuracy", "balanced_accuracy", "concordance", "mean", "other")
"""Kinds of metrics: an area under a ROC curve, a fraction of rows, a mean of such over classes, a fraction of pairs of rows, a mean over
rows, another figure."""

_KIND_OF: dict[Any, str] = {auroc: "auroc", accuracy: "accuracy", balanced_accuracy: "balanced_accuracy", log_loss: "mean"}


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


def _layers(function: Any) -> Iterator[Any]:
    """A function, and those inside of its Metric, partial() and functools.wraps, the innermost last."""
    yield function
    if isinstance(function, Metric):
        yield from _layers(function.function)
    elif isinstance(function, functools.partial):
        yield from _layers(function.func)
    elif hasattr(function, "__wrapped__"):
        yield from _layers(function.__wrapped__)


def unwrapped(function: Any) -> Any:
    """The function inside of partial(), functools.wraps and Metric."""
    *_, innermost = _layers(function)
    return innermost


def kind_of(metric: MetricFunction) -> str:
    """One of KINDS: as a Metric says, of built-in functions also where they are wrapped; "other" where nobody says."""
    layers = list(_layers(metric))
    said = next((layer.kind for layer in layers if isinstance(layer, Metric) and layer.kind != "other"), None)
    return said or (_KIND_OF.get(layers[-1], "other") if layers[-1].__hash__ is not None else "other")


def logits_and_classes(outputs: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits (M, 1 or C) in float64 and classes (M,) int64; None where there are no rows or a logit is not finite.

    Raises:
        TaskError: a target is no class of these outputs, or the outputs are no table; the message says which targets there are.
    """
    logits = outputs.double().numpy()
    logits = logits[:, None] if logits.ndim == 1 else logits
    if logits.ndim != 2:  # noqa: PLR2004
        raise TaskError(f"outputs have {logits.ndim} axes: expected one logit a row, or one for each class")
    found = targets.numpy().reshape(-1)
    if len(logits) != len(found):
        raise ValueError(f"{len(logits)} rows of outputs, {len(found)} targets: expected as many")
    classes = found.astype(np.int64)
    if fault := fault_of_classes(found, max(logits.shape[1], 2)):
        raise TaskError(fault)
    if not len(logits) or not np.isfinite(logits).all():
        return None
    return logits, classes


def fault_of_classes(targets: np.ndarray, num_classes: int) -> str | None:
    """One sentence where targets are not all in range(num_classes), with those that there are."""
    if not len(targets):
        return None
    least, most = targets.min(), targets.max()
    is_whole = targets.dtype.kind in "biu" or bool((targets == np.trunc(targets)).all())
    if is_whole and least >= 0 and most < num_classes:
        return None
    expected = "0 and 1" if num_classes == 2 else f"whole numbers from 0 to {num_classes - 1}"  # noqa: PLR2004
    different = np.unique(targets)
    if len(different) <= _MOST_NAMED:
        texts = [f"{float(value):g}" for value in different]
        named = " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
        return f"target{'s' if len(texts) > 1 else ''} {named}: expected {expected}"
    kind = f"whole numbers from {least:g} to {most:g}" if is_whole else "values that are not all whole numbers"
    return f"targets of {len(different):,} different {kind}: expected {expected}"


def losses_of(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Each row's negative log-likelihood of the right class, (M,), as `log_loss` takes the mean of."""
    losses_M = np.empty(len(classes))
    for first in range(0, len(classes), _AT_ONCE):  # of millions of rows no table of probabilities is made
        block = slice(first, first + _AT_ONCE)
        right_M = probabilities_of(logits[block])[np.arange(len(classes[block])), classes[block]]
        losses_M[block] = -np.log(right_M.clip(_EPS, 1 - _EPS))
    return losses_M


def chosen(logits: np.ndarray) -> np.ndarray:
    """The class of each row, (M,) int64; of two, the second above probability 0.5."""
    return (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """(M, C), also for two classes; rows sum to 1."""
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))
