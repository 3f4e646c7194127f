"""The columns of a site's table found by their names: each of them once, or at the position that the site says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from p2pfl.data.contract import Contract
from p2pfl.data.table_format import SIGNS, SiteTable
from p2pfl.errors import DataError, some
from p2pfl.yaml_files import shown

_NAMES = {sign: word for word, sign in SIGNS.items() if word != "point"}


def column_positions(header: Sequence[str], contract: Contract, site: SiteTable, place: str) -> dict[str, int]:
    """Find the position of each variable's column, from 0.

    Raises:
        DataError: a column is not there, or there twice, or two variables have the same one; every finding.
    """
    findings = list(_faults(header, contract, site))
    if findings:
        raise DataError(findings, place)
    positions = {}
    for name in contract.variables:
        wanted = site.columns.get(name, name)
        if name not in site.absent:
            positions[name] = wanted - 1 if isinstance(wanted, int) else header.index(wanted)
    return positions


def sign_name(sign: str) -> str:
    """Word for a sign between fields, as a site's file has it."""
    return _NAMES.get(sign, shown(sign))


def _faults(header: Sequence[str], contract: Contract, site: SiteTable) -> Iterator[str]:
    used: dict[int, str] = {}
    missing = []
    for name in contract.variables:
        wanted = site.columns.get(name, name)
        if isinstance(wanted, str) and wanted not in header:
            if name not in site.absent:
                missing.append(wanted)
            continue
        if (fault := _fault_of_column(header, name, wanted, site)) is not None:
            yield fault
            continue
        position = wanted if isinstance(wanted, int) else header.index(wanted) + 1
        if position in used:
            yield f"table.columns: {used[position]} and {name} are the same column, {position}"
        used[position] = name
    if missing:
        yield _lacking(header, missing, (contract.table.overridden(site.format).separator or "comma") if site.file else None)


def _fault_of_column(header: Sequence[str], name: str, wanted: str | int, site: SiteTable) -> str | None:
    """Find why the header's column cannot be the variable's."""
    if isinstance(wanted, int):
        return f"table.columns.{name} = {wanted}: the header has {len(header)} columns" if wanted > len(header) else None
    if name in site.absent:
        return f"table.absent has {name}, and the header has it as well: expected one of both"
    if (times := header.count(wanted)) > 1:
        such = f"table.columns.{name}: {header.index(wanted) + 1}"
        return f"the header has {shown(wanted)} {times} times: say which one by its position, such as {such}"
    return None


def _lacking(header: Sequence[str], missing: list[str], separator: str | None) -> str:
    """Say what the header lacks, or that its fields are separated by another sign."""
    near = next((word for sign, word in _NAMES.items() if separator and len(header) == 1 and sign in header[0] and word != separator), None)
    if near is not None:
        return f"the header is one field, which holds {near}: say table.separator: {near}, if it separates the columns"
    return f"the header lacks {some(missing)}: say in table.columns what the column is called, or in table.absent that there is none"
