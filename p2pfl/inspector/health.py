"""How every node of a run is now: from the records alone. A state that no record tells is unknown."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from p2pfl.inspector.outages import not_started
from p2pfl.inspector.run_state import (
    NO_REPORT,
    clock_time,
    duration,
    heard_in,
    is_asked,
    member_of,
    names_text,
    neighbours_of,
    never_trained,
    run_state,
)
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

NodeState = Literal["well", "late", "lost", "paused", "unknown", "finished", "has not trained"]


_AGE_WORTH_SAYING_S = 10.0
_STALE_ROUNDS = 4
"""A node whose newest record is older than so many of its own rounds, and than 10 s, is in an unknown state."""
_SIMULATED = ("simulator", "sharded")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeHealth:
    """How one node is."""

    state: NodeState
    why: str
    """A sentence."""
    round: int | None
    """The newest that it has recorded."""


def node_health(run: RunRecords, now_s: float | None = None) -> dict[str, NodeHealth]:
    """Every node of the graph and of the records, in the order in which the graph has them.

    "lost": it has died and recorded nothing since, or every neighbour that can tell goes on without it and is ahead of it.
    "late": some neighbour went on without it in its newest round.
    "paused": it said that it pauses, and has not come back since.
    "finished": the run has ended, or it says so of itself.
    "has not trained": too few members were there at the start, so that the run ended before its first round; or the network has
    started without it.
    "unknown": no record says how it is now, or at a moment in seconds since 1970.
    """
    judge = _Judge(run, time.time() if now_s is None else now_s)
    names = dict.fromkeys([*((run.topology or {}).get("nodes") or ()), *judge.newest, *judge.skippers, *judge.dead])
    return {name: judge.health(name) for name in names}


def newest_rows(rows: list[Row]) -> dict[str, Row]:
    """The row of each node's highest round."""
    newest: dict[str, Row] = {}
    for row in rows:
        name = str(row["node"])
        if name not in newest or row["round"] >= newest[name]["round"]:
            newest[name] = row
    return newest


def skippers_of(newest: Mapping[str, Row], dead: Mapping[str, str]) -> dict[str, set[str]]:
    """Nodes that went on without another in their newest round, but for those whose newest round is long past for that node."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for by, row in newest.items():
        for other in map(str, () if by in dead else row.get("skipped") or ()):
            if other not in newest or newest[other]["round"] <= row["round"] + 1:
                found[other].add(by)
    return dict(found)


def dead_nodes(run: RunRecords, newest: Mapping[str, Row]) -> dict[str, str]:
    """Nodes that have died and have not recorded a round since, each with the cause."""
    last = {str(event["node"]): event for event in run.events if event["event"] == EventKind.DIED}
    return {
        name: str(event.get("detail") or "")
        for name, event in last.items()
        if name not in newest or newest[name]["round"] <= (event["round"] or 0)
    }


def _left(run: RunRecords) -> dict[str, str]:
    """Nodes that were heard to finish, each with who heard it."""
    found = {}
    for event in run.events:
        name, _, rest = str(event.get("detail") or "").partition(" has finished")
        if event["event"] == EventKind.LEFT and name and not rest:
            found[name] = str(event["node"])
    return found


def paused_nodes(run: RunRecords) -> dict[str, str]:
    """Nodes that have paused and not come back as far as is recorded, each with how that is known, in words without a full stop."""
    found: dict[str, tuple[float, str]] = {}
    for event in run.events:
        kind, by, detail = event["event"], str(event["node"]), str(event.get("detail") or "")
        about = detail.split(" ", maxsplit=1)[0]
        if kind == EventKind.PAUSED:
            found[by] = math.inf, f"It paused{f' {detail}' if detail else ''} at {clock_time(event.get('time'))}"
        elif kind == EventKind.LEFT and detail == f"{about} is pausing":
            found.setdefault(about, (event["round"] or 0, f"It said to {by} at {clock_time(event.get('time'))} that it pauses"))
        elif kind in (EventKind.LEFT, EventKind.HANDSHAKE, EventKind.CAME_BACK):
            found.pop(about, None)
        elif kind in (EventKind.STARTED, EventKind.RESUMED, EventKind.DIED):
            found.pop(by, None)
    newest = newest_rows(run.nodes)  # who has come back far from here is known by its rounds alone
    return {name: why for name, (number, why) in found.items() if name not in newest or newest[name]["round"] <= number + 1}


def _since(run: RunRecords, newest: Mapping[str, Row]) -> dict[tuple[str, str], int]:
    """The first round of those in a row, up to a node's newest, in which it went on without another; by (node, other)."""
    skipping = {by: set(map(str, row["skipped"])) for by, row in newest.items() if row.get("skipped")}
    found: dict[tuple[str, str], int] = {}
    for row in sorted((row for row in run.nodes if str(row["node"]) in skipping), key=lambda row: -row["round"]):
        by = str(row["node"])
        skipping[by] &= set(map(str, row.get("skipped") or ()))
        found |= {(by, other): int(row["round"]) for other in skipping[by]}
    return found


