"""Regression tables of generalised linear and Cox models over all sites, and the comparison of the sites' own models.

Arrays of results are (P,) in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from p2pfl.analyses.coefficients import FittedResult, coefficient_records, coefficient_table
from p2pfl.analyses.curved_terms import agree_on_curves, numbers_of_curves
from p2pfl.analyses.dominance import has_column_of_few, without_dominated_columns
from p2pfl.analyses.floors import Counts, at_sites, check_cross_table, count_patients, counted
from p2pfl.analyses.rows import CrossTable, ModelColumns, SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import figure, p_value, text_table, wrapped
from p2pfl.analyses.time_cells import TimeCells, count_cells
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.cox import CoxFit, CoxRows, fit_cox
from p2pfl.statistics.families import FAMILIES, NEGATIVE_BINOMIAL, NegativeBinomial
from p2pfl.statistics.glm import DesignRows, GLMFit, fit_glm
from p2pfl.statistics.meta import Estimate, MetaAnalysis, meta_analysis
from p2pfl.statistics.negative_binomial import fit_negative_binomial
from p2pfl.statistics.sums import Numbers, SumRequest, analyse, once_a_site
from p2pfl.statistics.survival import SurvivalRows

ALL_SITES = "Patients are those of all sites; a site without an estimate of its own is counted, and has no part in the effects."
_RATIOS = {
    "binomial": "odds ratio",
    "poisson": "rate ratio",
    "negative-binomial": "rate ratio",
    "gamma": "mean ratio",
    "cox": "hazard ratio",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResult(FittedResult):
    """A fitted generalised linear or Cox model over all sites, equal to the one of the pooled rows."""

    fit: GLMFit | CoxFit
    ends_T: Numbers | None = None
    """Ends of the cells of time, where a Cox model has one baseline for all."""
    cells: TimeCells | None = None
    """Cells of time with those that they were merged from; None: exact times."""

    def records(self) -> list[dict[str, Any]]:
        """One row for each coefficient, for CSV and JSON."""
        return coefficient_records(self.fit, self.spec.level, _RATIOS.get(self.fit.family if isinstance(self.fit, GLMFit) else "cox"))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fit = self.fit
        facts: dict[str, Any] = {"log_likelihood": fit.log_likelihood, "iterations": fit.iterations}
        if isinstance(fit, GLMFit):
            facts |= {"df_resid": fit.df_resid, "dispersion": fit.dispersion} if self._is_counted else {}
            facts |= {"deviance": fit.deviance, "aic": fit.aic}
            facts |= {} if fit.theta is None else {"theta": fit.theta, "theta_se": fit.theta_bse}
        else:
            facts |= {"events": fit.num_events, "ties": fit.ties, "null_log_likelihood": fit.null_log_likelihood}
            facts |= {} if self.cells is None else {"cells": self.cells.as_dict()}
            facts |= {"ends": None if self.ends_T is None else self.ends_T.tolist()}
            facts |= {"tests": {name: {"statistic": each[0], "p": each[1]} for name, each in fit.tests().items()}}
        return {"analysis": self.spec.as_dict(), **self.counts.as_dict(), **facts, "coefficients": self.records()}

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        fit, level = self.fit, f"{100 * self.spec.level:g} %"
        is_t = isinstance(fit, GLMFit) and fit.has_dispersion
        records = self.records()
        lines = [*wrapped(self._title()), *wrapped(counted(self.counts, self.spec)), ""]
        lines += coefficient_table(records, self.spec.level, "t" if is_t else "z")
        if (ratio := _RATIOS.get(fit.family if isinstance(fit, GLMFit) else "cox")) is not None:
            key = ratio.replace(" ", "_")
            ratios = [(r["name"], figure(r[key]), figure(r["ratio_low"]), figure(r["ratio_high"])) for r in records if r["name"][0] != "("]
            lines += ["", *text_table(("", ratio, f"{level} from", "to"), ratios)] if ratios else []
        return "\n".join([*lines, "", *(line for fact in self._facts() for line in wrapped(fact))])

    @property
    def _is_counted(self) -> bool:
        return self.counts.num_missing is not None

    def _title(self) -> str:
        if isinstance(self.fit, GLMFit):
            return f"{self.spec.formula}, family {self.fit.family}"
        base = "a baseline for each site" if self.ends_T is None else "one baseline on cells of time"
        return f"{self.spec.formula}, Cox model, {base}, ties by {self.fit.ties.capitalize()}"

    def _facts(self) -> list[str]:
        fit = self.fit
        iterations = "1 iteration" if fit.iterations == 1 else f"{fit.iterations} iterations"
        if isinstance(fit, GLMFit):
            if not self._is_counted:
                return [f"deviance {figure(fit.deviance, 8)}, AIC {figure(fit.aic, 8)}, {iterations}"]
            named = "residual variance" if fit.family == "gaussian" else "dispersion"
            spread = f", {named} {figure(fit.dispersion)}" if fit.has_dispersion else ""
            error = "given" if fit.theta_bse is None else f"SE {figure(fit.theta_bse, 4)}"
            return [
                *([] if fit.theta is None else [f"variance = mean + mean² / theta, theta {figure(fit.theta)} ({error})"]),
                f"deviance {figure(fit.deviance, 8)} on {fit.df_resid:,} degrees of freedom{spread}",
                f"log-likelihood {figure(fit.log_likelihood, 8)}, AIC {figure(fit.aic, 8)}, {iterations}",
            ]
        tests = "; ".join(f"{name} {figure(each[0], 4)}, p {p_value(each[1])}" for name, each in fit.tests().items())
        return [
            f"{fit.num_events:,} events, log-likelihood {figure(fit.log_likelihood, 8)}, {iterations}",
            f"tests: {tests}",
            *([] if self.cells is None else [str(self.cells)]),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaResult:
    """One coefficient of the sites' own models, combined without showing a site's estimate."""

    spec: AnalysisSpec
    counts: Counts
    meta: MetaAnalysis
    sites: tuple[tuple[str, float, float], ...] = ()
    """Name, estimate and standard error of each site that lets it be shown, if the others' do not follow from these."""

    def records(self) -> list[dict[str, Any]]:
        """The fixed and the random effect, for CSV and JSON."""
        found = self.meta
        return [
            {"effect": "fixed", "estimate": found.fixed, "se": found.fixed_bse},
            {"effect": "random", "estimate": found.random, "se": found.random_bse},
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = self.meta
        facts = {"estimates": found.num_estimates, "q": found.q, "q_p": found.q_pvalue, "i_squared": found.i_squared}
        return {
            "analysis": self.spec.as_dict(),
            **self.counts.as_dict(),
            **facts,
            "tau_squared": found.tau_squared,
            "effects": self.records(),
            "sites": [{"name": name, "estimate": value, "se": error} for name, value, error in self.sites],
        }

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        found = self.meta
        rows = [(f"{each['effect']} effect", figure(each["estimate"]), figure(each["se"], 4)) for each in self.records()]
        rows += [(f"  {name}", figure(value), figure(error, 4)) for name, value, error in self.sites]
        title = f"{self.spec.coefficient} of {self.spec.formula}, family {self.spec.family}: meta-analysis of {found.num_estimates} sites"
        lines = [*wrapped(title), *wrapped(counted(self.counts, self.spec)), *wrapped(ALL_SITES), ""]
        lines += [*text_table(("", "estimate", "SE"), rows), ""]
        q = f"differences between sites: Q {figure(found.q)}, p {p_value(found.q_pvalue)}, I² {100 * found.i_squared:.1f} %"
        return "\n".join([*lines, *wrapped(f"{q}, tau² {figure(found.tau_squared)} (DerSimonian and Laird)")])


def glm(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[DesignRows]], Numbers, ModelResult]:
    """Fit a generalised linear model to the rows of all sites; ConfigError where a floor or the model does not hold."""
    return (yield from fit_model(spec, contract))[0]


