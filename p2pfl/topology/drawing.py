"""Pictures of graphs and of how fast gossip on them agrees; needs the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.topology.graph import Topology
from p2pfl.topology.spectrum import rounds_to, spectral_gap

_MAX_DRAWN = 1000
_MAX_LABELLED = 60
_MAX_SPRINGS = 150
_ACCURACY = 1e-6


def draw_graph(topology: Topology, path: Path) -> None:
    """Nodes with their names, and the predicted decay of disagreement, as an image of the kind that the path's ending says."""
    figure = _figure(11, 5)
    graph_axes, decay_axes = figure.subplots(1, 2)
    _draw_nodes(graph_axes, topology)
    _draw_decay(decay_axes, {topology.name: topology})
    _save(figure, path)


def draw_comparison(topologies: Mapping[str, Topology], path: Path) -> None:
    """The predicted decay of disagreement on several graphs over each other, in the order given."""
    figure = _figure(8, 5)
    _draw_decay(figure.subplots(), topologies)
    _save(figure, path)


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
    if topology.num_nodes > _MAX_DRAWN:
        axes.text(0.5, 0.5, f"more than {_MAX_DRAWN} nodes:\ntoo many to draw", ha="center", va="center", transform=axes.transAxes)
        return
    from matplotlib.collections import LineCollection

    places = _layout(topology)
    ends = np.stack([places[topology.senders], places[topology.receivers]], axis=1)
    axes.add_collection(LineCollection(list(ends), colors="0.7", linewidths=1.2 if topology.num_nodes <= _MAX_LABELLED else 0.5, zorder=1))
    axes.scatter(places[:, 0], places[:, 1], s=max(8, 220 - 2 * topology.num_nodes), color="tab:blue", zorder=2)
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


def _layout(topology: Topology) -> Any:
    """(N, 2) positions; the same graph is drawn the same way every time."""
    import networkx as nx

    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(topology.num_nodes))
    graph.add_edges_from(zip(topology.senders.tolist(), topology.receivers.tolist(), strict=True))
    if topology.periods is not None and len(topology.periods) == 1:
        places = nx.circular_layout(graph)
    elif topology.num_nodes <= _MAX_SPRINGS:
        places = nx.kamada_kawai_layout(graph)
    else:
        places = nx.spring_layout(graph, seed=0)
    return np.array([places[node] for node in range(topology.num_nodes)])


def _draw_decay(axes: Any, topologies: Mapping[str, Topology]) -> None:
    """Disagreement left after each round for the worst start, (1 - gap)**round, until 1e-6 of the beginning."""
    longest = max((rounds_to(topology, _ACCURACY) or 1 for topology in topologies.values()), default=1)
    for label, topology in topologies.items():
        gap, last = spectral_gap(topology), rounds_to(topology, _ACCURACY)
        rounds = np.linspace(0, last or longest, 200)
        left = np.maximum((1 - gap) ** rounds, _ACCURACY) if last != 1 else np.array([1.0, _ACCURACY])
        axes.plot(rounds if last != 1 else [0, 1], left, label=f"{label}: {_rounds(last)}")
    axes.set_yscale("log")
    axes.set_ylim(_ACCURACY, 1.5)
    axes.set_xlim(left=0)
    if longest > 50 * min(rounds_to(topology, _ACCURACY) or longest for topology in topologies.values()):
        axes.set_xscale("symlog", linthresh=1)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rounds of gossip")
    axes.set_ylabel("disagreement left, worst start")
    axes.set_title("predicted from the spectral gap", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9)


def _rounds(last: int | None) -> str:
    return "never" if last is None else "1 round" if last == 1 else f"{last:,} rounds"


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from error
