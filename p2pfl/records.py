"""A run's numbers on disk: one folder, JSON lines while it runs, a summary at its end.

    experiment.yaml    resolved, every default written out
    environment.json   versions, platform, when it started
    topology.json      the graph, its weights and its spectrum
    rounds.jsonl       one row a round
    nodes.jsonl        one row a node and round
    network.jsonl      of a node: one row a round of the network, as its records came in from everybody
    events.jsonl       one row for everything out of the ordinary
    cross_site.json    every model at every site, written at the end where it was computed
    subgroups.json     figures of groups of patients, where sites have any
    worth.json         what each site has of the network, where it was also trained alone
    summary.json       written once, at the end
    process.json       which process writes all this, until it has come to a clean end (writing_process.py)

A line counts once its newline is there: a reader may come while a row is being written, and a crash may leave half of one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, DiskFull, StoreError, store_error
from p2pfl.open_files import open_patiently
from p2pfl.writing_process import ProcessState, mark_process, process_state, unmark_process
from p2pfl.yaml_files import dump_yaml, load_yaml

Row = dict[str, Any]

MAX_PER_NODE = 1000
"""Above this many nodes a summary holds quantiles instead of one figure a node."""

NOT_FOR_CHOOSING = "not used for choosing"
"""The mark of figures on test rows while choices are made on validation rows."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DISTRIBUTIONS = ("torch", "numpy", "p2pfl-mesh")

