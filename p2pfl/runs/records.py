"""Read the folder of a run, also while the run is in progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pfl.errors import StoreError
from p2pfl.runs.folder import existing_run
from p2pfl.runs.rows import KNOWN, REQUIRED
from p2pfl.runs.text import Row, read_document, read_lines
from p2pfl.runs.writing_process import ProcessState, process_state
from p2pfl.yaml_files import load_yaml

_LISTED = {"network": "network", "subgroups": "subgroups", "gains": "worth"}
"""Fields of `RunRecords` with their names in a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """Content of a run folder at the moment of reading."""

    experiment: Row
    environment: Row
    topology: Row | None
    rounds: list[Row]
    nodes: list[Row]
    events: list[Row]
    network: tuple[Row, ...] = ()
    """Rounds of the network as far as a node came to know them, rising; empty but for a node's own folder."""
    summary: Row | None
    """None while the run is in progress, or where it did not come to an end."""
    cross_site: Row | None = None
    """The primary metric of every model at every site, as `p2pfl.evaluation.cross_site` gives it; None where it was not computed."""
    subgroups: tuple[Row, ...] = ()
    """As `p2pfl.evaluation.subgroups` gives them."""
    gains: tuple[Row, ...] = ()
    """As `p2pfl.evaluation.gain_over_local` gives them."""
    written_s: float | None = field(default=None, compare=False)
    """When the newest row was written, in seconds since 1970; None where a node at work told all this."""
    process: ProcessState | None = None
    """How the process is that writes the folder; None: not known here, or the run has ended."""


def read_run(path: Path | str, *, experiment: Mapping[str, Any] | None = None) -> RunRecords:
    """Read all that a run folder holds, also while the run is in progress.

    Who knows its experiment gives it: most of the time that many short runs take is the reading of experiment.yaml.

    Raises:
        ConfigError: there is no run there.
        StoreError: a file is damaged; the message names it, and the line.
    """
    folder = existing_run(path)
    documents = ("environment", "topology", "cross_site", "subgroups", "worth", "summary")
    environment, topology, cross_site, subgroups, gains, summary = (read_document(folder / f"{name}.json") for name in documents)
    read_experiment = dict(experiment) if experiment is not None else load_yaml(folder / "experiment.yaml")
    files = [folder / name for name in (*KNOWN, "experiment.yaml")]
    network = {row["round"]: row for row in read_lines(folder / "network.jsonl")}  # a round may be there twice, as after a restart
    return RunRecords(
        experiment=read_experiment,
        environment=environment or {},
        topology=topology,
        rounds=with_both_distances(read_lines(folder / "rounds.jsonl"), read_experiment),
        nodes=read_lines(folder / "nodes.jsonl"),
        events=read_lines(folder / "events.jsonl"),
        network=tuple(network[number] for number in sorted(network)),
        cross_site=cross_site,
        subgroups=tuple((subgroups or {}).get("rows") or ()),
        gains=tuple((gains or {}).get("rows") or ()),
        summary=summary,
        written_s=max((path.stat().st_mtime for path in files if path.exists()), default=None),
        process=process_state(folder) if summary is None else None,
    )


@contextmanager
def damage_told(source: str) -> Iterator[None]:
    """Raise a StoreError where the code inside the block meets a record without a field, or with one of another type."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(f"{source}: its records are not as p2pfl writes them ({fault}); take them from where the run was made") from error


def records_of(document: Mapping[str, Any]) -> RunRecords:
    """Make records from one document, as a node at work gives it.

    Raises:
        TypeError: it is not such a document.
    """
    listed: dict[str, Any] = {field: tuple(document.get(name) or ()) for field, name in _LISTED.items()}
    found = RunRecords(**{name: value for name, value in document.items() if name not in _LISTED.values()}, **listed)
    tables = {"rounds.jsonl": found.rounds, "nodes.jsonl": found.nodes, "events.jsonl": found.events, "network.jsonl": found.network}
    faulty = [name for name, rows in tables.items() for row in rows if not isinstance(row, dict) or REQUIRED[name] - row.keys()]
    if not isinstance(found.experiment, dict) or faulty:
        raise TypeError(f"expected rows with {', '.join(sorted(REQUIRED[faulty[0]]))}" if faulty else "expected an experiment")
    return found


def heard_records(network: Mapping[str, Any], folder: Path) -> RunRecords:
    """Make records of the newest rows in the part `network` of a node's status, and of the topology.json in its own run folder.

    Raises:
        StoreError: that file is damaged.
    """
    rows = list(network["rows"])
    names = [*(str(row["node"]) for row in rows), *map(str, network["not_heard_of"])]
    topology = read_document(folder / "topology.json") or {"nodes": names, "edges": []}
    return RunRecords(experiment={}, environment={}, topology=topology, rounds=[], nodes=rows, events=[], summary=None)


def with_both_distances(rows: list[Row], experiment: Mapping[str, Any]) -> list[Row]:
    """Translate rounds of earlier versions: `rms_disagreement` before mixing, `consensus_distance` after mixing.

    Earlier versions had one name: in step `consensus_distance` was what is now `rms_disagreement`, at the nodes' own pace what it is now.
    """
    in_step = (experiment.get("pace") or {}).get("name", "synchronous") == "synchronous"
    return [
        row
        if "rms_disagreement" in row or "consensus_distance" not in row
        else row
        | {"rms_disagreement": row["consensus_distance"] if in_step else None}
        | {"consensus_distance": None if in_step else row["consensus_distance"]}
        for row in rows
    ]


def read_rounds(path: Path | str) -> list[Row]:
    """Read the network's rows of a run of any version; empty where there are none.

    Raises:
        StoreError: the file is damaged.
    """
    folder = Path(path)
    rows = read_lines(folder / "rounds.jsonl")
    is_old = any("consensus_distance" in row and "rms_disagreement" not in row for row in rows)
    return with_both_distances(rows, load_yaml(folder / "experiment.yaml") if is_old else {})


def read_summary(path: Path | str) -> Row | None:
    """Read a run's summary.json; None where it has not ended.

    Raises:
        StoreError: the file is damaged.
    """
    return read_document(Path(path) / "summary.json")
