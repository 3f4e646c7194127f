"""What each node gives its neighbours' messages: rules that make a graph a mixing matrix.

Every rule but "given" and "push-sum" yields a symmetric matrix whose rows and columns sum to 1, so that the network's mean stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from p2pfl.errors import TopologyError
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.spectrum import laplacian_extremes, spectral_gap

_TOLERANCE = 1e-9
_MIN_GAP = 1e-12  # a gap of 0 up to rounding; a ring of a million nodes has 1e-11


def metropolis(topology: Topology) -> Topology:
    """Metropolis-Hastings: w_ij = 1 / (1 + max(deg i, deg j)); a node needs to know its neighbours' degrees only.

    Source: Xiao, Boyd & Lall, IPSN 2005.
    """
    larger_E = np.maximum(topology.degrees[topology.senders], topology.degrees[topology.receivers])
    return topology.with_weights(1 / (1 + larger_E), invariant=True)


def max_degree(topology: Topology) -> Topology:
    """W = I - L / (d_max + 1): one number for all edges."""
    return topology.with_weights(1 / (1 + topology.degrees.max()), invariant=True)


def lazy(topology: Topology) -> Topology:
    """(I + W) / 2 of Metropolis-Hastings: no negative eigenvalue, about half the speed."""
    larger_E = np.maximum(topology.degrees[topology.senders], topology.degrees[topology.receivers])
    return topology.with_weights(1 / (2 + 2 * larger_E), invariant=True)


def best_constant(topology: Topology) -> Topology:
    """W = I - a L with a = 2 / (lambda_max(L) + lambda_2(L)): the fastest of all with one number for all edges.

    Some nodes' own weight may be negative (a star's centre).

    Source: Xiao & Boyd, Systems & Control Letters 53, 2004.
    """
    return topology.with_weights(2 / sum(laplacian_extremes(topology)), invariant=True)


def given(topology: Topology) -> Topology:
    """The weights that the graph came with, checked: symmetric (directed: doubly stochastic), neighbours' sum at most 1, and converging.

    Raises:
        TopologyError: with every node or pair of nodes at fault (the first five).
    """
    if topology.weights is None:
        raise TopologyError(f"weights = 'given': topology {topology.name} comes without; write a weight on each edge or take metropolis")
    faults = []
    if topology.directed:
        columns_N = np.bincount(topology.senders, weights=topology.weights, minlength=topology.num_nodes) + topology.self_weights
        faults += [
            f"weights = 'given': {topology.label(i)}'s message counts {columns_N[i]:.6g} in all, expected 1: the mean would drift"
            for i in np.flatnonzero(np.abs(columns_N - 1) > _TOLERANCE).tolist()
        ]
    else:
        reverse = np.lexsort((topology.receivers, topology.senders))  # the edge (j, i) at the place of (i, j)
        faults += [
            f"weights = 'given': {topology.label(int(topology.senders[e]))} - {topology.label(int(topology.receivers[e]))} weighs"
            f" {topology.weights[e]:.6g} one way and {topology.weights[reverse[e]]:.6g} the other, expected the same"
            for e in np.flatnonzero(np.abs(topology.weights - topology.weights[reverse]) > _TOLERANCE)
            if topology.senders[e] < topology.receivers[e]
        ]
    faults += [
        f"weights = 'given': {topology.label(i)} gives its neighbours {1 - topology.self_weights[i]:.6g} in all, expected at most 1"
        for i in np.flatnonzero(topology.self_weights < -_TOLERANCE).tolist()
    ]
    if not faults and (gap := spectral_gap(topology)) < _MIN_GAP:
        faults.append(
            f"weights = 'given': gossip on {topology.name} would never agree (spectral gap {gap:.3g}); change them or take metropolis"
        )
    if faults:
        more = [f"... and {len(faults) - 5} more"] if len(faults) > 5 else []  # noqa: PLR2004
        raise TopologyError([*faults[:5], *more])
    return topology


def push_sum(topology: Topology) -> Topology:
    """C_ij = 1 / (1 + out-degree of j): each sender splits what it has evenly between its receivers and itself; columns sum to 1.

    For the algorithm push-sum, on any graph. The result counts as directed, because what goes one way is not what comes back.

    Source: Kempe, Dobra & Gehrke, FOCS 2003.
    """
    out_N = np.bincount(topology.senders, minlength=topology.num_nodes)
    return replace(topology.with_weights(1 / (1 + out_N[topology.senders])), directed=True)


WEIGHTS: Mapping[str, Callable[[Topology], Topology]] = {
    "metropolis": metropolis,
    "max-degree": max_degree,
    "lazy": lazy,
    "best-constant": best_constant,
    "given": given,
    "push-sum": push_sum,
}


def weighted(topology: Topology, rule: str = "metropolis") -> Topology:
    """The same edges with the weights of a rule.

    Raises:
        TopologyError: no such rule; the graph is not connected, with two nodes that have no path named; the graph is directed and the rule
            is for undirected ones.
    """
    if rule not in WEIGHTS:
        raise TopologyError(f"weights = {rule!r}: expected one of {', '.join(WEIGHTS)}")
    check_connected(topology)
    if topology.directed and rule not in ("given", "push-sum"):
        raise TopologyError(
            f"weights = {rule!r}: topology {topology.name} is directed and {rule} is for undirected ones;"
            " take weights: given, which keeps its own, or push-sum"
        )
    return WEIGHTS[rule](topology)