def _stale_s(run: RunRecords, newest: Mapping[str, Row]) -> dict[str, float]:
    """The age from which each node's newest record says nothing of how it is now, by how far apart its last records were."""
    rounds: defaultdict[str, set[int]] = defaultdict(set)
    for row in run.nodes:
        rounds[str(row["node"])].add(int(row["round"]))
    found = {}
    for name, row in newest.items():
        if "age_s" in row:
            step = max((after - before for before, after in pairwise(sorted(rounds[name])[-3:])), default=1)
            spent_s = sum(value for value in (row.get("seconds") or {}).values() if value is not None)
            found[name] = max(_AGE_WORTH_SAYING_S, _STALE_ROUNDS * step * spent_s)
    return found


class _Judge:
    """Facts to judge every node of a run by."""

    def __init__(self, run: RunRecords, now_s: float) -> None:
        state = run_state(run, now_s)
        self.newest = newest_rows(run.nodes)
        self.dead = dead_nodes(run, self.newest)
        self.skippers = skippers_of(self.newest, self.dead)
        self._is_over, self._never_trained = run.summary is not None, never_trained(run.summary)
        self._is_simulated = ((run.summary or {}).get("engine") or run.environment.get("engine")) in _SIMULATED
        self._silence = state.said if state.kind in ("paused", "silent") else ""  # empty while the run goes on
        own: NodeState = "lost" if state.kind == "silent" and run.process == "gone" else "unknown"
        self._own = (own, state.said) if state.kind in ("silent", "unknown") else None  # None: nothing speaks against its going on
        self._member = None if is_asked(run) else member_of(run)  # whose own folder this is, without reports of others
        self._heard_in, self._left, self._paused = heard_in(run), _left(run), paused_nodes(run)
        self._unstarted = not_started(run) if run.summary is None else frozenset[str]()
        self._neighbours = neighbours_of(run)
        self._since, self._stale_s = _since(run, self.newest), _stale_s(run, self.newest)

    def health(self, name: str) -> NodeHealth:
        row = self.newest.get(name)
        state, why = self._judged(name, row)
        age_s = (row or {}).get("age_s")
        heard = f" Last heard of {duration(age_s)} ago." if age_s is not None and age_s >= _AGE_WORTH_SAYING_S else ""
        return NodeHealth(state=state, why=why + heard, round=self._round(name))

    def _judged(self, name: str, row: Row | None) -> tuple[NodeState, str]:  # noqa: PLR0911  # a line for each state
        died = f"It died {self._after(row)}{f' ({self.dead[name]})' if self.dead.get(name) else ''} and has not come back"
        if self._is_over:
            return self._at_the_end(name, row, died)
        if (said := self._said(name, row)) is not None:
            return said
        if name in self.dead:
            return "lost", f"{died} yet."
        if self._own is not None and name == self._member:
            return self._own
        if skippers := self.skippers.get(name, set()):
            return self._missed(name, row, skippers)
        if self._silence:
            return "unknown", self._silence
        if row is None:
            return "unknown", self._no_report(name)
        if row.get("age_s") is not None and row["age_s"] > self._stale_s[name]:
            return "unknown", "Its newest record is too old to say how it is; nobody is known to go on without it."
        return "well", "Nobody goes on without it."

    def _said(self, name: str, row: Row | None) -> tuple[NodeState, str] | None:
        """How a node is by what it said last of itself; None where that is nothing but its rounds."""
        word = (row or {}).get("state")
        if word == "finished":
            return "finished", "It has finished."
        if name in self._left:
            return "finished", f"{self._left[name]} has heard that it finished."
        if name in self._paused or word == "paused":
            return "paused", f"{self._paused.get(name, 'It said that it pauses')}, and is not back yet."
        if name in self._unstarted:
            return "has not trained", "The network started without it, and it has not come yet."
        return None

    def _at_the_end(self, name: str, row: Row | None, died: str) -> tuple[NodeState, str]:  # noqa: PLR0911  # a line for each state
        if self._never_trained and self._member in (None, name):
            return "has not trained", "Too few members were there at the start."
        if name in self.dead:
            return "lost", f"{died}; the run has ended without it."
        if name in self._left:
            return "finished", f"{self._left[name]} has heard that it finished."
        if self._member is not None and name != self._member:
            return self._heard_at_the_end(name, self._member)
        if name in self._paused:
            return "paused", f"{self._paused[name]}; the run has ended without it."
        last = max((int(other["round"]) for other in self.newest.values()), default=-1)
        if row is None and self.newest and not self._is_simulated:
            return "unknown", NO_REPORT
        if row is not None and row["round"] < last and self._is_given_up(name, self.skippers.get(name, set())):
            return "lost", f"Its last record is of round {row['round']}; the run has ended without it, after round {last}."
        return "finished", "The run has ended."

    def _heard_at_the_end(self, name: str, member: str) -> tuple[NodeState, str]:
        """How another member is in the records of one that has ended."""
        last = self._round(member)
        if last is not None and self._heard_in.get(name, -1) >= last:
            return "finished", f"{member} had its record of the last round."
        if name in self._paused:
            return "paused", f"{self._paused[name]}; the run has ended without it."
        if self._is_given_up(name, self.skippers.get(name, set())):
            return "lost", f"{self._gone_on(name)}; the run has ended without it."
        return "unknown", self._no_report(name)

    def _missed(self, name: str, row: Row | None, skippers: set[str]) -> tuple[NodeState, str]:
        if self._member is not None and row is None:
            doubt = ""
            around = self._neighbours.get(self._member, frozenset())
            if len(around) > 1 and all(self._member in self.skippers.get(other, ()) for other in around):
                doubt = f" So it does without all its neighbours: the connection of {self._member} itself may be down."
            return "lost", f"{self._gone_on(name)}.{doubt}"
        if self._is_given_up(name, skippers):
            return "lost", f"Every neighbour that can tell goes on without it {self._after(row)}."
        return "late", f"In the newest round {names_text(sorted(skippers))} went on without it."

    def _gone_on(self, name: str) -> str:
        by = min(self.skippers[name])
        return f"{by} goes on without it since round {self._since[by, name]}"

    def _after(self, row: Row | None) -> str:
        return "before its first round" if row is None else f"after round {row['round']}"

    def _no_report(self, name: str) -> str:
        if name == self._member:
            return "It has not recorded a round yet."
        heard = f" {self._member} last had its record of round {self._heard_in[name]}." if name in self._heard_in and self._member else ""
        return NO_REPORT + heard

    def _is_given_up(self, name: str, skippers: set[str]) -> bool:
        """Whether all go on without it that are themselves at work: who is skipped and no further than this node may be gone as well."""
        if not skippers:
            return False
        own = self._round(name)
        ahead = {other for other in self._neighbours.get(name, frozenset()) | skippers if own is None or (self._round(other) or 0) > own}
        at_work = {other for other in self._neighbours.get(name, frozenset()) if other in self.newest and other not in self.skippers}
        return skippers <= ahead and (ahead & self.newest.keys() | at_work) - self.dead.keys() <= skippers

    def _round(self, name: str) -> int | None:
        return int(self.newest[name]["round"]) if name in self.newest else None
