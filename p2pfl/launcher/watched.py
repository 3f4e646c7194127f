"""A daemon that the launcher has started: its records and its last words, read while it runs."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from p2pfl.launcher.processes import Process
from p2pfl.runs.events import Departure, EventKind
from p2pfl.runs.records import read_summary

_LINE = 200  # characters of a log's line that are quoted
_BEFORE_HANDSHAKE = " before it greeted"


@dataclass
class WatchedNode:
    """A daemon of this network: its process, and its records as far as they have been read."""

    name: str
    folder: Path
    process: Process | None = None
    starts: int = 0
    began_at: int = -1
    """Last round on record when the process was last started."""
    fruitless: int = 0
    """How often in a row it died without a new round."""
    log_offset: int = 0
    """Where in its log its last start begins."""
    why: str = ""
    """Why its last process ended: in its own words where it has said anything."""
    fate: str = ""
    """A sentence on its end, where it is not started again."""
    has_greeted: bool = False
    waits: dict[str, str] = field(default_factory=dict)
    """Why it cannot talk to a neighbour, by neighbour, as its records say."""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)
    """Bytes that have been read of each file of records."""

    @property
    def run_folder(self) -> Path:
        """Folder of the records that the node writes."""
        return self.folder / "state" / "run"

    @property
    def rounds_seen(self) -> int:
        """The last round on record, -1 for none."""
        return max(self.rows, default=-1)

    @property
    def log(self) -> Path:
        """File with everything that the node prints."""
        return self.folder / "node.log"

    def is_away(self) -> bool:
        """Whether the node has died and has not recorded anything since."""
        if self.process is None:
            return not self.is_finished
        return self.starts > 1 and self.rounds_seen <= self.began_at

    def has_not_started(self) -> bool:
        """Whether the node has ended without a round because too few nodes were ready."""
        summary = read_summary(self.run_folder)
        return summary is not None and summary["stop_reason"] == "members_missing"

    def has_ended_its_rounds(self, last_possible_round: int) -> bool:
        """Whether the node has recorded its last round: the last that there can be, or the one after which the network stops."""
        if self.rounds_seen < 0:
            return False
        stop_round = self.rows[self.rounds_seen].get("stop_round")
        return self.rounds_seen + 1 >= last_possible_round or (stop_round is not None and self.rounds_seen >= stop_round)

    @property
    def is_lost(self) -> bool:
        """Whether the node has died for good."""
        return bool(self.fate)

    @property
    def is_finished(self) -> bool:
        """Whether the node has come to the end of its run."""
        return (self.run_folder / "summary.json").exists()

    def last_lines(self) -> list[str]:
        """Lines that the last process wrote to its log."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            file.seek(self.log_offset)
            return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]

    def last_words(self) -> str:
        """Error that the last process named before it ended; empty where it was killed or crashed."""
        lines = self.last_lines()
        starts = [i for i, line in enumerate(lines) if line.startswith("p2pfl: ")]
        return "\n".join(lines[starts[-1] :]).removeprefix("p2pfl: ") if starts else ""

    def last_line(self) -> str:
        """The last line of its log, shortened; empty where it wrote none."""
        lines = self.last_lines()
        return shorten(lines[-1], _LINE, placeholder=" ...") if lines else ""

    def read_new_events(self) -> list[dict[str, Any]]:
        """Read the events that the node has recorded since the last look."""
        found = [json.loads(line) for line in self._new_lines("events.jsonl")]
        for event in found:
            self._note(str(event["event"]), str(event.get("detail", "")))
        return found

    def _note(self, kind: str, detail: str) -> None:
        name = detail.split(" ", maxsplit=1)[0].rstrip(":")
        if kind in (EventKind.WAITING, EventKind.LINK_DOWN):
            self.waits[name] = detail
        elif kind in (EventKind.LINK_UP, EventKind.HANDSHAKE):
            self.waits.pop(name, None)
        self.has_greeted = self.has_greeted or kind == "greeted"

    def read_new_rows(self) -> None:
        """Take up what the node has recorded since the last look."""
        for line in self._new_lines("nodes.jsonl"):
            with suppress(ValueError):  # rewritten under our eyes; it is read whole at the end
                row = json.loads(line)
                self.rows[row["round"]] = row

    def _new_lines(self, records: str) -> list[bytes]:
        """Complete lines of a file of records since the last look."""
        path, offset = self.run_folder / records, self._offsets.get(records, 0)
        if not path.exists():
            return []
        if path.stat().st_size < offset:  # a restarted node has taken rows back, or its state was removed
            offset = 0
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offsets[records] = offset + len(complete)
        return complete.splitlines()

    def end_of_life(self, code: int, said: str) -> str:
        """Say in a sentence how a daemon ended that is not started again."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        times = {1: "", 2: " twice"}.get(self.fruitless, f" {self.fruitless} times") if self.fruitless else ""
        when = (
            f" after round {self.rounds_seen}"
            if self.rounds_seen >= 0
            else " before its first round"
            if self.has_greeted
            else _BEFORE_HANDSHAKE
        )
        reason = said or (self.why.partition(": ")[2] if code > 0 else "")
        return f"{self.name} {how}{times}{when}{f' ({reason})' if reason else ''}"

    def departure(self, rounds: int) -> Departure:
        """The departure that a daemon died for good."""
        last = f"; its last line: {self.last_line()}" if self.last_line() else ""
        return Departure(
            kind="rounds_missed" if self.rounds_seen >= 0 else "members_missing",
            detail=f"{self.fate} and was not started again: it made {self.rounds_seen + 1} of {rounds} rounds{last}",
        )
