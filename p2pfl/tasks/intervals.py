"""Confidence intervals of figures on a site's test rows, and of differences of two models there: by a metric's kind, or leaving out rows.

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
from p2pfl.tasks.metrics import chosen, kind_of, log_loss, logits_and_classes, losses_of, probabilities_of, unwrapped

CONFIDENCE = 0.95
NUM_GROUPS = 20
"""Number of groups of rows: so often a metric is computed for an interval where its kind has none."""

MOST_CALLS = 1000
"""Most calls of a metric for all intervals of one table. A slow metric takes some milliseconds, so that this takes some seconds."""

MOST_ROWS = 2_000_000
"""Handed to a metric in all of these calls."""

UNDEFINED = "the figure is undefined"
"""Why there is no interval."""

_FEWEST_ROWS = 10

Floats = np.ndarray


@dataclass(frozen=True, slots=True)
class Interval:
    """Confidence interval of one figure."""

    low: float
    high: float
    method: str
    """Name of the method, with its author."""


@dataclass(frozen=True, slots=True)
class Area:
    """An area under a ROC curve, or the mean of several, with what its variance and covariances are made of."""

    value: float
    pull_M: Floats
    """Amount by which each row moves it. The products of two areas' pulls on the same rows add up to DeLong's covariance of these areas."""
    rarer: int
    """Rows of the rarest class."""


def interval_of(metric: MetricFunction, outputs: Tensor, targets: Tensor, *, value: float | None = None) -> Interval | None:
    """A metric's confidence interval by its kind; None where the kind has none of its own, and where the metric is undefined.

    AUROC: the variance of DeLong, DeLong and Clarke-Pearson (1988), of more than two classes that of a mean of areas with all their
    covariances, on the logit scale, so that it ends within 0 and 1.
    Where every pair is in order, or none, that variance is zero; then Wilson's interval stands for it, as if there were as many independent
    pairs as the rarest class has rows. Accuracy: Wilson (1927). Balanced accuracy: Wilson's intervals of the classes, put together by
    squares (Zou and Donner 2008). Log loss: Student's t of the rows' losses. Where the metric's own figure, *value*, is given and is
    another than the kind's, there is none.
    """
    kind = kind_of(metric)
    rows = rows_of(metric, outputs, targets)
    if rows is None:
        return None
    logits, classes = rows
    found: tuple[float, Interval] | None = None
    if kind == "accuracy":
        right_M = chosen(logits) == classes
        found = float(right_M.mean()), Interval(*wilson(int(right_M.sum()), len(classes)), "Wilson")
    elif kind == "balanced_accuracy":
        found = _balanced(chosen(logits) == classes, classes)
    elif kind == "mean":
        losses_M = losses_of(logits, classes)
        interval = interval_of_mean(losses_M)
        found = (float(losses_M.mean()), interval) if interval is not None else None
    elif (area := area_of(logits, classes)) is not None:
        found = area.value, interval_of_area(area)
    return found[1] if found is not None and (value is None or is_near(found[0], value)) else None


def rows_of(metric: MetricFunction, outputs: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits and classes of a metric whose kind is measured by them; None of other metrics, and where they are none."""
    kind = kind_of(metric)
    # a mean is anybody's; of one alone it is known here how it is made of the rows
    if kind in ("concordance", "other") or (kind == "mean" and unwrapped(metric) is not log_loss):
        return None
    try:
        return logits_and_classes(outputs, targets)
    except (TaskError, ValueError, TypeError):
        return None


def is_near(one: float, other: float) -> bool:
    """Whether two figures are one but for rounding."""
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)


def _balanced(right_M: np.ndarray, classes: np.ndarray) -> tuple[float, Interval] | None:
    present, places_M = np.unique(classes, return_inverse=True)
    if len(present) < 2:  # noqa: PLR2004
        return None
    numbers, right = np.bincount(places_M), np.bincount(places_M, weights=right_M)
    ends = [wilson(float(hits), int(number)) for hits, number in zip(right, numbers, strict=True)]
    fractions = right / numbers
    value = float(fractions.mean())
    down, up = (
        math.sqrt(sum((fraction - pair[end]) ** 2 for fraction, pair in zip(fractions, ends, strict=True))) / len(present) for end in (0, 1)
    )
    return value, Interval(max(value - down, 0.0), min(value + up, 1.0), "Wilson of each class")


