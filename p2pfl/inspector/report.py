"""A run as one HTML page that needs nothing else: for a meeting, for an archive, for a reader without p2pfl. Needs plotly (extra `report`).

Names and details come from other machines: they are escaped wherever they stand.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pfl.errors import MissingExtraError
from p2pfl.inspector.convergence import Convergence, convergence
from p2pfl.inspector.verdict import SAME, Scores, lower_is_better, mean_scores, scores, verdict, worth_sentence
from p2pfl.records import Row, RunRecords, primary_metric, replace_file
from p2pfl.yaml_files import dump_yaml

_BLUE, _ORANGE, _RED, _GREY, _GREEN = "#2b6cb0", "#c05621", "#c53030", "#718096", "#2f855a"
_MAX_DRAWN = 200  # nodes; more are a blot
_MAX_ROWS = 200
_RING = 2  # neighbours
_HEIGHT = 380

_BASES = {
    "exact": "consensus distance",
    "upper bound": "consensus distance, upper bound",
    "local": "distance to the neighbours",
}

_ENDINGS = {"rounds": "ended at its last round"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --paper: #fff; --line: #cbd5e0; --faint: #5a6578; --good: #276749; --bad: #9b2c2c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --paper: #171c26; --line: #3d4757; --faint: #a0aec0; --good: #68d391; --bad: #fc8181; }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.facts, .note { color: var(--faint); } .short li { margin: .3rem 0; }
.scroll { overflow-x: auto; }
.figure { background: #fff; border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } td.number, th.number { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); }
tr.mean td { border-top: 2px solid var(--line); font-weight: 600; } pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); }
"""


@dataclass(frozen=True, slots=True)
class _Cell:
    """Of a table: a text, or a number with a judgement."""

    text: str
    kind: str = ""
    """Classes of the style sheet."""


def write_report(run: RunRecords, path: Path) -> None:
    """The page; what is there is replaced.

    Raises:
        MissingExtraError: plotly is not installed.
        StoreError: the file cannot be written.
    """
    replace_file(path, report(run))


