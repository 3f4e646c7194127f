"""A site's own table held against its study and its card: the contract that all agreed on, and the rows that the site has frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from p2pfl.analyses.agreed import AgreedAnalyses, check_same_contract
from p2pfl.data.contract import Contract
from p2pfl.data.site_rows import ExaminedTable, examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError, DataError
from p2pfl.governance.card import Card
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.study import Study
from p2pfl.node.site import SiteFile


def check_own_table(site: SiteFile, study: Study, place: Path) -> None:
    """Refuse another contract than the study's, and rows that are not those that the site's card is bound to.

    Where the card has no commitment the table is not read. Where the study has no contract nothing is looked at.

    Raises:
        ConfigError: the contract is another, the table is not there, or a frozen row has changed or is gone; without a value of a patient.
    """
    agreed = AgreedAnalyses.of(study, str(site.study))
    if agreed is None:
        return
    if site.contract is not None:
        check_same_contract(site.contract, agreed.contract, str(place))
    card = study.member(site.member)
    if card.cohort is None:
        return
    if site.table is None:
        raise ConfigError(
            f"table: required, but missing: the card of {card.name} is bound to {_counted(card.cohort)}, which must be compared", str(place)
        )
    _ = examine_own_table(SiteSection.load(place), agreed.contract, card).rows


def examine_own_table(section: SiteSection, contract: Contract, card: Card) -> ExaminedTable:
    """Read a site's table as `examine_site_table` does; frozen rows must be those that the card is bound to, where it is to any."""
    found = examine_site_table(section, contract)
    if card.cohort is None or found.table is None or found.cohort_fault is not None:
        return found
    bound = f"the card of {card.name} is bound to {_counted(card.cohort)}"
    if found.cohort is None:
        fault = DataError(f"no such file, and {bound}: restore it from its backup", str(section.cohort))
        return replace(found, cohort_fault=fault)
    if found.cohort.frozen.commitment != card.cohort:
        fault = DataError(
            f"other rows are frozen here, and {bound}: restore that file, or agree on a study with a new card", str(section.cohort)
        )
        return replace(found, cohort_fault=fault)
    return found


def _counted(cohort: CohortCommitment) -> str:
    return f"{cohort.rows:,} frozen rows of {cohort.patients:,} patients"
