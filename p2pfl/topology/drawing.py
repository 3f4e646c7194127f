"""Pictures of graphs and of how fast gossip on them agrees; needs the `plot` extra."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.topology.graph import FloatArray, Topology
from p2pfl.topology.schedule import ACCURACY, MOST_ROUNDS, Schedule, disagreement_left
from p2pfl.topology.spectrum import rounds_to, spectral_gap

_MAX_DRAWN = 1000
_MAX_LABELLED = 60
_MAX_SPRINGS = 150
_ROUNDS_SHOWN = 6
_COLUMNS = 5
_MAX_LINE = 24  # characters
_USED, _IDLE = "tab:orange", "0.75"


def draw_graph(topology: Topology, path: Path) -> None:
    """Nodes with their names, and the predicted decay of disagreement, as an image of the kind that the path's ending says."""
    figure = _figure(11, 5)
    graph_axes, decay_axes = figure.subplots(1, 2)
    _draw_nodes(graph_axes, topology)
    _draw_decay(decay_axes, {topology.name: _decay(topology)})
    _save(figure, path)


def draw_rounds(schedule: Schedule, path: Path) -> None:
    """The first rounds of a graph that changes, in small, and what is left of the disagreement after each round."""
    shown = min(schedule.period or _ROUNDS_SHOWN, _ROUNDS_SHOWN)
    columns = min(shown, 3)
    rows = -(-shown // columns)
    width = max(2.6 * columns, 4)
    figure = _figure(width + 5.5, max(2.6 * rows + 0.6, 4))
    graphs, decay = figure.subfigures(1, 2, width_ratios=[width, 5.5])
    union = schedule.union()
    repeats = {None: "never repeats", 1: "the same in every round"}.get(schedule.period, f"repeats after {schedule.period} rounds")
    graphs.suptitle(f"{schedule.name}: {schedule.num_nodes} nodes, {union.num_edges} links,\n{repeats}", fontsize=11)
    places = _layout(union)
    panels = graphs.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for number, axes in enumerate(panels[:shown]):
        axes.set_title(f"round {number}", fontsize=9)
        _draw_small(axes, union, places, schedule.at(number))
    _draw_decay(decay.subplots(), {schedule.name: _decay(schedule)})
    _save(figure, path)


def draw_comparison(graphs: Mapping[str, Topology | Schedule], path: Path) -> None:
    """Each graph in small and, below them, the decay of disagreement on all of them, in the order given.

    Of a graph that changes all links are drawn that it ever has, those of its first round in another colour.
    """
    rows = -(-len(graphs) // _COLUMNS)
    columns = -(-len(graphs) // rows)
    figure = _figure(max(2.4 * columns, 9), 2.5 * rows + 4.4)
    small, decay = figure.subfigures(2, 1, height_ratios=[2.5 * rows, 4.4])
    panels = small.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (label, graph) in zip(panels, graphs.items(), strict=False):
        union = graph.union() if isinstance(graph, Schedule) else graph
        axes.set_title(f"{_folded(label)}\n{union.num_nodes} nodes, {union.num_edges} links", fontsize=8)
        _draw_small(axes, union, _layout(union), graph.at(0) if isinstance(graph, Schedule) and graph.period != 1 else None)
    if any(isinstance(graph, Schedule) and graph.period != 1 for graph in graphs.values()):
        small.supxlabel("orange: the links of the first round, grey: all that there ever are", fontsize=8)
    _draw_decay(decay.subplots(), {label: _decay(graph) for label, graph in graphs.items()})
    _save(figure, path)


def _folded(label: str) -> str:
    """Long labels on several lines, broken where an option begins."""
    lines = [""]
    for part in re.split(r"(?<=[:,])", label):
        lines = [*lines[:-1], lines[-1] + part] if len(lines[-1] + part) <= _MAX_LINE else [*lines, part]
    return "\n".join(filter(None, lines))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib: pip install 'p2pfl-mesh[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_nodes(axes: Any, topology: Topology) -> None:
    axes.set_axis_off()
    arrows = " (i sends to j: arrow at j)" if topology.directed and topology.num_nodes <= _MAX_LABELLED else ""
    axes.set_title(f"{topology.name}: {topology.num_nodes} nodes, {topology.num_edges} edges{arrows}", fontsize=11)
    places = _layout(topology)
    if places is None:
        _say_too_many(axes)
        return
    ends = _draw_links(axes, topology, places, "0.7", 1.2 if topology.num_nodes <= _MAX_LABELLED else 0.5)
    axes.scatter(
        places[:, 0], places[:, 1], s=max(8, (220 if topology.names is None else 120) - 2 * topology.num_nodes), color="tab:blue", zorder=2
    )
    axes.margins(0.16)
    axes.set_aspect("equal")
    if topology.num_nodes > _MAX_LABELLED:
        return
    if topology.directed:
        for start, end in ends:
            axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.5", "shrinkA": 8, "shrinkB": 8}, zorder=1)
    white = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for node, place in enumerate(places):
        below = (0, -16) if topology.names is not None else (0, -4)
        color, box = ("black", white) if topology.names is not None else ("white", None)
        axes.annotate(topology.label(node), place, xytext=below, textcoords="offset points", ha="center", fontsize=8, color=color, bbox=box)


def _draw_small(axes: Any, union: Topology, places: FloatArray | None, used: Topology | None) -> None:
    """Nodes without names and all links, those in use in another colour, with arrows where they go one way."""
    if places is None:
        _say_too_many(axes)
        return
    _draw_links(axes, union, places, _IDLE, 0.8 if union.num_edges <= 4 * union.num_nodes else 0.3)
    if used is not None:
        ends = _draw_links(axes, used, places, _USED, 1.6)
        if used.directed and used.num_nodes <= _MAX_LABELLED:
            for start, end in ends:
                arrow = {"arrowstyle": "-|>", "color": _USED, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 7}
                axes.annotate("", end, start, arrowprops=arrow, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], s=max(3, 36 - union.num_nodes / 2), color="tab:blue", zorder=2)
    axes.margins(0.08)
    axes.set_aspect("equal")


def _draw_links(axes: Any, topology: Topology, places: FloatArray, color: str, width: float) -> FloatArray:
    """Lines between the ends of each edge; returns these, (E, 2, 2)."""
    from matplotlib.collections import LineCollection

    ends = np.stack([places[topology.senders], places[topology.receivers]], axis=1)
    axes.add_collection(LineCollection(list(ends), colors=color, linewidths=width, zorder=1))
    return ends


def _say_too_many(axes: Any) -> None:
    axes.text(0.5, 0.5, f"more than {_MAX_DRAWN} nodes:\ntoo many to draw", ha="center", va="center", transform=axes.transAxes)


def _layout(topology: Topology) -> FloatArray | None:
    """(N, 2) positions, the same for the same graph every time; None: there are too many nodes to draw."""
    import networkx as nx

    if topology.num_nodes > _MAX_DRAWN:
        return None
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(topology.num_nodes))
    graph.add_edges_from(zip(topology.senders.tolist(), topology.receivers.tolist(), strict=True))
    is_dense = 4 * graph.number_of_edges() > topology.num_nodes * (topology.num_nodes - 1)  # half of all pairs
    if (topology.periods is not None and len(topology.periods) == 1) or is_dense:
        places = nx.circular_layout(graph)
    elif topology.num_nodes <= _MAX_SPRINGS:
        places = nx.kamada_kawai_layout(graph)
    else:
        places = nx.spring_layout(graph, seed=0)
    return np.array([places[node] for node in range(topology.num_nodes)])


def _decay(graph: Topology | Schedule) -> tuple[FloatArray, FloatArray, int | None]:
    """Rounds, what of the disagreement is left after them for the worst start, and the first round with at most a millionth, if any.

    (1 - gap)**round where the graph stays as it is, otherwise the norm of the product of the rounds' matrices.
    """
    if isinstance(graph, Topology):
        last = rounds_to(graph, ACCURACY)
        rounds = np.array([0.0, 1.0]) if last == 1 else np.linspace(0, last or MOST_ROUNDS, 200)
        left = np.array([1.0, ACCURACY]) if last == 1 else np.maximum((1 - spectral_gap(graph)) ** rounds, ACCURACY)
        return rounds, left, last
    values = [1.0, *(max(left_now, ACCURACY) for left_now in disagreement_left(graph))]
    last = len(values) - 1 if values[-1] <= ACCURACY else None
    return np.arange(len(values), dtype=np.float64), np.array(values), last


def _draw_decay(axes: Any, decays: Mapping[str, tuple[FloatArray, FloatArray, int | None]]) -> None:
    """Disagreement left after each round for the worst start, until 1e-6 of the beginning."""
    lasts = [last for _, _, last in decays.values() if last is not None]
    longest, shortest = max(lasts, default=MOST_ROUNDS), min(lasts, default=1)
    for number, (label, (rounds, left, last)) in enumerate(decays.items()):
        # the same shades once more with dashes where there are more graphs than colours
        axes.plot(rounds, left, label=f"{label}: {_rounds(last)}", linestyle="-" if number < 10 else "--")  # noqa: PLR2004
    axes.set_yscale("log")
    axes.set_ylim(ACCURACY, max(1.5, *(1.2 * left.max() for _, left, _ in decays.values())))
    axes.set_xlim(0, longest if lasts else None)
    if longest > 50 * shortest:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, *(10**power for power in range(math.floor(math.log10(longest)) + 1))])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rounds of gossip")
    axes.set_ylabel("disagreement left, worst start")
    axes.set_title("until a millionth of the disagreement is left", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if len(decays) > 1 else {}
    axes.legend(fontsize=8, **beside)


def _rounds(last: int | None) -> str:
    return "never" if last is None else "1 round" if last == 1 else f"{last:,} rounds"


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from error
