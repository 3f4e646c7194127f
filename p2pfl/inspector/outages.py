"""Everything out of the ordinary in a run: rounds in which a node was away or late, and its recorded events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from p2pfl.inspector.run_state import clock_time, is_complete, member_of, neighbours_of
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

_EVERYDAY = frozenset({EventKind.STARTED, EventKind.START_AGREED, EventKind.HANDSHAKE, EventKind.SKIPPED, EventKind.CAME_BACK})
"""Skipped and returned are told of the node that they are about."""
_SHORTEST = 2  # rounds; a shorter outage stands in the tables of missed messages

Kind = Literal["offline", "late", "unheard", "not started"]
"""late: it made these rounds as well, but its messages came too late for everybody. unheard: one institution alone tells, which cannot know
whether the node or the link between them failed. not started: the network started without it, and it had not come yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """Rounds in a row in which all neighbours that tell went on without one node."""

    node: str
    first: int
    last: int
    kind: Kind
    by: str
    """The node that went on without it; of several the first by name."""
    is_over: bool
    """Whether a later round is recorded in which some neighbour did not go on without it."""

    @property
    def rounds(self) -> str:
        """The rounds in words."""
        return f"round {self.first}" if self.first == self.last else f"rounds {self.first}-{self.last}"

    @property
    def sentence(self) -> str:
        """The outage as a sentence."""
        if self.kind == "not started":
            until = f": the others made {self.rounds} without it" if self.is_over else ", and has not come yet"
            return f"{self.node} {'started late' if self.is_over else 'was not there at the start'}{until}."
        if self.kind == "unheard":
            done, since = f"went on without {self.node} in {self.rounds}", f"has gone on without {self.node} since round {self.first}"
            return f"{self.by} {done if self.is_over else since}."
        if self.kind == "late":
            return f"{self.node} was too late for all its neighbours in {self.rounds}."
        if self.is_over:
            return f"{self.node} was offline in {self.rounds}."
        return f"{self.node} has been offline since round {self.first}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Outages:
    """All outages of a run, and the skipped neighbours that they explain."""

    found: list[Outage]
    """By first round, then by name."""
    away: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """Node and round, offline or late."""
    isolated: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """Node and round in which it was offline, or had just come, although it has a row of that round."""

    def explain(self, by: str, other: str, number: int) -> bool:
        """Whether *by* went on without *other* in that round because one of the two was away, not because of their link."""
        return (other, number) in self.away or (by, number) in self.isolated


def outages(run: RunRecords) -> Outages:
    """Attribute missed messages to nodes where all their links missed in the same rounds.

    A node was offline in a round if all its neighbours that have a row of it went on without the node. Besides, the node has no row of it,
    or it went on without all its neighbours as well. If it has a row and its neighbours' messages came, it was late.
    One neighbour alone cannot tell a node from its link while the node works.
    """
    skipped = {(str(row["node"]), int(row["round"])): frozenset(map(str, row["skipped"])) for row in run.nodes if row.get("skipped")}
    if not skipped:
        return Outages(found=[])
    present: defaultdict[str, set[int]] = defaultdict(set)
    for row in run.nodes:
        present[str(row["node"])].add(int(row["round"]))
    neighbours, newest = neighbours_of(run), {node: max(rounds) for node, rounds in present.items()}
    missed_in: defaultdict[int, set[str]] = defaultdict(set)
    for (_, number), others in skipped.items():
        missed_in[number] |= others
    kinds: dict[tuple[str, int], Kind] = {}
    witness: dict[tuple[str, int], str] = {}
    behind = _behind(run, present)
    isolated = set(behind)
    for node, number in {(other, number) for (_, number), others in skipped.items() for other in others}:
        around = neighbours.get(node, frozenset())
        telling = [by for by in around or present.keys() - {node} if number in present.get(by, ()) and (by, number) not in behind]
        if not telling or not all(node in skipped.get((by, number), ()) for by in telling):
            continue
        is_undecided = newest.get(node, -1) < number
        if is_undecided and any(newest.get(by, number) < number and by not in missed_in[number] for by in around):
            continue  # a neighbour at work has not come to this round yet
        witness[node, number] = min(telling)
        if node not in present and len(present) == 1:
            kinds[node, number] = "unheard"
        elif number not in present.get(node, ()):
            kinds[node, number] = "offline"
        elif len(telling) > 1 and (own := _own_word(around, skipped.get((node, number), frozenset()))) is not None:
            kinds[node, number] = own
            isolated |= {(node, number)} if own == "offline" else set()
    _mark_late_starts(kinds, late_starters(run), present)
    found = _in_ranges(kinds, witness, present, neighbours)
    away = frozenset(place for place, kind in kinds.items() if kind != "unheard")
    return Outages(found=found, away=away, isolated=frozenset(isolated))


