"""Perspective of records, and whether their run goes on, was paused, has fallen silent or has ended when they are read."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from p2pfl.runs.events import EventKind, departures_in
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

NO_REPORT = "No report from this site here."
_SILENT_AFTER_S = 60.0
_SILENT_ROUNDS = 10
"""Without a record for so many of its longest recent rounds a run has probably stopped."""
_RECENT = 20  # rounds
_NAMED = 5
_GOING_ON = frozenset({EventKind.STARTED, EventKind.RESUMED, EventKind.DIED})
_COMING_AND_GOING = _GOING_ON | {EventKind.PAUSED}

_STILL: dict[str | None, str] = {
    "gone": "stopped: its process ended without a word, as one that is killed",
    "stopped": "standing still: a signal has stopped its process",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """How a run is."""

    kind: Literal["running", "unknown", "paused", "silent", "finished", "departed"]
    """departed: it has ended, and not as was agreed. silent: it has stopped, or probably. unknown: of one institution, whose node's process
    cannot be seen from here."""
    sentence: str
    """In words, without a full stop, beginning small."""

    @property
    def said(self) -> str:
        """The sentence with a capital and a full stop."""
        return f"{self.sentence[0].upper()}{self.sentence[1:]}."


def member_of(run: RunRecords) -> str | None:
    """The institution to which these records belong; None where they are of the whole network.

    Runs that were recorded before environment.json named the member are known by their rows: all rows of one node, in a graph of more.
    """
    named = run.environment.get("member")
    if named is not None:
        return str(named)
    names = (run.topology or {}).get("nodes") or ()
    if (run.environment.get("engine") or "daemons") != "daemons" or len(names) < 2 or not run.nodes:  # noqa: PLR2004  # alone it is the network
        return None
    first = run.nodes[0]["node"]
    is_one = all(row["node"] == first and "age_s" not in row for row in run.nodes)  # ends at the first other one
    return str(first) if is_one else None


def is_asked(run: RunRecords) -> bool:
    """Whether a node at work told all this when it was asked: its rows of others have ages."""
    return any("age_s" in row for row in run.nodes)


def is_complete(run: RunRecords) -> bool:
    """Whether there are records of all nodes, so that what is not recorded did not happen."""
    names, recorded = (run.topology or {}).get("nodes") or (), {str(row["node"]) for row in run.nodes}
    return member_of(run) is None and not is_asked(run) and bool(recorded) and bool(names) and recorded.issuperset(names)


def banner(run: RunRecords) -> str:
    """Says whose view this is; empty where the records are of the whole network."""
    member = member_of(run)
    if member is None:
        return "You see the network as one of its nodes has heard of it." if is_asked(run) else ""
    if is_asked(run):
        return f"You see the network as {member} has heard of it."
    if run.summary is not None:
        return f"You see {member} and what it heard, not the whole network."
    return f"You see {member} and what it heard. For the whole network open its state/status.url while its node runs."


def heard_in(run: RunRecords) -> dict[str, int]:
    """The newest round of the network, by member, in which this institution had that member's record."""
    found: dict[str, int] = {}
    names = [str(name) for name in (run.topology or {}).get("nodes") or ()]
    for row in run.network:
        missing = set(row.get("missing") or ())
        if row.get("nodes") == len(names) - len(missing):  # a sum by push-sum names nobody
            found |= {name: int(row["round"]) for name in names if name not in missing}
    return found


def neighbours_of(run: RunRecords) -> dict[str, frozenset[str]]:
    """Every node's neighbours, from topology.json; empty where the graph changes."""
    graph: Row = run.topology or {}
    names = graph.get("nodes") or []
    found: defaultdict[str, set[str]] = defaultdict(set)
    for i, j, _ in graph.get("edges") or ():
        if i != j:
            found[names[i]].add(names[j])
            found[names[j]].add(names[i])
    return {name: frozenset(others) for name, others in found.items()}


def run_state(run: RunRecords, now_s: float | None = None) -> RunState:
    """How the run is now, or at a moment in seconds since 1970."""
    if run.summary is not None:
        left = departures_in(run.summary)
        if left:
            return RunState(kind="departed", sentence=f"ended, and not as agreed: {'; '.join(left)}")
        reason = str(run.summary.get("stop_reason"))
        return RunState(kind="finished", sentence="ended at its last round" if reason == "rounds" else reason)
    if (halted := _halted(run)) is not None:
        return halted
    if run.written_s is None:
        return RunState(kind="running", sentence="running")
    return _since_its_last_record(run, max((time.time() if now_s is None else now_s) - run.written_s, 0.0))


