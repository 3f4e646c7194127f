"""How sure a figure on a site's test rows is: confidence intervals of AUROC and accuracy.

Shapes: M rows, of which A are positive and B negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from torch import Tensor

from p2pfl.tasks.base import Metric
from p2pfl.tasks.metrics import accuracy, auroc, chosen, logits_and_classes

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """Of one figure."""

    low: float
    high: float
    method: str
    """Whose it is."""


def interval_of(metric: Metric, outputs: Tensor, targets: Tensor, confidence: float = CONFIDENCE) -> Interval | None:
    """A metric's confidence interval; None for metrics of which none is known here, and where the metric is undefined.

    AUROC of two classes: the variance of DeLong, DeLong and Clarke-Pearson (1988), on the logit scale, so that it ends within 0 and 1.
    Where every pair is in order, or none, that variance is zero; then Wilson's interval stands for it, as if there were as many independent
    pairs as the rarer class has rows. Accuracy: Wilson (1927).

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
        low, high = _wilson(int((chosen(logits) == classes).sum()), len(classes), confidence)
        return Interval(low, high, "Wilson")
    if logits.shape[1] > 1 or len(np.unique(classes)) < 2:  # noqa: PLR2004  # a class each way is needed
        return None
    return _of_area(logits[:, 0], classes > 0, confidence)


def _of_area(scores: np.ndarray, positive: np.ndarray, confidence: float) -> Interval:
    from scipy.stats import rankdata

    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    among_all = rankdata(scores)
    # of each row, the share of the other class that it is rightly above, or below
    right_A = (among_all[positive] - rankdata(scores[positive])) / num_negative
    right_B = 1 - (among_all[~positive] - rankdata(scores[~positive])) / num_positive
    area = float(right_A.mean())
    variance = sum(float(right.var(ddof=1)) / len(right) if len(right) > 1 else 0.0 for right in (right_A, right_B))
    rarer = min(num_positive, num_negative)
    if variance == 0 or not 0 < area < 1 or rarer == 1:
        low, high = _wilson(area * rarer, rarer, confidence)
        return Interval(low, high, "Wilson on the rarer class")
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance) / (area * (1 - area))
    low, high = (1 / (1 + math.exp(-(math.log(area / (1 - area)) + sign * reach))) for sign in (-1, 1))
    return Interval(low, high, "DeLong")


def _wilson(successes: float, number: int, confidence: float) -> tuple[float, float]:
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / number
    centre, scale = share + z * z / (2 * number), 1 + z * z / number
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    # exactly at the ends, which rounding would miss
    return 0.0 if successes == 0 else (centre - reach) / scale, 1.0 if successes == number else (centre + reach) / scale
