"""A run as one page of text, for a terminal of 80 columns or a pipe.

Names and details come from other machines: they are printed as they are and never read as markup or as control sequences.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from p2pfl.errors import TransportError
from p2pfl.inspector.bottleneck import bottleneck
from p2pfl.inspector.cells import MAX_NODES, bytes_text, hospital_table, name_cell, number_text, ranges_text, seconds_text, table_of
from p2pfl.inspector.chart import log_chart
from p2pfl.inspector.convergence import BASES, CONSENSUS, DISAGREEMENT, Convergence, Reached, convergence, course_of
from p2pfl.inspector.gaps import Gap, gaps
from p2pfl.inspector.health import NodeHealth, node_health
from p2pfl.inspector.link_health import WINDOW, edge_health, in_need, link_name, links_in_order, slowest_link_sentence
from p2pfl.inspector.outages import incidents, no_incidents, time_column
from p2pfl.inspector.run_state import banner, clock_text, count_text, duration, has_metrics, member_of, names_text, printable, run_state
from p2pfl.inspector.utilisation import UTILISATION_PARTS, busiest_first, utilisation
from p2pfl.inspector.verdict import COST_PARTS, percent, round_costs, verdict
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import primary_metric
from p2pfl.runs.text import Row

_MAX_WIDTH = 100
_MAX_ROWS = 12
_STYLES = {
    "well": "green",
    "late": "yellow",
    "paused": "yellow",
    "slow": "yellow",
    "lost": "bold red",
    "unknown": "dim",
    "finished": "cyan",
    "has not trained": "yellow",
}
_MAX_GAPS = 3
_MAX_NAMED = 8


def print_page(run: RunRecords, console: Console, goals: Sequence[Reached] = ()) -> None:
    """Print the page; colours only where the console has them, ASCII only where it has nothing else."""
    console.print(page(run, width=min(console.width, _MAX_WIDTH), ascii_only=console.options.ascii_only, goals=goals))


def follow(look: Callable[[], RunRecords], console: Console, *, every_s: float, pause: Callable[[float], object]) -> RunRecords:
    """Show a run's page anew and anew until the run has ended; what it comes to stands on top, where no screen is too small for it.

    Anything but a terminal is left alone until the end. The answer is the run as it has ended, or as the node that is asked said last.

    Raises:
        P2PFLError: what `look` raises, but for a node that has answered once and is gone.
    """
    run = look()
    with Live(console=console, auto_refresh=False, screen=True) if console.is_terminal else nullcontext() as live:
        while run.summary is None:
            if live is not None:
                width, ascii_only = min(console.width, _MAX_WIDTH), console.options.ascii_only
                live.update(page(run, width=width, ascii_only=ascii_only, is_live=True), refresh=True)
            pause(every_s)
            try:
                run = look()
            except TransportError:
                break
    return run


def page(
    run: RunRecords, *, width: int = 80, ascii_only: bool = False, goals: Sequence[Reached] = (), is_live: bool = False
) -> RenderableType:
    """Header, convergence, metrics, skipped neighbours, events, cost, and what it comes to: at the end, or, of a live page, on top."""
    course, nodes = convergence(run), node_health(run)
    in_short = _section("In short", [Text(printable(sentence)) for sentence in verdict(run, course)])
    parts: list[RenderableType] = [
        *_header(run),
        *(_section("Nodes now", _nodes(nodes)) if is_live else ()),
        *(in_short if is_live else ()),
        *_section("Agreement", _agreement(run, course, width, ascii_only)),
        *_section("Seconds on the network's clock", _simulated(run, course)),
        *_section("Reached", [_reached(goals)] if goals else []),
        *_section("Hospital by hospital", [hospital_table(run.summary)] if run.summary and has_metrics(run.summary) else []),
        *_section("Nodes, as this one has heard of them", _heard_of(run, nodes)),
        *(() if is_live else _section("Nodes now" if run.summary is None else "Nodes", _nodes(nodes))),
        *_section("Furthest from their neighbours", _slowest(run, course)),
        *_section("Links", _links(run, nodes)),
        *_section("Skipped neighbours, in all rounds recorded here", _skipped(course)),
        *_section("Events", _events(run)),
        *_section("Cost of a round", _cost(run)),
        *_section("Where the time goes", _where_time_goes(run)),
        *(() if is_live else in_short),
    ]
    return Group(*parts)


def _header(run: RunRecords) -> list[RenderableType]:
    summary = run.summary or {}
    name = str(run.experiment.get("name", "run"))
    engine = summary.get("engine") or run.environment.get("engine") or "unknown engine"
    state = run_state(run)
    colours = {"running": "cyan", "unknown": "yellow", "paused": "yellow", "silent": "bold red", "departed": "bold red"}
    endings = {"converged": "green", "rounds": "yellow"}
    colour = colours.get(state.kind) or endings.get(str(summary.get("stop_reason")), "red")
    member = member_of(run)
    mixing_only = sum(row["kind"] == "settle" for row in run.rounds)
    topology = (run.experiment.get("topology") or {}).get("name")
    nodes = summary.get("nodes") or len((run.topology or {}).get("nodes") or ()) or (run.rounds[-1].get("nodes") if run.rounds else None)
    facts = [
        str(engine),
        f"{count_text(nodes, 'node')}{f', {topology}' if topology else ''}" if nodes else "",
        count_text(len(run.rounds), "round")
        + (f" at {member}" if member is not None else "")
        + (f", {mixing_only} of them mixing only" if mixing_only else ""),
        seconds_text(total) if (total := (summary.get("seconds") or {}).get("total")) is not None else "",
        f"{clock_text(clock)} s on the network's clock" if (clock := (summary.get("seconds") or {}).get("simulated")) is not None else "",
    ]
    return [
        Text.assemble((printable(name), "bold"), ": ", (printable(state.sentence), f"bold {colour}")),
        Text(printable("; ".join(fact for fact in facts if fact)), style="dim"),
        *([Text(printable(whose))] if (whose := banner(run)) else []),
    ]


def _agreement(run: RunRecords, course: Convergence, width: int, ascii_only: bool) -> list[RenderableType]:
    if not course.rounds:
        return []
    lines: list[RenderableType] = []
    chart = log_chart(course.rounds, course.distance, course.bound, width=width - 2, ascii_only=ascii_only)
    if chart:
        bounded = any(value is not None for value in course.bound)
        sign, dot = ("*", ".") if ascii_only else ("⣀⡠", "·")
        lines += [
            Text("\n".join(chart), no_wrap=True),
            Text(f"{sign} {BASES[course.basis]}{f'   {dot} spectral bound' if bounded else ''}", style="dim"),
            *(Text(printable(sentence), style="dim") for sentence in _gap_sentences(gaps(run, course))),
        ]
    table = Table.grid(padding=(0, 2))
    if course.basis != "after mixing":
        table.add_row(BASES["local"] if course.basis == "local" else DISAGREEMENT, _distance(course))
        if course.relative is not None:
            wanted = f", wanted {course.tolerance:.1e}" if course.tolerance is not None else ""
            table.add_row("of the models' size", f"{course.relative:.2e}{wanted}")
    recorded = (run.summary or {}).get("consensus_distance")
    if (distance := recorded if recorded is not None else course.consensus[-1]) is not None:
        table.add_row(CONSENSUS, f"{distance:.3e}")
    if course.relative_consensus is not None:
        table.add_row("of the models' size", f"{course.relative_consensus:.2e}")
    table.add_row("rate a round, fitted", f"{course.fitted_rate:.6f}" if course.fitted_rate is not None else f"none: {course.fit_missing}")
    table.add_row(
        "rate a round, predicted", f"{course.predicted_rate:.6f}" if course.predicted_rate is not None else "none: no topology.json"
    )
    return [*lines, table]


def _gap_sentences(found: Sequence[Gap]) -> list[str]:
    """Why the line breaks, the longest gaps first."""
    longest = sorted((gap for gap in found if gap.last > gap.first), key=lambda gap: gap.first - gap.last)
    more = [f"{count_text(len(longest) - _MAX_GAPS, 'more gap')}"] if len(longest) > _MAX_GAPS else []
    return [*(f"rounds {gap.first}-{gap.last}: {gap.why}" for gap in longest[:_MAX_GAPS]), *more]


def _distance(course: Convergence) -> str:
    last, low, high = course.distance[-1], course.low[-1], course.high[-1]
    between = f" (bounds {low:.2e} to {high:.2e})" if low is not None and high is not None else ""
    why = "" if any(value is not None for value in course.distance) else " (no models were compared)"
    return f"{'at most ' if course.basis == 'upper bound' else ''}{last:.3e}{between}" if last is not None else f"unknown{why}{between}"


def _simulated(run: RunRecords, course: Convergence) -> list[RenderableType]:
    """Rounds with their seconds, some of many, and what was reached by then."""
    timed = [place for place, second in enumerate(course.simulated_s) if second is not None]
    if not timed:
        return []
    metric = primary_metric(sorted({name for row in run.nodes for name in row.get("metrics") or ()}))
    values = course_of(run, metric) if metric else {}
    known = [place for place in timed if course.rounds[place] in values] or timed
    number = min(len(known), _MAX_ROWS)
    shown = sorted({known[-1 - (i * (len(known) - 1)) // max(number - 1, 1)] for i in range(number)} | {timed[-1]})
    table = table_of("after rounds", "seconds", "distance", *([printable(metric)] if metric else []))
    for place in shown:
        distance, value = course.distance[place], values.get(course.rounds[place])
        cells = [clock_text(course.simulated_s[place]), f"{distance:.2e}" if distance is not None else "-"]
        table.add_row(str(course.rounds[place] + 1), *cells, *([number_text(value)] if metric else []))
    return [table, Text(f"{clock_text((course.simulated_s[timed[-1]] or 0.0) / (course.rounds[timed[-1]] + 1))} a round", style="dim")]


def _reached(goals: Sequence[Reached]) -> Table:
    table = table_of("metric", "wanted", "after rounds", "seconds")
    for goal in goals:
        rounds = str(goal.rounds) if goal.rounds is not None else "never"
        table.add_row(name_cell(goal.what), f"{goal.wanted:g}", rounds, clock_text(goal.simulated_s))
    return table


def _heard_of(run: RunRecords, health: Mapping[str, NodeHealth]) -> list[RenderableType]:
    """Table of everybody's newest row in a node's own view, with its age."""
    newest = {row["node"]: row for row in sorted(run.nodes, key=lambda row: row["round"]) if "age_s" in row}
    if not newest:
        return []
    metric = primary_metric(sorted({name for row in newest.values() for name in row.get("metrics") or ()}))
    table = table_of("node", "is", "round", "heard", "loss", *([printable(metric)] if metric else []), "went on without")
    for name, row in sorted(newest.items())[:MAX_NODES]:
        heard = "-" if row.get("age_s") is None else f"{duration(row['age_s'])} ago"
        cells = [number_text(row.get("loss")), *([number_text((row.get("metrics") or {}).get(metric))] if metric else [])]
        is_now = Text(health[name].state, style=_STYLES[health[name].state])
        table.add_row(name_cell(name), is_now, str(row["round"]), heard, *cells, name_cell(", ".join(row.get("skipped") or ())))
    unheard = [name for name in (run.topology or {}).get("nodes") or () if name not in newest]
    silent = [Text(printable(f"never heard of: {', '.join(unheard)}"), style="red")] if unheard else []
    return [table, *_more(len(newest) - MAX_NODES, "nodes"), *silent]


def _slowest(run: RunRecords, course: Convergence) -> list[RenderableType]:
    """The nodes furthest from their neighbours, where the network has not agreed."""
    if (run.summary or {}).get("stop_reason") == "converged" or len(course.slowest) < 2:  # noqa: PLR2004  # one node holds all of it
        return []
    table = table_of("node", "fraction of disagreement", "own test", "rounds agreed")
    for slow in course.slowest[:5]:
        own = f"{slow.relative:.1e}" if slow.relative is not None else "-"
        table.add_row(
            name_cell(slow.node), percent(slow.fraction), own, str(slow.consensus_counter) if slow.consensus_counter is not None else "-"
        )
    return [table]


def _nodes(nodes: Mapping[str, NodeHealth]) -> list[RenderableType]:
    """How many nodes are in which state, and a line for each that is lost, late or paused."""
    if not nodes:
        return []
    counts = Counter(health.state for health in nodes.values())
    told = Text(", ").join(
        Text(f"{counts[state]:,} {state if counts[state] == 1 else state.replace('has ', 'have ')}", style=_STYLES[state])
        for state in ("lost", "late", "paused", "unknown", "well", "finished", "has not trained")
        if counts[state]
    )
    bad = [(name, health) for name, health in nodes.items() if health.state in ("lost", "late", "paused")]
    bad.sort(key=lambda pair: ("lost", "late", "paused").index(pair[1].state))
    unknown: defaultdict[str, list[str]] = defaultdict(list)
    for name, health in nodes.items():
        if health.state == "unknown":
            unknown[health.why].append(name)
    rows = [(name, health.state, health.why) for name, health in bad]
    rows += [(names_text(names, _MAX_NAMED), "unknown", why) for why, names in unknown.items()]
    if not rows:
        return [told]
    table = table_of("node", "is", "why")
    for name, state, why in rows[:_MAX_ROWS]:
        table.add_row(name_cell(name), Text(state, style=_STYLES[state]), name_cell(why))
    return [told, table, *_more(len(rows) - _MAX_ROWS, "rows of nodes that are not known to be well")]


def _links(run: RunRecords, nodes: Mapping[str, NodeHealth]) -> list[RenderableType]:
    edges = edge_health(run, nodes)
    bad = in_need(edges)
    if not bad:
        said = links_in_order(run, edges)
        return [Text(printable(said))] if said else []
    table = table_of("link", "is", "missed", "why")
    for ends, edge in bad[:_MAX_ROWS]:
        table.add_row(
            name_cell(link_name(ends)),
            Text(edge.state, style=_STYLES[edge.state]),
            f"{edge.missed} ({percent(edge.fraction)})" if edge.missed else "-",
            name_cell(edge.why),
        )
    slowest = slowest_link_sentence(edges)
    window = Text(f"missed: in the last {WINDOW} rounds", style="dim")
    return [table, *_more(len(bad) - _MAX_ROWS, "links in nodes.jsonl"), window, *([Text(printable(slowest))] if slowest else [])]


def _skipped(course: Convergence) -> list[RenderableType]:
    if not course.skipped:
        return []
    table = table_of("node", "skipped by", "times", "rounds")
    for skip in course.skipped[:_MAX_ROWS]:
        table.add_row(name_cell(skip.node), name_cell(skip.by), str(len(skip.rounds)), Text(ranges_text(skip.rounds)))
    return [table, *_more(len(course.skipped) - _MAX_ROWS, "pairs in nodes.jsonl")]


def _events(run: RunRecords) -> list[RenderableType]:
    """Events out of the ordinary; what several nodes report of the same round stands on one line."""
    events = incidents(run)
    groups: defaultdict[tuple[Any, str, str], list[Row]] = defaultdict(list)
    for event in events:
        groups[event["round"], str(event["event"]), str(event.get("detail") or "")].append(event)
    if not groups:
        return [Text(printable(no_incidents(run)))]
    last = list(groups.items())[-_MAX_ROWS:]
    table = table_of("time (UTC)", "round", "event", "nodes", "detail")
    for at, ((number, kind, detail), same) in zip(time_column([same[0] for _, same in last]), last, strict=True):
        who = names_text([str(event["node"]) for event in same])
        table.add_row(name_cell(at), "-" if number is None else str(number), name_cell(kind), name_cell(who), name_cell(detail))
    return [table, *_more(len(groups) - _MAX_ROWS, "earlier ones in events.jsonl")]


def _cost(run: RunRecords) -> list[RenderableType]:
    if not run.rounds:
        return []
    table = table_of("rounds", "number", "bytes", *COST_PARTS)
    for label, number, size_bytes, seconds in round_costs(run):
        table.add_row(label, str(number), bytes_text(size_bytes), *map(seconds_text, seconds))
    sent = (run.summary or {}).get("bytes_sent")
    total = sent if sent is not None else sum(row.get("bytes_sent") or 0 for row in run.rounds)
    return [table, Text(f"{bytes_text(total)} sent in all", style="dim")]


def _where_time_goes(run: RunRecords) -> list[RenderableType]:
    """Fractions of a round in which each node trained, waited, mixed and wrote; and who costs most, where anybody does."""
    found = busiest_first(utilisation(run))
    if not found:
        return []
    table = table_of("node", "a round", *UTILISATION_PARTS)
    for name, own in found[:_MAX_ROWS]:
        table.add_row(name_cell(name), seconds_text(own.round_s), *(percent(each) if each is not None else "-" for each in own.cells()))
    costs = bottleneck(run)
    told = [Text(printable(sentence)) for sentence in costs.sentences] if costs is not None else []
    note = Text(f"fractions of the newest {WINDOW} rounds; sending is part of waiting", style="dim")
    return [table, *_more(len(found) - _MAX_ROWS, "nodes in nodes.jsonl"), note, *told]


def _section(title: str, parts: Sequence[RenderableType]) -> list[RenderableType]:
    """A title and its parts, indented; nothing where there are none."""
    return [Text(), Text(title, style="bold"), *(Padding(part, (0, 0, 0, 2), expand=False) for part in parts)] if parts else []


def _more(hidden: int, what: str) -> list[RenderableType]:
    """A line that says how many rows are not shown; none where all are."""
    return [Text(f"({hidden} more {what})", style="dim")] if hidden > 0 else []
