"""The graph of an experiment: its mixing weights round by round, and how the network agrees on it to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import ConfigError, ConflictError, some
from p2pfl.experiment.spec import Experiment, Named
from p2pfl.topology import (
    SCHEDULES,
    Schedule,
    Topology,
    base_spec,
    describe,
    diameter,
    diameter_bounds,
    has_base,
    is_spectrum_quick,
    laplacian_extremes,
    load_over,
    make,
    make_schedule,
    transports_over,
    weighted,
)

_MOST_CERTIFIED = 512  # nodes
_MOST_NEWS_ROUNDS = 1000
_EDGES_LISTED_UP_TO = 1000  # nodes; a larger graph is made again from the experiment where somebody needs it
_EXACT_DIAMETER_UP_TO = 20_000  # nodes; each needs a search through the graph


def build_topology(experiment: Experiment, names: Sequence[str], samples: Mapping[str, int | None] | None = None) -> Topology:
    """Build the weighted graph over the nodes, which are the rows in the order of their sorted names.

    Each node's training rows, *samples*, are for `weights: stationary` where the graph's file gives no masses.

    Raises:
        TopologyError: the graph is not connected, cannot have that many nodes, or names other nodes than the task has.
        ConfigError: it is not known how much a node counts.
    """
    graph = _named_graph(experiment, experiment.topology, names)
    if experiment.weights == "stationary" and graph.masses is None:
        counts = {name: (samples or {}).get(name) for name in names}
        if unknown := [name for name, count in counts.items() if not count]:
            raise ConflictError(
                f"weights = 'stationary': how much does {some(unknown)} count? Their training rows are not known or none; give"
                " `samples` on every card, or a mass for every node in a topology's file"
            )
        graph = replace(graph.renamed(tuple(names)), masses=np.array(list(counts.values()), dtype=np.float64))
    return weighted(graph, experiment.weights).renamed(tuple(names))


def build_schedule(
    experiment: Experiment, names: Sequence[str], agreed: Topology | None = None, samples: Mapping[str, int | None] | None = None
) -> Schedule:
    """Build the weighted graph of every round, over the nodes in the order of their sorted names; *agreed* is a study's graph.

    Raises:
        TopologyError: as `build_topology`.
        ConfigError: the study's edges are not those of the experiment's rounds.
    """
    if experiment.topology.name not in SCHEDULES:
        graph = agreed if agreed is not None else build_topology(experiment, names, samples)
        return Schedule.static(graph, weighted_mean=experiment.weights == "stationary")
    options = {"seed": experiment.seed, **experiment.topology.options}
    if has_base(experiment.topology.name):
        options["base"] = agreed if agreed is not None else _base(experiment, names)
    schedule = make_schedule(experiment.topology.name, len(names), **options).renamed(tuple(names))
    if agreed is not None and _edges(agreed) != _edges(schedule.union()):
        raise ConfigError(
            f"topology.name = {experiment.topology.name!r}: the study has other links than its rounds need; make the study again"
        )
    return schedule


def agreeing_on(experiment: Experiment, schedule: Schedule) -> Experiment:
    """Write what nodes must not each compute for themselves into the topology's options."""
    if not schedule.agreed:
        return experiment
    return replace(experiment, topology=replace(experiment.topology, options={**experiment.topology.options, **schedule.agreed}))


def link_costs(experiment: Experiment, topology: Topology, names: Sequence[str]) -> Topology | None:
    """The run's graph, or the one from which changing rounds choose, where it has latencies or bandwidths of links."""
    graph = _base(experiment, names) if has_base(experiment.topology.name) else topology
    return graph if graph.latency_ms is not None or graph.bandwidth_mbps is not None else None


