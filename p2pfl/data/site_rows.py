"""A site's rows from its file to what is computed with: read, held against the contract, and those that are frozen taken out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from p2pfl.data.check import CheckedTable, CheckReport, check_table
from p2pfl.data.cohort_files import FrozenCohort, frozen_cohort
from p2pfl.data.contract import Contract
from p2pfl.data.raw_table import RawTable
from p2pfl.data.site_section import SiteSection
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExaminedTable:
    """A site's table as the contract finds it, with its frozen rows where there are any."""

    section: SiteSection
    contract: Contract
    raw: RawTable
    report: CheckReport
    table: CheckedTable | None
    """All rows; None where the contract refuses the table."""
    cohort: FrozenCohort | None = None
    """Frozen rows; None where none are frozen, or they cannot be found again."""
    cohort_fault: ConfigError | None = None
    """Why frozen rows cannot be found again."""

    @property
    def is_accepted(self) -> bool:
        """Whether the table follows the contract, and frozen rows are as they were."""
        return self.table is not None and self.cohort_fault is None

    @property
    def rows(self) -> CheckedTable:
        """Rows that the site computes with: all of an accepted table, or the frozen ones where it has frozen some.

        Raises:
            ConfigError: a rule refuses the table, or a frozen row has changed or is gone.
        """
        if self.table is None:
            raise DataError([str(each) for each in self.report.refusals], self.raw.place)
        if self.cohort_fault is not None:
            raise self.cohort_fault
        return self.cohort.rows if self.cohort is not None else self.table


def examine_site_table(section: SiteSection, contract: Contract | Path | None = None) -> ExaminedTable:
    """Read a site's table, hold it against the contract, and look for its frozen rows.

    Args:
        section: what the site's file says.
        contract: the contract or its file; None: the one that the section names.

    Raises:
        ConfigError: contract or table cannot be read; every finding, without a value of a patient.
    """
    given = contract or section.contract
    if given is None:
        raise ConfigError("contract: required, but missing: the file of the data contract, or say --contract FILE", section.place)
    agreed = given if isinstance(given, Contract) else Contract.load(given)
    raw = read_site_table(section.table, agreed, section.folder, section.place)
    report, table = check_table(raw, agreed, section.table)
    cohort, fault = None, None
    if table is not None:
        try:
            cohort = frozen_cohort(table, agreed, section.cohort, section.keys)
        except ConfigError as error:
            fault = error
    return ExaminedTable(section=section, contract=agreed, raw=raw, report=report, table=table, cohort=cohort, cohort_fault=fault)


def site_rows(section: SiteSection, contract: Contract | Path | None = None) -> tuple[Contract, CheckedTable]:
    """Give the rows that a site computes with: all of an accepted table, or the frozen ones where it has frozen some.

    Raises:
        ConfigError: as `examine_site_table`; a rule refuses the table, or a frozen row has changed or is gone.
    """
    found = examine_site_table(section, contract)
    return found.contract, found.rows
