"""Survival curves and log-rank tests over all sites.

Shapes: T cells of time, G groups.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2pfl.analyses.floors import Counts, check_cross_table, count_patients, counted
from p2pfl.analyses.rows import SiteRows, groups_of, part_of
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import figure, p_value, text_table, wrapped
from p2pfl.analyses.time_cells import TimeCells, count_cells
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers, SumRequest
from p2pfl.statistics.survival import (
    LifeTable,
    LogRank,
    SurvivalCurve,
    SurvivalRows,
    counts,
    kaplan_meier,
    life_table,
    log_rank,
    log_rank_sums,
)

_MOST_TIMES = 10
"""Times of a curve in a table for people; files have all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvesResult:
    """Kaplan-Meier curves of all sites' patients, by group, on merged cells of time."""

    spec: AnalysisSpec
    counts: Counts
    group: str | None
    """Variable of the groups."""
    table: LifeTable
    cells: TimeCells
    curves: dict[str, SurvivalCurve]
    """By the group's label; groups without a patient are not there."""
    test: LogRank | None
    """Log-rank test of equal survival in all groups; None: there is one."""

    def records(self) -> list[dict[str, Any]]:
        """One row for each group and time, for CSV and JSON."""
        found = []
        for label, curve in self.curves.items():
            columns = (curve.times_T, curve.at_risk_T, curve.survival_T, curve.bse_T, curve.cumulative_hazard_T)
            for time, at_risk, survival, error, hazard, (low, high) in zip(*columns, curve.conf_int(self.spec.level), strict=True):
                found.append(
                    {
                        "group": label,
                        "time": float(time),
                        "at_risk": round(at_risk),
                        "survival": float(survival),
                        "se": float(error),
                        "low": _number(low),
                        "high": _number(high),
                        "cumulative_hazard": float(hazard),
                    }
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; null where a median is never seen."""
        medians: dict[str, dict[str, Any]] = {}
        for label, curve in self.curves.items():
            low, high = curve.median_conf_int(self.spec.level)
            medians[label] = {"median": _number(curve.median()), "low": _number(low), "high": _number(high)}
            medians[label]["cell"] = self.cells.around(curve.median())
        test = None if self.test is None else _test(self.test)
        content = {"analysis": self.spec.as_dict(), **self.counts.as_dict(), "group": self.group, "medians": medians}
        return {**content, "cells": self.cells.as_dict(), "log_rank": test, "curves": self.records()}

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        level = f"{100 * self.spec.level:g} %"
        lines = [
            *wrapped(f"{self.spec.formula}, Kaplan-Meier on cells of time"),
            *wrapped(counted(self.counts, self.spec)),
            *wrapped(str(self.cells)),
        ]
        for label, curve in self.curves.items():
            low, high = curve.median_conf_int(self.spec.level)
            name = "all patients" if self.group is None else f"{self.group} = {label}"
            cell = self.cells.around(curve.median())
            where = "" if cell is None else f" (cell from {cell[0]:g} to {cell[1]:g})"
            lines += ["", *wrapped(f"{name}: median {figure(curve.median())}{where}, {level} from {figure(low)} to {figure(high)}")]
            bounds, times = curve.conf_int(self.spec.level), len(curve.times_T)
            places = np.unique(np.linspace(0, times - 1, min(times, _MOST_TIMES)).round().astype(int))
            rows = [
                (
                    f"{curve.times_T[k]:g}",
                    f"{curve.at_risk_T[k]:,.0f}",
                    figure(curve.survival_T[k], 4),
                    figure(curve.bse_T[k], 4),
                    figure(bounds[k, 0], 4),
                    figure(bounds[k, 1], 4),
                )
                for k in places
            ]
            lines += text_table(("until", "at risk before", "survival", "SE", f"{level} from", "to"), rows)
            if times > _MOST_TIMES:
                lines += wrapped(f"{_MOST_TIMES} of {times} cells; the others are in --csv and --json")
        if self.test is not None:
            lines += ["", *wrapped(_sentence(self.test))]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRankResult:
    """A log-rank test over all sites' patients, stratified by site or on merged cells of time."""

    spec: AnalysisSpec
    counts: Counts
    group: str
    labels: tuple[str, ...]
    test: LogRank
    cells: TimeCells | None
    """Merged cells of time; None: exact times, stratified by site."""

    def records(self) -> list[dict[str, Any]]:
        """Observed and expected events of each group, for CSV and JSON."""
        columns = (self.labels, self.test.observed_G, self.test.expected_G)
        return [
            {"group": label, "observed": round(seen), "expected": float(expected)} for label, seen, expected in zip(*columns, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        content = {"analysis": self.spec.as_dict(), **self.counts.as_dict(), "group": self.group}
        content |= {} if self.cells is None else {"cells": self.cells.as_dict()}
        return {**content, "log_rank": _test(self.test), "groups": self.records()}

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        how = "stratified by site, exact times" if self.cells is None else "on cells of time"
        rows = [(each["group"], f"{each['observed']:,}", figure(each["expected"])) for each in self.records()]
        lines = [*wrapped(f"{self.spec.formula}, log-rank test, {how}"), *wrapped(counted(self.counts, self.spec))]
        lines += ["", *([] if self.cells is None else [*wrapped(str(self.cells)), ""])]
        return "\n".join([*lines, *text_table((self.group, "events", "expected"), rows), "", *wrapped(_sentence(self.test))])


def km(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[SurvivalRows]], Numbers, CurvesResult]:
    """Estimate survival curves of all sites' patients; ConfigError where a floor does not hold."""
    group, labels = groups_of(spec, contract)
    patients = yield from count_patients(spec)
    table = yield from count_cells(spec, contract, part_of, len(labels))
    is_there = table.at_risk[0] > 0
    return CurvesResult(
        spec=spec,
        counts=patients,
        group=group,
        table=table,
        cells=TimeCells(ends_T=table.ends_T, num_agreed=len(spec.time_cells(contract))),
        curves={label: kaplan_meier(table, place) for place, label in enumerate(labels) if is_there[place]},
        test=log_rank(log_rank_sums(table)) if is_there.sum() > 1 else None,
    )


def compare_groups(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[SurvivalRows]], Numbers, LogRankResult]:
    """Test whether groups survive alike; ConfigError where a floor does not hold, or there is one group only."""
    group, labels = groups_of(spec, contract)
    assert group is not None
    num_groups = len(labels)
    patients = yield from count_patients(spec)
    if spec.is_by_site:
        yield from check_cross_table(spec, contract)

        def own(site: SiteRows[SurvivalRows]) -> Numbers:
            if not len(site.part.times_M):
                return np.zeros((2 + num_groups, num_groups))
            ends_T = np.unique(site.part.times_M)
            return log_rank_sums(life_table(ends_T, counts(site.part, ends_T, num_groups)))

        shape = (2 + num_groups, num_groups)
        sums = yield SumRequest(statistic="observed and expected events", shape=shape, contribution=own)
        cells = None
    else:
        table = yield from count_cells(spec, contract, part_of, num_groups)
        sums, cells = log_rank_sums(table), TimeCells(ends_T=table.ends_T, num_agreed=len(spec.time_cells(contract)))
    if (sums[1] > 0).sum() <= 1:
        raise ConfigError(f"{group}: a log-rank test needs two groups that are at risk when events happen")
    return LogRankResult(spec=spec, counts=patients, group=group, labels=labels, test=log_rank(sums), cells=cells)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _test(test: LogRank) -> dict[str, Any]:
    return {"statistic": test.statistic, "df": test.df, "p": test.pvalue}


def _sentence(test: LogRank) -> str:
    return f"log-rank test: {figure(test.statistic)} on {test.df} degree{'' if test.df == 1 else 's'} of freedom, p {p_value(test.pvalue)}"
