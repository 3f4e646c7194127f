"""Rules for the weights that each node gives its neighbours' messages: they make a graph a mixing matrix.

Every rule but "given", "push-sum" and "stationary" yields a symmetric matrix whose rows and columns sum to 1, so that the network's mean
is preserved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from p2pfl.errors import MissingExtraError, TopologyError
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.spectrum import laplacian_extremes, spectral_gap

_TOLERANCE = 1e-9
_MAX_OPTIMISED = 64  # nodes; half a minute
_DECIMALS = 9
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


def fdla(topology: Topology) -> Topology:
    """The fastest symmetric weights that these links can have; some may be negative. Needs the extra `optimal`.

    The largest |eigenvalue| of W - J is as small as it can be, a semidefinite program. They are rounded to nine decimals; a study carries
    them, so that whoever takes part in it needs no solver.

    Raises:
        MissingExtraError: cvxpy or its solver is not installed.
        TopologyError: the graph is too large, or the solver fails.

    Source: Xiao & Boyd, Systems & Control Letters 53, 2004 ("fastest distributed linear averaging").
    """
    n = topology.num_nodes
    if n > _MAX_OPTIMISED:
        raise TopologyError(
            f"weights = 'fdla': topology {topology.name} of {n} nodes would take minutes; expected at most {_MAX_OPTIMISED}; take"
            " best-constant"
        )
    try:
        import clarabel  # noqa: F401  # the solver, which cvxpy does without until it is asked
        import cvxpy
    except ImportError as error:
        raise MissingExtraError("weights = 'fdla' needs cvxpy: pip install 'p2pfl-mesh[optimal]'") from error
    once = topology.senders > topology.receivers
    one, other = topology.receivers[once], topology.senders[once]
    incidence_NE = np.zeros((n, len(one)))
    incidence_NE[one, np.arange(len(one))], incidence_NE[other, np.arange(len(one))] = 1, -1
    weights_E, largest = cvxpy.Variable(len(one)), cvxpy.Variable()
    apart_NN = np.eye(n) - 1 / n - incidence_NE @ cvxpy.diag(weights_E) @ incidence_NE.T  # W - J
    bounds = [apart_NN << largest * np.eye(n), apart_NN >> -largest * np.eye(n)]
    problem = cvxpy.Problem(cvxpy.Minimize(largest), bounds)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")  # its last digits: they are rounded away
            problem.solve(solver=cvxpy.CLARABEL)
    except cvxpy.SolverError as error:
        raise TopologyError(f"weights = 'fdla': no solution for topology {topology.name} ({error}); take best-constant") from error
    if weights_E.value is None:
        raise TopologyError(f"weights = 'fdla': no solution for topology {topology.name} ({problem.status}); take best-constant")
    table_NN = np.zeros((n, n))
    table_NN[one, other] = table_NN[other, one] = np.round(weights_E.value, _DECIMALS)
    return topology.with_weights(table_NN[topology.receivers, topology.senders])


def stationary(topology: Topology) -> Topology:
    """w_ij = min(1 / (1 + deg i), m_j / (m_i (1 + deg j))): the mean that is preserved is weighted by the nodes' masses m.

    Rows sum to 1, columns do not: everybody ends at sum_i m_i x_i / sum_i m_i. m_i w_ij = m_j w_ji, so that over each edge m_i times what i
    takes in is m_j times what j gives, and a flow that one end does not match is taken back exactly, as with symmetric weights.

    Raises:
        TopologyError: nobody has said how much the nodes count.

    Source: Metropolis et al. 1953 and Hastings 1970, a chain whose stationary distribution is m / sum(m).
    """
    if topology.masses is None:
        raise TopologyError(
            f"weights = 'stationary': topology {topology.name} does not say how much each node counts; in its file write"
            " nodes: [{name: a, mass: 120}, ...]"
        )
    own_E = 1 / (1 + topology.degrees[topology.receivers])
    share_E = topology.masses[topology.senders] / topology.masses[topology.receivers] / (1 + topology.degrees[topology.senders])
    return replace(topology.with_weights(np.minimum(own_E, share_E)), directed=True)


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
    "fdla": fdla,
    "given": given,
    "push-sum": push_sum,
    "stationary": stationary,
}


def weighted(topology: Topology, rule: str = "metropolis") -> Topology:
    """Give a graph the weights of a rule.

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
