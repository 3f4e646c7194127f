"""Meta-analysis of estimates that each site makes of its own rows: fixed effect, heterogeneity, and DerSimonian and Laird's random effects.

Only sums over sites are needed, so that no site's estimate is seen. Source: DerSimonian & Laird 1986.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincc

from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers, SumRequest

FEWEST_ESTIMATES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One site's estimate of a coefficient, with the square of its standard error."""

    value: float
    variance: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and 0 < self.variance < math.inf):
            raise ConfigError("a site's estimate is no finite number with a standard error above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaAnalysis:
    """Result of combining several sites' estimates of one coefficient."""

    num_estimates: int
    fixed: float
    fixed_bse: float
    q: float
    """Cochran's Q, of the differences between sites."""
    q_pvalue: float
    i_squared: float
    """Part of the differences that is not due to chance."""
    tau_squared: float
    """Variance of the true effects between sites; 0 where the differences are no larger than by chance."""
    random: float
    random_bse: float


def meta_analysis() -> Generator[SumRequest[Estimate | None], Numbers, MetaAnalysis]:
    """Combine estimates of one coefficient; a site that has none gives None.

    Raises:
        ConfigError: fewer than two sites have an estimate.
    """

    def at(tau_squared: float, centre: float) -> SumRequest[Estimate | None]:
        def sums(estimate: Estimate | None) -> Numbers:
            if estimate is None:
                return np.zeros(5)
            weight, value = 1 / (estimate.variance + tau_squared), estimate.value - centre
            return np.array([1.0, weight, weight * value, weight * value**2, weight**2])

        return SumRequest(statistic="weighted estimates", shape=(5,), contribution=sums)

    count, weight, mean, *_ = yield at(0.0, 0.0)
    if count < FEWEST_ESTIMATES:
        having = "1 site has" if round(count) == 1 else f"{round(count)} sites have"
        raise ConfigError(f"{having} an estimate: a meta-analysis needs {FEWEST_ESTIMATES}")
    fixed = float(mean / weight)
    # around the fixed effect, so that no digits cancel
    _, weight, mean, squares, weights_squared = yield at(0.0, fixed)
    q, df = float(squares - mean**2 / weight), round(count) - 1
    tau_squared = max(0.0, float((q - df) / (weight - weights_squared / weight)))
    _, random_weight, random_mean, *_ = yield at(tau_squared, fixed)
    return MetaAnalysis(
        num_estimates=round(count),
        fixed=fixed,
        fixed_bse=float(weight**-0.5),
        q=q,
        q_pvalue=float(gammaincc(df / 2, q / 2)),
        i_squared=max(0.0, 1 - df / q) if q > 0 else 0.0,
        tau_squared=tau_squared,
        random=fixed + float(random_mean / random_weight),
        random_bse=float(random_weight**-0.5),
    )
