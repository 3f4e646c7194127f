"""Survival from sums over institutions: who is at risk when, Kaplan-Meier, and the log-rank test.

Times are whole cells of an agreed grid, numbered from 0; a time counts as the end of its cell. Where each time has a cell of its own, all
figures are those of the exact times.

Shapes: M patients of one site, T cells, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc, ndtri

from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers

Integers = NDArray[np.int64]

HALF = 0.5
"""Fraction that is free of the event at the median time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalRows:
    """One site's patients: until when each was seen, and whether the event happened then."""

    times_M: Numbers
    events_M: NDArray[np.bool_]
    groups_M: Integers
    """Numbered from 0 in the order that all have agreed on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LifeTable:
    """Totals over all sites by cell and group: events, censored patients and those at risk when the cell begins, (T, G) each."""

    ends_T: Numbers
    """Last time of each cell."""
    events_TG: Numbers
    censored_TG: Numbers

    @property
    def at_risk(self) -> Numbers:
        """Patients who leave in a cell or after it, (T, G)."""
        leaving_TG = self.events_TG + self.censored_TG
        return np.asarray(leaving_TG[::-1].cumsum(axis=0)[::-1])


def cells_of(times_M: Numbers, ends_T: Numbers) -> Integers:
    """Cell of each time, rounded up to the cell's end, (M,).

    Raises:
        ConfigError: a time is not positive, not finite, or after the last cell.
    """
    if not (np.isfinite(times_M).all() and (times_M > 0).all() and (times_M <= ends_T[-1]).all()):
        raise ConfigError(f"a time that is not between 0 and {ends_T[-1]:g}, where the agreed grid ends")
    return np.searchsorted(ends_T, times_M, side="left").astype(np.int64)


def counts(rows: SurvivalRows, ends_T: Numbers, num_groups: int) -> Numbers:
    """One site's events and censored patients by cell and group, (2, T, G)."""
    found = np.zeros((2, len(ends_T), num_groups))
    np.add.at(found, (np.where(rows.events_M, 0, 1), cells_of(rows.times_M, ends_T), rows.groups_M), 1.0)
    return found


def merged_ends(table: LifeTable, fewest: int) -> Numbers:
    """Ends of cells that are merged forward until nobody can be told apart in one.

    A cell is closed as soon as each group has 0 or at least *fewest* events in it, 0 or at least *fewest* censored patients, and as many at
    risk when it begins; what cannot be closed at the end joins the last cell that can.

    Raises:
        ConfigError: not even all cells together pass.
    """

    def passes(first: int, last: int) -> bool:
        events_G = table.events_TG[first : last + 1].sum(axis=0)
        censored_G = table.censored_TG[first : last + 1].sum(axis=0)
        at_risk_G = table.at_risk[first]
        few = [(events_G > 0) & (events_G < fewest), (censored_G > 0) & (censored_G < fewest), (at_risk_G > 0) & (at_risk_G < fewest)]
        return not np.any(few)

    firsts, lasts, first = [], [], 0
    for last in range(len(table.ends_T)):
        if passes(first, last):
            firsts.append(first)
            lasts.append(last)
            first = last + 1
    while first < len(table.ends_T):
        if not lasts:
            raise ConfigError(f"fewer than {fewest} patients in a group: no grid hides them")
        first = firsts.pop()
        lasts.pop()
        if passes(first, len(table.ends_T) - 1):
            lasts.append(len(table.ends_T) - 1)
            break
    return np.asarray(table.ends_T[lasts])


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalCurve:
    """A Kaplan-Meier curve of one group, with Greenwood's standard errors; arrays are (T,)."""

    times_T: Numbers
    survival_T: Numbers
    bse_T: Numbers
    at_risk_T: Numbers
    cumulative_hazard_T: Numbers
    """Nelson and Aalen's estimate."""
    _log_variance_T: Numbers

    def at(self, time: float) -> float:
        """Estimated fraction that is free of the event after a time."""
        place = int(np.searchsorted(self.times_T, time, side="right")) - 1
        return 1.0 if place < 0 else float(self.survival_T[place])

    def conf_int(self, level: float = 0.95) -> Numbers:
        """Confidence intervals on the scale of log(-log S), (T, 2); NaN where S is 0 or 1."""
        z = float(ndtri((1 + level) / 2))
        is_inside_T = (self.survival_T > 0) & (self.survival_T < 1)
        logs_T = np.log(np.where(is_inside_T, self.survival_T, 0.5))
        width_T = z * np.sqrt(self._log_variance_T) / np.abs(logs_T)
        bounds = np.stack([np.exp(logs_T * np.exp(width_T)), np.exp(logs_T * np.exp(-width_T))], axis=-1)
        return np.where(is_inside_T[:, None], bounds, np.nan)

    def median(self) -> float:
        """First time at which at most half are free of the event; infinite where that is never seen."""
        return self._first(self.survival_T)

    def median_conf_int(self, level: float = 0.95) -> tuple[float, float]:
        """First times at which the lower and the upper confidence bound are at most a half."""
        lower, upper = self.conf_int(level).T
        return self._first(lower), self._first(upper)

    def _first(self, values_T: Numbers) -> float:
        is_there = np.nan_to_num(values_T, nan=np.inf) <= HALF
        return float(self.times_T[is_there.argmax()]) if is_there.any() else math.inf


