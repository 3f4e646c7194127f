"""MATCHA: which of a base graph's links to use in a round at random, so that the network agrees fast on few messages.

The links fall into matchings, in each of which a node meets at most one other. Every round uses each matching with its own probability:
those that hold the network together often, the others seldom. W = I - a (Laplacian of the links in use) with one number a for all.

Source: Wang, Sahu, Joshi & Kar, "MATCHA: speeding up decentralized SGD via matching decomposition sampling" (arXiv:1905.09435).

Shapes: N nodes, E links, M matchings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from p2pfl.errors import TopologyError
from p2pfl.topology.graph import FloatArray, IntArray, Topology

_DECIMALS = 6
_MAX_NODES = 128
_DUALITY_GAP = 1e-9  # of lambda_2
_CENTRES = 14
_NEWTON_STEPS = 50
_QUADRATIC = 0.25  # Newton decrement: below it, full steps square it
_CENTRED = 1e-7
_BISECTIONS = 60


Colouring = list[list[int]]
"""By node and colour the neighbour over the link of that colour, -1 where the colour is free."""


def matchings(graph: Topology) -> list[IntArray]:
    """The links in groups of which no two share a node, (k, 2) each, both ends in rising order.

    As many groups as the largest degree D where the graph is bipartite, at most D + 1 otherwise, and then often D as well. Whole numbers in
    a fixed order: the same on every machine.

    Source: alternating paths after Konig 1916; where they do not do, the fans of Misra & Gries, Information Processing Letters 41, 1992.
    """
    num_colours = int(graph.degrees.max(initial=0)) + 1
    at: Colouring = [[-1] * num_colours for _ in range(graph.num_nodes)]
    once = graph.senders > graph.receivers  # sorted by receiver, which is then the smaller number
    links = np.stack([graph.receivers[once], graph.senders[once]], axis=1)
    for one, other in links.tolist():
        _add(at, one, other)
    colours = np.array([at[one].index(other) for one, other in links.tolist()], dtype=np.int64)
    return [links[colours == colour] for colour in range(num_colours) if np.any(colours == colour)]


def _add(at: Colouring, one: int, other: int) -> None:
    """Find a colour for a new link, giving links that have one another where that must be; the last colour is for fans."""
    of_one, of_other = _free(at[one][:-1]), _free(at[other][:-1])
    for colour in of_one:
        if colour in of_other:
            return _set(at, one, other, colour)
    for mine in of_one:
        for theirs in of_other:
            path = _path(at, other, mine, theirs)
            if path[-1] != one:
                _swap(at, path, mine, theirs)
                return _set(at, one, other, mine)
    return _add_by_fan(at, one, other)


def _add_by_fan(at: Colouring, centre: int, first: int) -> None:
    """Misra & Gries: turn the colours around a node until the new link gets one; the last colour of D + 1 makes it always possible."""
    fan, free = [first], _free(at[first])
    while (following := next((at[centre][c] for c in free if at[centre][c] not in (-1, *fan)), None)) is not None:
        fan.append(following)
        free = _free(at[following])
    mine, theirs = _free(at[centre])[0], free[0]
    _swap(at, _path(at, centre, theirs, mine), theirs, mine)
    # after the swap a shorter fan may be the one whose last node has the colour free
    size = 1
    while at[fan[size - 1]][theirs] != -1:
        colour = at[centre].index(fan[size])
        assert at[fan[size - 1]][colour] == -1  # what Misra & Gries prove
        size += 1
    for nearer, further in pairwise(fan[:size]):
        colour = at[centre].index(further)
        at[further][colour] = -1
        _set(at, centre, nearer, colour)
    _set(at, centre, fan[size - 1], theirs)


def _free(row: Sequence[int]) -> list[int]:
    """Colours that a node's links do not have."""
    return [colour for colour, other in enumerate(row) if other == -1]


def _set(at: Colouring, one: int, other: int, colour: int) -> None:
    at[one][colour], at[other][colour] = other, one


def _path(at: Colouring, start: int, first: int, second: int) -> list[int]:
    """The nodes from one on along links of two colours in turns; the start has no link of the second."""
    path, colour = [start], first
    while (following := at[path[-1]][colour]) != -1:
        path.append(following)
        colour = second if colour == first else first
    return path


def _swap(at: Colouring, path: Sequence[int], first: int, second: int) -> None:
    """The two colours of a path's links change places."""
    for node in path:
        at[node][first], at[node][second] = at[node][second], at[node][first]


