"""A site's table read with the reader of its kind, as the section `table:` of the site's file says it."""

from __future__ import annotations

from pathlib import Path

from p2pfl.data.contract import Contract
from p2pfl.data.csv_reading import read_csv
from p2pfl.data.raw_table import RawTable
from p2pfl.data.table_format import SiteTable
from p2pfl.errors import DataError


def read_site_table(site: SiteTable, contract: Contract, folder: Path | str, place: str = "site.yaml") -> RawTable:
    """Read a site's table as texts.

    Args:
        site: the section `table:`; its kind chooses the reader.
        contract: whose variables are read, and no other column.
        folder: of the site's file; relative paths are beside it.
        place: the site's file, for messages.

    Raises:
        DataError: the table cannot be read, or not as contract and site say it is; every finding, without a value of a patient.
    """
    if faults := list(contract.faults_of_site(site)):
        raise DataError(faults, f"{place}, table")
    return read_csv(beside(folder, site.file), contract, site)


def beside(folder: Path | str, path: str) -> Path:
    """Find a path that a site's file names: beside the file, unless it is absolute or begins with a home folder."""
    return Path(folder) / Path(path).expanduser()