def interval_of_mean(values_M: np.ndarray) -> Interval | None:
    """Student's t interval of a mean of independent rows; None of fewer than ten, and where they do not vary."""
    value = float(values_M.mean())
    deviation = float(values_M.std(ddof=1)) if len(values_M) > 1 else 0.0
    if deviation == 0 or len(values_M) < _FEWEST_ROWS:
        return None
    reach = _students_t(len(values_M) - 1) * deviation / math.sqrt(len(values_M))
    return Interval(value - reach, value + reach, "Student's t")


def _students_t(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def left_out_interval(
    statistic: Callable[[np.ndarray], float], num_rows: int, generator: np.random.Generator, value: float
) -> Interval | str:
    """A statistic plus and minus what leaving out one group of rows after the other says: the jackknife of Tukey (1958), by groups.

    The rows fall into 20 groups by chance, so that any metric is computed 20 times and no more, however long it takes. Student's t with 19
    degrees of freedom goes with it. The statistic takes rising row numbers, and is NaN where it is undefined; *value* is that of all rows.

    Returns:
        The interval, or why there is none: fewer than ten rows, a statistic that is undefined, fails or stays as it is without some rows.
    """
    if num_rows < _FEWEST_ROWS:
        return f"of fewer than {_FEWEST_ROWS} test rows none is given"
    number = min(NUM_GROUPS, num_rows)
    group_M = np.arange(num_rows) % number
    generator.shuffle(group_M)
    try:
        with np.errstate(all="ignore"):  # a metric may divide by zero where rows are missing; it is undefined there
            without = np.array([statistic(np.flatnonzero(group_M != group)) for group in range(number)])
    except TaskError:
        return "the metric fails where some rows are left out"
    if not np.isfinite(without).all():
        return "the metric is undefined where some rows are left out"
    error = math.sqrt((number - 1) / number * float(np.square(without - without.mean()).sum()))
    if error == 0:
        return "the metric stays as it is where rows are left out"
    reach = _students_t(number - 1) * error
    return Interval(value - reach, value + reach, f"jackknife of {number} groups of rows")


def why_not_left_out(num_figures: int, num_rows: int) -> str | None:
    """Why a metric is not computed again and again for a table's figures, on so many test rows in all; None where it is within bounds."""
    for number, most, of in ((num_figures * NUM_GROUPS, MOST_CALLS, "calls of the metric"), (num_rows * NUM_GROUPS, MOST_ROWS, "rows")):
        if number > most:
            return f"the metric's kind has none, and leaving out rows would take {number:,} {of}, where {most:,} are the most"
    return None


def clipped(interval: Interval, kind: str, *, least: float = 0.0) -> Interval:
    """Within what figures of a kind can be: areas and fractions end at 1."""
    if kind not in ("auroc", "accuracy", "balanced_accuracy", "concordance"):
        return interval
    return Interval(max(interval.low, least), min(interval.high, 1.0), interval.method)


def area_of(logits: np.ndarray, classes: np.ndarray) -> Area | None:
    """Area under the ROC curve of logits (M, 1 or C) and classes (M,); None where there are not two classes.

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
        # of each row of this side, the fraction of the others that it is above, ties counting half
        above = (among_all[side_M] - rankdata(scores[side_M])) / (len(scores) - number)
        right = above if side_M is positive else 1 - above
        value = float(right.mean())  # the same from both sides
        if number > 1:
            pull_M[side_M] = (right - value) / math.sqrt(number * (number - 1))
    return value, pull_M


def covariance(first: Area, second: Area) -> float:
    """DeLong's, of two areas on the same rows; of one with itself its variance."""
    return float(first.pull_M @ second.pull_M)


def interval_of_area(area: Area) -> Interval:
    """Interval of an area under a ROC curve."""
    value, variance, rarer = area.value, covariance(area, area), area.rarer
    if variance == 0 or not 0 < value < 1 or rarer == 1:
        low, high = wilson(value * rarer, rarer)
        return Interval(low, high, "Wilson on the rarer class")
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-(math.log(value / (1 - value)) + sign * reach))) for sign in (-1, 1))
    return Interval(low, high, "DeLong")


