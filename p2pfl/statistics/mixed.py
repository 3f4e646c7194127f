"""Linear models with a random intercept for each institution, from one summary of each: the fit of the pooled rows by REML.

The summary of a site is [X y]'[X y] with the intercept among the columns, and so holds its number of rows, its means and its products. All
members learn it. The likelihood is then a function of one number, the ratio of both variances.

Shapes: M rows of one site, P columns of the design, S sites. Source: Luo et al. 2022 (DLMM); Bates et al. 2015 (lme4) for the criterion.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincc

from p2pfl.errors import ConfigError
from p2pfl.statistics.glm import MOST_PARAMETERS_PER_ROW, DesignRows
from p2pfl.statistics.newton import solved
from p2pfl.statistics.scale import INTERCEPT, agree_on_scale
from p2pfl.statistics.sums import Numbers, SumRequest
from p2pfl.statistics.wald import WaldFit

FEWEST_SITES = 2
_NO_SCATTER = 1e-12
"""Part of the outcome's squares, up to which what the model leaves may be rounding: it is a difference of both."""

_RATIOS = np.exp(np.arange(-16.0, 16.25, 0.25))
"""Ratios of the variance between sites to the one within, among which the best is sought before it is found exactly."""


class PlacedRows(NamedTuple):
    """One site's rows of a model, with its place among the summaries of all sites."""

    rows: DesignRows
    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedFit(WaldFit):
    """A fitted linear model with a random intercept for each site; arrays are (P,) in the order of the names."""

    num_rows: int
    num_sites: int
    tau_squared: float
    """Variance of the sites' intercepts."""
    residual_variance: float
    reml_log_likelihood: float
    tau_statistic: float
    """Likelihood ratio of the model to the one without differences between sites."""

    def in_unit(self, unit: float) -> MixedFit:
        """The fit of outcomes in their own unit, from that of outcomes divided by it."""
        return replace(
            self,
            params=self.params * unit,
            covariance_PP=self.covariance_PP * unit**2,
            tau_squared=self.tau_squared * unit**2,
            residual_variance=self.residual_variance * unit**2,
            reml_log_likelihood=self.reml_log_likelihood - (self.num_rows - len(self.names)) * math.log(unit),
        )

    @property
    def icc(self) -> float:
        """Part of the variance that lies between sites."""
        return self.tau_squared / (self.tau_squared + self.residual_variance)

    @property
    def tau_pvalue(self) -> float:
        """p-value of the test that sites do not differ: half of chi-squared's, as a variance is not negative."""
        return float(gammaincc(0.5, self.tau_statistic / 2)) / 2 if self.tau_statistic > 0 else 1.0


def fit_mixed(
    names: Sequence[str], outcome: str, num_sites: int, *, units_P: Numbers
) -> Generator[SumRequest[PlacedRows], Numbers, MixedFit]:
    """Fit a linear model with a random intercept for each site.

    Args:
        names: of the design's columns, P; one called INTERCEPT is all ones.
        outcome: its name, for messages.
        num_sites: places of summaries.
        units_P: of the columns, for `agree_on_scale`.

    Raises:
        ConfigError: too few rows or sites, no intercept, columns that depend on each other, or an outcome without scatter.
    """
    if INTERCEPT not in names:
        raise ConfigError("a mixed model has an intercept, around which those of the sites lie: leave the 0 out")
    num_columns, size = len(names), len(names) + 1
    scale = yield from agree_on_scale((*names, outcome), _columns, units_P=np.append(units_P, 1.0))
    if num_columns >= MOST_PARAMETERS_PER_ROW * scale.num_rows:
        raise ConfigError(f"{num_columns} coefficients from {scale.num_rows} rows: fewer than {MOST_PARAMETERS_PER_ROW:g} a row are needed")
    upper = np.triu_indices(size)

    def summary(site: PlacedRows) -> Numbers:
        scaled = scale.scaled(_columns(site))
        found = np.zeros((num_sites, len(upper[0])))
        found[site.place] = (scaled.T @ scaled)[upper]
        return found

    totals = yield SumRequest(statistic=SUMMARIES, shape=(num_sites, len(upper[0])), contribution=summary)
    products_SPP = np.zeros((num_sites, size, size))
    products_SPP[:, upper[0], upper[1]] = products_SPP[:, upper[1], upper[0]] = totals
    place = names.index(INTERCEPT)
    products_SPP = products_SPP[products_SPP[:, place, place] > 0]
    if len(products_SPP) < FEWEST_SITES:
        raise ConfigError(f"{len(products_SPP)} sites have rows: a mixed model needs {FEWEST_SITES}")
    profile = _Profile(products_SPP, place, names)
    ratio = profile.best_ratio()
    best, none = profile.at(ratio), profile.at(0.0)
    back_PP, unit = scale.back((*names, outcome))[:-1, :-1], float(scale.spreads_P[-1])
    params = unit * back_PP @ best.params
    params[place] += scale.centres_P[-1]
    # the criterion is that of scaled columns: both determinants change by the spreads
    shift = 2 * float(np.log(scale.spreads_P[:-1]).sum()) + 2 * (scale.num_rows - num_columns) * math.log(unit)
    return MixedFit(
        names=tuple(names),
        params=params,
        covariance_PP=unit**2 * best.variance * back_PP @ np.linalg.inv(best.information_PP) @ back_PP.T,
        num_rows=scale.num_rows,
        num_sites=len(products_SPP),
        tau_squared=ratio * best.variance * unit**2,
        residual_variance=best.variance * unit**2,
        reml_log_likelihood=-(best.criterion + shift) / 2,
        tau_statistic=none.criterion - best.criterion,
    )