def report(run: RunRecords) -> str:
    """The page's HTML, whole: scripts and styles are in it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    course = convergence(run)
    name = str(run.experiment.get("name", "run"))
    sections = [
        ("In short", _list(verdict(run, course))),
        ("Who exchanges with whom", _network(run, course)),
        ("Agreement", _agreement(course)),
        ("Loss", _loss(run)),
        ("Was it worth it, and for whom", _worth(run.summary, run.worth) if run.summary and run.summary.get("metrics") else ""),
        ("Every model at every site", _cross_site(run.cross_site) if run.cross_site else ""),
        ("For whom: subgroups", _subgroups(run.subgroups)),
        ("Links that were waited for in vain", _skips(course)),
        ("Events", _events(run)),
        ("Cost of a round", _cost(run)),
        ("The experiment", _experiment(run)),
    ]
    body = "".join(f"<section><h2>{_escaped(title)}</h2>{content}</section>\n" for title, content in sections if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(name)}</title><style>{_STYLE}</style><script>{_script()}</script></head>\n"
        f'<body><h1>{_escaped(name)}</h1><p class="facts">{_escaped(_facts(run))}</p>\n{body}</body></html>\n'
    )


def _facts(run: RunRecords) -> str:
    summary = run.summary or {}
    nodes = summary.get("nodes") or len((run.topology or {}).get("nodes") or ())
    topology = (run.experiment.get("topology") or {}).get("name")
    sent = summary.get("bytes_sent")
    facts = [
        str(summary.get("engine") or run.environment.get("engine") or "unknown engine"),
        f"{nodes:,} nodes" + (f", {topology}" if topology else ""),
        f"{len(run.rounds):,} rounds",
        _ENDINGS.get(ending, ending) if (ending := summary.get("stop_reason")) else "still running, or interrupted",
        f"{sent:,} bytes sent" if sent is not None else "",
        f"began {run.environment['started']}" if run.environment.get("started") else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _network(run: RunRecords, course: Convergence) -> str:
    """The graph: each node's share of what disagreement is left, each link as often as it failed."""
    graph = run.topology or {}
    names, edges = graph.get("nodes") or [], graph.get("edges") or []
    if not edges or len(names) > _MAX_DRAWN:
        return f'<p class="note">The graph of {len(names):,} nodes is not drawn.</p>' if names else ""
    import networkx as nx  # only here

    drawn: Any = nx.Graph()
    drawn.add_nodes_from(range(len(names)))
    drawn.add_edges_from((i, j) for i, j, _ in edges)
    is_ring_or_path = nx.is_connected(drawn) and max(degree for _, degree in drawn.degree()) <= _RING
    places = (nx.circular_layout if is_ring_or_path else nx.kamada_kawai_layout)(drawn)
    failed = _failures(course)
    most = max(failed.values(), default=0)
    figure = _figure()
    for i, j in drawn.edges:
        count = failed.get(frozenset((names[i], names[j])), 0)
        share = count / most if most else 0.0
        (x_0, y_0), (x_1, y_1) = places[i], places[j]
        label = f"{names[i]} - {names[j]}: " + (f"{count} times in vain" if count else "always in time")
        figure.add_scatter(
            x=[x_0, (x_0 + x_1) / 2, x_1],
            y=[y_0, (y_0 + y_1) / 2, y_1],
            mode="lines",
            line={"color": _RED if count else _GREY, "width": 1.5 + 4 * share, "dash": "dash" if count else "solid"},
            hoverinfo="text",
            text=[_escaped(label)] * 3,
            showlegend=False,
        )
    shares = {slow.node: slow.share for slow in course.slowest}
    figure.add_scatter(
        x=[places[i][0] for i in range(len(names))],
        y=[places[i][1] for i in range(len(names))],
        mode="markers+text",
        marker={
            "size": 22,
            "color": [shares.get(name, 0.0) for name in names],
            "colorscale": [[0, "#bee3f8"], [1, _ORANGE]],
            "cmin": 0,
            "line": {"color": "#2d3748", "width": 1},
            "showscale": bool(shares),
            "colorbar": {"title": {"text": "share of what<br>disagreement is left"}, "tickformat": ".0%"},
        },
        text=[_escaped(name) for name in names],
        textposition="top center",
        hovertext=[_escaped(f"{name}: {shares[name]:.0%} of what disagreement is left" if name in shares else name) for name in names],
        hoverinfo="text",
        showlegend=False,
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    worst = f" The worst is {_escaped(_link(max(failed, key=failed.__getitem__)))}, {most} times." if failed else ""
    note = f'<p class="note">Dashed, red and the thicker the more often: a message over this link came too late or not at all.{worst}</p>'
    return _drawn(figure, "the graph of nodes and links") + (note if failed else '<p class="note">Every message came in time.</p>')


def _failures(course: Convergence) -> Counter[frozenset[str]]:
    """How often each link failed, in either direction."""
    failed: Counter[frozenset[str]] = Counter()
    for skip in course.skipped:
        failed[frozenset((skip.node, skip.by))] += len(skip.rounds)
    return failed


def _link(ends: frozenset[str]) -> str:
    return " - ".join(sorted(ends))


def _agreement(course: Convergence) -> str:
    if not any(course.distance):
        return ""
    figure = _figure(x="round", y="distance")
    if all(low is not None for low in course.low) and all(high is not None for high in course.high):
        fill = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=course.rounds, y=course.high, showlegend=False, **fill)
        certified = "certified by the nodes' own records"
        figure.add_scatter(x=course.rounds, y=course.low, fill="tonexty", fillcolor="rgba(43,108,176,0.15)", name=certified, **fill)
    figure.add_scatter(x=course.rounds, y=course.distance, mode="lines", name=_BASES[course.basis], line={"color": _BLUE, "width": 2})
    if any(value is not None for value in course.bound):
        dots = {"color": _ORANGE, "dash": "dot"}
        figure.add_scatter(x=course.rounds, y=course.bound, mode="lines", name="bound from the graph's spectrum", line=dots)
    figure.update_yaxes(type="log", exponentformat="power")
    fitted = f"{course.fitted_rate:.6f} a round, fitted" if course.fitted_rate is not None else f"no fitted rate: {course.fit_missing}"
    predicted = f"{course.predicted_rate:.6f} a round from the spectrum" if course.predicted_rate is not None else ""
    size = f"in the end {course.relative:.1e} of the models' size" if course.relative is not None else ""
    wanted = f"wanted {course.tolerance:.1e}" if course.tolerance is not None else ""
    facts = "; ".join(fact for fact in (fitted, predicted, size, wanted) if fact)
    return _drawn(figure, "how far the models are apart, round by round") + f'<p class="note">{_escaped(facts)}</p>'


