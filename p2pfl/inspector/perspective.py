"""Perspective of a page: records of all nodes, or of one institution and what it heard of the others."""

from __future__ import annotations

from collections import defaultdict

from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

NO_REPORT = "No report from this site here."


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


def unreported(run: RunRecords) -> list[str]:
    """Nodes of the graph of which no row is here."""
    recorded = {str(row["node"]) for row in run.nodes}
    return [name for name in (run.topology or {}).get("nodes") or () if name not in recorded]


def is_complete(run: RunRecords) -> bool:
    """Whether there are records of all nodes, so that what is not recorded did not happen."""
    names = (run.topology or {}).get("nodes") or ()
    return member_of(run) is None and not is_asked(run) and bool(run.nodes) and bool(names) and not unreported(run)


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
