"""How every node and every link is now: from the records alone. A state that no record tells is unknown."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from p2pfl.inspector.outages import Outages, not_started, outages
from p2pfl.inspector.perspective import NO_REPORT, heard_in, is_asked, is_complete, member_of, neighbours_of
from p2pfl.inspector.run_state import RunState, clock_time, duration, never_trained, run_state
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

NodeState = Literal["well", "late", "lost", "paused", "unknown", "finished", "has not trained"]
EdgeState = Literal["well", "slow", "lost", "paused", "unknown"]
Ends = frozenset[str]
"""The two nodes of a link."""

WINDOW = 50
"""Newest rounds over which a link's missed messages are counted."""
SLOW_FROM = 0.02
"""Fraction of a link's messages in the window above which it is slow."""

_AGE_WORTH_SAYING_S = 10.0
_STALE_ROUNDS = 4
"""Of a node whose newest record is older than so many of its own rounds, and than 10 s, nobody knows how it is now."""
_NAMED = 3
_EXCEPT = "except while"
_SIMULATED = ("simulator", "sharded")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeHealth:
    """How one node is."""

    state: NodeState
    why: str
    """A sentence."""
    round: int | None
    """The newest that it has recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeHealth:
    """How one link is, both directions together. Rounds in which one of its ends was offline or late for everybody do not count."""

    state: EdgeState
    why: str
    """A sentence."""
    missed: int
    """How many messages over it came too late or not at all, in the newest 50 rounds."""
    expected: int
    """How many were due in these rounds, by the records of its ends."""
    missed_ever: int
    """As missed, in all rounds that are recorded."""

    @property
    def fraction(self) -> float:
        """Missed of expected, 0 to 1."""
        return min(1.0, self.missed / self.expected) if self.expected else 0.0


def link_name(ends: Ends) -> str:
    """The two nodes, in the order of their names."""
    return " - ".join(sorted(ends))


def node_health(run: RunRecords, now_s: float | None = None) -> dict[str, NodeHealth]:
    """Every node of the graph and of the records, in the order in which the graph has them.

    "lost": it has died and recorded nothing since, or every neighbour that can tell goes on without it and is ahead of it.
    "late": some neighbour went on without it in its newest round.
    "paused": it said that it pauses, and has not come back since.
    "finished": the run has ended, or it says so of itself.
    "has not trained": too few members were there at the start, so that the run ended before its first round; or the network has
    started without it.
    "unknown": no record says how it is now.

    Args:
        run: its records.
        now_s: seconds since 1970; None: now.
    """
    newest = _newest(run.nodes)
    dead = _dead(run, newest)
    state = run_state(run, time.time() if now_s is None else now_s)
    now = _Now(
        is_over=run.summary is not None,
        never_trained=never_trained(run.summary),
        is_simulated=((run.summary or {}).get("engine") or run.environment.get("engine")) in _SIMULATED,
        silence=state.sentence if state.kind in ("paused", "silent") else "",
        own=_own_state(run, state),
        member=None if is_asked(run) else member_of(run),
        heard_in=heard_in(run),
        left=_left(run),
        paused=paused_nodes(run),
        unstarted=not_started(run) if run.summary is None else frozenset(),
        newest=newest,
        dead=dead,
        neighbours=neighbours_of(run),
        skippers=_skippers(newest, dead),
        since=_since(run, newest),
        stale_s=_stale_s(run, newest),
    )
    names = dict.fromkeys([*((run.topology or {}).get("nodes") or ()), *newest, *now.skippers, *dead])
    return {name: now.health(name) for name in names}


def edge_health(run: RunRecords, nodes: Mapping[str, NodeHealth] | None = None, away: Outages | None = None) -> dict[Ends, EdgeHealth]:
    """Every link of the graph, and those over which a message was missed where the graph changes.

    "lost": one end went on without the other in its newest round, or is lost itself. Of a run that has ended none is lost.
    "paused": one end has paused.
    "slow": more than 2 % of its messages were missed in the newest 50 rounds.
    "unknown": an end of it is unknown, or neither end has a record.

    Args:
        run: its records.
        nodes: the answer of `node_health`, if at hand.
        away: the answer of `outages`, if at hand.
    """
    known = node_health(run) if nodes is None else nodes
    explained = outages(run) if away is None else away
    newest = _newest(run.nodes)
    counted = _counted(run, explained, newest)
    skippers = _skippers(newest, _dead(run, newest)) if run.summary is None else {}
    cut = {
        frozenset((by, other)): f"{by} went on without {other} in round {newest[by]['round']}."
        for other, others in skippers.items()
        for by in others
    }
    judge = _Links(
        known=known,
        is_over=run.summary is not None,
        is_whole=is_complete(run),
        cut=cut,
        window=counted.window,
        away=_rounds_away(explained),
    )
    found = {}
    for ends in dict.fromkeys([*_links(run), *counted.ever, *counted.excused]):
        missed, ever = counted.missed[ends], counted.ever[ends]
        expected = max(sum(counted.due[end] for end in ends) - counted.excused[ends], missed)
        state, why = judge.judged(ends, missed, expected, ever)
        found[ends] = EdgeHealth(state=state, why=why, missed=missed, expected=expected, missed_ever=ever)
    return found


def slowest_edge(edges: Mapping[Ends, EdgeHealth]) -> Ends | None:
    """The slow link over which most messages were missed, of several the first by name."""
    slow = [ends for ends, edge in edges.items() if edge.state == "slow"]
    return min(slow, key=lambda ends: (-edges[ends].missed, link_name(ends)), default=None)


def slowest_link_sentence(edges: Mapping[Ends, EdgeHealth]) -> str:
    """Name the slowest link with its count, in the same words wherever it is said; empty where none is slow."""
    worst = slowest_edge(edges)
    return f"The slowest link is {link_name(worst)}: {edges[worst].why}" if worst is not None else ""


def links_in_order(run: RunRecords, edges: Mapping[Ends, EdgeHealth]) -> str:
    """A sentence for a run without a lost or slow link, as strong as its records allow; empty where there are no links."""
    if not edges:
        return ""
    odd = sum(edge.missed_ever for edge in edges.values())
    unknown = sum(edge.state == "unknown" for edge in edges.values())
    if unknown:
        return f"No link is known to be lost or slow; of {unknown} of {len(edges)} links nothing is known here."
    if odd:
        return f"No link is slow now; {odd} {'message was' if odd == 1 else 'messages were'} missed over links in all rounds recorded here."
    if not is_complete(run):
        return "No missed message is recorded here; records of all nodes and rounds are not."
    was_away = any(_EXCEPT in edge.why for edge in edges.values())
    return "Every message came in time, except to and from nodes that were away." if was_away else "Every message came in time."


def in_need(edges: Mapping[Ends, EdgeHealth]) -> list[tuple[Ends, EdgeHealth]]:
    """Links that are lost, then those that are slow, each with the most missed first."""
    bad = [(ends, edge) for ends, edge in edges.items() if edge.state in ("lost", "slow")]
    return sorted(bad, key=lambda pair: (pair[1].state != "lost", -pair[1].missed, link_name(pair[0])))


def _newest(rows: list[Row]) -> dict[str, Row]:
    """The row of each node's highest round."""
    newest: dict[str, Row] = {}
    for row in rows:
        name = str(row["node"])
        if name not in newest or row["round"] >= newest[name]["round"]:
            newest[name] = row
    return newest


