"""How fast a graph mixes: eigenvalues of mixing matrix and Laplacian, diameter, predicted rounds. Computed only when asked for.

Eigenvalues are those of a Laplacian in every case, I - W for the mixing matrix: its smallest is the gap itself and keeps the digits that
1 - lambda_2 would lose.

Shapes: N nodes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import TopologyError
from p2pfl.topology.graph import IntArray, Topology
from p2pfl.topology.schedule import ACCURACY, MOST_MULTIPLIED, Schedule, disagreement_left

_MAX_DENSE = 400
_MAX_DENSE_DIRECTED = 2000
_ZERO = 1e-12
_BEYOND = 1e-9  # of a round: rounding is not one more
_NUM_SINGLE_SEARCHES = 64
_BATCH_WORDS = 16
_MAX_SEARCHED = 20_000


def spectral_gap(topology: Topology) -> float:
    """1 - max(|lambda_2|, |lambda_min|): the fraction by which a round reduces disagreement at least; 0 or less: nodes never agree."""
    return float(min(min(value, 2 - value) for value in _one_minus_w(topology)))


def laplacian_extremes(topology: Topology) -> tuple[float, float]:
    """lambda_2(L) and lambda_max(L) of the unweighted Laplacian, kept with the topology."""
    key = "_laplacian_extremes"
    if key not in vars(topology):
        values = _extremes(topology, topology.laplacian())
        vars(topology)[key] = (float(values.min()), float(values.max()))
    found: tuple[float, float] = vars(topology)[key]
    return found


def is_spectrum_quick(topology: Topology) -> bool:
    """Whether its eigenvalues take seconds: lattices of any size, other graphs up to 20,000 nodes."""
    return topology.periods is not None or topology.num_nodes <= _MAX_SEARCHED


def rounds_to(topology: Topology, accuracy: float = ACCURACY) -> int | None:
    """Rounds of plain gossip after which the disagreement is at most *accuracy* times what it was, for the worst start; None: never."""
    return rounds_at(spectral_gap(topology), accuracy)


def rounds_at(gap: float, accuracy: float) -> int | None:
    """Rounds after which (1 - gap)**rounds is at most *accuracy*; None: never."""
    if gap <= _ZERO:
        return None
    if gap >= 1 - _ZERO:
        return 1
    return math.ceil(math.log(accuracy) / math.log1p(-gap) - _BEYOND)


def steps_from(topology: Topology, node: int) -> IntArray:
    """(N,) links between a node and each one, whichever way they go; -1: not reachable."""
    return _distances(topology.adjacency() + topology.adjacency().T, node)


def diameter(topology: Topology) -> int:
    """The most steps between two nodes, exact.

    A lattice takes one search, a graph with an end and a middle a few. A random graph takes N of them, 64 x 16 at a time: seconds at 10**4
    nodes, minutes at 10**5; `diameter_bounds` is for larger ones.

    Raises:
        TopologyError: the graph is not connected.
    """
    low, high, candidates = _bounded_diameter(topology)
    if low == high:
        return low
    return max(low, _largest_distance(topology, candidates))


def diameter_bounds(topology: Topology) -> tuple[int, int]:
    """The diameter is at least the first and at most the second number; at most 64 searches, so also at 10**6 nodes."""
    low, high, _ = _bounded_diameter(topology)
    return low, high


def describe(topology: Topology) -> dict[str, Any]:
    """Facts for ``p2pfl topology show --json``.

    rounds_to_1e-6 is None where gossip never agrees; diameter is None above 20,000 nodes where a few searches do not settle it.
    """
    slow, fast = (1 - value for value in _one_minus_w(topology))
    gap = spectral_gap(topology)
    low, high = diameter_bounds(topology)
    settled = low == high
    return {
        "nodes": topology.num_nodes,
        "edges": topology.num_edges,
        "degree": {"min": int(topology.degrees.min()), "mean": float(topology.degrees.mean()), "max": int(topology.degrees.max())},
        "diameter": diameter(topology) if settled or topology.num_nodes <= _MAX_SEARCHED else None,
        "lambda_2": slow,
        "lambda_min": fast,
        "spectral_gap": gap,
        "rounds_to_1e-6": rounds_at(gap, ACCURACY),
    }


def describe_rounds(schedule: Schedule) -> dict[str, Any]:
    """Facts for ``p2pfl topology show --json`` for a graph that changes, from its rounds themselves.

    degree is of one round; spectral_gap is 1 - (what a round leaves of the disagreement, on average); exact_after is None where no number
    of rounds gives everybody the exact mean. Those of random rounds are those of this schedule's seed.

    Raises:
        TopologyError: there are too many nodes to multiply their matrices.
    """
    if schedule.num_nodes > MOST_MULTIPLIED:
        raise TopologyError(
            f"topology {schedule.name} of {schedule.num_nodes} nodes: its rounds are multiplied for at most {MOST_MULTIPLIED}"
        )
    left = list(disagreement_left(schedule))
    sent = np.array([np.bincount(schedule.at(number).senders, minlength=schedule.num_nodes) for number in range(len(left))])
    rate = 0.0 if schedule.exact_after is not None else left[-1] ** (1 / len(left))
    return {
        "nodes": schedule.num_nodes,
        "edges": schedule.union().num_edges,
        "degree": {"min": int(sent.min()), "mean": float(sent.mean()), "max": int(sent.max())},
        "diameter": None,
        "lambda_2": None,
        "lambda_min": None,
        "spectral_gap": 1 - rate,
        "rounds_to_1e-6": len(left) if left[-1] <= ACCURACY else None,
        "exact_after": schedule.exact_after,
        "random": schedule.period is None,
        **schedule.facts,
        **schedule.agreed,
    }


def _one_minus_w(topology: Topology) -> tuple[float, float]:
    """1 - lambda_2 and 1 - lambda_min of W, kept with the topology: it is frozen, and so are they."""
    key = "_one_minus_w"
    if key not in vars(topology):
        from scipy.sparse import eye_array

        values = _extremes(topology, (eye_array(topology.num_nodes) - topology.mixing_matrix()).tocsr())
        largest_modulus = np.abs(1 - values).max()
        slow = 1 - largest_modulus if topology.directed else values.min()
        vars(topology)[key] = (float(slow), float(values.real.max()))
    found: tuple[float, float] = vars(topology)[key]
    return found


def _extremes(topology: Topology, laplacian: Any) -> NDArray[Any]:
    """Eigenvalues of a Laplacian (N, N) without the one of the constant vector; the extreme ones at least, of a large graph no others."""
    n = topology.num_nodes
    symmetric = not topology.directed or abs(laplacian - laplacian.T).max() < _ZERO
    if topology.periods is not None:
        values = np.fft.fftn(laplacian[[0]].toarray().reshape(topology.periods)).ravel()[1:]
        assert not symmetric or np.abs(values.imag).max(initial=0) < 1e-9  # noqa: PLR2004  # a symmetric matrix has real eigenvalues
        return np.asarray(values.real) if symmetric else values
    if n <= (_MAX_DENSE if symmetric else _MAX_DENSE_DIRECTED):
        dense = laplacian.toarray()
        values = np.linalg.eigvalsh(dense) if symmetric else np.linalg.eigvals(dense)
        return np.delete(values, np.argmin(np.abs(values)))
    if symmetric:
        return np.array([_smallest(laplacian), _largest(laplacian)])
    return _directed_extremes(laplacian)


def _start(n: int) -> NDArray[np.float64]:
    """Start vector of every run, always the same, so that the digits are the same too."""
    return np.random.default_rng(0).standard_normal(n)


def _is_thin(laplacian: Any) -> bool:
    """Whether a graph is long for its size, like a path or a grid.

    Its factors are sparse and its gap is narrow, so that inverting is quick and Lanczos is not; a random graph is the opposite.
    """
    n = laplacian.shape[0]
    longest: int = _distances(laplacian, 0).max().item()
    return longest >= math.isqrt(n)


def _smallest(laplacian: Any) -> float:
    """The smallest eigenvalue besides that of the constant vector."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = laplacian.shape[0]
    scale = 2 * laplacian.diagonal().max()
    if _is_thin(laplacian):
        values = eigsh(laplacian.tocsc(), k=2, sigma=-scale * _ZERO, v0=_start(n), tol=1e-9, return_eigenvectors=False)
        return float(np.delete(values, np.argmin(np.abs(values)))[0])

    def lifted(x: NDArray[np.float64]) -> Any:
        return laplacian @ x + scale * x.mean()  # the constant vector goes to the other end

    return float(_lanczos(LinearOperator((n, n), matvec=lifted, dtype=np.float64), "SA"))