def edge_transports(experiment: Experiment, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """The transports that a topology's file names for edges, by their ends in the order of the names; empty where none are named."""
    wanted = experiment.topology
    if has_base(wanted.name):
        spec = base_spec(wanted.options.get("base", "ring"))
        wanted = Named(name=spec.pop("name", "file"), options=spec)
    return transports_over(Path(wanted.options["file"]), names) if wanted.name == "file" else {}


def stop_rule(experiment: Experiment, schedule: Schedule) -> StopRule | None:
    """The rule by which this network agrees to stop; None: it stops after exactly `rounds`.

    Raises:
        ConflictError: the mixing-only rounds do not connect everybody often enough, or there are too many nodes to find that out.
    """
    stop = experiment.stop
    if stop is None:
        return None
    rule = partial(StopRule, tolerance=stop.relative_consensus, patience=stop.patience)
    if schedule.is_steady:
        graph = schedule.union()
        return rule(diameter=diameter_bound(graph), lambda_2=float(laplacian_extremes(graph)[0]))
    window, lambda_2 = _certified(experiment, schedule)
    return rule(diameter=window, lambda_2=lambda_2, window=window)


def extremes_for_bounds(experiment: Experiment, schedule: Schedule) -> tuple[float, float] | None:
    """The extremes of the Laplacian by which a round's numbers bound the disagreement; None where they bound nothing, or take too long."""
    is_constant = experiment.pace.kind.in_step and schedule.period == 1
    return laplacian_extremes(graph) if is_constant and is_spectrum_quick(graph := schedule.union()) else None


def _certified(experiment: Experiment, schedule: Schedule) -> tuple[int, float]:
    """Rounds that news needs on a graph that is directed or changes, and the least lambda_2 of the edges of so many rounds."""
    if schedule.num_nodes > _MOST_CERTIFIED:
        raise ConflictError(
            f"stop: a graph that is directed or changes is certified for at most {_MOST_CERTIFIED} nodes, this one has "
            f"{schedule.num_nodes}; take stop: null"
        )
    last = experiment.rounds + schedule.period if schedule.period is not None else experiment.last_possible_round
    starts = range(experiment.rounds, last)
    rounds = [rounds_of_news(schedule, start, max(4 * schedule.num_nodes, _MOST_NEWS_ROUNDS)) for start in starts]
    if None in rounds:
        raise ConflictError(f"stop: on topology {schedule.name} news does not reach everybody; take stop: null")
    window = max(int(number) for number in rounds if number is not None)
    if schedule.period is not None:  # whole periods have all edges in them
        window = -(-window // schedule.period) * schedule.period
        return window, lambda_2_of(schedule, experiment.rounds, window)
    return window, min(lambda_2_of(schedule, start, window) for start in starts)


def rounds_of_news(schedule: Schedule, start: int, most: int) -> int | None:
    """Count the rounds from `start` on that news from every node needs to reach every other; None: more than `most`."""
    knows_NN = np.eye(schedule.num_nodes, dtype=np.bool_)
    for number in range(most):
        graph = schedule.at(start + number)
        before_NN = knows_NN.copy()
        np.logical_or.at(knows_NN, graph.receivers, before_NN[graph.senders])
        if knows_NN.all():
            return number + 1
    return None


def lambda_2_of(schedule: Schedule, start: int, window: int) -> float:
    """Second smallest eigenvalue of the Laplacian of all edges of some rounds, each once."""
    codes = np.unique(np.concatenate([(g := schedule.at(start + r)).receivers * g.num_nodes + g.senders for r in range(window)]))
    n = schedule.num_nodes
    union = Topology.from_edges(schedule.name, n, codes % n, codes // n, directed=schedule.directed)
    return float(np.linalg.eigvalsh(union.laplacian().toarray())[1])


def diameter_bound(topology: Topology) -> int:
    """The diameter, or an upper bound on it for very large graphs: rounds that news needs to reach everybody."""
    return diameter(topology) if topology.num_nodes <= _EXACT_DIAMETER_UP_TO else diameter_bounds(topology)[1]


def record_of(topology: Topology, names: Sequence[str]) -> dict[str, Any]:
    """Describe a graph over nodes as the run folder's topology.json holds it."""
    quick = is_spectrum_quick(topology)
    lambda_2, lambda_max = laplacian_extremes(topology) if quick else (None, None)
    spectrum = describe(topology) if quick else {"lambda_2": None, "lambda_min": None}
    weights = topology.weights
    assert weights is not None
    edges = None
    if len(names) <= _EDGES_LISTED_UP_TO:
        edges = [[int(i), int(j), float(w)] for i, j, w in zip(topology.senders, topology.receivers, weights, strict=True)]
    return {
        "nodes": list(names),
        "edges": edges,
        "lambda_2": spectrum["lambda_2"],
        "lambda_min": spectrum["lambda_min"],
        "laplacian_lambda_2": lambda_2,
        "laplacian_lambda_max": lambda_max,
        "diameter": diameter_bound(topology) if quick else None,
    }


def _named_graph(experiment: Experiment, wanted: Named, names: Sequence[str]) -> Topology:
    """Make a graph by name, or load it from a file and match its nodes with the names."""
    if wanted.name == "file":
        return load_over(Path(wanted.options["file"]), names)
    graph = make(wanted.name, len(names), **{"seed": experiment.seed, **wanted.options})
    if graph.num_nodes != len(names):
        raise ConflictError(f"topology.name = {wanted.name!r} has {graph.num_nodes} nodes, the run {len(names)}; set nodes to that")
    return graph


def _base(experiment: Experiment, names: Sequence[str]) -> Topology:
    """The graph from whose edges a schedule chooses."""
    spec = base_spec(experiment.topology.options.get("base", "ring"))
    return _named_graph(experiment, Named(name=spec.pop("name", "file"), options=spec), names)


def _edges(topology: Topology) -> set[tuple[int, int]]:
    """Both ends of every edge, the smaller number first."""
    return {(min(i, j), max(i, j)) for i, j in zip(topology.senders.tolist(), topology.receivers.tolist(), strict=True)}