def _loss(run: RunRecords) -> str:
    points = [(row["round"], row["loss"]) for row in run.rounds if row.get("loss") is not None]
    if not points:
        return ""
    figure = _figure(x="round", y="training loss, mean over the nodes")
    rounds, losses = zip(*points, strict=True)
    figure.add_scatter(x=rounds, y=losses, mode="lines", line={"color": _BLUE, "width": 2}, showlegend=False)
    return _drawn(figure, "the training loss, round by round")


def _worth(summary: Row, sure: Sequence[Row] = ()) -> str:
    """Every metric at every site: alone, in the network, pooled; the primary one also as a picture, and with how sure its gains are."""
    first = primary_metric(summary["metrics"])
    assert first is not None
    intervals = {(row["site"], row["metric"]): row for row in sure}
    found = ""
    for metric in sorted(summary["metrics"], key=lambda name: name != first):
        at = scores(summary, metric)
        mean = mean_scores(summary, metric)
        heads = ["site", "alone", "network", "pooled", "gain"]
        rows = [[_Cell(node), *_figures(figure, metric, intervals.get((node, metric)))] for node, figure in list(at.items())[:_MAX_ROWS]]
        more = f'<p class="note">{len(at) - _MAX_ROWS} more in summary.json.</p>' if len(at) > _MAX_ROWS else ""
        of_mean_model = (summary.get("mean_model") or {}).get(metric)
        note = f'<p class="note">The mean model, on all test rows together: {of_mean_model:.3f}.</p>' if of_mean_model is not None else ""
        picture = _gains(at, metric) if metric == first and len(at) <= _MAX_DRAWN else ""
        found += f"<h3>{_escaped(metric)}</h3>{picture}{_table(heads, rows, [_Cell('mean'), *_figures(mean, metric)])}{more}{note}"
        found += _sentences([row for row in sure if row["metric"] == metric][:_MAX_ROWS])
    return found


def _sentences(rows: Sequence[Row]) -> str:
    """Of each site, whether its gain is more than chance."""
    if not rows:
        return ""
    methods = "; ".join(sorted({row["method"] for row in rows if row["method"]})) or "none is known"
    note = (
        f"In brackets the {rows[0]['confidence']:.0%} interval of each gain, both models on the same test rows ({methods}). "
        "Each site is judged by itself: of twenty that gain nothing one will look as if it did, or as if it lost."
    )
    return _list([worth_sentence(row) for row in rows]) + f'<p class="note">{_escaped(note)}</p>'