def fit_model(
    spec: AnalysisSpec, contract: Contract, num_others: int = 0
) -> Generator[SumRequest[SiteRows[DesignRows]], Numbers, tuple[ModelResult, Callable[[SiteRows[DesignRows]], DesignRows]]]:
    """Fit a generalised linear model, and give also the function that makes a site's rows with all columns.

    Args:
        spec: of kind glm.
        contract: of all sites.
        num_others: numbers that an analysis releases about the same rows after the fit.

    Raises:
        ConfigError: a floor or the model does not hold.
    """
    model = ModelColumns.of(spec, contract)
    patients = yield from count_patients(spec, len(model.names))
    yield from check_cross_table(spec, contract)
    part = yield from agree_on_curves(spec, contract, model)
    most = most_numbers(spec, contract, model, patients.num_patients) - num_others
    fitted = at_sites(_fitted(spec, model, model.units_P), part, most)
    fit = yield from without_dominated_columns(spec, model, part, fitted)
    return ModelResult(spec=spec, counts=patients, fit=_unscaled(fit, model.outcome_unit)), part


def most_numbers(spec: AnalysisSpec, contract: Contract, model: ModelColumns, num_patients: int) -> float:
    """Count the numbers that a fit may release about the same rows; where all is categorical, the cross table holds the floor."""
    if CrossTable.of(spec, contract).holds_all(spec):
        return np.inf
    return spec.parameters_per_patient * num_patients * len(model.names) - numbers_of_curves(model)


