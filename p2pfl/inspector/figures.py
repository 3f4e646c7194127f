"""The pictures of a run, for every page that shows one. Needs plotly, which the extras `report` and `dashboard` bring.

Plotly reads texts as markup: names that come from other machines are escaped. Nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from p2pfl.errors import MissingExtraError
from p2pfl.inspector.convergence import BASES, Convergence
from p2pfl.inspector.gaps import Gap, broken_line, certified_pieces, isolated_points
from p2pfl.inspector.health import NodeHealth
from p2pfl.inspector.link_health import EdgeHealth, Ends, link_name
from p2pfl.inspector.markup import escaped
from p2pfl.inspector.verdict import Scores
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import lower_is_better, metric_heading
from p2pfl.runs.text import Row

Figure = Any
"""plotly.graph_objects.Figure, which has no types."""

MAX_DRAWN = 200
"""Nodes; more are a blot."""

_BLUE, _ORANGE, _RED, _GREY, _GREEN, _VIOLET = "#2b6cb0", "#dd6b20", "#e53e3e", "#718096", "#2f855a", "#805ad5"
_SEVERAL = (_BLUE, _ORANGE, _GREEN, _VIOLET, _GREY, _RED)
_DASHES = ("solid", "dash", "longdash", "dashdot", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
_RING = 2  # neighbours
_HEIGHT = 380
_SMALL = 300
_FEW_DECADES = 1.5
_UPRIGHT = 0.6
"""Tangent of the angle above which a name stands above or below its node and not beside it."""
_MAX_GAPS, _FEW_GAPS = 40, 12
_ROOM = 0.04
"""Fraction of the axis for a reason written upright."""
_LOWEST = 1e-3
"""Fraction of the upper bound to draw where the lower one is zero and a logarithmic axis has no place for it."""
_WIDTHS = 4
"""Different widths of links over which messages were missed."""


def network(run: RunRecords, course: Convergence, nodes: Mapping[str, NodeHealth], edges: Mapping[Ends, EdgeHealth]) -> Figure | None:
    """The graph: each node's fraction of the disagreement that is left, each link as often as it failed, and who and what is lost now.

    None where there is no graph, where it changes from round to round, and above 200 nodes.
    """
    graph = run.topology or {}
    names, links = graph.get("nodes") or [], graph.get("edges") or []
    if not links or len(names) > MAX_DRAWN:
        return None
    _, places = laid_out(len(names), tuple((i, j) for i, j, _ in links))
    at = {name: (round(x, 4), round(y, 4)) for name, (x, y) in zip(names, places, strict=True)}  # a pixel is more
    figure = _empty()
    _draw_links(figure, {ends: edge for ends, edge in edges.items() if ends <= at.keys()}, at)
    fractions = {slow.node: slow.fraction for slow in course.slowest}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        state = nodes[name].state if name in nodes else "unknown"
        groups[{"finished": "well", "has not trained": "unknown"}.get(state, state)].append(name)
    for state, symbol, colour in (
        ("well", "circle", None),
        ("unknown", "circle-open", _GREY),
        ("late", "diamond", _ORANGE),
        ("paused", "square", _ORANGE),
        ("lost", "x", _RED),
    ):
        some = groups.get(state, [])
        if not some:
            continue
        marked = "" if state == "well" else f" ({state})"
        figure.add_scatter(
            x=[at[name][0] for name in some],
            y=[at[name][1] for name in some],
            mode="markers+text",
            name="node of which nothing is known now" if state == "unknown" else f"node {state} now" if marked else "nodes",
            marker={
                "size": 22 if not marked else 24,
                "symbol": symbol,
                "color": colour or [fractions.get(name, 0.0) for name in some],
                "line": {"color": _GREY, "width": 3} if state == "unknown" else {"color": "#2d3748", "width": 1},
                **({} if colour else _shading(fractions)),
            },
            # a word at each of many unknown nodes would hide the graph: the ring and the legend say it
            text=[_text(name + ("" if state == "unknown" else marked)) for name in some],
            textposition=[_beside(*at[name]) for name in some],
            hovertext=[_text(_about(name, fractions, nodes)) for name in some],
            hoverinfo="text",
            showlegend=bool(marked),
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return figure


def agreement(courses: Mapping[str, Convergence], gaps: Sequence[Gap] = ()) -> Figure | None:
    """How far the models are apart, round by round, with what the spectrum allows; of one run also what its records certify.

    Lines and bands break where nothing is known; gaps of one run are shaded with their reasons.
    """
    told = {name: course for name, course in courses.items() if any(course.distance)}
    if not told:
        return None
    figure = _empty(x="round", y="distance")
    alone = len(courses) == 1
    for number, (name, course) in enumerate(told.items()):
        if alone and course.certified:
            _draw_band(figure, course)
            _shade(figure, gaps, course.rounds)
        colour = _SEVERAL[number % len(_SEVERAL)]
        label = BASES[course.basis] if alone else _text(name)
        line = {"color": colour, "width": 2, "dash": _DASHES[number % len(_DASHES)]}
        _draw_line(figure, course.rounds, course.distance, name=label, line=line, legendgroup=str(number))
        # below the run's own noise the bound of a good graph falls without end
        floor = min((value for value in course.distance if value), default=0.0) / 10
        bounds = [value if value is not None and value >= floor else None for value in course.bound]
        if any(value is not None for value in bounds):
            dots = {"color": _ORANGE if alone else colour, "dash": "dot", "width": 1.5}
            bound = "bound from the graph's spectrum" if alone else f"{_text(name)}, spectral bound"
            group = str(number)
            figure.add_scatter(x=course.rounds, y=bounds, mode="lines", name=bound, line=dots, legendgroup=group, showlegend=alone)
    return _logarithmic(figure)


def _draw_band(figure: Figure, course: Convergence) -> None:
    """Draw the bounds that the records certify, one shape for each piece without a gap."""
    x, y, some = list[float | None](), list[float | None](), certified_pieces(course)
    for piece in some:
        rounds = [number for number, _, _ in piece]
        lows = [low if low > 0 else high * _LOWEST for _, low, high in piece]
        x += [*rounds, *reversed(rounds), rounds[0], None]
        y += [*lows, *(high for _, _, high in reversed(piece)), lows[0], None]
    missed = ", of rounds without a missed message" if sum(map(len, some)) < len(course.rounds) else ""
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 1, "color": "rgba(43,108,176,0.2)"},  # so that a single round shows
        fill="toself",
        fillcolor="rgba(43,108,176,0.2)",
        name=f"certified by the nodes' own records{missed}",
        hoverinfo="skip",
    )


def _shade(figure: Figure, gaps: Sequence[Gap], rounds: Sequence[int]) -> None:
    """Grey where nothing is certified, the reason in the gap where it has room."""
    span = max(rounds[-1] - rounds[0], 1)
    few = len(gaps) <= _FEW_GAPS  # of many, those of one round would be stripes all over
    widest = sorted((gap for gap in gaps if few or gap.last > gap.first), key=lambda gap: gap.first - gap.last)[:_MAX_GAPS]
    for gap in widest:
        has_room = gap.last - gap.first >= _ROOM * span
        figure.add_vrect(
            x0=gap.first - 0.5,
            x1=gap.last + 0.5,
            fillcolor="rgba(113,128,150,0.18)",
            line_width=0,
            layer="below",
            **({"annotation_text": _text(gap.why), "annotation_position": "bottom", "annotation_textangle": -90} if has_room else {}),
        )


def _draw_line(figure: Figure, rounds: Sequence[int], values: Sequence[float | None], **look: Any) -> None:
    """A line that breaks at gaps; a round between two gaps is a dot."""
    x, y = broken_line(rounds, values)
    figure.add_scatter(x=x, y=y, mode="lines", connectgaps=False, **look)
    if single := isolated_points(rounds, values):
        marker = {"color": look["line"]["color"], "size": 4}
        dots, heights = zip(*single, strict=True)
        group = look.get("legendgroup")
        figure.add_scatter(x=dots, y=heights, mode="markers", marker=marker, showlegend=False, name=look.get("name"), legendgroup=group)


def loss(run: RunRecords) -> Figure | None:
    """The training loss, mean over the nodes, round by round."""
    points = [(row["round"], row["loss"]) for row in run.rounds if row.get("loss") is not None]
    return _curves("training loss, mean over the nodes", {"loss": points}, height=_HEIGHT) if points else None


def gains(at: Mapping[str, Scores], metric: str) -> Figure:
    """A metric at each site, alone, in the network and pooled."""
    figure = _empty(x=metric_heading(metric))
    names = [_text(node) for node in at]
    for which, colour, symbol in (("alone", _GREY, "circle-open"), ("pooled", _ORANGE, "diamond-open"), ("network", _BLUE, "circle")):
        values = [getattr(figure_at, which) for figure_at in at.values()]
        if any(value is not None for value in values):
            marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}}
            figure.add_scatter(x=values, y=names, mode="markers", name=which, marker=marker)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(height=max(_HEIGHT // 2, 120 + 26 * len(at)))
    return figure


def cross_site(found: Row) -> Figure:
    """Matrix of models by the sites where they are measured."""
    values, names = found["value"], [site["name"] for site in found["sites"]]
    figure = _empty(x="measured at", y="model of")
    figure.add_heatmap(
        z=values,
        x=[_text(name) for name in names],
        y=[_text(model) for model in found["models"]],
        text=[["" if value is None else f"{value:.2f}" for value in row] for row in values],
        texttemplate="%{text}",
        colorscale="Blues" if not lower_is_better(found["metric"]) else "Blues_r",
        hovertemplate="%{y} at %{x}: %{z:.3f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    figure.update_layout(height=max(_HEIGHT, 140 + 26 * len(found["models"])))
    return figure


def site(run: RunRecords, name: str) -> dict[str, Figure]:
    """One node's own course, by what each picture shows: loss, metrics, disagreement with neighbours, seconds."""
    rows = [row for row in run.nodes if row["node"] == name]

    def points(key: str, inside: str | None = None) -> list[tuple[int, float]]:
        pairs = ((row["round"], row.get(key) if inside is None else (row.get(inside) or {}).get(key)) for row in rows)
        return [(number, value) for number, value in pairs if value is not None]

    metrics = sorted({metric for row in rows for metric in row.get("metrics") or ()})
    parts = sorted({part for row in rows for part in row.get("seconds") or ()})
    found = {
        "training loss": {"loss": points("loss")},
        "metrics on its own rows": {metric: points(metric, "metrics") for metric in metrics},
        "disagreement with neighbours": {"disagreement": [(number, value) for number, value in points("disagreement") if value > 0]},
        "seconds a round": {part: points(part, "seconds") for part in parts},
    }
    drawn = {what: _curves(what, curves, height=_SMALL) for what, curves in found.items() if any(curves.values())}
    if (apart := drawn.get("disagreement with neighbours")) is not None:
        _logarithmic(apart)
    return drawn


