"""How every link of a run is now: from the records alone. A state that no record tells is unknown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from p2pfl.inspector.health import NodeHealth, dead_nodes, newest_rows, node_health, skippers_of
from p2pfl.inspector.outages import Outages, outages
from p2pfl.inspector.run_state import is_complete, names_text
from p2pfl.runs.records import RunRecords

EdgeState = Literal["well", "slow", "lost", "paused", "unknown"]
Ends = frozenset[str]
"""The two nodes of a link."""
WINDOW = 50
"""Newest rounds over which a link's missed messages are counted."""
SLOW_FROM = 0.02
"""Fraction of a link's messages in the window above which it is slow."""
_EXCEPT = "except while"
_NAMED = 3


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


def edge_health(run: RunRecords, nodes: Mapping[str, NodeHealth] | None = None, away: Outages | None = None) -> dict[Ends, EdgeHealth]:
    """Every link of the graph, and those over which a message was missed where the graph changes.

    "lost": one end went on without the other in its newest round, or is lost itself. Of a run that has ended none is lost.
    "paused": one end has paused.
    "slow": more than 2 % of its messages were missed in the newest 50 rounds.
    "unknown": an end of it is unknown, or neither end has a record.

    *nodes* is the answer of `node_health` and *away* that of `outages`, if at hand.
    """
    known = node_health(run) if nodes is None else nodes
    explained = outages(run) if away is None else away
    newest = newest_rows(run.nodes)
    last = max((int(row["round"]) for row in newest.values()), default=-1)
    begin = max(last - WINDOW + 1, min((int(row["round"]) for row in run.nodes), default=0))
    window = f"rounds {begin}-{last}" if last > begin else f"round {last}"
    due = Counter(str(row["node"]) for row in run.nodes if row["round"] >= begin)  # one message from each of its neighbours
    missed, ever, excused = _missed(run, explained, begin)
    skippers = skippers_of(newest, dead_nodes(run, newest)) if run.summary is None else {}
    cut: dict[Ends, tuple[EdgeState, str]] = {
        frozenset((by, other)): ("lost", f"{by} went on without {other} in round {newest[by]['round']}.")
        for other, others in skippers.items()
        for by in others
    }
    spent: defaultdict[str, list[str]] = defaultdict(list)
    for outage in explained.found:
        spent[outage.node].append(outage.rounds)
    absent = {node: names_text(texts, _NAMED) + (" times" if len(texts) > _NAMED else "") for node, texts in spent.items()}
    every = "Every message came in time" if is_complete(run) else f"No missed message is recorded in {window}"
    found = {}
    for ends in dict.fromkeys([*_links(run), *ever, *excused]):
        states = {end: known[end].state if end in known else "unknown" for end in sorted(ends)}
        expected = max(sum(due[end] for end in ends) - excused[ends], missed[ends])
        without = " and ".join(f"{end} was away in {absent[end]}" for end in states if end in absent)
        state, why = (
            _by_its_ends(states, is_over=run.summary is not None)
            or cut.get(ends)
            or _by_its_messages(states, missed[ends], expected, ever[ends], window, without, every)
        )
        found[ends] = EdgeHealth(state=state, why=why, missed=missed[ends], expected=expected, missed_ever=ever[ends])
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


def _links(run: RunRecords) -> list[Ends]:
    graph = run.topology or {}
    names = graph.get("nodes") or []
    return list(dict.fromkeys(frozenset((names[i], names[j])) for i, j, _ in graph.get("edges") or () if i != j))


def _missed(run: RunRecords, explained: Outages, begin: int) -> tuple[Counter[Ends], Counter[Ends], Counter[Ends]]:
    """Messages missed over each link from a round on, in all rounds, and from that round on because a node was away."""
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
    return missed, ever, excused


def _by_its_ends(states: Mapping[str, str], *, is_over: bool) -> tuple[EdgeState, str] | None:
    """How a link is because of the nodes that it joins; None where they exchange models."""
    gone, paused, absent = ([end for end in states if states[end] == state] for state in ("lost", "paused", "has not trained"))
    if gone and not is_over:
        return "lost", f"{' and '.join(gone)} cannot be reached."
    if paused and not is_over:
        return "paused", f"{' and '.join(paused)} {'has' if len(paused) == 1 else 'have'} paused."
    if absent:
        return "unknown", f"{' and '.join(absent)} {'has' if len(absent) == 1 else 'have'} not started."
    return None


def _by_its_messages(
    states: Mapping[str, str], missed: int, expected: int, ever: int, window: str, without: str, every: str
) -> tuple[EdgeState, str]:
    """How a link is of which nobody says that it is cut."""
    unsure = [end for end in states if states[end] == "unknown"]
    but = f" Not counted: {without}." if without else ""
    counted = f"{missed} of {expected} messages over it were missed in {window}"
    if missed > SLOW_FROM * expected:
        return "slow", f"{counted}.{but}"
    if unsure:
        return "unknown", f"No report here from {' and '.join(unsure)}."
    if not expected:
        return "unknown", "No report of this link here."
    if ever:
        return "well", f"{counted}, {ever} in all.{but}"
    return "well", f"{every}{f', {_EXCEPT} {without}' if without else ''}."
