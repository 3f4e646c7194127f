"""A site's table read with the reader of its kind, as the section `table:` of the site's file says it."""

from __future__ import annotations

from pathlib import Path

from p2pfl.data.contract import Contract
from p2pfl.data.csv_reading import read_csv
from p2pfl.data.parquet_reading import read_parquet
from p2pfl.data.raw_table import RawTable
from p2pfl.data.site_section import beside
from p2pfl.data.sql_reading import read_sql
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
    if site.sql is not None:
        return read_sql(site.sql, contract, site, Path(folder))
    if site.parquet is not None:
        return read_parquet(beside(folder, site.parquet), contract, site)
    assert site.file is not None  # from_mapping has seen to it that one of the three is given
    return read_csv(beside(folder, site.file), contract, site)
