"""What pages about runs have in common: the text and the tables of a run, as HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from p2pfl.inspector.health import EdgeHealth, Ends, NodeHealth, in_need, link_name, slowest_edge
from p2pfl.inspector.markup import MAX_ROWS, Cell, note, table
from p2pfl.inspector.verdict import mean_scores
from p2pfl.records import RunRecords, primary_metric

_ENDINGS = {"rounds": "ended at its last round"}
_EVERYDAY = ("started", "greeted", "skipped")


def facts(run: RunRecords) -> str:
    """One line: what it is, how large, how it ended."""
    summary = run.summary or {}
    nodes = summary.get("nodes") or len((run.topology or {}).get("nodes") or ())
    topology = (run.experiment.get("topology") or {}).get("name")
    sent = summary.get("bytes_sent")
    found = [
        str(summary.get("engine") or run.environment.get("engine") or "unknown engine"),
        f"{nodes:,} nodes" + (f", {topology}" if topology else ""),
        f"{len(run.rounds):,} rounds",
        _ENDINGS.get(ending, ending) if (ending := summary.get("stop_reason")) else "still running, or interrupted",
        f"{sent:,} bytes sent" if sent is not None else "",
        f"began {run.environment['started']}" if run.environment.get("started") else "",
    ]
    return " · ".join(fact for fact in found if fact)


def events(run: RunRecords) -> str:
    """What was out of the ordinary; empty where nothing was."""
    told = [event for event in run.events if event["event"] not in _EVERYDAY][-MAX_ROWS:]
    rows = [
        [
            Cell("-" if event["round"] is None else str(event["round"]), "number"),
            *(Cell(str(event.get(key) or "")) for key in ("event", "node", "detail")),
        ]
        for event in told
    ]
    return table(["round", "event", "node", "detail"], rows, about="events") if rows else ""


def node_states(nodes: Mapping[str, NodeHealth]) -> str:
    """How every node is now, those in need first."""
    order = {"lost": 0, "late": 1, "well": 2, "finished": 3}
    ranked = sorted(nodes.items(), key=lambda pair: order[pair[1].state])
    rows = [
        [
            Cell(name),
            Cell(health.state, f"state {health.state}"),
            Cell("-" if health.round is None else str(health.round), "number"),
            Cell(health.why),
        ]
        for name, health in ranked[:MAX_ROWS]
    ]
    more = note(f"{len(ranked) - MAX_ROWS} more, all of them {ranked[MAX_ROWS][1].state} or better.") if len(ranked) > MAX_ROWS else ""
    return table(["node", "is", "newest round", "why"], rows, about="how every node is") + more if rows else ""


def link_states(edges: Mapping[Ends, EdgeHealth]) -> str:
    """Which links are lost or slow, and which one slows the network most."""
    worst = slowest_edge(edges)
    bad = in_need(edges)
    if not bad:
        return note("Every message came in time.") if edges else ""
    rows = [
        [
            Cell(link_name(ends)),
            Cell(edge.state, f"state {edge.state}"),
            Cell(str(edge.missed), "number"),
            Cell(f"{edge.share:.0%}", "number"),
            Cell(edge.why),
        ]
        for ends, edge in bad[:MAX_ROWS]
    ]
    told = note(f"The link that slows the network most is {link_name(worst)}.") if worst is not None else ""
    more = note(f"{len(bad) - MAX_ROWS} more.") if len(bad) > MAX_ROWS else ""
    return told + table(["link", "is", "missed", "share", "why"], rows, about="links that are lost or slow") + more


def comparison(runs: Mapping[str, RunRecords]) -> str:
    """Several runs beside each other: how long each took to agree, what it cost, how good it became."""
    rows = []
    for name, run in runs.items():
        summary = run.summary or {}
        ending = summary.get("stop_reason")
        metric = primary_metric(summary["metrics"]) if summary.get("metrics") else None
        mean = mean_scores(summary, metric).network if metric is not None else None
        sent = summary.get("bytes_sent")
        total = sent if sent is not None else sum(row.get("bytes_sent") or 0 for row in run.network or run.rounds)
        graph = (run.experiment.get("topology") or {}).get("name") or "its own"
        rows.append(
            [
                Cell(name),
                Cell(str(graph)),
                Cell(f"{summary['rounds']:,}" if ending == "converged" else "-", "number"),
                Cell(f"{total:,}", "number"),
                Cell("-" if metric is None or mean is None else f"{metric} {mean:.3f}", "number"),
                Cell(_ENDINGS.get(str(ending), str(ending)) if ending else f"still running, {len(run.rounds):,} rounds so far"),
            ]
        )
    return table(["run", "graph", "rounds to converge", "bytes sent", "mean over the nodes", "ending"], rows, about="the runs compared")


def went_without(run: RunRecords, name: str) -> str:
    """Whom one node did not wait for, and who did not wait for it."""
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row in run.nodes:
        for other in row.get("skipped") or ():
            if name in (row["node"], other):
                found[str(row["node"]), str(other)].append(row["round"])
    rows = [
        [Cell(by), Cell(other), Cell(str(len(rounds)), "number"), Cell(f"{min(rounds)} to {max(rounds)}")]
        for (by, other), rounds in sorted(found.items(), key=lambda pair: -len(pair[1]))[:MAX_ROWS]
    ]
    if not rows:
        return note(f"{name} never went on without a neighbour, and none without it.")
    return table(["this node", "went on without", "times", "rounds"], rows, about=f"who went on without whom at {name}")
