"""Cox's proportional hazards model from sums over institutions.

Stratified by institution, each site contributes log-likelihood, score and information of its own partial likelihood, on exact times. With
one baseline for all, each contributes its sums over those at risk in each cell of an agreed grid. The same partial likelihood is made of
them after they are added.

Shapes: M patients of one site, T cells, P columns. Source: Cox 1972; ties: Efron 1977, Breslow 1974; stratified sites: Lu et al. 2015.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc

from p2pfl.errors import ConfigError
from p2pfl.statistics.newton import MOST_ITERATIONS, check_separation, solved, stands
from p2pfl.statistics.scale import INTERCEPT, Scale, agree_on_scale
from p2pfl.statistics.sums import Numbers, SumRequest
from p2pfl.statistics.survival import cells_of
from p2pfl.statistics.wald import WaldFit

Ties = Literal["efron", "breslow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoxRows:
    """One site's patients, complete cases only."""

    columns_MP: Numbers
    times_M: Numbers
    events_M: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskSums:
    """Sums over patients by cell, which add up over sites: of weights w = exp(x beta) times 1, x and x x'."""

    num_events_T: Numbers
    eta_T: Numbers
    """Sum of x beta over the events."""
    columns_TP: Numbers
    """Sum of x over the events."""
    at_risk: tuple[Numbers, Numbers, Numbers]
    """(T,), (T, P) and (T, P, P) over those at risk."""
    tied: tuple[Numbers, Numbers, Numbers]
    """Such sums over the events alone."""

    def packed(self) -> Numbers:
        """All numbers in one vector; symmetric matrices by their upper triangles."""
        upper = np.triu_indices(self.columns_TP.shape[1])
        parts = [self.num_events_T, self.eta_T, self.columns_TP]
        for weights_T, columns_TP, squares_TPP in (self.at_risk, self.tied):
            parts += [weights_T, columns_TP, squares_TPP[:, upper[0], upper[1]]]
        return np.concatenate([part.ravel() for part in parts])

    @staticmethod
    def unpacked(numbers: Numbers, num_cells: int, num_columns: int) -> RiskSums:
        """Read the vector that `packed` makes."""
        upper = np.triu_indices(num_columns)
        widths = [1, 1, num_columns, *[1, num_columns, len(upper[0])] * 2]
        parts = np.split(numbers, np.cumsum([num_cells * width for width in widths])[:-1])
        events_T, eta_T, columns, *rest = (part.reshape(num_cells, -1) for part in parts)

        def triple(weights: Numbers, columns_TP: Numbers, triangles: Numbers) -> tuple[Numbers, Numbers, Numbers]:
            squares = np.zeros((num_cells, num_columns, num_columns))
            squares[:, upper[0], upper[1]] = squares[:, upper[1], upper[0]] = triangles
            return weights[:, 0], columns_TP, squares

        return RiskSums(
            num_events_T=events_T[:, 0],
            eta_T=eta_T[:, 0],
            columns_TP=columns,
            at_risk=triple(rest[0], rest[1], rest[2]),
            tied=triple(rest[3], rest[4], rest[5]),
        )


def risk_sums(columns_MP: Numbers, rows: CoxRows, ends_T: Numbers, params: Numbers) -> RiskSums:
    """One site's sums at some coefficients, by cell."""
    cells_M, num_cells, num_columns = cells_of(rows.times_M, ends_T), len(ends_T), columns_MP.shape[1]
    eta_M = columns_MP @ params
    weights_M = np.exp(eta_M)
    terms = (weights_M, weights_M[:, None] * columns_MP, weights_M[:, None, None] * columns_MP[:, :, None] * columns_MP[:, None, :])

    def by_cell(values: Numbers, of: NDArray[np.bool_] | None = None) -> Numbers:
        found = np.zeros((num_cells, *values.shape[1:]))
        np.add.at(found, cells_M if of is None else cells_M[of], values if of is None else values[of])
        return found

    def until(values: Numbers) -> Numbers:
        return by_cell(values)[::-1].cumsum(axis=0)[::-1]

    assert num_columns == len(params)
    events_M = rows.events_M
    return RiskSums(
        num_events_T=by_cell(np.ones(len(cells_M)), events_M),
        eta_T=by_cell(eta_M, events_M),
        columns_TP=by_cell(columns_MP, events_M),
        at_risk=(until(terms[0]), until(terms[1]), until(terms[2])),
        tied=(by_cell(terms[0], events_M), by_cell(terms[1], events_M), by_cell(terms[2], events_M)),
    )


def partial_likelihood(sums: RiskSums, ties: Ties) -> tuple[float, Numbers, Numbers]:
    """Log partial likelihood, its score (P,) and its information (P, P)."""
    used = np.flatnonzero(np.rint(sums.num_events_T))
    log_likelihood, score = float(sums.eta_T.sum()), sums.columns_TP.sum(axis=0)
    information = np.zeros((len(score), len(score)))
    for cell in used:
        if not sums.at_risk[0][cell] > 0:  # all weights are too small for a number: the events are separated
            return np.nan, np.full_like(score, np.nan), np.full_like(information, np.nan)
        num_tied = round(float(sums.num_events_T[cell]))
        for k in range(num_tied):
            less = k / num_tied if ties == "efron" else 0.0  # the part of the tied events that has left
            weight, column, square = (risk[cell] - less * tied[cell] for risk, tied in zip(sums.at_risk, sums.tied, strict=True))
            mean = column / weight
            log_likelihood -= float(np.log(weight))
            score = score - mean
            information += square / weight - np.outer(mean, mean)
    return log_likelihood, score, information


