"""How every node and every link is now: from the records alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from p2pfl.records import Row, RunRecords

NodeState = Literal["well", "late", "lost", "finished"]
EdgeState = Literal["well", "slow", "lost"]
Ends = frozenset[str]
"""The two nodes of a link."""

_AGE_WORTH_SAYING_S = 10.0
_NAMED = 3


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
    """How one link is, both directions together."""

    state: EdgeState
    why: str
    """A sentence."""
    missed: int
    """How many messages over it came too late or not at all."""
    share: float
    """Of the rounds that its ends have recorded, 0 to 1."""


def link_name(ends: Ends) -> str:
    """The two nodes, in the order of their names."""
    return " - ".join(sorted(ends))


def node_health(run: RunRecords) -> dict[str, NodeHealth]:
    """Every node of the graph and of the records, in the order in which the graph has them.

    "lost": it has died and recorded nothing since, or every neighbour that can tell goes on without it and is ahead of it.
    "late": some neighbour went on without it in its newest round.
    "finished": the run has ended, or it says so of itself.
    """
    newest = _newest(run.nodes)
    dead = _dead(run, newest)
    now = _Now(
        is_over=run.summary is not None,
        newest=newest,
        dead=dead,
        neighbours=_neighbours(run),
        skippers=_skippers(newest, dead),
    )
    names = dict.fromkeys([*((run.topology or {}).get("nodes") or ()), *newest, *now.skippers, *dead])
    return {name: now.health(name) for name in names}


def edge_health(run: RunRecords, nodes: Mapping[str, NodeHealth] | None = None) -> dict[Ends, EdgeHealth]:
    """Every link of the graph, and those over which a message was missed where the graph changes.

    "lost": one end went on without the other in its newest round, or is lost itself. Of a run that has ended none is lost.
    "slow": messages over it were missed before.

    Args:
        run: what there is.
        nodes: what `node_health` says of it, for one who knows.
    """
    known = node_health(run) if nodes is None else nodes
    newest = _newest(run.nodes)
    rounds = Counter(str(row["node"]) for row in run.nodes)
    missed = Counter(frozenset((str(row["node"]), str(other))) for row in run.nodes for other in row.get("skipped") or ())
    skippers = _skippers(newest, _dead(run, newest)) if run.summary is None else {}
    cut = {
        frozenset((by, other)): f"{by} went on without {other} in round {newest[by]['round']}."
        for other, others in skippers.items()
        for by in others
    }
    found = {}
    for ends in dict.fromkeys([*_links(run), *missed]):
        recorded = sum(rounds[end] for end in ends)
        gone = sorted(end for end in ends if end in known and known[end].state == "lost")
        times = missed[ends]
        share = min(1.0, times / recorded) if recorded else 0.0
        before = f"{times} of {recorded} messages over it were missed."
        if gone:
            found[ends] = EdgeHealth(state="lost", why=f"{' and '.join(gone)} cannot be reached.", missed=times, share=share)
        elif ends in cut:
            found[ends] = EdgeHealth(state="lost", why=cut[ends], missed=times, share=share)
        elif times:
            found[ends] = EdgeHealth(state="slow", why=before, missed=times, share=share)
        else:
            found[ends] = EdgeHealth(state="well", why="Every message came in time.", missed=0, share=0.0)
    return found


def slowest_edge(edges: Mapping[Ends, EdgeHealth]) -> Ends | None:
    """The link that slows the network most: the one over which most messages were missed, of several the first by name."""
    slow = [ends for ends, edge in edges.items() if edge.missed]
    return min(slow, key=lambda ends: (-edges[ends].missed, link_name(ends)), default=None)


def in_need(edges: Mapping[Ends, EdgeHealth]) -> list[tuple[Ends, EdgeHealth]]:
    """Links that are lost, then those that are slow, each with the most missed first."""
    bad = [(ends, edge) for ends, edge in edges.items() if edge.state != "well"]
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


def _neighbours(run: RunRecords) -> dict[str, frozenset[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for one, other in map(tuple, _links(run)):
        found[one].add(other)
        found[other].add(one)
    return {name: frozenset(others) for name, others in found.items()}


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
    last = {str(event["node"]): event for event in run.events if event["event"] == "died"}
    return {
        name: str(event.get("detail") or "")
        for name, event in last.items()
        if name not in newest or newest[name]["round"] <= (event["round"] or 0)
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Now:
    """What there is to judge a node by."""

    is_over: bool
    newest: Mapping[str, Row]
    dead: Mapping[str, str]
    neighbours: Mapping[str, frozenset[str]]
    skippers: Mapping[str, set[str]]

    def health(self, name: str) -> NodeHealth:
        row = self.newest.get(name)
        state, why = self._judged(name, row)
        age_s = (row or {}).get("age_s")
        heard = f" Last heard of {age_s:.0f} s ago." if age_s is not None and age_s >= _AGE_WORTH_SAYING_S else ""
        return NodeHealth(state=state, why=why + heard, round=self._round(name))

    def _judged(self, name: str, row: Row | None) -> tuple[NodeState, str]:
        if self.is_over:
            return "finished", "The run has ended."
        if row is not None and row.get("state") == "finished":
            return "finished", "It has finished."
        since = "before its first round" if row is None else f"after round {row['round']}"
        if name in self.dead:
            detail = f" ({self.dead[name]})" if self.dead[name] else ""
            return "lost", f"It died {since}{detail} and has not come back yet."
        skippers = self.skippers.get(name, set())
        if not skippers:
            return "well", "Nobody goes on without it." if row is not None else "Nothing is recorded of it, and nobody goes on without it."
        if self._is_given_up(name, skippers):
            return "lost", f"Every neighbour that can tell goes on without it {since}."
        who = sorted(skippers)
        named = ", ".join(who[:_NAMED]) + (f" and {len(who) - _NAMED} more" if len(who) > _NAMED else "")
        return "late", f"In the newest round {named} went on without it."

    def _is_given_up(self, name: str, skippers: set[str]) -> bool:
        """Whether all go on without it that are themselves at work: who is skipped and no further than this node may be gone as well."""
        own = self._round(name)
        ahead = {other for other in self.neighbours.get(name, frozenset()) | skippers if own is None or (self._round(other) or 0) > own}
        at_work = {other for other in self.neighbours.get(name, frozenset()) if other in self.newest and other not in self.skippers}
        return skippers <= ahead and (ahead & self.newest.keys() | at_work) - self.dead.keys() <= skippers

    def _round(self, name: str) -> int | None:
        return int(self.newest[name]["round"]) if name in self.newest else None