SUMMARIES = "summaries of sites"


def _columns(site: PlacedRows) -> Numbers:
    return np.column_stack([site.rows.columns_MP, site.rows.outcomes_M])


# ---- the likelihood as a function of the ratio of the variances


@dataclass(frozen=True, kw_only=True, slots=True)
class _AtRatio:
    """Fit at one ratio of the variances, in scaled columns."""

    params: Numbers
    information_PP: Numbers
    variance: float
    """Within sites."""
    criterion: float
    """Minus twice the restricted log-likelihood."""
    slope: float
    """Derivative of the criterion by the ratio."""


class _Profile:
    """Restricted likelihood of the sites' summaries (S, P + 1, P + 1), the outcome last."""

    def __init__(self, products_SPP: Numbers, intercept: int, names: Sequence[str]) -> None:
        self._sums_SP = products_SPP[:, intercept]
        self._rows_S = products_SPP[:, intercept, intercept]
        # around the means of each site, so that a great ratio cancels no digits
        self._within = products_SPP.sum(axis=0) - (self._sums_SP.T / self._rows_S) @ self._sums_SP
        self._within[intercept] = self._within[:, intercept] = 0.0
        self._df = float(self._rows_S.sum()) - (self._within.shape[0] - 1)
        self._squares = float(products_SPP[:, -1, -1].sum())
        whole = self._products(0.0)
        solved(whole[:-1, :-1], whole[:-1, -1], names)  # columns that depend on each other are named

    def _products(self, ratio: float) -> Numbers:
        """Products of the columns and the outcome under the inverse of the covariance, but for the variance within sites."""
        return np.asarray(self._within + (self._sums_SP.T / (self._rows_S * (1 + self._rows_S * ratio))) @ self._sums_SP)

    def at(self, ratio: float) -> _AtRatio:
        """Fit at a ratio; ConfigError where the outcome has no scatter."""
        shrunk_S = 1 + self._rows_S * ratio
        products = self._products(ratio)
        change = -(self._sums_SP.T / shrunk_S**2) @ self._sums_SP
        information, target = products[:-1, :-1], products[:-1, -1]
        params = np.asarray(np.linalg.solve(information, target))
        squares = float(products[-1, -1] - target @ params)
        if squares <= _NO_SCATTER * self._squares:
            raise ConfigError("the outcome has no scatter around the model: it follows from the other variables")
        residual = np.append(-params, 1.0)
        variance = squares / self._df
        log_det = float(np.linalg.slogdet(information)[1])
        return _AtRatio(
            params=params,
            information_PP=information,
            variance=variance,
            criterion=self._df * (1 + math.log(2 * math.pi * variance)) + float(np.log(shrunk_S).sum()) + log_det,
            slope=float(residual @ change @ residual) / variance
            + float((self._rows_S / shrunk_S).sum())
            + float(np.trace(np.linalg.solve(information, change[:-1, :-1]))),
        )

    def best_ratio(self) -> float:
        """Ratio with the greatest restricted likelihood; 0 where sites do not differ more than by chance."""
        slopes = [self.at(ratio).slope for ratio in _RATIOS]
        found = [0.0]
        for (low, high), (before, after) in zip(pairwise(_RATIOS), pairwise(slopes), strict=True):
            if before < 0 <= after:
                found.append(float(brentq(lambda ratio: self.at(ratio).slope, low, high, xtol=1e-300, rtol=1e-14)))
        return min(found, key=lambda ratio: self.at(ratio).criterion)
