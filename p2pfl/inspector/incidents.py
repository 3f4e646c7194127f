"""Everything out of the ordinary in a run: its recorded events, and what the rows tell of nodes that were away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from p2pfl.inspector.outages import Outage, Outages, outages
from p2pfl.inspector.perspective import is_complete, member_of
from p2pfl.inspector.run_state import clock_time
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

_EVERYDAY = frozenset({EventKind.STARTED, EventKind.START_AGREED, EventKind.HANDSHAKE, EventKind.SKIPPED, EventKind.CAME_BACK})
"""Skipped and returned are told of the node that they are about."""
_SHORTEST = 2  # rounds; a shorter outage stands in the tables of missed messages


def incidents(run: RunRecords, away: Outages | None = None, now_s: float | None = None) -> list[Row]:
    """Rows as in events.jsonl, by round and time; a node that was away has one for when it stopped answering and one for its return.

    Args:
        run: its records.
        away: the answer of `outages`, if at hand.
        now_s: seconds since 1970; None: now.
    """
    found = away if away is not None else outages(run)
    told = [event for event in run.events if event["event"] not in _EVERYDAY]
    heard = _last_heard(run, time.time() if now_s is None else now_s)
    for outage in found.found:
        told += _told(outage, run.events, None if outage.is_over else heard.get(outage.node))
    return sorted(told, key=lambda event: (event["round"] is None, event["round"] or 0, str(event.get("time") or "")))


def no_incidents(run: RunRecords) -> str:
    """The sentence in the place of a list without incidents: an all-clear only where records of all nodes are complete."""
    member = member_of(run)
    if member is not None:
        return f"{member} has recorded nothing out of the ordinary. Events of other sites are kept there; this view has none."
    if not is_complete(run):
        return "Events are kept at each site; this view has none."
    if run.summary is None and run.environment.get("engine") == "daemons":
        return "No death and no outage of two rounds or more so far. The nodes' own events are gathered when the run ends."
    if any(row.get("skipped") for row in run.nodes):
        return "Nothing out of the ordinary is recorded, except for missed messages."
    return "Nothing out of the ordinary has happened."


def time_column(events: Sequence[Row]) -> list[str]:
    """The time of each event in UTC, with its day where they are of several days; "-" where it is not known."""
    texts = [clock_time(event["time"]) if event.get("time") else "" for event in events]
    days = {text.partition(" UTC on ")[2] for text in texts if text}
    return ["-" if not text else _short(text, with_day=len(days) > 1) for text in texts]


def _short(text: str, *, with_day: bool) -> str:
    hour, _, day = text.partition(" UTC on ")
    return f"{day[:6]} {hour}" if with_day and day else hour


def _last_heard(run: RunRecords, now_s: float) -> dict[str, str]:
    """When each node was last heard of, by how old its newest row is."""
    ages = {str(row["node"]): float(row["age_s"]) for row in run.nodes if row.get("age_s") is not None}
    return {node: datetime.fromtimestamp(now_s - age_s, UTC).isoformat(timespec="seconds") for node, age_s in ages.items()}


def _told(outage: Outage, events: Sequence[Row], last_heard: str | None) -> list[Row]:
    if outage.is_over and outage.last - outage.first + 1 < _SHORTEST:
        return []
    name = outage.node
    went = [e for e in events if e["event"] == EventKind.SKIPPED and str(e.get("detail") or "").startswith(f"{name} did not ")]
    back = [e for e in events if e["event"] == EventKind.CAME_BACK and str(e.get("detail") or "").startswith(f"{name} is back ")]
    stopped_at = min((str(e["time"]) for e in went if e.get("time") and e["round"] == outage.first), default=last_heard)
    kind, detail = ("late", outage.sentence) if outage.kind == "late" else ("stopped answering", _detail(outage))
    came = "is back"
    if outage.kind == "not started":
        kind, detail, came = "not started", outage.sentence, "has come"
    elif outage.kind != "late" and _has_said_so(outage, events):
        kind = "paused"
    rows: list[Row] = [{"time": stopped_at, "round": outage.first, "node": name, "event": kind, "detail": detail}]
    if outage.is_over and outage.kind != "late":
        times = [str(e["time"]) for e in back if e.get("time") and e["round"] is not None and e["round"] >= outage.last]
        rows.append({"time": min(times, default=None), "round": outage.last + 1, "node": name, "event": came, "detail": ""})
    return rows


def _has_said_so(outage: Outage, events: Sequence[Row]) -> bool:
    """Whether a node said that it pauses when it went away."""
    said = [e for e in events if e["event"] == EventKind.LEFT and e.get("detail") == f"{outage.node} is pausing"]
    said += [e for e in events if e["event"] == EventKind.PAUSED and e["node"] == outage.node]
    return any(outage.first - 2 <= (e["round"] or 0) <= outage.first for e in said)


def _detail(outage: Outage) -> str:
    if outage.kind == "unheard":
        return f"{outage.by} goes on without it" if not outage.is_over else f"{outage.by} went on without it until round {outage.last}"
    return "all its neighbours go on without it" if not outage.is_over else f"offline until round {outage.last}"
