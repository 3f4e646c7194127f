"""Negative binomial models whose theta is estimated with the coefficients, from sums over institutions.

Coefficients and theta take a step together: the information has no part that they share, so that both steps follow from the same totals.
Theta steps on its logarithm, and at most by a factor of 4.

Shapes: M rows of one site, P columns. Source: Venables & Ripley 2002, section 7.4 (glm.nb).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma

from p2pfl.errors import ConfigError
from p2pfl.statistics.families import NEGATIVE_BINOMIAL, NegativeBinomial
from p2pfl.statistics.glm import MOST_PARAMETERS_PER_ROW, DesignRows, GLMFit
from p2pfl.statistics.newton import LAST_STEP, MOST_ITERATIONS, check_separation, is_last, solved
from p2pfl.statistics.scale import Scale, agree_on_scale
from p2pfl.statistics.sums import Numbers, SumRequest

_LONGEST_STEP = math.log(4)
_POISSON = 1e4
"""Theta, in means of a count, from which on nobody can tell the counts from those of a Poisson model."""


def fit_negative_binomial(names: Sequence[str], *, units_P: Numbers | None = None) -> Generator[SumRequest[DesignRows], Numbers, GLMFit]:
    """Fit a negative binomial model and its theta; lead it to its result with `analyse`, or by secure sums.

    Args:
        names: of the design's columns, P; one called INTERCEPT is all ones.
        units_P: of the columns, for `agree_on_scale`.

    Raises:
        ConfigError: as `fit_glm`, and where the counts scatter no more than a Poisson model says.
    """
    scale = yield from agree_on_scale(names, lambda rows: rows.columns_MP, units_P=units_P)
    if len(names) >= MOST_PARAMETERS_PER_ROW * scale.num_rows:
        raise ConfigError(f"{len(names)} coefficients from {scale.num_rows} rows: fewer than {MOST_PARAMETERS_PER_ROW:g} a row are needed")
    num_missing, total, num_foreign = yield SumRequest(statistic="missing rows and sum of the outcomes", shape=(3,), contribution=_facts)
    if num_foreign:
        raise ConfigError(f"an outcome that no {NEGATIVE_BINOMIAL} model has: {NegativeBinomial(1.0).expected}")
    first = yield from _at(None, 1.0, scale, 0)
    params, theta = solved(first.information_PP, first.target_P, names), 1.0
    for iteration in range(1, MOST_ITERATIONS + 1):
        now = yield from _at(params, theta, scale, iteration)
        check_separation(first.information_PP, now.information_PP, names, outcome="the outcome is")
        step_P = solved(now.information_PP, now.target_P, names) - params
        step = now.theta_step
        params, theta = params + step_P, theta * math.exp(step)
        if theta > _POISSON * (1 + total / scale.num_rows):
            raise ConfigError("the counts scatter no more than a Poisson model says, and theta has no end: use family poisson")
        if is_last(step_P, now.information_PP) and step**2 * max(now.theta_information, 1.0) < LAST_STEP**2:
            break
    else:
        raise ConfigError(f"no fit after {MOST_ITERATIONS} iterations: the outcome may be separated, or a column far too large")
    last = yield from _at(params, theta, scale, iteration + 1)
    back_PP = scale.back(names)
    return GLMFit(
        names=tuple(names),
        family=NEGATIVE_BINOMIAL,
        params=back_PP @ params,
        covariance_PP=back_PP @ np.linalg.inv(last.information_PP) @ back_PP.T,
        num_rows=scale.num_rows,
        num_missing=round(num_missing),
        deviance=last.deviance,
        dispersion=1.0,
        log_likelihood=last.log_likelihood,
        aic=-2 * last.log_likelihood + 2 * (len(names) + 1),
        iterations=iteration,
        theta=theta,
        theta_bse=theta / math.sqrt(last.theta_information),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Totals:
    """Totals over all sites at some coefficients and theta."""

    information_PP: Numbers
    target_P: Numbers
    """X'Wz."""
    deviance: float
    log_likelihood: float
    theta_score: float
    """Derivative of the log-likelihood by theta's logarithm."""
    theta_information: float
    """Observed information about theta's logarithm."""

    @property
    def theta_step(self) -> float:
        """Newton's step on theta's logarithm; uphill where the likelihood bends the other way."""
        if not self.theta_information > 0:
            return math.copysign(_LONGEST_STEP, self.theta_score)
        return min(max(self.theta_score / self.theta_information, -_LONGEST_STEP), _LONGEST_STEP)


def _facts(rows: DesignRows) -> Numbers:
    """Rows with a missing value, sum of the outcomes, and 1 if these are no counts."""
    if not NegativeBinomial(1.0).accepts(rows.outcomes_M):
        return np.array([rows.num_missing, 0.0, 1.0])
    return np.array([rows.num_missing, rows.outcomes_M.sum(), 0.0])


def _at(params: Numbers | None, theta: float, scale: Scale, number: int) -> Generator[SumRequest[DesignRows], Numbers, _Totals]:
    """Ask for the totals at some coefficients and theta; None: at the means that the family begins with."""
    family, num_columns = NegativeBinomial(theta), len(scale.centres_P)
    upper = np.triu_indices(num_columns)
    num_triangle = len(upper[0])

    def numbers(rows: DesignRows) -> Numbers:
        scaled_MP, y, weights = scale.scaled(rows.columns_MP), rows.outcomes_M, rows.weights_M
        eta = family.link(family.start(y, weights)) if params is None else scaled_MP @ params + rows.offsets_M
        mu = family.mean(eta)
        working, score = weights * family.information(eta), family.score(y, mu)
        weighted = working * (eta - rows.offsets_M) + weights * score
        information = (scaled_MP * working[:, None]).T @ scaled_MP
        deviances = family.deviances(y, mu)
        likelihoods = family.saturated(y) - deviances / 2
        by_theta = digamma(y + theta) - digamma(theta) - np.log1p(mu / theta) - (y - mu) / (theta + mu)
        bend = polygamma(1, theta) - polygamma(1, y + theta) - 1 / theta + 2 / (mu + theta) - (y + theta) / (mu + theta) ** 2
        score_M, bend_M = theta * by_theta, theta**2 * bend - theta * by_theta
        others = [np.sum(weights * each) for each in (deviances, likelihoods, score_M, bend_M)]
        return np.concatenate([information[upper], scaled_MP.T @ weighted, others])

    shape = (num_triangle + num_columns + 4,)
    total = yield SumRequest(statistic=f"information, score and theta, iteration {number}", shape=shape, contribution=numbers)
    information = np.zeros((num_columns, num_columns))
    information[upper] = information.T[upper] = total[:num_triangle]
    target, others = np.split(total[num_triangle:], [num_columns])
    deviance, log_likelihood, theta_score, theta_information = map(float, others)
    return _Totals(
        information_PP=information,
        target_P=target,
        deviance=deviance,
        log_likelihood=log_likelihood,
        theta_score=theta_score,
        theta_information=theta_information,
    )
