"""New rows that a model predicts on, read by the contract's rules from a file: its inputs and patient ids, without an outcome.

Shapes: M rows, D model inputs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from p2pfl.data.check import check_table
from p2pfl.data.contract import Contract
from p2pfl.data.model_inputs import ModelInputs
from p2pfl.data.site_section import SiteSection
from p2pfl.data.table_format import SiteTable
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import DataError

SITE_FILES = (".yaml", ".yml")


def read_new_rows(inputs: ModelInputs, file: Path) -> Tensor:
    """Read a table of new rows as model inputs, (M, D) float32.

    Args:
        inputs: columns of the model.
        file: a CSV or Parquet file as the contract says it, or a site's file whose section `table:` says where the table is.

    Raises:
        ConfigError: the file cannot be read, or a value is not as the contract has it; with columns and counts, without a value.
    """
    if file.suffix in SITE_FILES:
        section = SiteSection.load(file)
        given, folder, place = section.table, section.folder, section.place
    else:
        given, folder, place = table_of_file(file), file.absolute().parent, str(file)
    contract = _without_outcome(inputs.contract)
    table = replace(
        given,
        columns={name: column for name, column in given.columns.items() if name in contract.variables},
        units={name: unit for name, unit in given.units.items() if name in contract.variables},
        absent=tuple(name for name in given.absent if name in contract.variables),
    )
    raw = read_site_table(table, contract, folder, place)
    report, checked = check_table(raw, contract, table, needs_values=False)
    if checked is None:
        raise DataError([str(each) for each in report.refusals], raw.place)
    return torch.from_numpy(replace(inputs, contract=contract).encode(checked)).float()


def table_of_file(file: Path) -> SiteTable:
    """Section `table:` of a CSV or Parquet file that is as the contract says."""
    return SiteTable(parquet=str(file.absolute())) if file.suffix == ".parquet" else SiteTable(file=str(file.absolute()))


def _without_outcome(contract: Contract) -> Contract:
    """Contract of new rows: patient and inputs alone, and any number of rows for a patient."""
    kept = {contract.patient, *contract.inputs}
    variables = {name: each for name, each in contract.variables.items() if name in kept}
    return replace(contract, variables=variables, rows="several-per-patient")
