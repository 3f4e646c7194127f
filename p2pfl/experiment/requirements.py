"""Requirements of an experiment that can be checked once its nodes and their graphs are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pfl.algorithms import Algorithm, Requirement
from p2pfl.errors import TopologyError, some
from p2pfl.experiment.spec import Experiment, RequireSpec
from p2pfl.tasks import Task
from p2pfl.topology import Schedule, Topology, check_connected

NEEDS_ALL: frozenset[Requirement] = frozenset({"reliable", "complete"})
"""Requirements that no network meets in which messages can stay out."""

_ROUNDING = 1e-12


def unmet_requirements(
    experiment: Experiment, algorithm: Algorithm, schedule: Schedule, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Faults of values that do not fit the nodes, and conflicts of the rounds' graphs with the algorithm and the rest of the experiment."""
    name, clock = experiment.algorithm.name, experiment.clock
    faults = faults_of_members(experiment.require, len(names))
    conflicts = [f"topology.name = {experiment.topology.name!r}: {unmet}" for unmet in _unmet_by_graphs(algorithm, name, schedule)]
    if not algorithm.uses_weights and experiment.weights != "metropolis":
        conflicts.append(f"weights = {experiment.weights!r}: algorithm {name} uses none; leave it out, or take dpsgd")
    if experiment.stop is not None and algorithm.model_channel is None:
        conflicts.append(f"algorithm {name} sends no models that neighbours could compare; it needs stop: null")
    if clock is not None:
        unknown = sorted(clock.speeds.keys() - set(names))
        faults += [f"clock.speeds.{node} = {clock.speeds[node]}: no node of that name; one of {some(names)}" for node in unknown]
        if experiment.pace.kind.in_step and not matches_flows(algorithm, schedule.union()):
            conflicts += [
                f"clock.{drop}: on a directed graph nobody can match what did not come; take an undirected one" for drop in clock.drops
            ]
    return faults, conflicts


def faults_of_members(require: RequireSpec, num_members: int) -> list[str]:
    """The fault that so many of the members cannot be required, if it is one."""
    least = num_members // 2 + 1
    if require.members == "all" or least <= require.members <= num_members:
        return []
    if require.members > num_members:
        return [f"require.members = {require.members}: there are {num_members} members; give all, or {least} to {num_members}"]
    fault = f"require.members = {require.members}: not more than half of the {num_members} members, so that two halves could train apart"
    return [f"{fault}; give all, or {least} to {num_members}"]


def _unmet_by_graphs(algorithm: Algorithm, name: str, schedule: Schedule) -> list[str]:
    """Requirements of an algorithm that the graphs of the rounds do not meet, a sentence each."""
    found = []
    needs = algorithm.requires
    if schedule.weighted_mean and "fixed mean" not in needs:  # its one edge for each direction is no fault of the graph
        return [f"weights = 'stationary' have a weighted mean; algorithm {name} needs a plain one: take metropolis, or dpsgd"]
    if "static" in needs and schedule.period != 1:
        found.append(f"changes from round to round; algorithm {name} needs a graph that stays as it is")
    if "symmetric" in needs and schedule.directed:
        found.append(f"a directed graph; algorithm {name} needs a symmetric one")
    graph = schedule.at(0)
    assert graph.weights is not None
    if "complete" in needs and len(graph.senders) != graph.num_nodes * (graph.num_nodes - 1):
        found.append(f"algorithm {name} needs complete")
    if "tree" in needs and (schedule.directed or graph.num_edges != graph.num_nodes - 1 or not _is_connected(graph)):
        found.append(f"{graph.num_edges} edges between {graph.num_nodes} nodes; algorithm {name} needs a tree, such as path or star")
    given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
    taken_N = 1 - graph.self_weights
    # random graphs that do not keep the mean in each round keep it on average
    keeps_mean = schedule.period is None or schedule.weighted_mean or np.allclose(given_N, taken_N, atol=1e-9)
    if needs & {"doubly stochastic", "fixed mean"} and not keeps_mean:
        found.append(
            f"what a node gives is not what it takes; algorithm {name} needs doubly stochastic weights: on this graph use push-sum"
        )
    if "column stochastic" in needs and given_N.max(initial=0.0) >= 1:
        found.append(f"a node gives away all it has; algorithm {name} needs weights: push-sum")
    if "nonnegative weights" in needs:
        found += negative_weights(schedule, f"algorithm {name}")
    return found


def faults_of_batches(experiment: Experiment, task: Task) -> list[str]:
    """Faults of batches and gradients that a loss over all rows of a site has not, a sentence each."""
    if not task.compares_rows:
        return []
    why, found = f"the loss of task {task.name} compares all rows of a site", list[str]()
    if experiment.algorithm.batch_size != "full":
        found.append(f"algorithm.batch_size = {experiment.algorithm.batch_size}: {why}; take full")
    if experiment.privacy is not None:
        found.append(f"privacy: needs gradients of single examples, and {why}; take another model")
    return found


def matches_flows(algorithm: Algorithm, union: Topology) -> bool:
    """Whether each side of every edge can compensate what the other did not merge, so that messages may stay out."""
    return not algorithm.splits_mass and len(union.undirected().senders) == len(union.senders)


def negative_weights(schedule: Schedule, who: str) -> list[str]:
    """The finding that some message counts negatively for *who*, a rule that counts, sorts or bounds single messages."""
    least = schedule.least_weight()
    return [f"a message may count {least:.3g}; {who} needs weights of 0 or more: take metropolis"] if least < -_ROUNDING else []


def _is_connected(graph: Topology) -> bool:
    try:
        check_connected(graph)
    except TopologyError:
        return False
    return True
