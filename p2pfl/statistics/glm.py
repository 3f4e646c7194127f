"""Generalised linear models from sums over institutions: the fit of the pooled rows, and no row leaves its site.

Each site contributes X'WX, X'Wz and its deviance at coefficients that all know; everybody solves the same system. Columns are first centred
and scaled by pooled moments, and the result is transformed back, because normal equations square the condition number.

Shapes: M rows of one site, P columns of the design. Source: McCullagh & Nelder 1989, section 2.5 (iterated weighted least squares).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.families import FAMILIES, Family, NegativeBinomial
from p2pfl.statistics.newton import MOST_ITERATIONS, check_separation, is_last, solved, stands
from p2pfl.statistics.scale import Scale, agree_on_scale
from p2pfl.statistics.sums import Numbers, SumRequest
from p2pfl.statistics.wald import WaldFit

MOST_PARAMETERS_PER_ROW = 0.33

NO_SCATTER = 1e-20
"""Part of the outcome's squares, up to which what the model leaves is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DesignRows:
    """One site's rows of a model, complete cases only."""

    columns_MP: Numbers
    outcomes_M: Numbers
    offsets_M: Numbers
    weights_M: Numbers
    num_missing: int = 0
    """Rows that were left out because a value is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GLMFit(WaldFit):
    """A fitted generalised linear model; arrays are (P,) in the order of the names."""

    family: str
    num_rows: int
    num_missing: int
    deviance: float
    dispersion: float
    log_likelihood: float
    aic: float
    """As R counts: an estimated dispersion is one more parameter."""
    iterations: int
    theta: float | None = None
    """Parameter of a negative binomial model, whose variance is mean + mean^2 / theta."""
    theta_bse: float | None = None
    """Standard error of theta; None where it was given."""

    @property
    def df_resid(self) -> int:
        """Degrees of freedom that the residuals have."""
        return self.num_rows - len(self.names)

    @property
    def t_df(self) -> int | None:
        """Degrees of freedom of t tests: those of the residuals where the dispersion is estimated; None elsewhere."""
        return self.df_resid if self.has_dispersion else None

    @property
    def has_dispersion(self) -> bool:
        """Whether the scatter around the mean is estimated, so that tests are by t."""
        return self.family in FAMILIES and FAMILIES[self.family].has_dispersion


def fit_glm(names: Sequence[str], family: Family, *, units_P: Numbers | None = None) -> Generator[SumRequest[DesignRows], Numbers, GLMFit]:
    """Fit a generalised linear model; lead it to its result with `analyse`, or by secure sums.

    Args:
        names: of the design's columns, P; one called INTERCEPT is all ones.
        family: of the outcome.
        units_P: of the columns, for `agree_on_scale`.

    Raises:
        ConfigError: too few rows for so many columns, columns that depend on each other, an outcome that is separated or not of the family,
            or one that the columns foretell exactly where its scatter is estimated.
    """
    scale = yield from agree_on_scale(names, lambda rows: rows.columns_MP, units_P=units_P)
    dof = scale.num_rows - len(names)
    if len(names) >= MOST_PARAMETERS_PER_ROW * scale.num_rows:
        raise ConfigError(f"{len(names)} coefficients from {scale.num_rows} rows: fewer than {MOST_PARAMETERS_PER_ROW:g} a row are needed")
    num_missing, saturated, num_foreign = yield SumRequest(
        statistic="missing rows and saturated log-likelihood", shape=(3,), contribution=lambda rows: _facts(rows, family)
    )
    if num_foreign:
        raise ConfigError(f"an outcome that no {family.name} model has: {family.expected}")
    first = previous = yield from _at(None, family, scale, 0)
    for iteration in range(1, MOST_ITERATIONS + 1):
        params = solved(previous.information_PP, previous.target_P, names)
        now = yield from _at(params, family, scale, iteration)
        check_separation(first.information_PP, now.information_PP, names, outcome="the outcome is")
        is_over = stands(now.deviance, previous.deviance)
        if is_over and not family.is_canonical:
            step_P = solved(now.information_PP, now.target_P, names) - params
            is_over = is_last(step_P, now.information_PP, now.deviance / dof if family.has_dispersion else 1.0)
        previous = now
        if is_over:
            break
    else:
        raise ConfigError(f"no fit after {MOST_ITERATIONS} iterations: the outcome may be separated, or a column far too large")
    params = solved(previous.information_PP, previous.target_P, names)
    last = yield from _at(params, family, scale, iteration + 1)  # the information at the coefficients that are reported
    if family.has_dispersion and last.deviance <= NO_SCATTER * abs(float(last.target_P @ params)):
        raise ConfigError("the outcome has no scatter around the model: it is the same in all rows, or follows from the other variables")
    dispersion = last.pearson / dof if family.has_dispersion else 1.0
    covariance = dispersion * np.linalg.inv(last.information_PP)
    log_likelihood = family.log_likelihood(float(saturated), last.deviance, scale.num_rows)
    back_PP = scale.back(names)
    return GLMFit(
        names=tuple(names),
        family=family.name,
        params=back_PP @ params,
        covariance_PP=back_PP @ covariance @ back_PP.T,
        num_rows=scale.num_rows,
        num_missing=round(num_missing),
        deviance=last.deviance,
        dispersion=dispersion,
        log_likelihood=log_likelihood,
        aic=-2 * log_likelihood + 2 * (len(names) + family.has_dispersion),
        iterations=iteration,
        theta=family.theta if isinstance(family, NegativeBinomial) else None,
    )


# ---- one iteration


@dataclass(frozen=True, kw_only=True, slots=True)
class _Totals:
    """Totals over all sites at some coefficients."""

    information_PP: Numbers
    target_P: Numbers
    """X'Wz."""
    deviance: float
    pearson: float
    """Squared residuals, each divided by the variance that its mean gives but for the dispersion."""


