"""Calibration and discrimination of predicted risks from sums over institutions.

Shapes: M patients of one site, C cells of risk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers

RISK_ENDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Ends of the cells of risk where an analysis says no others."""

NUM_FACTS = 11
_MOST_GROUPS = 10
_FEWEST_TO_VARY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskGroups:
    """Neighbouring cells of risk, merged until each holds nobody or enough; arrays are (C,)."""

    starts: Numbers
    ends: Numbers
    patients: Numbers
    events: Numbers
    predicted: Numbers
    """Mean predicted risk."""

    def intervals(self, level: float) -> Numbers:
        """Wilson's intervals of the observed risks, (C, 2)."""
        z, n, observed = ndtri((1 + level) / 2), self.patients, self.events / self.patients
        middle = (observed + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(observed * (1 - observed) / n + z**2 / (4 * n**2))
        return np.stack([middle - half, middle + half], axis=-1)

    def auc_bounds(self) -> tuple[float, float]:
        """Least and largest area under the ROC curve over all pairs; pairs within a group may be in either order."""
        healthy = self.patients - self.events
        below = np.cumsum(healthy) - healthy
        num_pairs, ordered, within = self.events.sum() * healthy.sum(), self.events @ below, self.events @ healthy
        return float(ordered / num_pairs), float((ordered + within) / num_pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFacts:
    """Figures of predicted risks over all patients; NaN where there is none."""

    intercept: float
    """Calibration in the large: intercept where the slope is held at 1."""
    intercept_bse: float
    slope: float
    slope_bse: float
    brier: float
    """Mean squared difference of risk and outcome."""
    scaled_brier: float
    """One less its ratio to that of a model without variables: 1 is the best."""
    auc: float
    """Area under the ROC curve over the pairs of patients of one site."""
    auc_bse: float

    @staticmethod
    def of(totals: Numbers, num_events: float) -> CalibrationFacts:
        """Make the figures of the totals of `facts` and the number of events."""
        weight, by_risk, squares, residual, residual_by_risk, error, num_rows, concordant, pairs, spread, num_sites = map(float, totals)
        # one step of Newton's method from an intercept of 0 and a slope of 1, where the model's own fit ends
        steps = np.linalg.solve([[weight, by_risk], [by_risk, squares]], [residual, residual_by_risk])
        prevalence = num_events / num_rows
        has_auc = num_sites >= _FEWEST_TO_VARY
        return CalibrationFacts(
            intercept=residual / weight,
            intercept_bse=weight**-0.5,
            slope=1 + float(steps[1]),
            slope_bse=(squares - by_risk**2 / weight) ** -0.5,
            brier=error / num_rows,
            scaled_brier=1 - error / num_rows / (prevalence * (1 - prevalence)),
            auc=concordant / pairs if has_auc else math.nan,
            auc_bse=math.sqrt(spread) / pairs if has_auc else math.nan,
        )


def cells_of_risk(predictors_M: Numbers, outcomes_M: Numbers, ends: Numbers) -> Numbers:
    """Patients, events and sum of the predicted risks in each cell, (3, C)."""
    risks_M = expit(predictors_M)
    cells_M = np.searchsorted(ends, risks_M)
    return np.stack([np.bincount(cells_M, each, minlength=len(ends)) for each in (np.ones_like(risks_M), outcomes_M, risks_M)])


def merged_groups(counts: Numbers, ends: Numbers, fewest: int) -> RiskGroups:
    """Merge cells of risk from the lowest on, into at most ten groups.

    Each gets a tenth of the patients, *fewest* at least, and no events or so many, and no other patients or so many.

    Raises:
        ConfigError: all patients together have fewer events, or fewer others.
    """
    least = max(float(fewest), counts[0].sum() / _MOST_GROUPS * (1 - 1e-9))

    def is_enough(own: Numbers) -> bool:
        return own[0] >= least and all(round(each) == 0 or each >= fewest for each in (own[1], own[0] - own[1]))

    groups, bounds, so_far = [], [0.0], np.zeros(3)
    for end, own in zip(ends, counts.T, strict=True):
        so_far = so_far + own
        if is_enough(so_far):
            groups.append(so_far)
            bounds.append(float(end))
            so_far = np.zeros(3)
    while groups and so_far[0] > 0 and not is_enough(so_far):
        so_far = so_far + groups.pop()
        bounds.pop()
    if so_far[0] > 0:
        if not is_enough(so_far):
            raise ConfigError(f"fewer than {fewest} patients have the event, or do not have it: no group of risk hides them")
        groups.append(so_far)
        bounds.append(float(ends[-1]))
    bounds[-1] = float(ends[-1])
    patients, events, risks = np.stack(groups, axis=-1)
    return RiskGroups(
        starts=np.array(bounds[:-1]),
        ends=np.array(bounds[1:]),
        patients=np.rint(patients),
        events=np.rint(events),
        predicted=risks / patients,
    )


def facts(predictors_M: Numbers, outcomes_M: Numbers) -> Numbers:
    """One site's sums for `CalibrationFacts`, (NUM_FACTS,)."""
    risks_M = expit(predictors_M)
    weights_M, residuals_M = risks_M * expit(-predictors_M), outcomes_M - risks_M
    moments = [np.sum(weights_M * predictors_M**power) for power in range(3)]
    scores = [residuals_M.sum(), residuals_M @ predictors_M]
    return np.array([*moments, *scores, residuals_M @ residuals_M, len(risks_M), *_pairs(predictors_M, outcomes_M > 0)])


def _pairs(predictors_M: Numbers, is_event_M: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Concordant pairs, all pairs, variance of the concordant ones by DeLong's method, and 1 where there are pairs enough."""
    events, others = predictors_M[is_event_M], predictors_M[~is_event_M]
    num_events, num_others = len(events), len(others)
    if min(num_events, num_others) < _FEWEST_TO_VARY:
        return 0.0, 0.0, 0.0, 0.0
    ranks = rankdata(np.concatenate([events, others]))
    below = ranks[:num_events] - rankdata(events)
    above = num_events - (ranks[num_events:] - rankdata(others))
    num_pairs = float(num_events * num_others)
    variance = np.var(below / num_others, ddof=1) / num_events + np.var(above / num_events, ddof=1) / num_others
    return float(below.sum()), num_pairs, float(variance * num_pairs**2), 1.0
