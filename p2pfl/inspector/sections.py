"""Text and tables of a run as HTML, for the report and the dashboard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from p2pfl.inspector.bottleneck import bottleneck
from p2pfl.inspector.cells import seconds_text
from p2pfl.inspector.health import NodeHealth
from p2pfl.inspector.link_health import WINDOW, EdgeHealth, Ends, in_need, link_name, links_in_order, slowest_link_sentence
from p2pfl.inspector.markup import MAX_ROWS, Cell, listed, note, table
from p2pfl.inspector.outages import incidents, no_incidents, time_column
from p2pfl.inspector.run_state import clock_time, is_complete, member_of, run_state
from p2pfl.inspector.utilisation import UTILISATION_PARTS, busiest_first, utilisation
from p2pfl.inspector.verdict import mean_scores, percent
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import primary_metric


def facts(run: RunRecords) -> str:
    """One line: what it is, how large, whether it goes on or how it ended."""
    summary = run.summary or {}
    nodes = summary.get("nodes") or len((run.topology or {}).get("nodes") or ())
    topology = (run.experiment.get("topology") or {}).get("name")
    sent = summary.get("bytes_sent")
    member = member_of(run)
    found = [
        str(summary.get("engine") or run.environment.get("engine") or "unknown engine"),
        f"{nodes:,} nodes" + (f", {topology}" if topology else ""),
        f"{len(run.rounds):,} rounds{f' at {member}' if member is not None else ''}",
        run_state(run).sentence,
        f"{sent:,} bytes sent" if sent is not None else "",
        f"began {clock_time(run.environment['started'])}" if run.environment.get("started") else "",
    ]
    return " · ".join(fact for fact in found if fact)


def events(run: RunRecords) -> str:
    """Events that were out of the ordinary, or a sentence about whether any are known."""
    told = incidents(run)[-MAX_ROWS:]
    rows: list[list[Cell]] = [
        [
            (at, "number"),
            ("-" if event["round"] is None else str(event["round"]), "number"),
            *(str(event.get(key) or "") for key in ("event", "node", "detail")),
        ]
        for at, event in zip(time_column(told), told, strict=True)
    ]
    if not rows:
        return note(no_incidents(run))
    own = member_of(run)
    whose = note(f"As {own} has recorded and heard. Events of other sites are kept there.") if own is not None else ""
    return table(["time (UTC)", "round", "event", "node", "detail"], rows, about="events") + whose


def time_spent(run: RunRecords) -> str:
    """Tell what fraction of a round each node trained, waited, mixed and wrote; and who costs most, where anybody does."""
    found = busiest_first(utilisation(run))
    if not found:
        return ""
    rows: list[list[Cell]] = [
        [name, (seconds_text(own.round_s), "number"), *(("-" if each is None else percent(each), "number") for each in own.cells())]
        for name, own in found[:MAX_ROWS]
    ]
    costs = bottleneck(run)
    told = listed(costs.sentences) if costs is not None else ""
    about = note(f"Fractions of the newest {WINDOW} rounds. Sending is part of waiting. Who waits least stands first.")
    return told + table(["node", "a round", *UTILISATION_PARTS], rows, about="fractions of a round") + about


def node_states(nodes: Mapping[str, NodeHealth]) -> str:
    """How every node is now, those in need first."""
    order = {"lost": 0, "late": 1, "paused": 2, "unknown": 3, "well": 4, "finished": 5, "has not trained": 6}
    ranked = sorted(nodes.items(), key=lambda pair: order[pair[1].state])
    alike: defaultdict[object, list[str]] = defaultdict(list)
    for name, health in ranked[:MAX_ROWS]:
        alike[(health.why, health.round) if health.state == "unknown" else name].append(name)
    rows: list[list[Cell]] = [
        [
            ", ".join(names),
            (nodes[names[0]].state, f"state {nodes[names[0]].state}"),
            ("-" if nodes[names[0]].round is None else str(nodes[names[0]].round), "number"),
            nodes[names[0]].why,
        ]
        for names in alike.values()
    ]
    more = note(f"{len(ranked) - MAX_ROWS} more, the first of them {ranked[MAX_ROWS][1].state}.") if len(ranked) > MAX_ROWS else ""
    return table(["node", "is", "newest round", "why"], rows, about="how every node is") + more if rows else ""


def link_states(run: RunRecords, edges: Mapping[Ends, EdgeHealth]) -> str:
    """Which links are lost or slow, and which is the slowest."""
    bad = in_need(edges)
    if not bad:
        return note(links_in_order(run, edges)) if edges else ""
    rows: list[list[Cell]] = [
        [
            link_name(ends),
            (edge.state, f"state {edge.state}"),
            (f"{edge.missed} ({percent(edge.fraction)})" if edge.missed else "-", "number"),
            edge.why,
        ]
        for ends, edge in bad[:MAX_ROWS]
    ]
    slowest = slowest_link_sentence(edges)
    told = note(f"{slowest} Missed: in the last {WINDOW} rounds.".strip())
    more = note(f"{len(bad) - MAX_ROWS} more.") if len(bad) > MAX_ROWS else ""
    return told + table(["link", "is", "missed", "why"], rows, about="links that are lost or slow") + more


def comparison(runs: Mapping[str, RunRecords]) -> str:
    """Several runs beside each other: how long each took to agree, what it cost, how good it became."""
    rows: list[list[Cell]] = []
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
                name,
                str(graph),
                (f"{summary['rounds']:,}" if ending == "converged" else "-", "number"),
                (f"{total:,}", "number"),
                ("-" if metric is None or mean is None else f"{metric} {mean:.3f}", "number"),
                run_state(run).sentence + ("" if ending else f", {len(run.rounds):,} rounds so far"),
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
    if not found:
        if is_complete(run):
            return note(f"{name} never went on without a neighbour, and none without it.")
        return note(f"No record here says that {name} went on without a neighbour, or a neighbour without it.")
    skips = [(by, other, rounds) for (by, other), rounds in sorted(found.items(), key=lambda pair: -len(pair[1]))]
    return skip_table(skips, f"who went on without whom at {name}") + note("Counted over all rounds that are recorded here.")


def skip_table(skips: Sequence[tuple[str, str, Sequence[int]]], about: str) -> str:
    """Table of who went on without whom, and in which rounds."""
    rows: list[list[Cell]] = [
        [by, other, (str(len(rounds)), "number"), f"{min(rounds)} to {max(rounds)}"] for by, other, rounds in skips[:MAX_ROWS]
    ]
    return table(["this node", "went on without", "times", "rounds"], rows, about=about)
