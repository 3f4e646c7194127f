"""A site's own table held against its study and its card: the contract that all agreed on, and the rows that the site has frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from p2pfl.analyses.agreed import AgreedAnalyses, check_same_contract
from p2pfl.data.contract import Contract
from p2pfl.data.site_rows import ExaminedTable, examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError, DataError
from p2pfl.experiment.table_files import contract_of_task
from p2pfl.governance.card import Card
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.study import Study
from p2pfl.node.site import SiteFile


def check_own_table(site: SiteFile, study: Study, place: Path) -> None:
    """Refuse another contract than the study's, and rows that are not those that the site's card is bound to.

    Where the card has no commitment the table is not read. Where neither study nor table task has a contract nothing is looked at.

    Raises:
        ConfigError: the contract is another, the table is not there, or a frozen row has changed or is gone; without a value of a patient.
    """
    contract, card = _agreed_contract(site, study, place), study.member(site.member)
    if contract is not None and card.cohort is not None:
        _ = _examined(site, contract, card, place).rows


def examine_own_table(site: SiteFile, study: Study, place: Path) -> ExaminedTable | None:
    """Read a site's table as the study's contract and the site's card have it; None where there is no contract, or no table.

    Raises:
        ConfigError: the contract is another, the table cannot be read, or it is not there and the card is bound to its rows.
    """
    contract, card = _agreed_contract(site, study, place), study.member(site.member)
    if contract is None or (site.table is None and card.cohort is None):
        return None
    return _examined(site, contract, card, place)


def examine_bound_table(section: SiteSection, contract: Contract, card: Card) -> ExaminedTable:
    """Read a site's table as `examine_site_table` does; frozen rows must be those that the card is bound to, where it is to any."""
    found = examine_site_table(section, contract)
    if card.cohort is None or found.table is None or found.cohort_fault is not None:
        return found
    if found.cohort is None:
        said = f"no such file, and {_bound(card, card.cohort)}: restore it from its backup"
        return replace(found, cohort_fault=DataError(said, str(section.cohort)))
    if found.cohort.frozen.commitment != card.cohort:
        said = f"other rows are frozen here, and {_bound(card, card.cohort)}: restore that file, or agree on a study with a new card"
        return replace(found, cohort_fault=DataError(said, str(section.cohort)))
    return found


def _agreed_contract(site: SiteFile, study: Study, place: Path) -> Contract | None:
    """Give the contract of the study, or else of its table task; ConfigError where the site's file names another one than the study's."""
    agreed = AgreedAnalyses.of(study, str(site.study))
    if agreed is None:
        return contract_of_task(study.experiment.get("task"))  # which holds the site's own against it itself
    if site.contract is not None:
        check_same_contract(site.contract, agreed.contract, str(place))
    return agreed.contract


def _examined(site: SiteFile, contract: Contract, card: Card, place: Path) -> ExaminedTable:
    if site.table is None and card.cohort is not None:
        raise ConfigError(f"table: required, but missing: {_bound(card, card.cohort)}, which must be compared", str(place))
    return examine_bound_table(SiteSection.load(place), contract, card)


def _bound(card: Card, cohort: CohortCommitment) -> str:
    return f"the card of {card.name} is bound to {cohort.rows:,} frozen rows of {cohort.patients:,} patients"