def late_starters(run: RunRecords) -> frozenset[str]:
    """Members without which the network started, as its events say."""
    told = (str(event.get("detail") or "") for event in run.events if event["event"] == EventKind.STARTED_WITHOUT)
    return frozenset(name for detail in told for name in detail.rpartition(": ")[0].split(", ") if name)


def not_started(run: RunRecords) -> frozenset[str]:
    """Members without which the network started, and which have not come yet."""
    if not late_starters(run):
        return frozenset()
    return frozenset(outage.node for outage in outages(run).found if outage.kind == "not started" and not outage.is_over)


def _behind(run: RunRecords, present: Mapping[str, set[int]]) -> set[tuple[str, int]]:
    """Nodes and the rounds to which they jumped, since they were behind: what they missed there was their own lateness."""
    found = set()
    for event in run.events:
        if event["event"] == EventKind.JUMPED:
            by = str(event["node"])
            after = [number for number in present.get(by, ()) if number >= (event["round"] or 0)]
            found |= {(by, min(after))} if after else set()
    return found


def _mark_late_starts(kinds: dict[tuple[str, int], Kind], late: frozenset[str], present: Mapping[str, set[int]]) -> None:
    """A late starter was not away but had not started, in its rounds from the first that anybody recorded on."""
    first = min((number for rounds in present.values() for number in rounds), default=0)
    for node in late:
        number = first
        while kinds.get((node, number)) in ("offline", "unheard"):
            kinds[node, number] = "not started"
            number += 1


def _own_word(around: frozenset[str], went_without: frozenset[str]) -> Kind | None:
    """How a node was for which nobody waited, by whom it went on without itself; None where its links differ."""
    if not around & went_without:
        return "late"
    return "offline" if around and around <= went_without else None


def _in_ranges(
    kinds: Mapping[tuple[str, int], Kind],
    witness: Mapping[tuple[str, int], str],
    present: Mapping[str, set[int]],
    neighbours: Mapping[str, frozenset[str]],
) -> list[Outage]:
    """Rounds in a row, as far as the neighbours have rows of them, as one outage."""
    rounds: defaultdict[str, list[int]] = defaultdict(list)
    for node, number in sorted(kinds):
        rounds[node].append(number)
    found = []
    for node, away in rounds.items():
        others = neighbours.get(node) or present.keys() - {node}
        told = sorted({number for other in others for number in present.get(other, ())})
        place = {number: where for where, number in enumerate(told)}
        begin = 0
        for end in range(1, len(away) + 1):
            is_next = (
                end < len(away) and place[away[end]] == place[away[end - 1]] + 1 and kinds[node, away[end]] == kinds[node, away[begin]]
            )
            if not is_next:
                first, last = away[begin], away[end - 1]
                kind, by = kinds[node, first], witness[node, first]
                found.append(Outage(node=node, first=first, last=last, kind=kind, by=by, is_over=last < told[-1]))
                begin = end
    return sorted(found, key=lambda outage: (outage.first, outage.node))


def incidents(run: RunRecords, now_s: float | None = None) -> list[Row]:
    """Rows as in events.jsonl, by round and time; a node that was away has one for when it stopped answering and one for its return.

    The moment is in seconds since 1970.
    """
    told = [event for event in run.events if event["event"] not in _EVERYDAY]
    heard = _last_heard(run, time.time() if now_s is None else now_s)
    for outage in outages(run).found:
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
    said = [e for e in events if e["event"] == EventKind.LEFT and e.get("detail") == f"{outage.node} is pausing"]
    said += [e for e in events if e["event"] == EventKind.PAUSED and e["node"] == outage.node]
    return any(outage.first - 2 <= (e["round"] or 0) <= outage.first for e in said)


def _detail(outage: Outage) -> str:
    if outage.kind == "unheard":
        return f"{outage.by} goes on without it" if not outage.is_over else f"{outage.by} went on without it until round {outage.last}"
    return "all its neighbours go on without it" if not outage.is_over else f"offline until round {outage.last}"
