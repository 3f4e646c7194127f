"""Check of the site's table against the data contract: that of the study, or the one that site.yaml names."""

from __future__ import annotations

from p2pfl.data.site_rows import ExaminedTable, examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of
from p2pfl.node.own_table import examine_own_table

_TABLE = "mend the table, or what `table` in site.yaml says of it; p2pfl data check shows the same"
_COHORT = "restore the rows, or freeze them anew and tell the other institutions"


def check_table(exam: Examination) -> Noted:
    """Read the site's table, hold it against the contract, and compare its frozen rows; silent where there is no table or no contract."""
    try:
        found = _examined(exam)
    except ConfigError as error:
        yield from findings_of(error, _TABLE)
        return
    if found is None:
        return
    yield from (Finding(fault=str(each), remedy=each.remedy or _TABLE) for each in found.report.refusals)
    if found.cohort_fault is not None:
        yield from findings_of(found.cohort_fault, _COHORT)
    if found.is_accepted:
        rows, later = found.report.num_rows, found.cohort.num_later if found.cohort is not None else 0
        frozen = "" if found.cohort is None else f"; {rows - later:,} are frozen and as they were, {later:,} came later"
        said = f"{rows:,} rows follow the contract {found.contract.name}{frozen}"
        yield Fact(what="table", said=said, figures={"rows": rows, "patients": found.report.num_patients, "digest": found.contract.digest})


def _examined(exam: Examination) -> ExaminedTable | None:
    """Read the table as the study says, where it has a contract; else as site.yaml alone says."""
    assert exam.site is not None
    study = exam.study
    if study is not None and (study.contract is not None or study.member(exam.site.member).cohort is not None):
        found = examine_own_table(exam.site, study, exam.path)
        if found is not None or study.contract is not None:
            return found
    if exam.site.table is None or exam.site.contract is None:
        return None
    return examine_site_table(SiteSection.load(exam.path))
