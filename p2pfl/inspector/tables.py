"""A run's records as flat tables, for pandas and for other programs: one value a cell, times in seconds, sizes in bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from p2pfl.errors import MissingExtraError, StoreError, visible
from p2pfl.inspector.verdict import betterness, scores
from p2pfl.runs.open_files import replace_file
from p2pfl.runs.records import RunRecords, read_run
from p2pfl.runs.summary_fields import rows_word
from p2pfl.runs.text import Row

Cell = str | int | float | bool | None
FlatRow = dict[str, Cell]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Flat tables of a run folder: `pandas.DataFrame(tables.nodes)` takes each of them.

    What was nested is told apart by a dot (`seconds.train`, `metrics.accuracy`); names in a list stand in one cell, with a blank between.
    """

    rounds: list[FlatRow]
    """One row a round of the whole network."""
    network: list[FlatRow]
    """One row a round of the network, as far as a node came to know it; empty but for a node's own records."""
    nodes: list[FlatRow]
    """One row a node and round."""
    events: list[FlatRow]
    """One row for everything out of the ordinary."""
    edges: list[FlatRow]
    """One row for each direction of a link, with the weight that the receiver gives the sender. Empty where the graph changes."""
    sites: list[FlatRow]
    """One row a node and metric at the end: network, alone, pooled. Empty while the run is in progress, and above 1,000 nodes.

    Where they were measured on validation rows, `measured_on` says so, and `test` has the value on test rows, which chooses nothing.
    """
    worth: list[FlatRow]
    """One row a site: the primary metric alone and in the network, and `better_by` with its interval: positive where the network is better,
    whichever direction the metric has. Empty where sites were not trained alone."""
    cross_site: list[FlatRow]
    """One row a model and site: the primary metric, its interval, and on how many test rows. Empty where it was not computed."""
    subgroups: list[FlatRow]
    """One row a site, attribute and group of patients."""

    def named(self) -> dict[str, list[FlatRow]]:
        """All tables of a run, by name."""
        return {table.name: getattr(self, table.name) for table in fields(self)}


def read(run: Path | str) -> Tables:
    """The records in a run's folder, also while it is in progress.

    Raises:
        ConfigError: there is no run there.
        StoreError: a file of it is damaged.
    """
    return tables_of(read_run(run))


def tables_of(records: RunRecords) -> Tables:
    """As `read`, of records at hand."""
    return Tables(
        rounds=[_flat(row) for row in records.rounds],
        nodes=[_flat(row) for row in records.nodes],
        events=[_flat(row) for row in records.events],
        edges=_edges(records.topology or {}),
        sites=_sites(records.summary or {}),
        network=[_flat(row) for row in records.network],
        worth=[_one_direction(row) for row in records.gains],
        cross_site=_cross_site(records.cross_site or {}),
        subgroups=[dict(row) for row in records.subgroups],
    )


def write_tables(tables: Tables, folder: Path, kind: str) -> list[Path]:
    """Write each table to a file NAME.csv or NAME.parquet, and return the files; those there are replaced, empty ones are left out.

    Raises:
        MissingExtraError: Parquet without pyarrow.
        StoreError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made: {error.strerror}") from error
    written = []
    for name, rows in tables.named().items():
        if rows:
            path = folder / f"{name}.{kind}"
            (write_csv if kind == "csv" else write_parquet)(path, rows)
            written.append(path)
    return written


def write_csv(path: Path, rows: Sequence[FlatRow]) -> None:
    """Write rows as CSV with a header; no cell can be taken for a formula, or steers the terminal that shows it.

    Raises:
        StoreError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: harmless(value) for key, value in row.items()} for row in rows)
    replace_file(path, visible(text.getvalue()))


def write_parquet(path: Path, rows: Sequence[FlatRow]) -> None:
    """Write rows as Parquet, every column of one type.

    Raises:
        MissingExtraError: pyarrow is not installed.
        StoreError: the file cannot be written.
    """
    try:
        import pyarrow as pa  # an extra
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("--parquet needs pyarrow: pip install 'p2pfl-mesh[report]'") from error
    columns = {key: _of_one_type([row.get(key) for row in rows]) for key in _columns(rows)}
    try:
        parquet.write_table(pa.table(columns), path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}") from error


def _columns(rows: Sequence[FlatRow]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _of_one_type(values: list[Cell]) -> list[Cell]:
    """Whole numbers among fractions are fractions: JSON writes 1.0 as 1 at times."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [float(value) if value is not None else None for value in values]
    return values if len(kinds) <= 1 else [str(value) if value is not None else None for value in values]


def harmless(value: Cell) -> Cell:
    """A name or a detail comes from others: a spreadsheet must not take it for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _flat(row: Mapping[str, Any], prefix: str = "") -> FlatRow:
    found: FlatRow = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[prefix + key] = " ".join(str(part[0] if isinstance(part, list) else part) for part in value)
        else:
            found[prefix + key] = value
    return found


def _edges(graph: Row) -> list[FlatRow]:
    names = graph.get("nodes") or []
    return [{"sender": names[i], "receiver": names[j], "weight": weight} for i, j, weight in graph.get("edges") or []]


def _sites(summary: Row) -> list[FlatRow]:
    found: list[FlatRow] = []
    test = summary.get("test")
    for metric in summary.get("metrics") or ():
        for node, own in scores(summary, metric).items():
            row: FlatRow = {"node": node, "metric": metric, "network": own.network, "alone": own.alone, "pooled": own.pooled}
            row["direction"] = "lower is better" if own.lower_is_better else "higher is better"
            if test is not None:
                on_test = (test["metrics"][metric].get("per_node") or {}).get(node)
                row |= {"measured_on": rows_word(summary), "test": on_test, "test_is": test["use"]}
            found.append(row)
    return found


def _one_direction(row: Row) -> FlatRow:
    """A row of worth.json, whose gain is network minus alone, with what is positive where the network is better in its place."""
    better, low, high = betterness(row)
    found: FlatRow = {}
    for key, value in row.items():
        if key == "gain":
            found |= {"better_by": better, "better_by_low": low, "better_by_high": high}
        elif key not in ("low", "high"):
            found[key] = value
    return found


def _cross_site(found: Row) -> list[FlatRow]:
    return [
        {
            "model": model,
            "site": site["name"],
            "metric": found["metric"],
            **{key: found[key][number][place] for key in ("value", "low", "high")},
            "rows": site["rows"],
            "no_interval": found["no_interval"][number][place] if found.get("no_interval") else None,
        }
        for number, model in enumerate(found.get("models") or [])
        for place, site in enumerate(found["sites"])
    ]