def activation(graph: Topology, groups: Sequence[IntArray], budget: float) -> tuple[tuple[float, ...], float]:
    """How often each matching is used, and what a link in use weighs.

    The probabilities (M,) are those that connect best (`most_connected`), the weight a is that for which W then contracts most
    (`best_step`). Both are rounded to millionths: the last bits of an eigenvalue, which differ from machine to machine, do not show in
    them unless a number lies just between two.

    Args:
        graph: the base graph.
        groups: its matchings.
        budget: which part of the matchings is used in a round on average, 0 to 1.

    Raises:
        TopologyError: the graph is too large.
    """
    if graph.num_nodes > _MAX_NODES:
        raise TopologyError(
            f"topology matcha on {graph.name} of {graph.num_nodes} nodes: expected at most {_MAX_NODES}; random-matching takes any number"
        )
    found_M, _ = most_connected(graph.num_nodes, groups, budget)
    unit = 10**_DECIMALS
    millionths_M = np.rint(found_M * unit).astype(np.int64)
    while millionths_M.sum() > round(budget * len(groups) * unit):
        millionths_M[np.argmax(millionths_M)] -= 1
    probabilities = tuple(int(value) / unit for value in millionths_M)
    return probabilities, round(best_step(graph.num_nodes, groups, probabilities), _DECIMALS)


def most_connected(num_nodes: int, groups: Sequence[IntArray], budget: float) -> tuple[FloatArray, float]:
    """The probabilities (M,) for which lambda_2(sum_j p_j L_j) is largest, with sum_j p_j = budget * M and each from 0 to 1.

    A path of Newton's method through the interior (t < lambda_2, 0 < p < 1): where more than one p is best, it ends in the middle of them.

    Returns:
        Them, and a bound that no other choice exceeds: for any Z >= 0 of trace 1 that is orthogonal to the constant vector, lambda_2 is at
        most sum_j p_j tr(Z L_j).
    """
    num_groups = len(groups)
    p_M = np.full(num_groups, float(budget))
    start = float(np.linalg.eigvalsh(laplacian(num_nodes, groups, p_M))[1])
    if budget == 1 or num_groups == 1:
        return p_M, start
    t, bound = start / 2, math.inf
    for weight in np.geomspace(start, _DUALITY_GAP * start / (num_nodes + 2 * num_groups), _CENTRES).tolist():
        p_M, t = _centre(num_nodes, groups, p_M, t, weight)
        bound = min(bound, _bound(*_seen_from(num_nodes, groups, p_M, t), budget))
    return p_M, bound


def _bound(values_K: FloatArray, across_MKK: FloatArray, budget: float) -> float:
    """The most that sum_j p_j tr(Z L_j) can be, Z the inverse of what the barrier sees, of trace 1."""
    gains_M = np.trace(across_MKK, axis1=1, axis2=2) / (1 / values_K).sum()
    bound, left = 0.0, budget * len(gains_M)
    for gain in sorted(gains_M.tolist(), reverse=True):
        bound, left = bound + min(1.0, left) * gain, left - min(1.0, left)
    return bound


def _centre(num_nodes: int, groups: Sequence[IntArray], p_M: FloatArray, t: float, weight: float) -> tuple[FloatArray, float]:
    """The least of -t / weight - log det(L(p) - t, without the constants) - sum log p (1 - p) from a start inside, sum(p) as it is."""
    from scipy.linalg import helmert, solve_triangular

    num_groups, before = len(p_M), math.inf
    sum_zero = np.zeros((num_groups + 1, num_groups))  # what p and t may change by
    sum_zero[:-1, :-1], sum_zero[-1, -1] = helmert(num_groups).T, 1
    for _ in range(_NEWTON_STEPS):
        values_K, across_MKK = _seen_from(num_nodes, groups, p_M, t)
        rows, columns = np.triu_indices(len(values_K))
        twice = np.where(rows == columns, 1.0, math.sqrt(2))
        # the Hessian is roots' roots: its QR keeps the digits that the product, which is 1 / weight**2 large in some directions, would lose
        roots = np.zeros((len(rows) + 2 * num_groups, num_groups + 1))
        roots[: len(rows), :-1] = (across_MKK[:, rows, columns] * twice).T
        roots[: len(rows), -1] = np.where(rows == columns, -1 / values_K[rows], 0)
        roots[len(rows) : -num_groups, :-1], roots[-num_groups:, :-1] = np.diag(1 / p_M), np.diag(-1 / (1 - p_M))
        ones = np.concatenate([(rows == columns).astype(np.float64), np.ones(2 * num_groups)])
        orthogonal, triangle = np.linalg.qr(roots @ sum_zero)
        pull = np.append(np.zeros(num_groups - 1), 1 / weight)
        scaled = orthogonal.T @ ones + solve_triangular(triangle, pull, trans="T")
        decrement = float(np.linalg.norm(scaled))
        if decrement < _QUADRATIC and decrement >= before:
            break  # rounding
        # the damped step of a self-concordant function: it stays inside, and no values have to be compared
        step = sum_zero @ solve_triangular(triangle, scaled) * (1 if decrement < _QUADRATIC else 1 / (1 + decrement))
        p_M, t, before = p_M + step[:-1], float(t + step[-1]), decrement
        if decrement < _CENTRED:
            break
    return p_M, t


