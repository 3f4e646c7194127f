"""A run as one page of text, for a terminal of 80 columns or a pipe.

Names and details come from other machines: they are printed as they are and never read as markup or as control sequences.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from p2pfl.errors import TransportError
from p2pfl.inspector.chart import log_chart
from p2pfl.inspector.convergence import BASES, CONSENSUS, DISAGREEMENT, Convergence, convergence
from p2pfl.inspector.gaps import Gap, gaps
from p2pfl.inspector.health import WINDOW, NodeHealth, edge_health, in_need, link_name, links_in_order, node_health, slowest_link_sentence
from p2pfl.inspector.incidents import incidents, no_incidents, time_column
from p2pfl.inspector.perspective import banner, member_of
from p2pfl.inspector.reached import Reached, course_of
from p2pfl.inspector.run_state import duration, has_figures, run_state
from p2pfl.inspector.verdict import SAME, Scores, lower_is_better, mean_scores, of_rows, percent, scores, verdict
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import primary_metric
from p2pfl.runs.text import Row

_MAX_WIDTH = 100
_ANY_WIDTH = 10_000
_MAX_NODES = 40
_MAX_ROWS = 12
_METRICS_BESIDE = 2  # what 80 columns hold
_HEADING = 9
_REGULAR = 3  # steps of the same size that are no chance
_MAX_RANGES = 12
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

    Args:
        look: reads the run as it is now.
        console: a terminal; anything else is left alone until the end.
        every_s: seconds between two looks.
        pause: waits so many seconds.

    Returns:
        The run as it has ended, or as the node that is asked said last.

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
    in_short = _section("In short", [Text(_printable(sentence)) for sentence in verdict(run, course)])
    parts: list[RenderableType] = [
        *_header(run),
        *(_section("Nodes now", _nodes(nodes)) if is_live else ()),
        *(in_short if is_live else ()),
        *_section("Agreement", _agreement(run, course, width, ascii_only)),
        *_section("Seconds on the network's clock", _simulated(run, course)),
        *_section("Reached", [_reached(goals)] if goals else []),
        *_section("Hospital by hospital", [hospital_table(run.summary)] if run.summary and has_figures(run.summary) else []),
        *_section("Nodes, as this one has heard of them", _heard_of(run, nodes)),
        *(() if is_live else _section("Nodes now" if run.summary is None else "Nodes", _nodes(nodes))),
        *_section("Furthest from their neighbours", _slowest(run, course)),
        *_section("Links", _links(run, nodes)),
        *_section("Skipped neighbours, in all rounds recorded here", _skipped(course)),
        *_section("Events", _events(run)),
        *_section("Cost of a round", _cost(run)),
        *(() if is_live else in_short),
    ]
    return Group(*parts)


def hospital_table(summary: Mapping[str, Any]) -> RenderableType:
    """Every node's metrics: alone, in the network, with all data pooled, and how much better the network is; the primary metric first.

    A baseline that was not computed has no column. "mean model" is the mean of all models, on all test rows together. Above 40 nodes those
    with the largest and the smallest gain are shown, above 1,000 the mean alone.

    Raises:
        ValueError: the summary has no metrics.
    """
    if not summary["metrics"]:
        raise ValueError("a summary without metrics has no table")
    first = primary_metric(summary["metrics"])
    ordered = sorted(summary["metrics"], key=lambda name: name != first)
    said = [Text(_printable(sentence), style="dim") for sentence in of_rows(summary)]
    return Group(_MetricTables(summary=summary, metrics=ordered), *said)


@dataclass(frozen=True, kw_only=True, slots=True)
class _MetricTables:
    """Every node's metrics, two in a table where that many fit beside each other without folding a name."""

    summary: Mapping[str, Any]
    metrics: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for start in range(0, len(self.metrics), _METRICS_BESIDE):
            pair = self.metrics[start : start + _METRICS_BESIDE]
            together = _metric_table(self.summary, pair)
            fits = console.measure(together, options=options.update(max_width=_ANY_WIDTH)).maximum <= options.max_width
            for place, table in enumerate([together] if fits else [_metric_table(self.summary, [metric]) for metric in pair]):
                yield from (Text(), table) if start + place else (table,)


