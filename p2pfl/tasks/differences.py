"""How sure it is that one model is better than another on the same test rows: paired confidence intervals.

Shapes: M rows.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from p2pfl.tasks.base import MetricFunction
from p2pfl.tasks.intervals import CONFIDENCE, Interval, area_of, covariance, interval_of_area, interval_of_mean, is_near, rows_of, wilson
from p2pfl.tasks.metrics import chosen, kind_of, losses_of


def interval_of_difference(
    metric: MetricFunction,
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    confidence: float = CONFIDENCE,
    *,
    values: tuple[float, float] | None = None,
) -> Interval | None:
    """Interval of a metric of the first model minus that of the second; None where the kind has none, or one figure is undefined.

    Those of AUROC and accuracy take each model's own interval and put them together by squares, less what the two models have in common as
    they are measured on the same rows. AUROC: Zou and Yue (2013), from DeLong's intervals on the logit scale and DeLong's covariance. It
    tends to DeLong's own interval, the difference plus or minus 1.96 standard errors, as rows grow; that one covers nine times in ten only
    where areas are near 1, and is of no width where all pairs are in order. Where a variance is zero nothing is taken to be in common.
    Accuracy: Newcombe (1998), method 10, which has a width also where both models are right on the same rows; a bootstrap then has none,
    and covered 92 times in 100 on some hundred rows with few errors. Balanced accuracy: Newcombe's of each class, by squares. Log loss:
    Student's t of the rows' differences. Where the metric's own figures, *values*, are given and are others than the kind's, there is none.
    """
    found = _difference(metric, first, second, targets, confidence)
    if found is None or (values is not None and not all(is_near(*pair) for pair in zip(found[0], values, strict=True))):
        return None
    return found[1]


def _difference(
    metric: MetricFunction, first: Tensor, second: Tensor, targets: Tensor, confidence: float
) -> tuple[tuple[float, float], Interval] | None:
    """Both models' figures as the kind has them, and the interval of their difference."""
    kind = kind_of(metric)
    rows, other_rows = (rows_of(metric, outputs, targets) for outputs in (first, second))
    if rows is None or other_rows is None:
        return None
    (logits, classes), (others, _) = rows, other_rows
    if kind == "mean":
        lost_M, also_M = (losses_of(values, classes) for values in (logits, others))
        interval = interval_of_mean(lost_M - also_M, confidence)
        return None if interval is None else ((float(lost_M.mean()), float(also_M.mean())), interval)
    if kind in ("accuracy", "balanced_accuracy"):
        right_M, also_M = chosen(logits) == classes, chosen(others) == classes
        if kind == "accuracy":
            return (float(right_M.mean()), float(also_M.mean())), _of_shares(right_M, also_M, confidence)
        return _balanced(right_M, also_M, classes, confidence)
    one, other = area_of(logits, classes), area_of(others, classes)
    if one is None or other is None:
        return None
    variances = covariance(one, one) * covariance(other, other)
    common = covariance(one, other) / math.sqrt(variances) if variances > 0 else 0.0
    of_one, of_other = interval_of_area(one, confidence), interval_of_area(other, confidence)
    ends = ((of_one.low, of_one.high), (of_other.low, of_other.high))
    method = "Zou and Yue, " + ("DeLong's covariance" if variances > 0 else "Wilson on the rarer class")
    return (one.value, other.value), Interval(*_together(one.value, other.value, ends, common), method)


def _balanced(
    right_M: np.ndarray, also_M: np.ndarray, classes: np.ndarray, confidence: float
) -> tuple[tuple[float, float], Interval] | None:
    parts = [(right_M[classes == label], also_M[classes == label]) for label in np.unique(classes)]
    if len(parts) < 2:  # noqa: PLR2004
        return None
    one, other = (float(np.mean([pair[which].mean() for pair in parts])) for which in (0, 1))
    down = up = 0.0
    for mine, theirs in parts:
        gain, interval = float(mine.mean() - theirs.mean()), _of_shares(mine, theirs, confidence)
        down, up = down + (gain - interval.low) ** 2, up + (interval.high - gain) ** 2
    low, high = one - other - math.sqrt(down) / len(parts), one - other + math.sqrt(up) / len(parts)
    return (one, other), Interval(max(low, -1.0), min(high, 1.0), "Newcombe of each class")


def _of_shares(right_M: np.ndarray, also_M: np.ndarray, confidence: float) -> Interval:
    number = len(right_M)
    both, one, other = int((right_M & also_M).sum()), int((right_M & ~also_M).sum()), int((~right_M & also_M).sum())
    neither = number - both - one - other
    margins = (both + one) * (other + neither) * (both + other) * (one + neither)
    together = both * neither - one * other
    common = (max(together - number / 2, 0.0) if together > 0 else together) / math.sqrt(margins) if margins else 0.0
    ends = (wilson(both + one, number, confidence), wilson(both + other, number, confidence))
    return Interval(*_together((both + one) / number, (both + other) / number, ends, common), "Newcombe")


def _together(one: float, other: float, ends: tuple[tuple[float, float], tuple[float, float]], common: float) -> tuple[float, float]:
    """The interval of a difference from that of each, and how much the two go together, -1 to 1."""
    (low, high), (other_low, other_high) = ends

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down * down - 2 * common * down * up + up * up, 0.0))

    return one - other - reach(one - low, other_high - other), one - other + reach(high - one, other - other_low)