def _links(run: RunRecords) -> list[Ends]:
    graph = run.topology or {}
    names = graph.get("nodes") or []
    return list(dict.fromkeys(frozenset((names[i], names[j])) for i, j, _ in graph.get("edges") or () if i != j))


def _skippers(newest: Mapping[str, Row], dead: Mapping[str, str]) -> dict[str, set[str]]:
    """Who went on without a node in their newest round, but for those whose newest round is long past for that node."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for by, row in newest.items():
        for other in map(str, () if by in dead else row.get("skipped") or ()):
            if other not in newest or newest[other]["round"] <= row["round"] + 1:
                found[other].add(by)
    return dict(found)


def _dead(run: RunRecords, newest: Mapping[str, Row]) -> dict[str, str]:
    """Who has died and has not recorded a round since, and of what."""
    last = {str(event["node"]): event for event in run.events if event["event"] == EventKind.DIED}
    return {
        name: str(event.get("detail") or "")
        for name, event in last.items()
        if name not in newest or newest[name]["round"] <= (event["round"] or 0)
    }


def _own_state(run: RunRecords, state: RunState) -> tuple[NodeState, str] | None:
    """How the member of an institution's own records is; None where nothing speaks against its going on."""
    said = f"{state.sentence[0].upper()}{state.sentence[1:]}."
    if state.kind == "silent" and run.process == "gone":
        return "lost", said
    return ("unknown", said) if state.kind in ("silent", "unknown") else None


