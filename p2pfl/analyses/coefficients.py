"""Coefficients of a fitted model as a result: their attributes, rows and table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2pfl.analyses.floors import Counts
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import figure, p_value, text_table
from p2pfl.statistics.sums import Numbers
from p2pfl.statistics.wald import WaldFit


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedResult:
    """A fitted model over all sites, equal to the one of the pooled rows."""

    spec: AnalysisSpec
    counts: Counts
    fit: WaldFit

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the coefficients in their order."""
        return self.fit.names

    @property
    def params(self) -> Numbers:
        """Estimated coefficients of the model, (P,)."""
        return self.fit.params

    @property
    def bse(self) -> Numbers:
        """Standard errors of the coefficients, (P,)."""
        return self.fit.bse

    @property
    def pvalues(self) -> Numbers:
        """Two-sided p-values of Wald's test, (P,)."""
        return self.fit.pvalues

    def conf_int(self, level: float | None = None) -> Numbers:
        """Wald's confidence intervals, (P, 2); None: of the level that the analysis says."""
        return self.fit.conf_int(self.spec.level if level is None else level)


def coefficient_records(fit: WaldFit, level: float, ratio: str | None = None) -> list[dict[str, Any]]:
    """One row for each coefficient of a fit; *ratio* names what its exponential is."""
    found = []
    columns = (fit.names, fit.params, fit.bse, fit.params / fit.bse, fit.pvalues, fit.conf_int(level))
    for name, value, error, statistic, pvalue, (low, high) in zip(*columns, strict=True):
        row = {"name": name, "estimate": value, "se": error, "statistic": statistic, "p": pvalue, "low": low, "high": high}
        if ratio is not None:
            row |= {ratio.replace(" ", "_"): np.exp(value), "ratio_low": np.exp(low), "ratio_high": np.exp(high)}
        found.append({key: each if isinstance(each, str) else float(each) for key, each in row.items()})
    return found


def coefficient_table(records: Sequence[dict[str, Any]], level: float, statistic: str) -> list[str]:
    """Lines of a table of coefficients for people."""
    rows = [
        (each["name"], figure(each["estimate"]), figure(each["se"], 4), figure(each["statistic"], 4), p_value(each["p"]),
         figure(each["low"]), figure(each["high"]))
        for each in records
    ]  # fmt: skip
    return text_table(("", "estimate", "SE", statistic, "p", f"{100 * level:g} % from", "to"), rows)
