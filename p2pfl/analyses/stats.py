"""Statistics over sites from Python: `p2pfl.stats.glm(...)` and the others, each with the result of the pooled rows.

Each function takes the contract and the sites as paths of their files, or as objects that are loaded already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2pfl.analyses.calibration import CalibrationResult
from p2pfl.analyses.curves import CurvesResult, LogRankResult
from p2pfl.analyses.descriptions import DescriptionResult
from p2pfl.analyses.mixed import MixedResult
from p2pfl.analyses.models import MetaResult, ModelResult
from p2pfl.analyses.run import run_analysis
from p2pfl.analyses.site_files import AnalysisSite, load_sites
from p2pfl.analyses.spec import AnalysisSpec, FamilyName
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.yaml_files import shown

__all__ = ["calibration", "compare", "cox", "describe", "glm", "km", "mixed", "run"]

Sites = Sequence[Path | str | AnalysisSite]


def run(
    analysis: dict[str, Any] | AnalysisSpec, contract: Contract | Path | str, sites: Sites, *, releases: Path | str | None = None
) -> Any:
    """Run an analysis over simulated sites.

    Args:
        analysis: keys of an `AnalysisSpec`, as {"kind": "glm", "formula": "died ~ age", "family": "binomial"}.
        contract: the agreed table, or its file.
        sites: their files, or sites with their tables.
        releases: folder in which each site keeps a log of what it has released, and asks it first; None: no log.

    Raises:
        ConfigError: as `run_analysis`, and where a file is wrong.
    """
    spec = analysis if isinstance(analysis, AnalysisSpec) else AnalysisSpec.from_mapping(analysis)
    agreed = contract if isinstance(contract, Contract) else Contract.load(contract)
    spec.check(agreed)
    if isinstance(sites, str | Path):
        raise ConfigError(f"sites = {shown(str(sites))}: expected a list of files, such as ['site1.yaml', 'site2.yaml']")
    files = [each for each in sites if not isinstance(each, AnalysisSite)]
    loaded = iter(load_sites(files, agreed))
    chosen = [each if isinstance(each, AnalysisSite) else next(loaded) for each in sites]
    return run_analysis(spec, agreed, chosen, None if releases is None else Path(releases))


def describe(variables: Sequence[str] = (), *, contract: Contract | Path | str, sites: Sites, **floors: Any) -> DescriptionResult:
    """Describe variables; none named: all of the contract that are not ids. *floors* are other keys of an `AnalysisSpec`."""
    found: DescriptionResult = run({"kind": "describe", "variables": list(variables), **floors}, contract, sites)
    return found


def glm(formula: str, *, family: FamilyName, contract: Contract | Path | str, sites: Sites, **floors: Any) -> ModelResult:
    """Fit a generalised linear model. *floors* are other keys of an `AnalysisSpec`."""
    found: ModelResult = run({"kind": "glm", "formula": formula, "family": family, **floors}, contract, sites)
    return found


def calibration(formula: str, *, contract: Contract | Path | str, sites: Sites, **options: Any) -> CalibrationResult:
    """Fit a logistic model, and hold its risks against the outcomes. *options* are other keys of an `AnalysisSpec`."""
    found: CalibrationResult = run({"kind": "calibration", "formula": formula, **options}, contract, sites)
    return found


def mixed(formula: str, *, contract: Contract | Path | str, sites: Sites, **options: Any) -> MixedResult:
    """Fit a linear model with a random intercept for each site. *options* are other keys of an `AnalysisSpec`."""
    found: MixedResult = run({"kind": "mixed", "formula": formula, **options}, contract, sites)
    return found


def cox(formula: str, *, contract: Contract | Path | str, sites: Sites, **options: Any) -> ModelResult:
    """Fit a Cox model, stratified by site, or on an agreed grid. *options* are other keys of an `AnalysisSpec`."""
    found: ModelResult = run({"kind": "cox", "formula": formula, **options}, contract, sites)
    return found


def km(formula: str, *, contract: Contract | Path | str, sites: Sites, **options: Any) -> CurvesResult:
    """Estimate survival curves on an agreed grid. *options* are other keys of an `AnalysisSpec`, such as grid=30."""
    found: CurvesResult = run({"kind": "km", "formula": formula, **options}, contract, sites)
    return found


def compare(formula: str, *, contract: Contract | Path | str, sites: Sites, **options: Any) -> LogRankResult | MetaResult:
    """Compare survival of groups, or a coefficient between sites. *options* are other keys of an `AnalysisSpec`."""
    found: LogRankResult | MetaResult = run({"kind": "compare", "formula": formula, **options}, contract, sites)
    return found
