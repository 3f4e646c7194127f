"""Check of the site's table against the data contract, where site.yaml names both."""

from __future__ import annotations

from p2pfl.data.site_rows import examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of

_TABLE = "mend the table, or what `table` in site.yaml says of it; p2pfl data check shows the same"
_COHORT = "restore the rows, or freeze them anew and tell the other institutions"


def check_table(exam: Examination) -> Noted:
    """Read the site's table, hold it against the contract, and compare its frozen rows; silent where site.yaml does not name both."""
    assert exam.site is not None
    if exam.site.table is None or exam.site.contract is None:
        return
    try:
        found = examine_site_table(SiteSection.load(exam.path))
    except ConfigError as error:
        yield from findings_of(error, _TABLE)
        return
    yield from (Finding(fault=str(each), remedy=each.remedy or _TABLE) for each in found.report.refusals)
    if found.cohort_fault is not None:
        yield from findings_of(found.cohort_fault, _COHORT)
    if found.is_accepted:
        rows, later = found.report.num_rows, found.cohort.num_later if found.cohort is not None else 0
        frozen = "" if found.cohort is None else f"; {rows - later:,} are frozen and as they were, {later:,} came later"
        said = f"{rows:,} rows follow the contract {found.contract.name}{frozen}"
        yield Fact(what="table", said=said, figures={"rows": rows, "patients": found.report.num_patients, "digest": found.contract.digest})
