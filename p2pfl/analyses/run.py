"""An analysis from its spec to its result, over sites whose tables are all on this machine: simulated sites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from p2pfl.analyses.calibration import calibration
from p2pfl.analyses.common_rows import counted_rows
from p2pfl.analyses.curves import compare_groups, km
from p2pfl.analyses.descriptions import describe_variables
from p2pfl.analyses.leading import FewPatientsHere, lead
from p2pfl.analyses.mixed import mixed
from p2pfl.analyses.models import MetaResult, compare_coefficient, cox, glm, site_estimate
from p2pfl.analyses.policy import Kind, RefusedByPolicy
from p2pfl.analyses.release_log import ReleaseLog
from p2pfl.analyses.releases import RecordedRows, recorded, with_release
from p2pfl.analyses.rows import SiteRows, cox_rows, design_rows, survival_rows
from p2pfl.analyses.site_files import AnalysisSite
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.variables import is_survival
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.statistics.sums import Numbers, SumRequest

log = logging.getLogger(__name__)

FEWEST_HIDDEN = 3
"""Sites whose estimates stay hidden where others' are shown: of two, each knows the other's from the combined one."""


class Result(Protocol):
    """Result of any analysis, for people and for machines."""

    spec: AnalysisSpec

    def summary(self) -> str:
        """Tables for people, at most 80 columns wide."""
        ...

    def records(self) -> list[dict[str, Any]]:
        """Rows for a CSV file, all with the same keys."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ...


Conversation = Generator[SumRequest[Any], Numbers, Any]


def conversation(spec: AnalysisSpec, contract: Contract, num_sites: int = 1) -> tuple[Conversation, Callable[[CheckedTable], Any]]:
    """Sums that an analysis asks for, and the function that makes a site's rows for them. It has passed `AnalysisSpec.check`.

    A mixed model takes a summary of each of *num_sites* sites, at the `place` of its rows.
    """
    if spec.kind == "describe":
        return describe_variables(spec, contract), lambda table: counted_rows(spec, table)
    if spec.kind == "mixed":
        return mixed(spec, contract, num_sites), lambda table: design_rows(spec, contract, counted_rows(spec, table))
    analysis, rows_of = _OF_KIND[spec.kind, is_survival(spec.parsed)]
    return analysis(spec, contract), lambda table: rows_of(spec, contract, counted_rows(spec, table))


_Analysis = tuple[Callable[[AnalysisSpec, Contract], Conversation], Callable[[AnalysisSpec, Contract, CheckedTable], Any]]
_OF_KIND: dict[tuple[Kind, bool], _Analysis] = {
    ("glm", False): (glm, design_rows),
    ("calibration", False): (calibration, design_rows),
    ("cox", True): (cox, cox_rows),
    ("km", True): (km, survival_rows),
    ("compare", True): (compare_groups, survival_rows),
    ("compare", False): (compare_coefficient, design_rows),
}
"""Sums of each kind and a site's rows for them, by whether the outcome is a time and an event."""


def run_analysis(spec: AnalysisSpec, contract: Contract, sites: Sequence[AnalysisSite], releases: Path | None = None) -> Any:
    """Run an analysis over simulated sites; its result equals that of the pooled rows.

    Args:
        spec: of the analysis.
        contract: of all sites.
        sites: with their rows.
        releases: folder in which each site keeps a log of what it has released, as a real one does, and asks it first; None: no log.

    Returns:
        A `Result`.

    Raises:
        ConfigError: the analysis does not fit the contract, a site cannot contribute, the floors or the model do not hold,
            or one site alone has rows and does not let its own result be shown.
        RefusedByPolicy: a site refuses; its reasons are in the log alone.
        StoreError: a site's log of releases is damaged, or the disk failed.
    """
    spec.check(contract)
    if not sites:
        raise ConfigError("no site is given: expected at least one site's file")
    for site in sites:
        if reasons := tuple(site.policy.refusals(spec, contract)):
            raise refused(site.name, reasons)
    analysis, rows_of = conversation(spec, contract, len(sites))
    rows = _rows(sites, rows_of)
    _check_several(sites, rows)
    with ExitStack() as logs:
        recorded_rows = [RecordedRows(rows=own, release=None) for own in rows]
        if releases is not None:
            recorded_rows = [_with_log(logs, releases, spec, contract, site, own) for site, own in zip(sites, rows, strict=True)]
        try:
            result = lead(recorded(spec, analysis), [site.name for site in sites], recorded_rows)
        except FewPatientsHere as error:
            raise refused(error.site, (error.reason,)) from None
    if isinstance(result, MetaResult):
        return replace(result, sites=_released(spec, contract, sites, rows))
    return result


def placed(rows: Any, place: int) -> Any:
    """Rows of a site with its place among all sites, for an analysis that takes a summary of each."""
    return replace(rows, place=place) if isinstance(rows, SiteRows) else rows


def _rows(sites: Sequence[AnalysisSite], rows_of: Callable[[CheckedTable], Any]) -> list[Any]:
    """Make each site's rows for an analysis; ConfigError with what is wrong at all sites."""
    rows, findings = [], []
    for place, site in enumerate(sites):
        try:
            own = rows_of(site.table)
        except ConfigError as error:
            findings += [f"{site.name}: {each}" for each in error.findings]
            continue
        rows.append(placed(own, place))
    if findings:
        raise ConfigError(findings)
    return rows


def _with_log(logs: ExitStack, folder: Path, spec: AnalysisSpec, contract: Contract, site: AnalysisSite, rows: Any) -> RecordedRows[Any]:
    """Rows of a site that has asked its log of releases; RefusedByPolicy where that one refuses."""
    log = logs.enter_context(ReleaseLog(folder / site.name, folder / site.name))
    found = with_release(log, spec, contract, site.table, rows)
    if reasons := tuple(found.refusals(site.policy)):
        raise refused(site.name, reasons)
    return found


def _check_several(sites: Sequence[AnalysisSite], rows: Sequence[Any]) -> None:
    """Keep back a result that is a single site's own, unless this site lets it be shown."""
    patients = [len(own.patients) if isinstance(own, CheckedTable) else own.num_patients for own in rows]
    having = [site for site, number in zip(sites, patients, strict=True) if number]
    if len(having) == 1 and "site_estimates" not in having[0].policy.may_release:
        raise ConfigError(
            "one site alone has rows for this analysis, and the result would be its own: give another site, "
            "or say policy.may_release: [site_estimates] in its file"
        )


def _released(
    spec: AnalysisSpec, contract: Contract, sites: Sequence[AnalysisSite], rows: Sequence[Any]
) -> tuple[tuple[str, float, float], ...]:
    """Estimates of single sites that may be shown; none where those of few others would follow from the combined one."""
    estimates = [(site, site_estimate(spec, contract, own)) for site, own in zip(sites, rows, strict=True)]
    found = [(site, estimate) for site, estimate in estimates if estimate is not None]
    shown = [(site.name, *estimate) for site, estimate in found if "site_estimates" in site.policy.may_release]
    num_hidden = len(found) - len(shown)
    return tuple(shown) if num_hidden == 0 or num_hidden >= FEWEST_HIDDEN else ()


def refused(name: str, reasons: tuple[str, ...]) -> RefusedByPolicy:
    """The refusal of a site as others hear it; its reasons go into the log."""
    for reason in reasons:
        log.warning("%s refuses: %s", name, reason)
    return RefusedByPolicy(name, reasons)