def wilson(successes: float, number: int) -> tuple[float, float]:
    """Confidence interval of a fraction, Wilson (1927)."""
    z, fraction = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), successes / number
    centre, scale = fraction + z * z / (2 * number), 1 + z * z / number
    reach = z * math.sqrt(fraction * (1 - fraction) / number + z * z / (4 * number * number))
    # exactly at the ends, which rounding would miss
    return 0.0 if successes == 0 else (centre - reach) / scale, 1.0 if successes == number else (centre + reach) / scale


def interval_of_difference(
    metric: MetricFunction, first: Tensor, second: Tensor, targets: Tensor, *, values: tuple[float, float] | None = None
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
    found = _difference(metric, first, second, targets)
    if found is None or (values is not None and not all(is_near(*pair) for pair in zip(found[0], values, strict=True))):
        return None
    return found[1]


def _difference(metric: MetricFunction, first: Tensor, second: Tensor, targets: Tensor) -> tuple[tuple[float, float], Interval] | None:
    """Both models' figures as the kind has them, and the interval of their difference."""
    kind = kind_of(metric)
    rows, other_rows = (rows_of(metric, outputs, targets) for outputs in (first, second))
    if rows is None or other_rows is None:
        return None
    (logits, classes), (others, _) = rows, other_rows
    if kind == "mean":
        lost_M, also_M = (losses_of(values, classes) for values in (logits, others))
        interval = interval_of_mean(lost_M - also_M)
        return None if interval is None else ((float(lost_M.mean()), float(also_M.mean())), interval)
    if kind in ("accuracy", "balanced_accuracy"):
        right_M, also_M = chosen(logits) == classes, chosen(others) == classes
        if kind == "accuracy":
            return (float(right_M.mean()), float(also_M.mean())), _of_fractions(right_M, also_M)
        return _balanced_difference(right_M, also_M, classes)
    one, other = area_of(logits, classes), area_of(others, classes)
    if one is None or other is None:
        return None
    variances = covariance(one, one) * covariance(other, other)
    common = covariance(one, other) / math.sqrt(variances) if variances > 0 else 0.0
    of_one, of_other = interval_of_area(one), interval_of_area(other)
    ends = ((of_one.low, of_one.high), (of_other.low, of_other.high))
    method = "Zou and Yue, " + ("DeLong's covariance" if variances > 0 else "Wilson on the rarer class")
    return (one.value, other.value), Interval(*_together(one.value, other.value, ends, common), method)


def _balanced_difference(right_M: np.ndarray, also_M: np.ndarray, classes: np.ndarray) -> tuple[tuple[float, float], Interval] | None:
    parts = [(right_M[classes == label], also_M[classes == label]) for label in np.unique(classes)]
    if len(parts) < 2:  # noqa: PLR2004
        return None
    one, other = (float(np.mean([pair[which].mean() for pair in parts])) for which in (0, 1))
    down = up = 0.0
    for mine, theirs in parts:
        gain, interval = float(mine.mean() - theirs.mean()), _of_fractions(mine, theirs)
        down, up = down + (gain - interval.low) ** 2, up + (interval.high - gain) ** 2
    low, high = one - other - math.sqrt(down) / len(parts), one - other + math.sqrt(up) / len(parts)
    return (one, other), Interval(max(low, -1.0), min(high, 1.0), "Newcombe of each class")


def _of_fractions(right_M: np.ndarray, also_M: np.ndarray) -> Interval:
    number = len(right_M)
    both, one, other = int((right_M & also_M).sum()), int((right_M & ~also_M).sum()), int((~right_M & also_M).sum())
    neither = number - both - one - other
    margins = (both + one) * (other + neither) * (both + other) * (one + neither)
    together = both * neither - one * other
    common = (max(together - number / 2, 0.0) if together > 0 else together) / math.sqrt(margins) if margins else 0.0
    ends = (wilson(both + one, number), wilson(both + other, number))
    return Interval(*_together((both + one) / number, (both + other) / number, ends, common), "Newcombe")


def _together(one: float, other: float, ends: tuple[tuple[float, float], tuple[float, float]], common: float) -> tuple[float, float]:
    """The interval of a difference from that of each, and how much the two go together, -1 to 1."""
    (low, high), (other_low, other_high) = ends

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down * down - 2 * common * down * up + up * up, 0.0))

    return one - other - reach(one - low, other_high - other), one - other + reach(high - one, other - other_low)