def kaplan_meier(table: LifeTable, group: int) -> SurvivalCurve:
    """Estimate the fraction of a group that is free of the event after each cell."""
    events_T, at_risk_T = table.events_TG[:, group], table.at_risk[:, group]
    is_used_T = at_risk_T > 0
    events_T, at_risk_T, times_T = events_T[is_used_T], at_risk_T[is_used_T], table.ends_T[is_used_T]
    survival_T = np.asarray(np.cumprod(1 - events_T / at_risk_T), dtype=np.float64)
    left_T = at_risk_T - events_T
    terms_T = np.divide(events_T, at_risk_T * left_T, out=np.zeros_like(events_T), where=left_T > 0)
    variance_T = np.cumsum(terms_T)
    return SurvivalCurve(
        times_T=times_T,
        survival_T=survival_T,
        bse_T=survival_T * np.sqrt(variance_T),
        at_risk_T=at_risk_T,
        cumulative_hazard_T=np.cumsum(events_T / at_risk_T),
        _log_variance_T=variance_T,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRank:
    """A log-rank test of equal survival in all groups."""

    statistic: float
    df: int
    pvalue: float
    observed_G: Numbers
    expected_G: Numbers


def log_rank_sums(table: LifeTable) -> Numbers:
    """Observed and expected events of each group, and the covariance of their differences; (2 + G, G).

    Those of several strata, such as institutions, are added.
    """
    events_T, at_risk_T = table.events_TG.sum(axis=1), table.at_risk.sum(axis=1)
    is_used_T = (events_T > 0) & (at_risk_T > 1)
    # a cell in which one patient is at risk tells nothing of differences, but has its expected event
    fraction_TG = np.divide(table.at_risk, at_risk_T[:, None], out=np.zeros_like(table.at_risk), where=at_risk_T[:, None] > 0)
    expected_TG = events_T[:, None] * fraction_TG
    factor_T = np.where(is_used_T, events_T * (at_risk_T - events_T) / np.maximum(at_risk_T - 1, 1), 0.0)
    spread_GG = np.diag((factor_T[:, None] * fraction_TG).sum(axis=0)) - (factor_T[:, None] * fraction_TG).T @ fraction_TG
    return np.concatenate([[table.events_TG.sum(axis=0), expected_TG.sum(axis=0)], spread_GG])


def log_rank(sums: Numbers) -> LogRank:
    """Test whether all groups survive alike, from the sums of all strata.

    Raises:
        ConfigError: there is one group only, or no event while others are at risk.
    """
    observed_G, expected_G, spread_GG = sums[0], sums[1], sums[2:]
    is_used_G = expected_G > 0
    df = int(is_used_G.sum()) - 1
    if df < 1:
        raise ConfigError("a log-rank test needs two groups that are at risk when events happen")
    kept = np.flatnonzero(is_used_G)[:-1]  # the last one follows from the others
    difference = (observed_G - expected_G)[kept]
    statistic = float(difference @ np.linalg.solve(spread_GG[np.ix_(kept, kept)], difference))
    return LogRank(statistic=statistic, df=df, pvalue=float(gammaincc(df / 2, statistic / 2)), observed_G=observed_G, expected_G=expected_G)


def life_table(ends_T: Numbers, total: Numbers) -> LifeTable:
    """Table of the totals of `counts`, (2, T, G)."""
    return LifeTable(ends_T=ends_T, events_TG=total[0], censored_TG=total[1])


def grid(unit: float, last: float) -> Numbers:
    """Ends of the cells of an agreed grid: multiples of one unit up to the first at or after *last*."""
    return unit * np.arange(1, math.ceil(last / unit) + 1, dtype=np.float64)


def distinct_ends(several: Sequence[Numbers]) -> Numbers:
    """A cell for each time that is there: the exact times, for tests and for one site alone."""
    return np.unique(np.concatenate(several))
