"""How sure it is that one model is better than another on the same test rows: paired confidence intervals.

Shapes: M rows.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from p2pfl.tasks.base import MetricFunction
from p2pfl.tasks.intervals import CONFIDENCE, Interval, area_of, covariance, interval_of_area, wilson
from p2pfl.tasks.metrics import accuracy, auroc, chosen, logits_and_classes


def interval_of_difference(
    metric: MetricFunction, first: Tensor, second: Tensor, targets: Tensor, confidence: float = CONFIDENCE
) -> Interval | None:
    """Of a metric of the first model minus that of the second; None for metrics of which none is known here, and where one is undefined.

    Both take each model's own interval and put them together by squares, less what the two models have in common as they are measured on
    the same rows. AUROC: Zou and Yue (2013), from DeLong's intervals on the logit scale and DeLong's covariance. It tends to
    DeLong's own interval, the difference plus or minus 1.96 standard errors, as rows grow; that one covers nine times in ten only where
    areas are near 1, and is of no width where all pairs are in order. Where a variance is zero nothing is taken to be in common. Accuracy:
    Newcombe (1998), method 10, which has a width also where both models are right on the same rows; a bootstrap then has none, and covered
    92 times in 100 on some hundred rows with few errors.

    Args:
        metric: of `p2pfl.tasks.metrics`; others have none.
        first: outputs of one model, as the metric takes them.
        second: of the other.
        targets: of the rows.
        confidence: how often it should cover.
    """
    rows = [logits_and_classes(outputs, targets) for outputs in (first, second)] if metric in (auroc, accuracy) else [None]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    (logits, classes), (others, _) = known
    if metric is accuracy:
        return _of_shares(chosen(logits) == classes, chosen(others) == classes, confidence)
    one, other = area_of(logits, classes), area_of(others, classes)
    if one is None or other is None:
        return None
    variances = covariance(one, one) * covariance(other, other)
    common = covariance(one, other) / math.sqrt(variances) if variances > 0 else 0.0
    of_one, of_other = interval_of_area(one, confidence), interval_of_area(other, confidence)
    ends = ((of_one.low, of_one.high), (of_other.low, of_other.high))
    method = "Zou and Yue, " + ("DeLong's covariance" if variances > 0 else "Wilson on the rarer class")
    return Interval(*_together(one.value, other.value, ends, common), method)


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