def _seen_from(num_nodes: int, groups: Sequence[IntArray], p_M: FloatArray, t: float) -> tuple[FloatArray, FloatArray]:
    """L(p) - t without the constants, K = N - 1: its eigenvalues s (K,), and each L_j in its eigenvectors over sqrt(s s'), (M, K, K)."""
    values_N, vectors_NN = np.linalg.eigh(laplacian(num_nodes, groups, p_M))
    values_K = values_N[1:] - t
    scaled_NK = vectors_NN[:, 1:] / np.sqrt(values_K)
    across = [(difference := scaled_NK[group[:, 0]] - scaled_NK[group[:, 1]]).T @ difference for group in groups]
    return values_K, np.stack(across)


def best_step(num_nodes: int, groups: Sequence[IntArray], probabilities: Sequence[float]) -> float:
    """The a for which `mean_square_left` is least: it is convex in a, so halving by the sign of its slope finds it."""
    linear_NN, square_NN = _moments(num_nodes, groups, probabilities)
    low, high = 0.0, 1.0
    while _slope(linear_NN, square_NN, high) < 0:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(linear_NN, square_NN, middle) < 0 else (low, middle)
    return (low + high) / 2


def mean_square_left(num_nodes: int, groups: Sequence[IntArray], probabilities: Sequence[float], step: float) -> float:
    """rho, the largest eigenvalue of E[W'W] - J: what a round leaves of the squared disagreement, at most and on average.

    With W = I - a sum_j B_j L_j and independent B_j of probability p_j: E[W'W] = I - 2 a L + a**2 (L**2 + 2 sum_j p_j (1 - p_j) L_j) for
    L = sum_j p_j L_j, because L_j**2 = 2 L_j in a matching.
    """
    linear_NN, square_NN = _moments(num_nodes, groups, probabilities)
    return float(np.linalg.eigvalsh(_left(linear_NN, square_NN, step))[-1])


def laplacian(num_nodes: int, groups: Sequence[IntArray], scales: Sequence[float] | FloatArray) -> FloatArray:
    """sum_j scale_j L_j, (N, N)."""
    adjacency_NN = np.zeros((num_nodes, num_nodes))
    for group, scale in zip(groups, scales, strict=True):
        adjacency_NN[group[:, 0], group[:, 1]] = adjacency_NN[group[:, 1], group[:, 0]] = scale
    return np.diag(adjacency_NN.sum(axis=0)) - adjacency_NN


def _moments(num_nodes: int, groups: Sequence[IntArray], probabilities: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """E[sum_j B_j L_j] and E[(sum_j B_j L_j)**2]."""
    p_M = np.asarray(probabilities, dtype=np.float64)
    linear_NN = laplacian(num_nodes, groups, p_M)
    return linear_NN, linear_NN @ linear_NN + 2 * laplacian(num_nodes, groups, p_M * (1 - p_M))


def _left(linear_NN: FloatArray, square_NN: FloatArray, step: float) -> FloatArray:
    n = len(linear_NN)
    return np.asarray(np.eye(n) - 2 * step * linear_NN + step**2 * square_NN - 1 / n)


def _slope(linear_NN: FloatArray, square_NN: FloatArray, step: float) -> float:
    """Slope of the largest eigenvalue in the step."""
    largest_N = np.linalg.eigh(_left(linear_NN, square_NN, step))[1][:, -1]
    return float(largest_N @ (2 * step * square_NN - 2 * linear_NN) @ largest_N)