@dataclass(frozen=True, kw_only=True, slots=True)
class CoxFit(WaldFit):
    """A fitted Cox model; arrays are (P,) in the order of the names."""

    ties: Ties
    num_rows: int
    num_events: int
    log_likelihood: float
    null_log_likelihood: float
    score_statistic: float
    """Statistic of the score test that all coefficients are 0."""
    iterations: int

    def tests(self) -> dict[str, tuple[float, float]]:
        """Statistic and p-value of three tests that all coefficients are 0: Wald, score, likelihood ratio."""
        wald = float(self.params @ np.linalg.solve(self.covariance_PP, self.params))
        found = {
            "wald": wald,
            "score": self.score_statistic,
            "likelihood ratio": 2 * (self.log_likelihood - self.null_log_likelihood),
        }
        return {name: (statistic, float(gammaincc(len(self.names) / 2, statistic / 2))) for name, statistic in found.items()}


def fit_cox(
    names: Sequence[str], *, ties: Ties = "efron", ends_T: Numbers | None = None, units_P: Numbers | None = None
) -> Generator[SumRequest[CoxRows], Numbers, CoxFit]:
    """Fit a Cox model; lead it to its result with `analyse`, or by secure sums.

    Args:
        names: of the columns, P; no intercept.
        ties: what is made of events in one cell.
        ends_T: ends of the grid's cells, for one baseline for all; None: each site has its own baseline, on exact times.
        units_P: of the columns, for `agree_on_scale`.

    Raises:
        ConfigError: no event, columns that depend on each other, events that are separated, or a time outside of the grid.
    """
    if INTERCEPT in names:
        raise ConfigError("a Cox model has no intercept: the baseline hazard holds it")
    scale = yield from agree_on_scale(names, lambda rows: rows.columns_MP, may_centre=True, units_P=units_P)
    (num_events,) = yield SumRequest(statistic="events", shape=(1,), contribution=lambda rows: np.array([float(rows.events_M.sum())]))
    if num_events < 1:
        raise ConfigError("no site has an event: there is nothing to fit")
    params = np.zeros(len(names))
    first = previous = yield from _at(params, scale, ties, ends_T, 0)
    for iteration in range(1, MOST_ITERATIONS + 1):
        params = params + solved(previous[2], previous[1], names)
        now = yield from _at(params, scale, ties, ends_T, iteration)
        check_separation(first[2], now[2], names, outcome="the events are")
        is_over = stands(now[0], previous[0])
        previous = now
        if is_over:
            break
    else:
        raise ConfigError(f"no fit after {MOST_ITERATIONS} iterations: the events may be separated by a column")
    params = params + solved(previous[2], previous[1], names)
    log_likelihood, _, information = yield from _at(params, scale, ties, ends_T, iteration + 1)
    back_PP = scale.back(names)
    return CoxFit(
        names=tuple(names),
        ties=ties,
        params=back_PP @ params,
        covariance_PP=back_PP @ np.linalg.inv(information) @ back_PP.T,
        num_rows=scale.num_rows,
        num_events=round(num_events),
        log_likelihood=log_likelihood,
        null_log_likelihood=first[0],
        score_statistic=float(first[1] @ np.linalg.solve(first[2], first[1])),
        iterations=iteration,
    )


_Likelihood = tuple[float, Numbers, Numbers]


def _at(
    params: Numbers, scale: Scale, ties: Ties, ends_T: Numbers | None, number: int
) -> Generator[SumRequest[CoxRows], Numbers, _Likelihood]:
    """Ask for the partial likelihood of all sites at some coefficients of the scaled columns."""
    num_columns, upper = len(params), np.triu_indices(len(params))
    statistic = f"partial likelihood, iteration {number}"
    if ends_T is not None:

        def sums(rows: CoxRows) -> Numbers:
            return risk_sums(scale.scaled(rows.columns_MP), rows, ends_T, params).packed()

        size = len(ends_T) * (2 + num_columns + 2 * (1 + num_columns + len(upper[0])))
        total = yield SumRequest(statistic=statistic, shape=(size,), contribution=sums)
        return partial_likelihood(RiskSums.unpacked(total, len(ends_T), num_columns), ties)

    def own(rows: CoxRows) -> Numbers:
        if not rows.events_M.any():
            return np.zeros(1 + num_columns + len(upper[0]))
        own_ends = np.unique(rows.times_M)
        found = partial_likelihood(risk_sums(scale.scaled(rows.columns_MP), rows, own_ends, params), ties)
        return np.concatenate([[found[0]], found[1], found[2][upper]])

    total = yield SumRequest(statistic=statistic, shape=(1 + num_columns + len(upper[0]),), contribution=own)
    information = np.zeros((num_columns, num_columns))
    information[upper] = information.T[upper] = total[1 + num_columns :]
    return float(total[0]), total[1 : 1 + num_columns], information
