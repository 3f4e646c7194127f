"""Write the folder of a run.

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
import os
import platform
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from p2pfl.errors import ConfigError, DiskFull, StoreError, store_error
from p2pfl.runs.open_files import open_patiently, replace_file
from p2pfl.runs.rows import KNOWN, REQUIRED, NetworkRow, NodeRow
from p2pfl.runs.text import Row, document_of, line_of, plain, read_document, read_lines, utc_now
from p2pfl.runs.writing_process import MARK, mark_process
from p2pfl.yaml_files import dump_yaml

_DISTRIBUTIONS = ("torch", "numpy", "p2pfl-mesh")


class RunFolder:
    """Writer of a run folder, one at a time."""

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
        """Make a new folder with experiment.yaml, environment.json and, where given, topology.json.

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
        replace_file(folder.path / "experiment.yaml", dump_yaml(plain(experiment)))
        environment = _environment(engine) | ({"member": member} if member is not None else {})
        replace_file(folder.path / "environment.json", document_of(environment))
        if topology is not None:
            replace_file(folder.path / "topology.json", document_of(topology))
        mark_process(folder.path)
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open an existing folder to write on; the rest of a row that a crash left is cut off.

        Raises:
            ConfigError: there is no run there.
        """
        folder = cls(existing_run(path))
        for name in KNOWN:
            folder._cut_torn_line(name)
        mark_process(folder.path)
        return folder

    def began_ms(self) -> int:
        """Milliseconds since 1970 at which the run began, by its environment.json; 0 where it does not say."""
        started = (read_document(self.path / "environment.json") or {}).get("started")
        return int(1000 * datetime.fromisoformat(started).timestamp()) if started else 0

    def append_round(self, row: NetworkRow | Mapping[str, Any]) -> None:
        """Append to rounds.jsonl; the row is with the operating system when this returns."""
        self._append("rounds.jsonl", [row])

    def append_network(self, row: NetworkRow | Mapping[str, Any]) -> None:
        """Append a round of the network to network.jsonl."""
        self._append("network.jsonl", [row])

    def append_node(self, *rows: NodeRow | Mapping[str, Any]) -> None:
        """Append to nodes.jsonl any number of rows at once."""
        self._append("nodes.jsonl", rows)

    def append_event(self, row: Mapping[str, Any]) -> None:
        """Append to events.jsonl, with the time now where the row has none."""
        self._append("events.jsonl", [{"time": utc_now(), **row}])

    def events(self) -> list[Row]:
        """Rows of events.jsonl so far, by time: one that repeats is written later than it happened.

        Raises:
            StoreError: the file is damaged.
        """
        return sorted(read_lines(self.path / "events.jsonl"), key=lambda row: str(row.get("time", "")))

    def write_found(self, name: Literal["cross_site", "subgroups", "worth"], found: Mapping[str, Any] | Sequence[Row] | None) -> None:
        """Write what was computed at the end to NAME.json, rows as {"rows": [...]}, unless nothing was found."""
        if found:
            replace_file(self.path / f"{name}.json", document_of(found if isinstance(found, Mapping) else {"rows": list(found)}))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json as a whole or not at all."""
        replace_file(self.path / "summary.json", document_of(summary))
        self.leave()

    def update_summary(self, changes: Mapping[str, Any]) -> None:
        """Replace parts of the summary that was written."""
        self.write_summary({**(read_document(self.path / "summary.json") or {}), **changes})

    def leave(self) -> None:
        """Say that this process ended cleanly and writes no more."""
        (self.path / MARK).unlink(missing_ok=True)

    def truncate(self, from_round: int, by_node: Mapping[str, int] | None = None) -> None:
        """Remove rows of rounds >= *from_round* and the summary, so that a resumed run goes on as if never interrupted.

        Events stay: they happened. *by_node* has the round of each node, where they are not all in the same one.
        """
        for name in ("summary.json", "cross_site.json", "subgroups.json", "worth.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("rounds.jsonl", "network.jsonl", "nodes.jsonl"):
            rows = read_lines(self.path / name)
            kept = [row for row in rows if row["round"] < (by_node or {}).get(row.get("node", ""), from_round)]
            if len(kept) < len(rows):
                replace_file(self.path / name, "".join(map(line_of, kept)))

    def _append(self, name: str, rows: Iterable[NodeRow | NetworkRow | Mapping[str, Any]]) -> None:
        lines = []
        for each in rows:
            row = each if isinstance(each, Mapping) else each.as_row()
            missing, unknown = REQUIRED[name] - row.keys(), row.keys() - KNOWN[name]
            if missing or unknown:
                raise ValueError(
                    f"a row of {name} with unknown keys {sorted(unknown)}, without {sorted(missing)}: known {sorted(KNOWN[name])}"
                )
            lines.append(line_of(row))
        with self._is_writing:
            if self.waits_for_room:
                self._waiting.append((name, "".join(lines)))
                self.write_waiting()
            else:
                self._write(name, "".join(lines))

    @property
    def num_waiting(self) -> int:
        """Number of appends that wait for room on the disk."""
        return len(self._waiting)

    def write_waiting(self) -> None:
        """Write rows that wait for room on the disk, in their order, until the disk is full again.

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
            # a file object would ask the system five times as much
            file = open_patiently(lambda: os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666))
            try:
                encoded = text.encode()
                written = os.write(file, encoded)
                if written < len(encoded):
                    with suppress(OSError):
                        os.ftruncate(file, os.fstat(file).st_size - written)  # half a row would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            raise store_error(place, error) from error

    def _cut_torn_line(self, name: str) -> None:
        path = self.path / name
        if not path.exists():
            return
        with path.open("r+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)


def existing_run(path: Path | str) -> Path:
    """Check that a folder holds a run, else raise a ConfigError."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError("no such folder: give the folder of a run, as --out named it (runs/NAME by default)", str(path))
    if not (folder / "experiment.yaml").is_file():
        raise ConfigError(
            "holds no experiment.yaml and so is not a run: give the folder that `p2pfl up` or `p2pfl simulate` made", str(path)
        )
    return folder


def _environment(engine: str | None) -> Row:
    """Describe versions and platform, without naming the machine or its user."""
    return {
        "engine": engine,
        "started": utc_now(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
    }


@cache
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
