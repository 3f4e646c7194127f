"""How sure a figure on a site's test rows is: confidence intervals of AUROC, accuracy and, by resampling, of any other metric.

Shapes: M rows, of which A are positive and B negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from torch import Tensor

from p2pfl.errors import TaskError
from p2pfl.tasks.base import MetricFunction
from p2pfl.tasks.metrics import accuracy, auroc, chosen, logits_and_classes, probabilities_of

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
_FEWEST_ROWS = 10
_DEFINED = 0.95  # of resamples; where a metric is undefined more often, what is left is no sample of what could have been

Floats = np.ndarray


@dataclass(frozen=True, slots=True)
class Interval:
    """Of one figure."""

    low: float
    high: float
    method: str
    """Whose it is."""


@dataclass(frozen=True, slots=True)
class Area:
    """An area under a ROC curve, or the mean of several, with what its variance and covariances are made of."""

    value: float
    pull_M: Floats
    """What each row moves it by. The products of two areas' pulls on the same rows add up to DeLong's covariance of these areas."""
    rarer: int
    """Rows of the rarest class."""


def interval_of(metric: MetricFunction, outputs: Tensor, targets: Tensor, confidence: float = CONFIDENCE) -> Interval | None:
    """A metric's confidence interval; None for metrics of which none is known here, and where the metric is undefined.

    AUROC: the variance of DeLong, DeLong and Clarke-Pearson (1988), of more than two classes that of a mean of areas with all their
    covariances, on the logit scale, so that it ends within 0 and 1.
    Where every pair is in order, or none, that variance is zero; then Wilson's interval stands for it, as if there were as many independent
    pairs as the rarest class has rows. Accuracy: Wilson (1927).

    Args:
        metric: of `p2pfl.tasks.metrics`; others have none.
        outputs: as the metric takes them.
        targets: likewise.
        confidence: how often it should cover.
    """
    rows = logits_and_classes(outputs, targets) if metric in (auroc, accuracy) else None
    if rows is None:
        return None
    logits, classes = rows
    if metric is accuracy:
        low, high = wilson(int((chosen(logits) == classes).sum()), len(classes), confidence)
        return Interval(low, high, "Wilson")
    area = area_of(logits, classes)
    return None if area is None else interval_of_area(area, confidence)


def resampled_interval(
    statistic: Callable[[np.ndarray], float], num_rows: int, generator: np.random.Generator, confidence: float = CONFIDENCE
) -> Interval | None:
    """What lies between the quantiles of a statistic of 1000 resamples of the rows, drawn with replacement.

    The percentile interval of Efron (1979) and not BCa, which covered less often in trials on 30 and 100 rows and needs the statistic
    without each single row, where it may be undefined. scipy's bootstrap gives none where any resample is undefined.

    Args:
        statistic: of rows by their numbers, (M,) int64; NaN where it is undefined.
        num_rows: M.
        generator: what draws.
        confidence: how often it should cover.

    Returns:
        None below ten rows, where more than one resample in twenty leaves the statistic undefined, and where a user's metric fails on one.
    """
    if num_rows < _FEWEST_ROWS:
        return None
    try:
        with np.errstate(all="ignore"):  # a metric may divide by zero on a strange resample; it is undefined there
            drawn = np.array([statistic(rows) for rows in generator.integers(num_rows, size=(NUM_RESAMPLES, num_rows))])
    except TaskError:
        return None
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < _DEFINED * NUM_RESAMPLES:
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), f"bootstrap of {NUM_RESAMPLES} resamples")


def area_of(logits: np.ndarray, classes: np.ndarray) -> Area | None:
    """Of logits (M, 1 or C) and classes (M,); None where there are not two classes.

    Of more than two the mean, over those that the rows have, of one against the rest, as `auroc` takes it: a row's pulls on each add up.
    """
    present, counts = np.unique(classes, return_counts=True)
    if len(present) < 2:  # noqa: PLR2004  # a class each way is needed
        return None
    if logits.shape[1] == 1:
        value, pull_M = _ranked(logits[:, 0], classes > 0)
        return Area(value, pull_M, int(counts.min()))
    scores = probabilities_of(logits)
    values, pulls = zip(*(_ranked(scores[:, label], classes == label) for label in present), strict=True)
    return Area(float(np.mean(values)), np.mean(pulls, axis=0), int(counts.min()))


def _ranked(scores: np.ndarray, positive: np.ndarray) -> tuple[float, Floats]:
    """The area of one class against the rest, and what each row moves it by."""
    from scipy.stats import rankdata

    among_all, pull_M = rankdata(scores), np.zeros(len(scores))
    value = 0.0
    for side_M in (positive, ~positive):
        number = int(side_M.sum())
        # of each row of this side, the share of the others that it is above, ties counting half
        above = (among_all[side_M] - rankdata(scores[side_M])) / (len(scores) - number)
        right = above if side_M is positive else 1 - above
        value = float(right.mean())  # the same from both sides
        if number > 1:
            pull_M[side_M] = (right - value) / math.sqrt(number * (number - 1))
    return value, pull_M


def covariance(first: Area, second: Area) -> float:
    """DeLong's, of two areas on the same rows; of one with itself its variance."""
    return float(first.pull_M @ second.pull_M)


def interval_of_area(area: Area, confidence: float) -> Interval:
    """As `interval_of` says."""
    value, variance, rarer = area.value, covariance(area, area), area.rarer
    if variance == 0 or not 0 < value < 1 or rarer == 1:
        low, high = wilson(value * rarer, rarer, confidence)
        return Interval(low, high, "Wilson on the rarer class")
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-(math.log(value / (1 - value)) + sign * reach))) for sign in (-1, 1))
    return Interval(low, high, "DeLong")


def wilson(successes: float, number: int, confidence: float) -> tuple[float, float]:
    """The interval of a share, Wilson (1927)."""
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / number
    centre, scale = share + z * z / (2 * number), 1 + z * z / number
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    # exactly at the ends, which rounding would miss
    return 0.0 if successes == 0 else (centre - reach) / scale, 1.0 if successes == number else (centre + reach) / scale
