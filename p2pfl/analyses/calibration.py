"""Calibration of a logistic model that is fitted to the rows of all sites.

Its predicted risks are held against the outcomes: in groups of risk, by intercept and slope, by Brier score and area under the ROC curve.
A site's own intercept and slope say whether the model of all sites fits this one. They are combined over sites, and no single one is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.analyses.dominance import has_column_of_few
from p2pfl.analyses.floors import Counts, at_sites, counted, is_small
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.models import ModelResult, fit_model
from p2pfl.analyses.rows import SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import figure, p_value, text_table, wrapped
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.calibration import NUM_FACTS, RISK_ENDS, CalibrationFacts, RiskGroups, cells_of_risk, facts, merged_groups
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.meta import Estimate, MetaAnalysis, meta_analysis
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.sums import Numbers, SumRequest, analyse, once_a_site, relayed

_PREDICTOR = "predictor"
_SITE_SUMS = (3, 5)
"""Sums that combine the sites' own estimates, and numbers of each."""

Predicted = tuple[Numbers, Numbers, NDArray[np.int64]]
"""A site's predictors and outcomes with its patients by number, (M,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationResult:
    """Calibration of a logistic model over all sites."""

    spec: AnalysisSpec
    model: ModelResult
    """Model whose risks are held against the outcomes."""
    groups: RiskGroups
    facts: CalibrationFacts
    shrinkage: float
    """Slope to expect in new patients, (chi2 - df) / chi2 of the likelihood-ratio test; NaN with an offset."""
    site_intercepts: MetaAnalysis | None
    """Calibration in the large of the sites, combined; None: fewer than two sites have one."""
    site_slopes: MetaAnalysis | None

    @property
    def counts(self) -> Counts:
        """Numbers of the model."""
        return self.model.counts

    def records(self) -> list[dict[str, Any]]:
        """One row for each group of risk, for CSV and JSON; without counts where those would tell how many rows are left out."""
        found, is_counted = [], self.counts.num_missing is not None
        groups = self.groups
        columns = (groups.starts, groups.ends, groups.patients, groups.events, groups.predicted, groups.intervals(self.spec.level))
        for start, end, patients, events, predicted, (low, high) in zip(*columns, strict=True):
            row: dict[str, Any] = {"from": float(start), "to": float(end)}
            row |= {"patients": round(patients) if is_counted else None, "events": round(events) if is_counted else None}
            observed = {"observed": events / patients, "low": low, "high": high}  # an interval tells of how many patients it is
            row |= {"predicted": float(predicted), **{key: float(value) if is_counted else None for key, value in observed.items()}}
            found.append(row)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; null where a figure is not defined."""
        found = self.facts
        low, high = self.groups.auc_bounds()
        named = {name: _number(getattr(found, name)) for name in CalibrationFacts.__slots__}
        sites = {"intercepts": _meta(self.site_intercepts), "slopes": _meta(self.site_slopes)}
        calibration = {**named, "auc_least": low, "auc_most": high, "shrinkage": _number(self.shrinkage), "sites": sites}
        content = {"analysis": self.spec.as_dict(), **self.counts.as_dict(), "calibration": calibration, "risk_groups": self.records()}
        return {**content, "coefficients": self.model.records()}

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        level, found = f"{100 * self.spec.level:g} %", self.facts
        rows = [
            (
                f"{each['from']:g} to {each['to']:g}",
                *("-" if each[key] is None else f"{each[key]:,}" for key in ("patients", "events")),
                *("-" if each[key] is None else figure(each[key], 4) for key in ("predicted", "observed", "low", "high")),
            )
            for each in self.records()
        ]
        lines = [*wrapped(f"{self.spec.formula}, calibration of the logistic model"), *wrapped(counted(self.counts, self.spec)), ""]
        lines += text_table(("risk", "patients", "events", "predicted", "observed", f"{level} from", "to"), rows)
        low, high = self.groups.auc_bounds()
        sites = [
            [
                name,
                f"{each.num_estimates}",
                figure(each.random, 4),
                figure(each.random_bse, 4),
                figure(each.tau_squared, 4),
                p_value(each.q_pvalue),
            ]
            for name, each in (("intercept", self.site_intercepts), ("slope", self.site_slopes))
            if each is not None
        ]
        lines += ["", *wrapped(f"Brier score {figure(found.brier)}, scaled {figure(found.scaled_brier, 4)}")]
        lines += wrapped(f"area under the ROC curve, pairs of one site: {figure(found.auc, 4)} (SE {figure(found.auc_bse, 4)})")
        lines += wrapped(f"over all pairs it lies between {figure(low, 4)} and {figure(high, 4)}: pairs in one group have no order")
        lines += wrapped(
            f"intercept {_rounded(found.intercept)} (SE {figure(found.intercept_bse, 4)}), "
            f"slope {_rounded(found.slope)} (SE {figure(found.slope_bse, 4)}): {OWN_ROWS}"
        )
        if not math.isnan(self.shrinkage):
            lines += wrapped(f"slope to expect in new patients: {figure(self.shrinkage, 4)}")
        if sites:
            heads = ("of the sites, random effect", "sites", "estimate", "SE", "tau²", "p of Q")
            lines += ["", *text_table(heads, sites)]
        return "\n".join(lines)


OWN_ROWS = "0 and 1 wherever a model is held against the rows that it was fitted to"