def _facts(rows: DesignRows, family: Family) -> Numbers:
    """Rows with a missing value, the log-likelihood of the model that fits exactly, and 1 if the outcomes are not of the family."""
    if not family.accepts(rows.outcomes_M):
        return np.array([rows.num_missing, 0.0, 1.0])
    return np.array([rows.num_missing, np.sum(rows.weights_M * family.saturated(rows.outcomes_M)), 0.0])


def _at(params: Numbers | None, family: Family, scale: Scale, number: int) -> Generator[SumRequest[DesignRows], Numbers, _Totals]:
    """Ask for the totals at some coefficients; None: at the means that the family begins with."""
    num_columns = len(scale.centres_P)
    upper = np.triu_indices(num_columns)
    num_triangle = len(upper[0])

    def numbers(rows: DesignRows) -> Numbers:
        scaled_MP = scale.scaled(rows.columns_MP)
        y, weights = rows.outcomes_M, rows.weights_M
        eta = family.link(family.start(y, weights)) if params is None else scaled_MP @ params + rows.offsets_M
        mu = family.mean(eta)
        working, score = weights * family.information(eta), family.score(y, mu)
        # W z with z = eta - offset + score / information; multiplied out, so that no information divides nothing
        weighted = working * (eta - rows.offsets_M) + weights * score
        information = (scaled_MP * working[:, None]).T @ scaled_MP
        squares = [np.sum(weights * score**2)] if family.has_pearson else []
        return np.concatenate([information[upper], scaled_MP.T @ weighted, [np.sum(weights * family.deviances(y, mu))], squares])

    shape = (num_triangle + num_columns + 1 + family.has_pearson,)
    total = yield SumRequest(statistic=f"information, score and deviance, iteration {number}", shape=shape, contribution=numbers)
    information = np.zeros((num_columns, num_columns))
    information[upper] = information.T[upper] = total[:num_triangle]
    target, (deviance, *_) = np.split(total[num_triangle:], [num_columns])
    return _Totals(information_PP=information, target_P=target, deviance=float(deviance), pearson=float(total[-1]))