def _metric_table(summary: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    table = _table("node")
    table.columns[0].vertical = "bottom"  # the metrics' names have several lines
    figures = {metric: scores(summary, metric) for metric in metrics}
    means = {metric: mean_scores(summary, metric) for metric in metrics}
    columns = {metric: _columns([*figures[metric].values(), means[metric]]) for metric in metrics}
    for metric in metrics:
        for number, column in enumerate(columns[metric]):
            named = column.split(" ") if column == "better by" else [column]
            heading = [*_heading(metric), *named] if number == 0 else named
            table.add_column(Text("\n".join(heading)), justify="right", vertical="bottom", no_wrap=True)
    nodes, hidden = _shown_nodes(figures[metrics[0]])
    for node in nodes:
        table.add_row(_name(node), *(cell for m in metrics for cell in _score_cells(figures[m][node], columns[m])))
    if hidden:
        table.add_row(Text(f"({hidden} more)", style="dim"))
    table.add_section()
    table.add_row(Text("mean"), *(cell for m in metrics for cell in _score_cells(means[m], columns[m])))
    of_mean_model = summary.get("mean_model") or {}
    if any(of_mean_model.get(metric) is not None for metric in metrics):
        model_cells = (Text(_number(of_mean_model.get(m)) if column == "network" else "") for m in metrics for column in columns[m])
        table.add_row(Text("mean model"), *model_cells)
    return table


def _heading(metric: str) -> list[str]:
    """A metric's name on lines narrow enough for the column that it stands above, and whether less of it is better."""
    down = ["(lower is", "better)"] if lower_is_better(metric) else []
    return [piece[start : start + _HEADING] for piece in _printable(metric).split("_") for start in range(0, len(piece), _HEADING)] + down


def _columns(figures: Sequence[Scores]) -> list[str]:
    """Which columns hold anything."""
    alone = ["alone"] if any(figure.alone is not None for figure in figures) else []
    pooled = ["pooled"] if any(figure.pooled is not None for figure in figures) else []
    return [*alone, "network", *pooled, *(["better by"] if alone else [])]


def _score_cells(figure: Scores, columns: Sequence[str]) -> list[Text]:
    cells = []
    for column in columns:
        if column != "better by":
            cells.append(Text(_number(getattr(figure, column)), style="bold" if column == "network" else ""))
        elif figure.better_by is None:
            cells.append(Text("-"))
        else:
            style = "green" if figure.better_by >= SAME else "red" if figure.better_by <= -SAME else "dim"
            cells.append(Text(f"{figure.better_by:+.3f}" if style != "dim" else "0.000", style=style))
    return cells


def _shown_nodes(figures: Mapping[str, Scores]) -> tuple[list[str], int]:
    """All nodes, or the two ends of the list by what they gained, in the order of their names."""
    if len(figures) <= _MAX_NODES:
        return list(figures), 0
    ranked = sorted(figures, key=lambda node: figures[node].better_by or 0.0)
    half = _MAX_NODES // 4
    return sorted(ranked[:half] + ranked[-half:]), len(figures) - 2 * half


def _header(run: RunRecords) -> list[RenderableType]:
    summary = run.summary or {}
    name = str(run.experiment.get("name", "run"))
    engine = summary.get("engine") or run.environment.get("engine") or "unknown engine"
    state = run_state(run)
    colours = {"running": "cyan", "unknown": "yellow", "paused": "yellow", "silent": "bold red", "departed": "bold red"}
    endings = {"converged": "green", "rounds": "yellow"}
    colour = colours.get(state.kind) or endings.get(str(summary.get("stop_reason")), "red")
    member = member_of(run)
    settled = sum(row["kind"] == "settle" for row in run.rounds)
    topology = (run.experiment.get("topology") or {}).get("name")
    nodes = summary.get("nodes") or len((run.topology or {}).get("nodes") or ()) or (run.rounds[-1].get("nodes") if run.rounds else None)
    facts = [
        str(engine),
        f"{_count(nodes, 'node')}{f', {topology}' if topology else ''}" if nodes else "",
        _count(len(run.rounds), "round")
        + (f" at {member}" if member is not None else "")
        + (f", {settled} of them settling" if settled else ""),
        _seconds(total) if (total := (summary.get("seconds") or {}).get("total")) is not None else "",
        f"{_clock_seconds(clock)} s on the network's clock"
        if (clock := (summary.get("seconds") or {}).get("simulated")) is not None
        else "",
    ]
    return [
        Text.assemble(
            (_printable(name), "bold"),
            ": ",
            (_printable(state.sentence), f"bold {colour}"),
        ),
        Text(_printable("; ".join(fact for fact in facts if fact)), style="dim"),
        *([Text(_printable(whose))] if (whose := banner(run)) else []),
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
            *(Text(_printable(sentence), style="dim") for sentence in _gap_sentences(gaps(run, course))),
        ]
    table = Table.grid(padding=(0, 2))
    if course.basis != "after mixing":
        table.add_row(BASES["local"] if course.basis == "local" else DISAGREEMENT, _distance(course))
        if course.relative is not None:
            wanted = f", wanted {course.tolerance:.1e}" if course.tolerance is not None else ""
            table.add_row("of the models' size", f"{course.relative:.2e}{wanted}")
    if (distance := _consensus(run, course)) is not None:
        table.add_row(CONSENSUS, f"{distance:.3e}")
    if course.relative_consensus is not None:
        table.add_row("of the models' size", f"{course.relative_consensus:.2e}")
    table.add_row("rate a round, fitted", f"{course.fitted_rate:.6f}" if course.fitted_rate is not None else f"none: {course.fit_missing}")
    table.add_row(
        "rate a round, predicted", f"{course.predicted_rate:.6f}" if course.predicted_rate is not None else "none: no topology.json"
    )
    return [*lines, table]


def _consensus(run: RunRecords, course: Convergence) -> float | None:
    """The last consensus distance: of a run that has ended as its summary has it."""
    recorded = (run.summary or {}).get("consensus_distance")
    return recorded if recorded is not None else course.consensus[-1]


def _gap_sentences(found: Sequence[Gap]) -> list[str]:
    """Why the line breaks, the longest gaps first."""
    longest = sorted((gap for gap in found if gap.last > gap.first), key=lambda gap: gap.first - gap.last)
    more = [f"{_count(len(longest) - _MAX_GAPS, 'more gap')}"] if len(longest) > _MAX_GAPS else []
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
    figures = course_of(run, metric) if metric else {}
    known = [place for place in timed if course.rounds[place] in figures] or timed
    number = min(len(known), _MAX_ROWS)
    shown = sorted({known[-1 - (i * (len(known) - 1)) // max(number - 1, 1)] for i in range(number)} | {timed[-1]})
    table = _table("after rounds", "seconds", "distance", *([_printable(metric)] if metric else []))
    for place in shown:
        distance, value = course.distance[place], figures.get(course.rounds[place])
        cells = [_clock_seconds(course.simulated_s[place]), f"{distance:.2e}" if distance is not None else "-"]
        table.add_row(str(course.rounds[place] + 1), *cells, *([_number(value)] if metric else []))
    return [table, Text(f"{_clock_seconds((course.simulated_s[timed[-1]] or 0.0) / (course.rounds[timed[-1]] + 1))} a round", style="dim")]


def _reached(goals: Sequence[Reached]) -> Table:
    """What was asked for, and when it was there."""
    table = _table("figure", "wanted", "after rounds", "seconds")
    for goal in goals:
        rounds = str(goal.rounds) if goal.rounds is not None else "never"
        table.add_row(_name(goal.what), f"{goal.wanted:g}", rounds, _clock_seconds(goal.simulated_s))
    return table


def _heard_of(run: RunRecords, health: Mapping[str, NodeHealth]) -> list[RenderableType]:
    """Of a node's own view everybody's newest row, with its age."""
    newest = {row["node"]: row for row in sorted(run.nodes, key=lambda row: row["round"]) if "age_s" in row}
    if not newest:
        return []
    metric = primary_metric(sorted({name for row in newest.values() for name in row.get("metrics") or ()}))
    table = _table("node", "is", "round", "heard", "loss", *([_printable(metric)] if metric else []), "went on without")
    for name, row in sorted(newest.items())[:_MAX_NODES]:
        heard = "-" if row.get("age_s") is None else f"{duration(row['age_s'])} ago"
        figures = [_number(row.get("loss")), *([_number((row.get("metrics") or {}).get(metric))] if metric else [])]
        is_now = Text(health[name].state, style=_STYLES[health[name].state])
        table.add_row(_name(name), is_now, str(row["round"]), heard, *figures, _name(", ".join(row.get("skipped") or ())))
    unheard = [name for name in (run.topology or {}).get("nodes") or () if name not in newest]
    silent = [Text(_printable(f"never heard of: {', '.join(unheard)}"), style="red")] if unheard else []
    return [table, *_more(len(newest) - _MAX_NODES, "nodes"), *silent]


def _slowest(run: RunRecords, course: Convergence) -> list[RenderableType]:
    """The nodes furthest from their neighbours, where the network has not agreed."""
    if (run.summary or {}).get("stop_reason") == "converged" or len(course.slowest) < 2:  # noqa: PLR2004  # one node holds all of it
        return []
    table = _table("node", "share of disagreement", "own test", "rounds agreed")
    for slow in course.slowest[:5]:
        own = f"{slow.relative:.1e}" if slow.relative is not None else "-"
        table.add_row(_name(slow.node), percent(slow.share), own, str(slow.agreed_for) if slow.agreed_for is not None else "-")
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
    rows += [(", ".join(names[:_MAX_NAMED]) + _and_more(names), "unknown", why) for why, names in unknown.items()]
    if not rows:
        return [told]
    table = _table("node", "is", "why")
    for name, state, why in rows[:_MAX_ROWS]:
        table.add_row(_name(name), Text(state, style=_STYLES[state]), _name(why))
    return [told, table, *_more(len(rows) - _MAX_ROWS, "rows of nodes that are not known to be well")]


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""


def _links(run: RunRecords, nodes: Mapping[str, NodeHealth]) -> list[RenderableType]:
    """Those that are lost now, and those that have cost messages."""
    edges = edge_health(run, nodes)
    bad = in_need(edges)
    if not bad:
        said = links_in_order(run, edges)
        return [Text(_printable(said))] if said else []
    table = _table("link", "is", "missed", "why")
    for ends, edge in bad[:_MAX_ROWS]:
        table.add_row(
            _name(link_name(ends)),
            Text(edge.state, style=_STYLES[edge.state]),
            f"{edge.missed} ({percent(edge.fraction)})" if edge.missed else "-",
            _name(edge.why),
        )
    slowest = slowest_link_sentence(edges)
    window = Text(f"missed: in the last {WINDOW} rounds", style="dim")
    return [table, *_more(len(bad) - _MAX_ROWS, "links in nodes.jsonl"), window, *([Text(_printable(slowest))] if slowest else [])]


def _skipped(course: Convergence) -> list[RenderableType]:
    if not course.skipped:
        return []
    table = _table("node", "skipped by", "times", "rounds")
    for skip in course.skipped[:_MAX_ROWS]:
        table.add_row(_name(skip.node), _name(skip.by), str(len(skip.rounds)), Text(_ranges(skip.rounds)))
    return [table, *_more(len(course.skipped) - _MAX_ROWS, "pairs in nodes.jsonl")]


def _events(run: RunRecords) -> list[RenderableType]:
    """What was out of the ordinary; what several nodes report of the same round stands on one line."""
    events = incidents(run)
    groups: defaultdict[tuple[Any, str, str], list[Row]] = defaultdict(list)
    for event in events:
        groups[event["round"], str(event["event"]), str(event.get("detail") or "")].append(event)
    if not groups:
        return [Text(_printable(no_incidents(run)))]
    last = list(groups.items())[-_MAX_ROWS:]
    table = _table("time (UTC)", "round", "event", "nodes", "detail")
    for at, ((number, kind, detail), same) in zip(time_column([same[0] for _, same in last]), last, strict=True):
        nodes = [str(event["node"]) for event in same]
        who = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")  # noqa: PLR2004  # three names say enough
        table.add_row(_name(at), "-" if number is None else str(number), _name(kind), _name(who), _name(detail))
    return [table, *_more(len(groups) - _MAX_ROWS, "earlier ones in events.jsonl")]


def _cost(run: RunRecords) -> list[RenderableType]:
    if not run.rounds:
        return []
    parts = ("train", "wait", "mix", "evaluate", "checkpoint")
    table = _table("rounds", "number", "bytes", *parts)
    for kind, label in (("train", "training"), ("settle", "settling")):
        rows = [row for row in run.rounds if row["kind"] == kind]
        if rows:
            seconds = [_seconds(_mean((row.get("seconds") or {}).get(part) for row in rows)) for part in parts]
            table.add_row(label, str(len(rows)), _bytes(_mean(row.get("bytes_sent") for row in rows)), *seconds)
    sent = (run.summary or {}).get("bytes_sent")
    total = sent if sent is not None else sum(row.get("bytes_sent") or 0 for row in run.rounds)
    return [table, Text(f"{_bytes(total)} sent in all", style="dim")]


def _section(title: str, parts: Sequence[RenderableType]) -> list[RenderableType]:
    """A title and its parts, indented; nothing where there are none."""
    return [Text(), Text(title, style="bold"), *(Padding(part, (0, 0, 0, 2), expand=False) for part in parts)] if parts else []


def _table(first: str, *others: str) -> Table:
    """Two blanks between columns, a line under the heading; long words fold instead of being cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for column in (first, *others):
        table.add_column(column, overflow="fold")
    return table


def _more(hidden: int, what: str) -> list[RenderableType]:
    return [Text(f"({hidden} more {what})", style="dim")] if hidden > 0 else []


def _name(text: str) -> Text:
    return Text(_printable(text), overflow="fold")


def _printable(text: str) -> str:
    """Without control sequences: a name or a detail may come from a stranger."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _ranges(rounds: Sequence[int]) -> str:
    """4, 5, 6, 9, 20, 22, 24, 26 as "4-6, 9, every 2nd of 20-26"; some of many."""
    found, place = list[str](), 0
    while place < len(rounds):
        step = rounds[place + 1] - rounds[place] if place + 1 < len(rounds) else 1
        last = place
        while last + 1 < len(rounds) and rounds[last + 1] == rounds[last] + step:
            last += 1
        if step > 1 and last - place < _REGULAR:
            last = place
        between = f"{rounds[place]}-{rounds[last]}"
        found.append(str(rounds[place]) if last == place else between if step == 1 else f"every {_ordinal(step)} of {between}")
        place = last + 1
    return ", ".join(found[:_MAX_RANGES]) + (f" and {len(found) - _MAX_RANGES} more" if len(found) > _MAX_RANGES else "")


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or SAME <= abs(value) < 1000 else f"{value:.1e}"  # noqa: PLR2004  # what six signs can show


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _clock_seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"  # noqa: PLR2004  # three digits say enough


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:  # noqa: PLR2004
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