_REQUIRED = {
    "rounds.jsonl": {"round", "kind"},
    "network.jsonl": {"round", "kind", "nodes"},
    "nodes.jsonl": {"round", "node", "kind"},
    "events.jsonl": {"round", "node", "event"},
}
_OF_ALL_NODES = {
    "loss",
    "disagreement",
    "bound_low",
    "bound_high",
    "rms_norm",
    "rms_disagreement",
    "consensus_distance",
    "bytes_sent",
    "skipped",
    "seconds",
}
_KNOWN = {
    "rounds.jsonl": _REQUIRED["rounds.jsonl"] | _OF_ALL_NODES | {"nodes", "simulated_s"},
    "nodes.jsonl": _REQUIRED["nodes.jsonl"]
    | {"loss", "disagreement", "norm", "skipped", "agreed_for", "stop_round", "bytes_sent", "seconds", "metrics"}
    | {"merged", "simulated_s"},
    "network.jsonl": _REQUIRED["network.jsonl"] | _OF_ALL_NODES | {"known_in", "missing"},
    "events.jsonl": _REQUIRED["events.jsonl"] | {"time", "detail"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """What a run folder held at the moment of reading."""

    experiment: Row
    environment: Row
    topology: Row | None
    rounds: list[Row]
    nodes: list[Row]
    events: list[Row]
    network: tuple[Row, ...] = ()
    """Of a node's own folder: the network's rounds as far as it came to know them, rising; empty elsewhere."""
    summary: Row | None
    """None while the run is in progress, or where it did not come to an end."""
    cross_site: Row | None = None
    """The primary metric of every model at every site, as `p2pfl.cross_site` gives it; None where it was not computed."""
    subgroups: tuple[Row, ...] = ()
    """As `p2pfl.subgroups` gives them."""
    worth: tuple[Row, ...] = ()
    """As `p2pfl.worth` gives them."""
    written_s: float | None = field(default=None, compare=False)
    """When the newest row was written, in seconds since 1970; None where a node at work told all this."""
    process: ProcessState | None = None
    """How the process is that writes the folder; None: not known here, or the run has ended."""


class RunFolder:
    """The writing side of a run folder; one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waits_for_room = False
        """Whether rows for which the disk has no room are kept until it has; else they are a StoreError."""
        self._waiting: deque[tuple[str, str]] = deque()  # a file's name, and rows for it
        self._is_writing = threading.RLock()  # a node writes rows of rounds in one thread and events in another

    @classmethod
    def create(
        cls,
        path: Path | str,
        experiment: Mapping[str, Any],
        *,
        topology: Mapping[str, Any] | None = None,
        engine: str | None = None,
        member: str | None = None,
    ) -> RunFolder:
        """A new folder with experiment.yaml, environment.json and, where given, topology.json.

        Args:
            path: must not exist; its parents are made.
            experiment: resolved, as `Experiment.as_dict` gives it.
            topology: {"nodes": names, "edges": [[i, j, weight], ...], "lambda_2", "lambda_min", "laplacian_lambda_2",
                "laplacian_lambda_max", "diameter"}.
            engine: "simulator", "daemons" or "sharded".
            member: the institution whose own folder it is; None: a folder of the whole network.

        Raises:
            ConfigError: the folder exists.
            StoreError: it cannot be written.
        """
        folder = cls(Path(path))
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError as error:
            raise ConfigError("exists already: choose another --out, or continue that run with --resume", str(path)) from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be made: {error.strerror}") from error
        replace_file(folder.path / "experiment.yaml", dump_yaml(_plain(experiment)))
        replace_file(folder.path / "environment.json", _document(_environment(engine) | ({"member": member} if member is not None else {})))
        if topology is not None:
            replace_file(folder.path / "topology.json", _document(topology))
        mark_process(folder.path)
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing folder, to be written further; what a crash left of a last row is cut off.

        Raises:
            ConfigError: there is no run there.
        """
        folder = cls(_existing(path))
        for name in _KNOWN:
            folder._cut_torn_line(name)
        mark_process(folder.path)
        return folder

    def began(self) -> str | None:
        """When the run began, as its environment.json says."""
        found = _read_document(self.path / "environment.json") or {}
        return found.get("started")

    def append_round(self, row: Mapping[str, Any]) -> None:
        """One row of rounds.jsonl; it is with the operating system when this returns."""
        self._append("rounds.jsonl", [row])

    def append_network(self, row: Mapping[str, Any]) -> None:
        """One row of network.jsonl."""
        self._append("network.jsonl", [row])

    def append_node(self, *rows: Mapping[str, Any]) -> None:
        """Rows of nodes.jsonl, any number at once."""
        self._append("nodes.jsonl", rows)

    def append_event(self, row: Mapping[str, Any]) -> None:
        """One row of events.jsonl, with the time now where it has none."""
        self._append("events.jsonl", [{"time": utc_now(), **row}])

    def events(self) -> list[Row]:
        """Rows of events.jsonl so far, by time: one that repeats is written later than it happened.

        Raises:
            StoreError: the file is damaged.
        """
        return sorted(_read_lines(self.path / "events.jsonl"), key=lambda row: str(row.get("time", "")))

    def write_cross_site(self, found: Mapping[str, Any] | None) -> None:
        """cross_site.json; nothing where nothing was found."""
        if found is not None:
            replace_file(self.path / "cross_site.json", _document(found))

    def write_subgroups(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """subgroups.json, {"rows": [...]}; nothing where there are none."""
        if rows:
            replace_file(self.path / "subgroups.json", _document({"rows": list(rows)}))

    def write_worth(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """worth.json, {"rows": [...]}; nothing where there are none."""
        if rows:
            replace_file(self.path / "worth.json", _document({"rows": list(rows)}))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json: there whole or not at all."""
        replace_file(self.path / "summary.json", _document(summary))
        self.leave()

    def leave(self) -> None:
        """This process writes no more, and whoever reads the folder must not miss it."""
        unmark_process(self.path)

    def truncate(self, from_round: int, by_node: Mapping[str, int] | None = None) -> None:
        """Forget rounds and nodes rows of rounds >= *from_round* and the summary, so that a resumed run goes on as if never interrupted.

        Events stay: they happened.

        Args:
            from_round: of the network.
            by_node: of each node, where they are not all in the same round.
        """
        for name in ("summary.json", "cross_site.json", "subgroups.json", "worth.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("rounds.jsonl", "network.jsonl", "nodes.jsonl"):
            rows = _read_lines(self.path / name)
            kept = [row for row in rows if row["round"] < (by_node or {}).get(row.get("node", ""), from_round)]
            if len(kept) < len(rows):
                replace_file(self.path / name, "".join(map(_line, kept)))

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = []
        for row in rows:
            missing, unknown = _REQUIRED[name] - row.keys(), row.keys() - _KNOWN[name]
            if missing or unknown:
                raise ValueError(
                    f"a row of {name} with unknown keys {sorted(unknown)}, without {sorted(missing)}: known {sorted(_KNOWN[name])}"
                )
            lines.append(_line(row))
        with self._is_writing:
            if self.waits_for_room:
                self._waiting.append((name, "".join(lines)))
                self.write_waiting()
            else:
                self._write(name, "".join(lines))

    @property
    def num_waiting(self) -> int:
        """How often rows were appended that are not on the disk, because it has no room."""
        return len(self._waiting)

    def write_waiting(self) -> None:
        """Write rows that wait for room on the disk, in their order, as far as there is some.

        Raises:
            StoreError: the disk refuses for another reason.
        """
        with self._is_writing, suppress(DiskFull):
            while self._waiting:
                self._write(*self._waiting[0])
                self._waiting.popleft()

    def _write(self, name: str, text: str) -> None:
        place = self.path / name
        try:
            with open_patiently(lambda: place.open("ab", buffering=0)) as file:
                before, encoded = file.seek(0, os.SEEK_END), text.encode()
                try:
                    if file.write(encoded) < len(encoded):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    with suppress(OSError):
                        file.truncate(before)  # half a row would spoil the next one
                    raise
        except OSError as error:
            raise store_error(place, error) from error

    def _cut_torn_line(self, name: str) -> None:
        path = self.path / name
        if not path.exists():
            return
        with path.open("r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)


def read_run(path: Path | str, *, experiment: Mapping[str, Any] | None = None) -> RunRecords:
    """All that a run folder holds, also while the run is in progress.

    Args:
        path: the folder.
        experiment: what its experiment.yaml holds, for one who knows: most of the time that many short runs take is the reading of it.

    Raises:
        ConfigError: there is no run there.
        StoreError: a file is damaged; the message names it, and the line.
    """
    folder = _existing(path)
    documents = ("environment", "topology", "cross_site", "subgroups", "worth", "summary")
    environment, topology, cross_site, subgroups, worth, summary = (_read_document(folder / f"{name}.json") for name in documents)
    read_experiment = dict(experiment) if experiment is not None else load_yaml(folder / "experiment.yaml")
    return RunRecords(
        experiment=read_experiment,
        environment=environment or {},
        topology=topology,
        rounds=with_both_distances(_read_lines(folder / "rounds.jsonl"), read_experiment),
        nodes=_read_lines(folder / "nodes.jsonl"),
        events=_read_lines(folder / "events.jsonl"),
        network=_in_order(_read_lines(folder / "network.jsonl")),
        cross_site=cross_site,
        subgroups=tuple((subgroups or {}).get("rows") or ()),
        worth=tuple((worth or {}).get("rows") or ()),
        summary=summary,
        written_s=_written_s(folder),
        process=process_state(folder) if summary is None else None,
    )


@contextmanager
def damage_told(source: str) -> Iterator[None]:
    """Raise a StoreError where records lack a field, or have one of another type: whoever reads them in here need not check each.

    Args:
        source: where the records come from.

    Raises:
        StoreError: the records are not as p2pfl writes them.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(f"{source}: its records are not as p2pfl writes them ({fault}); take them from where the run was made") from error


def records_of(document: Mapping[str, Any]) -> RunRecords:
    """Records from one document that has them by the names of `RunRecords`, as a node gives them.

    Raises:
        TypeError: it is not such a document.
    """
    found = RunRecords(**{**document, **{name: tuple(document.get(name) or ()) for name in ("network", "subgroups", "worth")}})
    tables = {"rounds.jsonl": found.rounds, "nodes.jsonl": found.nodes, "events.jsonl": found.events, "network.jsonl": found.network}
    faulty = [name for name, rows in tables.items() for row in rows if not isinstance(row, dict) or _REQUIRED[name] - row.keys()]
    if not isinstance(found.experiment, dict) or faulty:
        raise TypeError(f"expected rows with {', '.join(sorted(_REQUIRED[faulty[0]]))}" if faulty else "expected an experiment")
    return found


def heard_records(network: Mapping[str, Any], folder: Path) -> RunRecords:
    """Records of what a node's status says of the network: everybody's newest row.

    Args:
        network: that part of the status.
        folder: the node's own run folder, for its topology.json.

    Raises:
        StoreError: that file is damaged.
    """
    rows = list(network["rows"])
    names = [*(str(row["node"]) for row in rows), *map(str, network["not_heard_of"])]
    topology = _read_document(folder / "topology.json") or {"nodes": names, "edges": []}
    return RunRecords(experiment={}, environment={}, topology=topology, rounds=[], nodes=rows, events=[], summary=None)


def with_both_distances(rows: list[Row], experiment: Mapping[str, Any]) -> list[Row]:
    """Rounds as they are written today: `rms_disagreement` before mixing, `consensus_distance` after mixing.

    Earlier versions had one name: in step `consensus_distance` was what is now `rms_disagreement`, at the nodes' own pace what it is now.

    Args:
        rows: of rounds.jsonl.
        experiment: of the run.
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
    """One row a round of the whole network, of a run of any version; empty where there are none.

    Raises:
        StoreError: the file is damaged.
    """
    folder = Path(path)
    rows = _read_lines(folder / "rounds.jsonl")
    is_old = any("consensus_distance" in row and "rms_disagreement" not in row for row in rows)
    return with_both_distances(rows, load_yaml(folder / "experiment.yaml") if is_old else {})


def read_summary(path: Path | str) -> Row | None:
    """What a run's summary.json holds; None where it has not ended.

    Raises:
        StoreError: the file is damaged.
    """
    return _read_document(Path(path) / "summary.json")


def statistics(values_by_node: Mapping[str, float | None]) -> Row:
    """One figure of every node in short: {"mean", "min", "max", "n_defined", "per_node"}.

    Undefined figures (None, NaN, infinite) are null in per_node, left out of mean, min and max and of n_defined. Above MAX_PER_NODE nodes
    "quantiles" {"0.05": ..., ...} stand in the place of "per_node". Keys run in sorted node order.
    """
    per_node = {node: _plain(values_by_node[node]) for node in sorted(values_by_node)}
    defined = sorted(value for value in per_node.values() if value is not None)
    short: Row = {
        "mean": math.fsum(defined) / len(defined) if defined else None,
        "min": defined[0] if defined else None,
        "max": defined[-1] if defined else None,
        "n_defined": len(defined),
    }
    if len(per_node) <= MAX_PER_NODE:
        return {**short, "per_node": per_node}
    return {**short, "quantiles": {str(share): _quantile(defined, share) for share in _QUANTILES}}


def validation_share(experiment: Mapping[str, Any]) -> float:
    """The fraction of each site's training rows that a run took out for validation; its metrics are measured on them. 0: on test rows."""
    share = experiment.get("validation")
    return float(share) if isinstance(share, int | float) else 0.0


def rows_word(document: Mapping[str, Any] | None) -> str:
    """On which rows metrics are measured, as a resolved experiment or a summary says it: "validation rows" or "test rows"."""
    document = document or {}
    return str(document.get("measured_on") or ("validation rows" if validation_share(document) else "test rows"))


def primary_metric(metrics: Iterable[str]) -> str | None:
    """The metric that decides: AUROC where there is one, else accuracy, else the first."""
    names = list(metrics)
    return next((name for name in ("auroc", "accuracy") if name in names), names[0] if names else None)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old one or the new one and nothing between.

    Raises:
        StoreError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open_patiently(lambda: temporary.open("w", encoding="utf-8")) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = open_patiently(lambda: os.open(path.parent, os.O_RDONLY))
        try:
            os.fsync(directory)  # the new name itself must survive a power cut
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise store_error(path, error) from error


def utc_now() -> str:
    """This moment, ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _in_order(rows: Iterable[Row]) -> tuple[Row, ...]:
    """By round; of a round that became known twice, as after a restart, what was known last."""
    by_round = {row["round"]: row for row in rows}
    return tuple(by_round[number] for number in sorted(by_round))


def _existing(path: Path | str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError("no such folder: give the folder of a run, as --out named it (runs/NAME by default)", str(path))
    if not (folder / "experiment.yaml").is_file():
        raise ConfigError(
            "holds no experiment.yaml and so is not a run: give the folder that `p2pfl up` or `p2pfl simulate` made", str(path)
        )
    return folder


def _environment(engine: str | None) -> Row:
    """Where a run was made, without naming the machine or its user."""
    return {
        "engine": engine,
        "started": utc_now(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _written_s(folder: Path) -> float | None:
    """When the newest row was written, or the folder made."""
    files = (folder / name for name in (*_KNOWN, "experiment.yaml"))
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


def _read_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise StoreError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _read_document(path: Path) -> Row | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path}: expected an object, got {type(document).__name__}")
    return document


def row_bytes(row: Mapping[str, Any]) -> int:
    """Size of a row as it is written."""
    return len(_line(row).encode())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _document(value: Mapping[str, Any]) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of any library as Python's own, what is not finite as None."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # arrays, and scalars that are not registered as numbers
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be recorded: expected numbers, texts, lists and mappings of them")


def _quantile(ordered: list[float], share: float) -> float | None:
    """Between the two nearest values, linearly."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
