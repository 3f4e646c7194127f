"""An analysis between institutions: each member of a study runs it on its own rows, and all learn the result of the pooled ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from p2pfl.analyses.agreed import AgreedAnalyses, check_same_contract, read_analysis
from p2pfl.analyses.leading import FewPatientsHere
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.analyses.release_log import ReleaseLog
from p2pfl.analyses.releases import recorded, with_release
from p2pfl.analyses.run import Conversation, conversation, placed, refused
from p2pfl.analyses.site_files import SiteSettings, load_settings
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.sum_plan import planned_sums
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError, MembersMissing
from p2pfl.experiment.loading import load_study
from p2pfl.governance.encoding import canonical
from p2pfl.governance.study import Study
from p2pfl.node.own_sums import analyse_with_others, memory_of, sum_terms
from p2pfl.node.own_table import examine_bound_table
from p2pfl.node.site import SiteFile
from p2pfl.node.sum_node import NO_NUMBERS, OTHER_PLAN, PATIENCE_S, SumSessionEnded
from p2pfl.node.sum_store import SumFolder
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.statistics.sums import Numbers, SumRequest

MOST_NUMBERS: Final = 2**22
"""Numbers of one sum between institutions; they take 64 MiB."""


def analyse_together(
    analysis: Path | str, site_path: Path, *, confirmed: str | None = None, patience_s: float = PATIENCE_S, **settings: Any
) -> Any:
    """Run an analysis with the other members of a study, which all do so at the same time.

    Args:
        analysis: name of one in the study; or a file with keys of an `AnalysisSpec`, the same at all members, and the contract's file
            where neither the study nor the site's own file has one. Where the study lists analyses, the file's is one of them.
        site_path: this member's site.yaml, with its table and its policy.
        confirmed: the study's digest as the administrator confirmed it; None: the one in site.yaml.
        patience_s: a member that is away for longer ends the analysis.
        settings: others of `SumNode`.

    Returns:
        A `Result`, the same at all members.

    Raises:
        RefusedByPolicy: this site refuses, also because of what it has released before; its reasons are in the log alone, and the
            others hear that it gives no numbers.
        ConfigError: a file is wrong, the floors or the model do not hold, or a member has another analysis or gives no numbers.
        MembersMissing: a member was away for too long.
        SumSessionEnded: parts of a sum did not fit.
        StoreError: the site's log of releases or its memory of sums is damaged, or the disk failed.
    """
    own, site = load_settings(site_path), SiteFile.load(site_path)
    study = load_study(site.study)
    spec, contract = _asked(analysis, own, AgreedAnalyses.of(study, str(site.study)))
    spec.check(contract)
    terms = terms_of(study, spec, contract)
    led, rows_of = conversation(spec, contract, len(study.names))
    refusal, rows = None, None
    try:
        with ExitStack() as logs:
            if not (reasons := tuple(own.policy.refusals(spec, contract))):
                table = examine_bound_table(own.section, contract, study.member(site.member)).rows
                log = logs.enter_context(ReleaseLog.beside(own.section.keys))
                own_rows = placed(rows_of(table), study.names.index(site.member))
                rows = with_release(log, spec, contract, table, own_rows, study=study.digest, cohort=own.section.cohort)
                reasons = (*_restored(site_path), *rows.refusals(own.policy))
            if reasons:
                refusal = refused(own.name, reasons)
            led = recorded(spec, led) if refusal is None else _without_numbers(led, refusal)
            return analyse_with_others(site_path, study, terms, led, rows, confirmed=confirmed, patience_s=patience_s, **settings)
    except FewPatientsHere as error:
        raise refused(own.name, (error.reason,)) from None
    except SumSessionEnded as ended:
        if refusal is not None:
            raise refusal from None
        if ended.reason.endswith(": away"):
            raise MembersMissing(
                f"{ended.reason} for {patience_s:g} s: there is no result; start again when they are there, and all go on where they were"
            ) from ended
        if OTHER_PLAN in ended.reason:
            raise ConfigError(
                f"{ended.reason}: there is no result; expected the same analysis and the same contract at all members"
            ) from ended
        if NO_NUMBERS in ended.reason:
            raise ConfigError(f"{ended.reason}: there is no result") from ended
        raise


def terms_of(study: Study, spec: AnalysisSpec, contract: Contract) -> SumTerms:
    """Terms of the sums of one analysis over all members of a study.

    Raises:
        ConfigError: the members are too few, or the sums are too large.
    """
    sums = planned_sums(spec, contract, len(study.names))
    _check_size(sums)
    return sum_terms(study, sums, agreement=hashlib.sha256(canonical([spec.as_dict(), contract.digest])).hexdigest())


def _asked(analysis: Path | str, own: SiteSettings, agreed: AgreedAnalyses | None) -> tuple[AnalysisSpec, Contract]:
    """Find the analysis that is asked for and its contract: the study's where it has one, else as files say."""
    if agreed is not None:
        if own.section.contract is not None:
            check_same_contract(own.section.contract, agreed.contract, own.section.place)
        return agreed.asked(str(analysis)), agreed.contract
    path = Path(analysis)
    spec, named = read_analysis(path)
    file = named if named is not None else own.section.contract
    if file is None:
        raise ConfigError(f"contract: required, but missing: the file of the data contract, here or in {own.section.place}", str(path))
    return spec, Contract.load(file)


def _check_size(sums: Sequence[PlannedSum]) -> None:
    """Refuse an analysis whose sums are too large to go over the links again and again."""
    size = max((math.prod(each.shape) for each in sums), default=0)
    if size > MOST_NUMBERS:
        raise ConfigError(
            f"the analysis adds {size:,} numbers in one sum, and {MOST_NUMBERS:,} are the most between institutions: "
            "take a wider grid, fewer variables, or a baseline for each site"
        )


def _restored(site_path: Path) -> Iterator[str]:
    """Say that the site was restored from a backup, where its neighbours have told it so: it cannot know all that it has released."""
    memory = memory_of(SiteFile.load(site_path))
    if not memory.exists():
        return
    with SumFolder(memory) as folder:
        if folder.was_restored:
            yield (
                "this site was restored from a backup, and its log of releases may lack what it has released since; "
                f"restore {memory} and the log from their newest backup"
            )


def _without_numbers(analysis: Conversation, refusal: RefusedByPolicy) -> Generator[SumRequest[Any], Numbers, Any]:
    """Lead an analysis to which this site gives no numbers: the others hear that at the first sum."""

    def none(_: object) -> Numbers:
        raise refusal

    try:
        request = next(analysis)
        while True:
            request = analysis.send((yield SumRequest(statistic=request.statistic, shape=request.shape, contribution=none)))
    except StopIteration:  # all totals are there from an earlier run
        raise refusal from None