def _since_its_last_record(run: RunRecords, age_s: float) -> RunState:
    """How a run is whose last record is so old, and which has not said that it halts."""
    if run.process == "paused":
        return RunState(kind="paused", sentence=f"paused: it was interrupted (last record {duration(age_s)} ago)")
    if run.process in _STILL:
        return RunState(kind="silent", sentence=f"{_STILL[run.process]} (last record {duration(age_s)} ago)")
    recent = (run.rounds or run.nodes)[-_RECENT:]
    longest_s = max((sum(value for value in (row.get("seconds") or {}).values() if value is not None) for row in recent), default=0.0)
    if age_s <= max(_SILENT_AFTER_S, _SILENT_ROUNDS * longest_s):
        if run.process is None and member_of(run) is not None:
            return RunState(kind="unknown", sentence=f"last record {duration(age_s)} ago; whether it still runs cannot be seen from here")
        return RunState(kind="running", sentence=f"running (last record {duration(age_s)} ago)")
    doubt = "probably stopped" if run.rounds or run.nodes else "stopped, or still in its first round"
    return RunState(kind="silent", sentence=f"no record for {duration(age_s)}, {doubt}")


def never_trained(summary: Mapping[str, Any] | None) -> bool:
    """Whether a run ended before its first round, because members were missing."""
    return summary is not None and summary.get("stop_reason") == "members_missing"


def has_metrics(summary: Mapping[str, Any] | None) -> bool:
    """Whether a summary has metrics of trained models."""
    return summary is not None and bool(summary.get("metrics")) and not never_trained(summary)


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, without decimals."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def count_text(number: int, word: str) -> str:
    """Write a number with its noun, in the plural where it is not one."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def names_text(names: Sequence[str], most: int = 3) -> str:
    """List names, or the first of them and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """Replace control signs by question marks: a name or a detail may come from an unknown peer."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def clock_text(value: float | None) -> str:
    """Write a time on the network's clock in seconds."""
    return "-" if value is None else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"  # noqa: PLR2004  # three digits say enough


def clock_time(moment: str | float | None) -> str:
    """The time of day in UTC of a record's time or of seconds since 1970."""
    if moment is None:
        return "an unknown time"
    try:
        at = datetime.fromtimestamp(moment, UTC) if isinstance(moment, int | float) else datetime.fromisoformat(moment).astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # somebody else's text
        return str(moment)
    return at.strftime("%H:%M:%S UTC on %d %b %Y")


def _halted(run: RunRecords) -> RunState | None:
    """Whether everybody that is left was paused."""
    last = {str(event["node"]): event for event in run.events if event["event"] in _COMING_AND_GOING}
    if (paused := _interrupted(run) or _paused(run, last)) is not None:
        by = f" {paused['detail']}" if paused.get("detail") else ""
        return RunState(kind="paused", sentence=f"paused{by} at {clock_time(paused.get('time'))}")
    broken = _broken(run, last)
    return RunState(kind="silent", sentence=broken) if broken is not None else None


def _interrupted(run: RunRecords) -> Row | None:
    """The event by which a signal paused `p2pfl up` with all its daemons; None where anybody has come or died since."""
    told = [event for event in run.events if event["event"] == EventKind.INTERRUPTED or event["event"] in _GOING_ON]
    return told[-1] if told and told[-1]["event"] == EventKind.INTERRUPTED else None


def _broken(run: RunRecords, last: Mapping[str, Row]) -> str | None:
    """A sentence where some members have died and all others were paused; None where anybody goes on, as far as is known."""
    dead = [event for event in last.values() if event["event"] == EventKind.DIED]
    paused = [event for event in last.values() if event["event"] == EventKind.PAUSED]
    if not dead or not paused or len(dead) + len(paused) < len((run.topology or {}).get("nodes") or last):
        return None
    who = ", ".join(sorted(str(event["node"]) for event in dead)[:_NAMED]) + (", ..." if len(dead) > _NAMED else "")
    return f"stopped, since {who} died: {dead[0].get('detail') or 'nobody knows why'}; the others were paused"


def _paused(run: RunRecords, last: Mapping[str, Row]) -> Row | None:
    """The event by which the whole run was paused; None where it goes on, or somebody does."""
    member = member_of(run)
    wanted = [event for name, event in last.items() if member in (None, name)]
    if not wanted or any(event["event"] != EventKind.PAUSED for event in wanted):
        return None
    return max(wanted, key=lambda event: str(event.get("time")))