def _largest(laplacian: Any) -> float:
    from scipy.sparse.linalg import eigsh

    n = laplacian.shape[0]
    if _is_thin(laplacian):
        beyond = abs(laplacian).sum(axis=1).max() * (1 + _ZERO)  # Gershgorin: no eigenvalue is larger
        return float(eigsh(laplacian.tocsc(), k=1, sigma=beyond, v0=_start(n), tol=1e-9, return_eigenvectors=False)[0])
    return float(_lanczos(laplacian, "LA"))


def _lanczos(matrix: Any, which: str) -> float:
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    n = matrix.shape[0]
    try:
        return float(eigsh(matrix, k=1, which=which, v0=_start(n), ncv=40, maxiter=500, tol=1e-10, return_eigenvectors=False)[0])
    except ArpackNoConvergence as error:
        raise TopologyError(f"a graph of {n} nodes whose eigenvalues do not converge: it mixes too slowly; take fewer nodes") from error


def _directed_extremes(laplacian: Any) -> NDArray[Any]:
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import ArpackNoConvergence, eigs

    n = laplacian.shape[0]
    mixing = eye_array(n) - laplacian
    try:
        by_modulus = eigs(mixing, k=2, which="LM", v0=_start(n), ncv=60, return_eigenvectors=False)
        by_real_part = eigs(mixing, k=1, which="SR", v0=_start(n), ncv=60, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise TopologyError(
            f"a directed graph of {n} nodes: its eigenvalues do not converge; take at most {_MAX_DENSE_DIRECTED} nodes"
        ) from error
    return 1 - np.append(np.delete(by_modulus, np.argmin(np.abs(by_modulus - 1))), by_real_part)


def _distances(adjacency: Any, source: int) -> IntArray:
    """(N,) steps from a node to each other one along a csr adjacency; -1: not reachable."""
    from scipy.sparse.csgraph import breadth_first_order

    n = adjacency.shape[0]
    order, before = breadth_first_order(adjacency, source, directed=True)
    steps = np.full(n, -1, dtype=np.int64)
    steps[order] = 1
    steps[source] = 0
    parent = np.where(before >= 0, before, np.arange(n)).astype(np.int64)
    # pointer doubling: after k passes a node knows its steps to its 2**k-th ancestor, which has none of its own once it is the source
    while np.any(parent[order] != source):
        steps[order] += np.where(order == source, 0, steps[parent[order]])
        parent = parent[parent]
    return steps


def _bounded_diameter(topology: Topology) -> tuple[int, int, IntArray]:
    """Bounds on the diameter and the nodes that may still be far from some other, kept with the topology."""
    key = "_bounded_diameter"
    if key not in vars(topology):
        vars(topology)[key] = _search_diameter(topology)
    found: tuple[int, int, IntArray] = vars(topology)[key]
    return found


def _search_diameter(topology: Topology) -> tuple[int, int, IntArray]:
    """Search for bounds on the diameter and for the nodes that may still be far from some other.

    Source: Takes & Kosters, "Determining the diameter of small world networks", CIKM 2011: a search from v bounds every w's eccentricity,
    max(d, ecc - d) <= ecc(w) <= ecc + d, d the distance of v and w.
    """
    n = topology.num_nodes
    adjacency = topology.adjacency()
    steps = _distances(adjacency, 0)
    if np.any(steps < 0):
        raise TopologyError(f"topology {topology.name} is not connected: it has no diameter")
    if topology.periods is not None:
        return int(steps.max()), int(steps.max()), np.zeros(0, dtype=np.int64)
    if topology.directed:
        return int(steps.max()), n - 1, np.arange(n)
    lower, upper = np.zeros(n, dtype=np.int64), np.full(n, n, dtype=np.int64)
    candidates, low = np.arange(n), 0
    for search in range(_NUM_SINGLE_SEARCHES):
        if search:
            node = candidates[np.argmin(lower[candidates]) if search % 2 == 0 else np.argmax(upper[candidates])]
            steps = _distances(adjacency, int(node))
        eccentricity = steps.max()
        lower = np.maximum(lower, np.maximum(steps, eccentricity - steps))
        upper = np.minimum(upper, eccentricity + steps)
        low = max(low, int(lower.max()))
        candidates = np.flatnonzero((upper > low) & (lower < upper))
        if not len(candidates):
            return low, low, candidates
    return low, int(upper.max()), candidates


def _largest_distance(topology: Topology, sources: IntArray) -> int:
    """The most steps from any of some nodes to any other: searches from many nodes at once, one bit for each."""
    largest = 0
    for first in range(0, len(sources), 64 * _BATCH_WORDS):
        batch = sources[first : first + 64 * _BATCH_WORDS]
        bits = np.arange(len(batch))
        reached = np.zeros((topology.num_nodes, _BATCH_WORDS), dtype=np.uint64)
        np.bitwise_or.at(reached, (batch, bits // 64), np.uint64(1) << (bits % 64).astype(np.uint64))
        everybody = np.bitwise_or.reduce(reached, axis=0)
        starts = topology._starts[:-1]  # noqa: SLF001
        steps = 0
        while not np.array_equal(np.bitwise_and.reduce(reached, axis=0), everybody):
            reached |= np.bitwise_or.reduceat(reached[topology.senders], starts, axis=0)
            steps += 1
        largest = max(largest, steps)
    return largest