def _gains(at: Mapping[str, Scores], metric: str) -> str:
    figure = _figure(x=metric, y="")
    names = [_escaped(node) for node in at]
    for which, colour, symbol in (("alone", _GREY, "circle-open"), ("pooled", _ORANGE, "diamond-open"), ("network", _BLUE, "circle")):
        values = [getattr(figure_at, which) for figure_at in at.values()]
        if any(value is not None for value in values):
            marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}}
            figure.add_scatter(x=values, y=names, mode="markers", name=which, marker=marker)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(height=max(_HEIGHT // 2, 120 + 26 * len(at)))
    return _drawn(figure, f"{metric} at each site, alone, in the network and pooled")


def _figures(figure: Scores, metric: str, sure: Row | None = None) -> list[_Cell]:
    cells = [_Cell(_number(value), "number") for value in (figure.alone, figure.network, figure.pooled)]
    if figure.gain is None:
        return [*cells, _Cell("-", "number")]
    better = -figure.gain if lower_is_better(metric) else figure.gain
    judged = "number good" if better >= SAME else "number bad" if better <= -SAME else "number"
    interval = f" [{sure['low']:+.3f}, {sure['high']:+.3f}]" if sure and sure["low"] is not None else ""
    return [*cells, _Cell((f"{figure.gain:+.3f}" if abs(better) >= SAME else "0.000") + interval, judged)]


def _cross_site(found: Row) -> str:
    """Models by sites, with intervals and support."""
    values, names = found["value"], [site["name"] for site in found["sites"]]
    figure = _figure(x="measured at", y="model of")
    figure.add_heatmap(
        z=values,
        x=[_escaped(name) for name in names],
        y=[_escaped(model) for model in found["models"]],
        text=[["" if value is None else f"{value:.2f}" for value in row] for row in values],
        texttemplate="%{text}",
        colorscale="Blues" if not lower_is_better(found["metric"]) else "Blues_r",
        hovertemplate="%{y} at %{x}: %{z:.3f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    figure.update_layout(height=max(_HEIGHT, 140 + 26 * len(found["models"])))
    heads = ["site", "test rows", "of each class", "own model", "mean model"]
    own = {name: number for number, name in enumerate(found["models"])}
    rows = [
        [
            _Cell(site["name"]),
            _Cell(f"{site['rows']:,}", "number"),
            _Cell(", ".join(f"{label}: {count}" for label, count in (site["support"] or {}).items())),
            *(_Cell(_with_interval(found, model, place), "number") for model in (own[site["name"]], len(found["models"]) - 1)),
        ]
        for place, site in enumerate(found["sites"])
    ]
    sure = f" In brackets {found['confidence']:.0%} confidence intervals ({found['method']})." if found["method"] else ""
    note = f'<p class="note">By {_escaped(found["metric"])}, each on the site\'s own test rows.{_escaped(sure)}</p>'
    return _drawn(figure, f"{found['metric']} of every model at every site") + _table(heads, rows) + note


def _subgroups(found: Sequence[Row]) -> str:
    if not found:
        return ""
    heads = ["site", "attribute", "group", "test rows", "AUROC", "sensitivity", "calibration error"]
    rows = []
    for row in found[:_MAX_ROWS]:
        sure = f" [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]" if row["auroc_low"] is not None else ""
        figures = [
            "fewer than 10" if row["rows"] is None else f"{row['rows']:,}",
            _number(row["auroc"]) + sure,
            _number(row["sensitivity"]),
            _number(row["calibration_error"]),
        ]
        names = (row["site"] or "all sites", row["attribute"], row["group"])
        rows.append([*map(_Cell, names), *(_Cell(text, "number") for text in figures)])
    note = (
        "Each site by its own model, all sites by the mean model. Sensitivity at specificity 0.9 within the group; groups of fewer than 10 "
        "test rows are withheld; in brackets 95% confidence intervals."
    )
    return _table(heads, rows) + f'<p class="note">{note}</p>'


def _with_interval(found: Row, model: int, place: int) -> str:
    value, low, high = (found[key][model][place] for key in ("value", "low", "high"))
    return _number(value) + (f" [{low:.3f}, {high:.3f}]" if value is not None and low is not None else "")


def _skips(course: Convergence) -> str:
    rows = [
        [_Cell(skip.by), _Cell(skip.node), _Cell(str(len(skip.rounds)), "number"), _Cell(f"{skip.rounds[0]} to {skip.rounds[-1]}")]
        for skip in course.skipped[:_MAX_ROWS]
    ]
    return _table(["this node", "went on without", "times", "rounds"], rows) if rows else ""


def _events(run: RunRecords) -> str:
    told = [event for event in run.events if event["event"] not in ("started", "greeted", "skipped")][-_MAX_ROWS:]
    rows = [
        [
            _Cell("-" if event["round"] is None else str(event["round"]), "number"),
            *(_Cell(str(event.get(key) or "")) for key in ("event", "node", "detail")),
        ]
        for event in told
    ]
    return _table(["round", "event", "node", "detail"], rows) if rows else ""


def _cost(run: RunRecords) -> str:
    parts = ("train", "wait", "mix", "evaluate")
    rows = []
    for kind, label in (("train", "training"), ("settle", "settling")):
        some = [row for row in run.rounds if row["kind"] == kind]
        if some:
            seconds = [_mean([(row.get("seconds") or {}).get(part) for row in some]) for part in parts]
            sent = _mean([row.get("bytes_sent") for row in some])
            cells = [
                f"{len(some):,}",
                "-" if sent is None else f"{sent:,.0f}",
                *("-" if s is None else f"{s * 1000:,.2f}" for s in seconds),
            ]
            rows.append([_Cell(label), *(_Cell(cell, "number") for cell in cells)])
    return _table(["rounds", "number", "bytes", *(f"{part}, ms" for part in parts)], rows) if rows else ""


def _experiment(run: RunRecords) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (run.environment.get("versions") or {}).items())
    return (
        f"<details><summary>experiment.yaml, every default written out</summary><pre>{_escaped(dump_yaml(run.experiment))}</pre></details>"
        f'<p class="note">{_escaped(versions)}</p>'
    )


def _list(sentences: Sequence[str]) -> str:
    return f'<ul class="short">{"".join(f"<li>{_escaped(sentence)}</li>" for sentence in sentences)}</ul>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[_Cell]], last: Sequence[_Cell] | None = None) -> str:
    def line(cells: Sequence[_Cell], kind: str = "") -> str:
        return f'<tr class="{kind}">' + "".join(f'<td class="{cell.kind}">{_escaped(cell.text)}</td>' for cell in cells) + "</tr>"

    kinds = [cell.kind.split(" ")[0] for cell in rows[0]] if rows else [""] * len(heads)
    top = "".join(f'<th scope="col" class="{kind}">{_escaped(head)}</th>' for head, kind in zip(heads, kinds, strict=True))
    body = "".join(map(line, rows)) + (line(last, "mean") if last is not None else "")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(x: str = "", y: str = "") -> Any:
    """An empty figure."""
    graph_objects, _ = _plotly()
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02}
    layout = {"template": "plotly_white", "height": _HEIGHT, "margin": {"l": 60, "r": 20, "t": 40, "b": 50}, "legend": legend}
    return graph_objects.Figure(layout={**layout, "xaxis": {"title": {"text": _escaped(x)}}, "yaxis": {"title": {"text": _escaped(y)}}})


def _drawn(figure: Any, what: str) -> str:
    """The figure's place in the page, with what it shows for those who do not see it."""
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return f'<div class="figure" role="img" aria-label="{_escaped(what)}">{drawn}</div>'


def _script() -> str:
    """plotly.js itself."""
    _, offline = _plotly()
    script: str = offline.get_plotlyjs()
    return script


def _plotly() -> tuple[Any, Any]:
    try:
        from plotly import graph_objects, offline  # an extra
    except ImportError as error:
        raise MissingExtraError("--html needs plotly: pip install 'p2pfl-mesh[report]'") from error
    return graph_objects, offline


def _escaped(text: str) -> str:
    return html.escape("".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