def _left(run: RunRecords) -> dict[str, str]:
    """Who was heard to finish, and by whom."""
    found = {}
    for event in run.events:
        name, _, rest = str(event.get("detail") or "").partition(" has finished")
        if event["event"] == EventKind.LEFT and name and not rest:
            found[name] = str(event["node"])
    return found


def paused_nodes(run: RunRecords) -> dict[str, str]:
    """Who said that it pauses and has not come back as far as is recorded, each with how that is known, in words without a full stop."""
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
    newest = _newest(run.nodes)  # who has come back far from here is known by its rounds alone
    return {name: why for name, (number, why) in found.items() if name not in newest or newest[name]["round"] <= number + 1}


def _since(run: RunRecords, newest: Mapping[str, Row]) -> dict[tuple[str, str], int]:
    """The first round of those in a row, up to a node's newest, in which it went on without another; by (node, other)."""
    wanted = {(by, str(other)) for by, row in newest.items() for other in row.get("skipped") or ()}
    if not wanted:
        return {}
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    concerned = {by for by, _ in wanted}
    for row in run.nodes:
        if row["node"] in concerned:
            rows[str(row["node"])].append(row)
    found = {}
    for by, other in wanted:
        for row in sorted(rows[by], key=lambda row: -row["round"]):
            if other not in (row.get("skipped") or ()):
                break
            found[by, other] = int(row["round"])
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    """Messages of all links."""

    window: str
    """The newest rounds in words."""
    due: Counter[str]
    """Rounds of the window that a node has recorded: a message was due from each of its neighbours."""
    missed: Counter[Ends]
    ever: Counter[Ends]
    excused: Counter[Ends]
    """Missed in the window because a node was away."""


