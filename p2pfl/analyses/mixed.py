"""Linear models with a random intercept for each site, where every site lets its summary be known."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from p2pfl.analyses.coefficients import FittedResult, coefficient_records, coefficient_table
from p2pfl.analyses.curved_terms import agree_on_curves
from p2pfl.analyses.dominance import has_column_of_few, without_dominated_columns
from p2pfl.analyses.floors import at_sites, check_cross_table, count_patients, counted
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.models import most_numbers
from p2pfl.analyses.rows import ModelColumns, SiteRows
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.text_tables import figure, p_value, wrapped
from p2pfl.data.contract import Contract
from p2pfl.statistics.glm import DesignRows
from p2pfl.statistics.mixed import SUMMARIES, MixedFit, PlacedRows, fit_mixed
from p2pfl.statistics.sums import Numbers, SumRequest, relayed


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedResult(FittedResult):
    """A fitted linear model with a random intercept for each site, equal to the one of the pooled rows."""

    fit: MixedFit

    def records(self) -> list[dict[str, Any]]:
        """One row for each coefficient, for CSV and JSON."""
        return coefficient_records(self.fit, self.spec.level)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fit = self.fit
        facts = {"sites": fit.num_sites, "tau_squared": fit.tau_squared, "residual_variance": fit.residual_variance, "icc": fit.icc}
        facts |= {"tau_statistic": fit.tau_statistic, "tau_p": fit.tau_pvalue, "log_likelihood": fit.reml_log_likelihood}
        return {"analysis": self.spec.as_dict(), **self.counts.as_dict(), "mixed": facts, "coefficients": self.records()}

    def summary(self) -> str:
        """Table for people, at most 80 columns wide."""
        fit = self.fit
        lines = [*wrapped(f"{self.spec.formula}, a random intercept for each of {fit.num_sites} sites, by REML")]
        lines += [*wrapped(counted(self.counts, self.spec)), "", *coefficient_table(self.records(), self.spec.level, "z"), ""]
        lines += wrapped(
            f"variance between sites (tau²) {figure(fit.tau_squared)}, within {figure(fit.residual_variance)}, "
            f"part between sites (ICC) {figure(fit.icc, 4)}"
        )
        lines += wrapped(f"test that sites do not differ: {figure(fit.tau_statistic)}, p {p_value(fit.tau_pvalue)}")
        return "\n".join([*lines, *wrapped(f"restricted log-likelihood {figure(fit.reml_log_likelihood, 8)}")])


def mixed(spec: AnalysisSpec, contract: Contract, num_sites: int) -> Generator[SumRequest[SiteRows[DesignRows]], Numbers, MixedResult]:
    """Fit a linear model with a random intercept for each of *num_sites* sites; ConfigError where a floor or the model does not hold.

    Each site's cells hold nobody or enough, whatever the analysis says of cells: its summary counts them.
    """
    model = ModelColumns.of(spec, contract)
    patients = yield from count_patients(spec, len(model.names))
    yield from check_cross_table(spec, contract, is_at_sites=True)
    part = yield from agree_on_curves(spec, contract, model)
    analysis = fit_mixed(model.names, spec.parsed.outcome[0], num_sites, units_P=model.units_P)
    checked = relayed(analysis, lambda request: _with_floors(request, spec, contract, model))

    def placed_rows(site: SiteRows[DesignRows]) -> _Site:
        return PlacedRows(part(site), site.place), site

    fitted = at_sites(checked, placed_rows)
    fit = yield from without_dominated_columns(spec, model, part, fitted)
    return MixedResult(spec=spec, counts=patients, fit=fit.in_unit(model.outcome_unit))


_Site = tuple[PlacedRows, SiteRows[DesignRows]]


def _with_floors(request: SumRequest[PlacedRows], spec: AnalysisSpec, contract: Contract, model: ModelColumns) -> SumRequest[_Site]:
    """Hold the floors for the patients of each single site before it gives its summary, which all members see."""

    def own(found: _Site) -> Numbers:
        rows, site = found
        if request.statistic == SUMMARIES and site.num_patients:
            num_numbers, num_patients = request.shape[1], site.num_patients
            if num_patients < spec.patients_per_sum:
                raise FewPatientsHere(f"policy.patients_per_sum: this site has {num_patients} patients, and its summary is a sum over them")
            if num_numbers > most_numbers(spec, contract, model, num_patients):
                raise FewPatientsHere(
                    f"policy.parameters_per_patient: this site's summary has {num_numbers} numbers about {num_patients} patients"
                )
            if has_column_of_few(rows.rows.columns_MP / model.units_P, site.patients_M, spec.patients_per_cell):
                raise FewPatientsHere(
                    f"policy.patients_per_cell: fewer than {spec.patients_per_cell} patients of this site make up nearly all differences "
                    "in one of its columns, and its summary is seen by all: use fewer variables"
                )
        return request.contribution(rows)

    return SumRequest(statistic=request.statistic, shape=request.shape, contribution=own)