def script() -> str:
    """The source of plotly.js as a script."""
    return str(_plotly()[1].get_plotlyjs())


def _text(name: str) -> str:
    return escaped(name, quotes=False)


def _shading(fractions: Mapping[str, float]) -> Row:
    title = {"text": "fraction of the<br>disagreement that is left"}
    bar = {"title": title, "tickformat": ".0%", "thickness": 16}
    most = max(fractions.values(), default=1.0)
    return {"colorscale": [[0, "#ebf8ff"], [1, _BLUE]], "cmin": 0, "cmax": most, "showscale": bool(fractions), "colorbar": bar}


def _beside(x: float, y: float) -> str:
    """Where a node's name stands: away from the middle, where the links are."""
    if abs(y) > _UPRIGHT * abs(x):
        return "top center" if y > 0 else "bottom center"
    return "middle right" if x > 0 else "middle left"


def _about(name: str, fractions: Mapping[str, float], nodes: Mapping[str, NodeHealth]) -> str:
    fraction = f": {fractions[name]:.0%} of the disagreement that is left" if name in fractions else ""
    why = f". {nodes[name].why}" if name in nodes and nodes[name].state != "finished" else ""
    return f"{name}{fraction}{why}"


def _draw_links(figure: Figure, edges: Mapping[Ends, EdgeHealth], at: Mapping[str, tuple[float, float]]) -> None:
    """One trace for all links that look the same."""
    most = max((edge.missed for edge in edges.values()), default=0)
    looks: defaultdict[tuple[str, int], list[tuple[Ends, EdgeHealth]]] = defaultdict(list)
    for ends, edge in edges.items():
        looks[edge.state, -(-_WIDTHS * edge.missed // most) if most else 0].append((ends, edge))
    styles = {
        "well": (_GREY, "solid", "link"),
        "unknown": ("#cbd5e0", "solid", "link of which nothing is known now"),
        "paused": ("#cbd5e0", "solid", "link to a node that has paused"),
        "slow": (_RED, "dash", "slow link"),
        "lost": (_RED, "dot", "link lost now"),
    }
    named = set()
    for (state, width), some in sorted(looks.items()):
        colour, dash, label = styles[state]
        x, y, texts = list[float | None](), list[float | None](), list[str | None]()
        for ends, edge in some:
            (x_0, y_0), (x_1, y_1) = (at[name] for name in sorted(ends))
            if state in ("well", "unknown", "paused"):  # there may be thousands of them, and they have nothing to tell
                x += [x_0, x_1, None]
                y += [y_0, y_1, None]
                continue
            x += [x_0, (x_0 + x_1) / 2, x_1, None]
            y += [y_0, (y_0 + y_1) / 2, y_1, None]
            texts += [_text(f"{link_name(ends)}: {edge.why}")] * 3 + [None]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name=label,
            line={"color": colour, "width": (3.0 if state == "lost" else 1.5) + width, "dash": dash},
            hoverinfo="text" if texts else "skip",
            text=texts or None,
            legendgroup=state,
            showlegend=state in ("slow", "lost") and state not in named,
        )
        named.add(state)


@lru_cache(maxsize=8)  # a page that is drawn every second draws the same graph
def laid_out(num_nodes: int, links: tuple[tuple[int, int], ...]) -> tuple[Any, list[tuple[float, float]]]:
    """Lay a graph out on a plane: the graph of networkx, and where each node stands."""
    import networkx as nx  # only here

    drawn: Any = nx.Graph()
    drawn.add_nodes_from(range(num_nodes))
    drawn.add_edges_from(links)
    is_ring_or_path = nx.is_connected(drawn) and max(degree for _, degree in drawn.degree()) <= _RING
    places = (nx.circular_layout if is_ring_or_path else nx.kamada_kawai_layout)(drawn)
    return drawn, [(float(places[i][0]), float(places[i][1])) for i in range(num_nodes)]


def _logarithmic(figure: Figure) -> Figure:
    """Powers of ten up the side, without digits between them where there are several."""
    values = [value for trace in figure.data for value in trace.y if value]
    decades = math.log10(max(values) / min(values)) if values else 0.0
    figure.update_yaxes(type="log", exponentformat="power", dtick=math.ceil(decades / 8) if decades > _FEW_DECADES else None)
    return figure


def _curves(y: str, curves: Mapping[str, Sequence[tuple[int, float]]], *, height: int) -> Figure:
    """Lines over rounds; a legend where there are several."""
    figure = _empty(x="round", y=y)
    told = {name: points for name, points in curves.items() if points}
    for number, (name, points) in enumerate(told.items()):
        rounds, values = broken_line(*zip(*points, strict=True))
        line = {"color": _SEVERAL[number % len(_SEVERAL)], "width": 2, "dash": _DASHES[number % len(_DASHES)]}
        single = isolated_points(*zip(*points, strict=True))
        mode = "lines" if not single else "lines+markers" if len(points) > len(single) else "markers"
        alone = {at for at, _ in single}
        size = 9 if mode == "markers" else [6 if at in alone else 0 for at in rounds]
        marker = {"symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": size, "color": line["color"]}
        figure.add_scatter(x=rounds, y=values, mode=mode, name=_text(name), line=line, marker=marker, showlegend=len(told) > 1)
    figure.update_layout(height=height)
    return figure


def _empty(x: str = "", y: str = "") -> Figure:
    """A figure without a paper of its own, so that it suits every page."""
    graph_objects, _ = _plotly()
    layout = {
        "template": "plotly_white",
        "height": _HEIGHT,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "uirevision": "the reader's",  # a page that draws anew leaves the zoom alone
        "xaxis": {"title": {"text": _text(x)}},
        "yaxis": {"title": {"text": _text(y)}},
    }
    return graph_objects.Figure(layout=layout)


def _plotly() -> tuple[Any, Any]:
    try:
        from plotly import graph_objects, offline  # an extra
    except ImportError as error:
        raise MissingExtraError("--html needs plotly: pip install 'p2pfl-mesh[report]'") from error
    return graph_objects, offline