def _counted(run: RunRecords, explained: Outages, newest: Mapping[str, Row]) -> _Counts:
    last = max((int(row["round"]) for row in newest.values()), default=-1)
    begin = max(last - WINDOW + 1, min((int(row["round"]) for row in run.nodes), default=0))
    missed, ever, excused = Counter[Ends](), Counter[Ends](), Counter[Ends]()
    for row in run.nodes:
        by, number = str(row["node"]), int(row["round"])
        for other in map(str, row.get("skipped") or ()):
            ends = frozenset((by, other))
            if explained.explain(by, other, number):
                excused[ends] += number >= begin
            else:
                ever[ends] += 1
                missed[ends] += number >= begin
    return _Counts(
        window=f"rounds {begin}-{last}" if last > begin else f"round {last}",
        due=Counter(str(row["node"]) for row in run.nodes if row["round"] >= begin),
        missed=missed,
        ever=ever,
        excused=excused,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Links:
    """Facts to judge a link by, besides its counts."""

    known: Mapping[str, NodeHealth]
    is_over: bool
    is_whole: bool
    cut: Mapping[Ends, str]
    window: str
    away: Mapping[str, str]

    def judged(self, ends: Ends, missed: int, expected: int, ever: int) -> tuple[EdgeState, str]:
        gone = sorted(end for end in ends if end in self.known and self.known[end].state == "lost")
        if gone and not self.is_over:
            return "lost", f"{' and '.join(gone)} cannot be reached."
        if (paused := sorted(end for end in ends if end in self.known and self.known[end].state == "paused")) and not self.is_over:
            return "paused", f"{' and '.join(paused)} {'has' if len(paused) == 1 else 'have'} paused."
        if absent := sorted(end for end in ends if end in self.known and self.known[end].state == "has not trained"):
            return "unknown", f"{' and '.join(absent)} {'has' if len(absent) == 1 else 'have'} not started."
        if ends in self.cut:
            return "lost", self.cut[ends]
        return self._counted(ends, missed, expected, ever)

    def _counted(self, ends: Ends, missed: int, expected: int, ever: int) -> tuple[EdgeState, str]:
        """How a link is of which nobody says that it is cut."""
        unsure = sorted(end for end in ends if end not in self.known or self.known[end].state == "unknown")
        counted = f"{missed} of {expected} messages over it were missed in {self.window}"
        without = " and ".join(f"{end} was away in {self.away[end]}" for end in sorted(ends) if end in self.away)
        but = f" Not counted: {without}." if without else ""
        if missed > SLOW_FROM * expected:
            return "slow", f"{counted}.{but}"
        if unsure or not expected:
            return "unknown", f"No report here from {' and '.join(unsure)}." if unsure else "No report of this link here."
        if ever:
            return "well", f"{counted}, {ever} in all.{but}"
        complete = "Every message came in time" if self.is_whole else f"No missed message is recorded in {self.window}"
        return "well", f"{complete}{f', {_EXCEPT} {without}' if without else ''}."


def _rounds_away(explained: Outages) -> dict[str, str]:
    """In which rounds each node was away, in words; some of many."""
    spent: defaultdict[str, list[str]] = defaultdict(list)
    for outage in explained.found:
        spent[outage.node].append(outage.rounds)
    return {node: _few(texts) for node, texts in spent.items()}


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:_NAMED]) + (f" and {len(texts) - _NAMED} more times" if len(texts) > _NAMED else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Now:
    """Facts to judge a node by."""

    is_over: bool
    never_trained: bool
    is_simulated: bool
    silence: str
    """Why nothing new is recorded; empty while the run goes on."""
    own: tuple[NodeState, str] | None
    """How the member is whose own folder this is, and why, where its process or the time since its last record tells."""
    member: str | None
    """Whose own folder this is, where it has no reports of others."""
    heard_in: Mapping[str, int]
    left: Mapping[str, str]
    paused: Mapping[str, str]
    unstarted: frozenset[str]
    newest: Mapping[str, Row]
    dead: Mapping[str, str]
    neighbours: Mapping[str, frozenset[str]]
    skippers: Mapping[str, set[str]]
    since: Mapping[tuple[str, str], int]
    stale_s: Mapping[str, float]

    def health(self, name: str) -> NodeHealth:
        row = self.newest.get(name)
        state, why = self._judged(name, row)
        age_s = (row or {}).get("age_s")
        heard = f" Last heard of {duration(age_s)} ago." if age_s is not None and age_s >= _AGE_WORTH_SAYING_S else ""
        return NodeHealth(state=state, why=why + heard, round=self._round(name))

    def _judged(self, name: str, row: Row | None) -> tuple[NodeState, str]:  # noqa: PLR0911  # a line for each state
        died = f"It died {self._after(row)}{f' ({self.dead[name]})' if self.dead.get(name) else ''} and has not come back"
        if self.is_over:
            return self._at_the_end(name, row, died)
        if (said := self._said(name, row)) is not None:
            return said
        if name in self.dead:
            return "lost", f"{died} yet."
        if self.own is not None and name == self.member:
            return self.own
        if skippers := self.skippers.get(name, set()):
            return self._missed(name, row, skippers)
        if self.silence:
            return "unknown", f"{self.silence[0].upper()}{self.silence[1:]}."
        if row is None:
            return "unknown", self._no_report(name)
        if row.get("age_s") is not None and row["age_s"] > self.stale_s[name]:
            return "unknown", "Its newest record is too old to say how it is; nobody is known to go on without it."
        return "well", "Nobody goes on without it."

    def _said(self, name: str, row: Row | None) -> tuple[NodeState, str] | None:
        """How a node is by what it said last of itself; None where that is nothing but its rounds."""
        word = (row or {}).get("state")
        if word == "finished":
            return "finished", "It has finished."
        if name in self.left:
            return "finished", f"{self.left[name]} has heard that it finished."
        if name in self.paused or word == "paused":
            return "paused", f"{self.paused.get(name, 'It said that it pauses')}, and is not back yet."
        if name in self.unstarted:
            return "has not trained", "The network started without it, and it has not come yet."
        return None

    def _at_the_end(self, name: str, row: Row | None, died: str) -> tuple[NodeState, str]:  # noqa: PLR0911  # a line for each state
        if self.never_trained and self.member in (None, name):
            return "has not trained", "Too few members were there at the start."
        if name in self.dead:
            return "lost", f"{died}; the run has ended without it."
        if name in self.left:
            return "finished", f"{self.left[name]} has heard that it finished."
        if self.member is not None and name != self.member:
            return self._heard_at_the_end(name, self.member)
        if name in self.paused:
            return "paused", f"{self.paused[name]}; the run has ended without it."
        last = max((int(other["round"]) for other in self.newest.values()), default=-1)
        if row is None and self.newest and not self.is_simulated:
            return "unknown", NO_REPORT
        if row is not None and row["round"] < last and self._is_given_up(name, self.skippers.get(name, set())):
            return "lost", f"Its last record is of round {row['round']}; the run has ended without it, after round {last}."
        return "finished", "The run has ended."

    def _heard_at_the_end(self, name: str, member: str) -> tuple[NodeState, str]:
        """How another member is in the records of one that has ended."""
        last = self._round(member)
        if last is not None and self.heard_in.get(name, -1) >= last:
            return "finished", f"{member} had its record of the last round."
        if name in self.paused:
            return "paused", f"{self.paused[name]}; the run has ended without it."
        if self._is_given_up(name, self.skippers.get(name, set())):
            return "lost", f"{self._gone_on(name)}; the run has ended without it."
        return "unknown", self._no_report(name)

    def _missed(self, name: str, row: Row | None, skippers: set[str]) -> tuple[NodeState, str]:
        if self.member is not None and row is None:
            doubt = ""
            around = self.neighbours.get(self.member, frozenset())
            if len(around) > 1 and all(self.member in self.skippers.get(other, ()) for other in around):
                doubt = f" So it does without all its neighbours: the connection of {self.member} itself may be down."
            return "lost", f"{self._gone_on(name)}.{doubt}"
        if self._is_given_up(name, skippers):
            return "lost", f"Every neighbour that can tell goes on without it {self._after(row)}."
        who = sorted(skippers)
        named = ", ".join(who[:_NAMED]) + (f" and {len(who) - _NAMED} more" if len(who) > _NAMED else "")
        return "late", f"In the newest round {named} went on without it."

    def _gone_on(self, name: str) -> str:
        by = min(self.skippers[name])
        return f"{by} goes on without it since round {self.since[by, name]}"

    def _after(self, row: Row | None) -> str:
        return "before its first round" if row is None else f"after round {row['round']}"

    def _no_report(self, name: str) -> str:
        if name == self.member:
            return "It has not recorded a round yet."
        heard = f" {self.member} last had its record of round {self.heard_in[name]}." if name in self.heard_in and self.member else ""
        return NO_REPORT + heard

    def _is_given_up(self, name: str, skippers: set[str]) -> bool:
        """Whether all go on without it that are themselves at work: who is skipped and no further than this node may be gone as well."""
        if not skippers:
            return False
        own = self._round(name)
        ahead = {other for other in self.neighbours.get(name, frozenset()) | skippers if own is None or (self._round(other) or 0) > own}
        at_work = {other for other in self.neighbours.get(name, frozenset()) if other in self.newest and other not in self.skippers}
        return skippers <= ahead and (ahead & self.newest.keys() | at_work) - self.dead.keys() <= skippers

    def _round(self, name: str) -> int | None:
        return int(self.newest[name]["round"]) if name in self.newest else None