def cox(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[CoxRows]], Numbers, ModelResult]:
    """Fit a Cox model to the rows of all sites; ConfigError where a floor or the model does not hold."""
    model = ModelColumns.of(spec, contract)
    patients = yield from count_patients(spec, len(model.names))
    yield from check_cross_table(spec, contract)
    part = yield from agree_on_curves(spec, contract, model)
    ends_T = cells = None
    if not spec.is_by_site:
        table = yield from count_cells(spec, contract, _one_group, 1)
        ends_T = table.ends_T
        cells = TimeCells(ends_T=ends_T, num_agreed=len(spec.time_cells(contract)))
    analysis = fit_cox(model.names, ties=spec.ties or "efron", ends_T=ends_T, units_P=model.units_P)
    most = (
        most_numbers(spec, contract, model, patients.num_patients) if spec.is_by_site else np.inf
    )  # cells of time have a floor of their own
    fit = yield from without_dominated_columns(spec, model, part, at_sites(analysis, part, most))
    return ModelResult(spec=spec, counts=patients, fit=fit, ends_T=ends_T, cells=cells)


def compare_coefficient(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[DesignRows]], Numbers, MetaResult]:
    """Compare one coefficient of the models that the sites fit to their own rows; ConfigError where a floor does not hold."""
    model = ModelColumns.of(spec, contract)
    if spec.coefficient not in model.names:
        raise ConfigError(f"coefficient = {spec.coefficient!r}: expected one of {', '.join(model.names)}")
    patients = yield from count_patients(spec, len(model.names))
    yield from check_cross_table(spec, contract)

    @once_a_site
    def own(site: SiteRows[DesignRows]) -> Estimate | None:
        return _own_estimate(spec, model, site)

    found = yield from at_sites(meta_analysis(), own)
    scale = model.outcome_unit / model.units_P[model.names.index(spec.coefficient)]
    meta = replace(
        found,
        fixed=found.fixed * scale,
        fixed_bse=found.fixed_bse * scale,
        tau_squared=found.tau_squared * scale**2,
        random=found.random * scale,
        random_bse=found.random_bse * scale,
    )
    return MetaResult(spec=spec, counts=patients, meta=meta)


def site_estimate(spec: AnalysisSpec, contract: Contract, rows: SiteRows[DesignRows]) -> tuple[float, float] | None:
    """A site's own estimate of the compared coefficient with its standard error; None: its rows allow none."""
    model = ModelColumns.of(spec, contract)
    found = _own_estimate(spec, model, rows)
    scale = model.outcome_unit / float(model.units_P[model.names.index(spec.coefficient or "")])
    return None if found is None else (found.value * scale, found.variance**0.5 * scale)


def _own_estimate(spec: AnalysisSpec, model: ModelColumns, site: SiteRows[DesignRows]) -> Estimate | None:
    """A site's estimate in units near 1, so that its weight fits the number format of sums."""
    if site.num_patients < spec.patients_per_sum or has_column_of_few(site.part.columns_MP, site.patients_M, spec.patients_per_cell):
        return None
    try:
        fit = analyse(_fitted(spec, model), [site.part])
    except ConfigError:
        return None  # too few rows here, or a column that is the same in all of them
    place = model.names.index(spec.coefficient or "")
    unit = float(model.units_P[place])
    return Estimate(value=float(fit.params[place]) * unit, variance=float(fit.bse[place] * unit) ** 2)


def _fitted(spec: AnalysisSpec, model: ModelColumns, units_P: Numbers | None = None) -> Generator[SumRequest[DesignRows], Numbers, GLMFit]:
    """The conversation that fits a model of the family that is asked for."""
    if spec.family != NEGATIVE_BINOMIAL:
        return fit_glm(model.names, FAMILIES[spec.family or ""], units_P=units_P)
    if spec.theta is None:
        return fit_negative_binomial(model.names, units_P=units_P)
    return fit_glm(model.names, NegativeBinomial(spec.theta), units_P=units_P)


def _unscaled(fit: GLMFit, unit: float) -> GLMFit:
    """The fit of outcomes in their own unit, from that of outcomes divided by a power of two."""
    if unit == 1.0:
        return fit
    log_likelihood = fit.log_likelihood - fit.num_rows * float(np.log(unit))
    return replace(
        fit,
        params=fit.params * unit,
        covariance_PP=fit.covariance_PP * unit**2,
        deviance=fit.deviance * unit**2,
        dispersion=fit.dispersion * unit**2,
        log_likelihood=log_likelihood,
        aic=fit.aic - 2 * (log_likelihood - fit.log_likelihood),
    )


def _one_group(site: SiteRows[CoxRows]) -> SurvivalRows:
    times_M = site.part.times_M
    return SurvivalRows(times_M=times_M, events_M=site.part.events_M, groups_M=np.zeros(len(times_M), dtype=np.int64))