def calibration(spec: AnalysisSpec, contract: Contract) -> Generator[SumRequest[SiteRows[DesignRows]], Numbers, CalibrationResult]:
    """Fit a logistic model and hold its risks against the outcomes; ConfigError where a floor or the model does not hold."""
    ends = risk_ends(spec)
    num_numbers = sum(math.prod(shape) for _, shape in sums_of_calibration(spec))
    model, part = yield from fit_model(model_spec(spec), contract, num_numbers)
    params = model.params

    @once_a_site
    def predicted(site: SiteRows[DesignRows]) -> Predicted:
        rows = part(site)
        return rows.columns_MP @ params + rows.offsets_M, rows.outcomes_M, site.patients_M

    groups, found = yield from at_sites(_calibrated(spec, ends), predicted)
    intercepts = yield from at_sites(_combined("intercepts", spec, _own_intercept), predicted)
    slopes = yield from at_sites(_combined("slopes", spec, _own_slope), predicted)
    return CalibrationResult(
        spec=spec,
        model=model,
        groups=groups,
        facts=found,
        shrinkage=_shrinkage(model, float(groups.events.sum())),
        site_intercepts=intercepts,
        site_slopes=slopes,
    )


def model_spec(spec: AnalysisSpec) -> AnalysisSpec:
    """The analysis that fits the model of a calibration."""
    return replace(spec, kind="glm", family="binomial", ends=())


def risk_ends(spec: AnalysisSpec) -> Numbers:
    """Ends of the agreed cells of risk."""
    return np.array(spec.ends or RISK_ENDS)


def sums_of_calibration(spec: AnalysisSpec) -> list[tuple[str, tuple[int, ...]]]:
    """Name the sums that follow the fit, in their order, with their shapes."""
    num_sums, num_numbers = _SITE_SUMS
    return [
        ("cells of risk", (3, len(risk_ends(spec)))),
        ("slope, Brier score and pairs", (NUM_FACTS,)),
        *((f"weighted {what}", (num_numbers,)) for what in ("intercepts", "slopes") for _ in range(num_sums)),
    ]


def _calibrated(spec: AnalysisSpec, ends: Numbers) -> Generator[SumRequest[Predicted], Numbers, tuple[RiskGroups, CalibrationFacts]]:
    def own_cells(site: Predicted) -> Numbers:
        counts = cells_of_risk(site[0], site[1], ends)
        if spec.cells == "site" and is_small(np.stack([counts[1], counts[0] - counts[1]]), spec.patients_per_cell):
            raise FewPatientsHere(
                f"policy.patients_per_cell: a cell of risk has fewer than {spec.patients_per_cell} patients of this site: other ends help"
            )
        return counts

    (cells, cells_shape), (others, others_shape), *_ = sums_of_calibration(spec)
    counts = yield SumRequest(statistic=cells, shape=cells_shape, contribution=own_cells)
    groups = merged_groups(counts, ends, spec.patients_per_cell)
    totals = yield SumRequest(statistic=others, shape=others_shape, contribution=lambda site: facts(site[0], site[1]))
    return groups, CalibrationFacts.of(totals, float(groups.events.sum()))


def _combined(
    what: str, spec: AnalysisSpec, own: Callable[[Predicted], Estimate | None]
) -> Generator[SumRequest[Predicted], Numbers, MetaAnalysis | None]:
    """Combine what each site with enough patients estimates of its own rows; None: fewer than two do."""

    @once_a_site
    def estimate(site: Predicted) -> Estimate | None:
        is_about_few = has_column_of_few(site[0][:, None], site[2], spec.patients_per_cell)
        return None if len(np.unique(site[2])) < spec.patients_per_sum or is_about_few else own(site)

    def asked(request: SumRequest[Estimate | None]) -> SumRequest[Predicted]:
        return SumRequest(statistic=f"weighted {what}", shape=request.shape, contribution=lambda site: request.contribution(estimate(site)))

    try:
        return (yield from relayed(meta_analysis(), asked))
    except ConfigError:
        return None


def _own_intercept(site: Predicted) -> Estimate | None:
    return _own(site, np.ones((len(site[0]), 1)), site[0], (INTERCEPT,))


def _own_slope(site: Predicted) -> Estimate | None:
    return _own(site, np.stack([np.ones_like(site[0]), site[0]], axis=-1), np.zeros_like(site[0]), (INTERCEPT, _PREDICTOR))


def _own(site: Predicted, columns_MP: Numbers, offsets_M: Numbers, names: tuple[str, ...]) -> Estimate | None:
    rows = DesignRows(columns_MP=columns_MP, outcomes_M=site[1], offsets_M=offsets_M, weights_M=np.ones_like(site[1]))
    try:
        fit = analyse(fit_glm(names, FAMILIES["binomial"]), [rows])
    except ConfigError:
        return None  # one outcome alone here, or a predictor that foretells it
    return Estimate(value=float(fit.params[-1]), variance=float(fit.bse[-1]) ** 2)


def _shrinkage(model: ModelResult, num_events: float) -> float:
    """Heuristic shrinkage of van Houwelingen and le Cessie 1990."""
    num_rows, df = model.fit.num_rows, len(model.names) - 1
    if model.spec.parsed.offsets or INTERCEPT not in model.names or not df:
        return math.nan
    null = num_events * math.log(num_events / num_rows) + (num_rows - num_events) * math.log(1 - num_events / num_rows)
    chi2 = 2 * (model.fit.log_likelihood - null)
    return (chi2 - df) / chi2


def _rounded(value: float) -> str:
    return f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _meta(found: MetaAnalysis | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "estimates": found.num_estimates,
        "random": found.random,
        "random_se": found.random_bse,
        "tau_squared": found.tau_squared,
        "q": found.q,
        "q_p": found.q_pvalue,
    }
