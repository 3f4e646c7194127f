"""Partitions of a graph: parts of equal size between which few links run.

Shapes: N nodes, E directed edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.topology.graph import IntArray, Topology

_PASSES = 8
_MOST_REFINED = 10**6  # directed edges in both directions: some ten seconds; of more the first partition is taken
_MOST_SEARCHED = 2 * 10**7  # of more, which only dense graphs have, the nodes' own order is as good as any
_SHARE_IN_VAIN = 0.05  # of all nodes are moved without success before a pass gives up


def partition(topology: Topology, num_parts: int) -> IntArray:
    """Partition a graph: the part of each node, (N,), from 0 to num_parts - 1; sizes differ by one at most, larger ones first.

    Halved again and again: along the nodes' own order or a breadth-first one, whichever cuts less, then nodes are exchanged in pairs.

    Args:
        topology: its directions and weights do not count.
        num_parts: at most N.

    Source: Kernighan & Lin, "An efficient heuristic procedure for partitioning graphs", 1970, with the running gains of Fiduccia &
    Mattheyses, DAC 1982.

    Raises:
        ValueError: more parts than nodes.
    """
    if not 1 <= num_parts <= topology.num_nodes:
        raise ValueError(f"num_parts = {num_parts}: from 1 to the {topology.num_nodes} nodes")
    part_N = np.zeros(topology.num_nodes, dtype=np.int64)
    if num_parts > 1:
        adjacency = topology.adjacency()
        both = (adjacency + adjacency.T).tocsr()
        both.data[:] = 1
        sizes = np.full(num_parts, topology.num_nodes // num_parts)
        sizes[: topology.num_nodes % num_parts] += 1
        _halve(both, np.arange(topology.num_nodes), sizes, 0, part_N)
    return part_N


def num_crossing(topology: Topology, part_N: NDArray[np.int64]) -> int:
    """How many links run between parts; an undirected one counts once."""
    crossing = int((part_N[topology.senders] != part_N[topology.receivers]).sum())
    return crossing if topology.directed else crossing // 2


def _halve(adjacency: Any, nodes: IntArray, sizes: NDArray[np.int64], first: int, part_N: IntArray) -> None:
    """Give the nodes their parts, from `first` on."""
    if len(sizes) == 1:
        part_N[nodes] = first
        return
    left = (len(sizes) + 1) // 2
    right_N = _two_halves(adjacency, int(sizes[:left].sum()))
    for chosen_N, some, number in ((~right_N, sizes[:left], first), (right_N, sizes[left:], first + left)):
        inside = adjacency[chosen_N][:, chosen_N] if len(some) > 1 else None
        _halve(inside, nodes[chosen_N], some, number, part_N)


def _two_halves(adjacency: Any, num_left: int) -> NDArray[np.bool_]:
    """Which nodes are on the right, (N,)."""
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    num_nodes = adjacency.shape[0]
    by_number_N = np.arange(num_nodes) >= num_left
    if adjacency.nnz > _MOST_SEARCHED:
        return by_number_N
    by_breadth_N = np.ones(num_nodes, dtype=np.bool_)
    by_breadth_N[reverse_cuthill_mckee(adjacency, symmetric_mode=True)[:num_left]] = False
    right_N = min(by_number_N, by_breadth_N, key=lambda right_N: _num_crossing(adjacency, right_N))
    return _refined(adjacency, right_N) if adjacency.nnz <= _MOST_REFINED else right_N


def _num_crossing(adjacency: Any, right_N: NDArray[np.bool_]) -> int:
    return int((right_N[adjacency.indices] != np.repeat(right_N, np.diff(adjacency.indptr))).sum())


def _refined(adjacency: Any, right_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pairs exchanged, the best first and also at a loss, as long as a pass leaves less than it found."""
    side: list[int] = right_N.astype(int).tolist()
    starts, others = adjacency.indptr.tolist(), adjacency.indices.tolist()
    around = [others[start:stop] for start, stop in pairwise(starts)]
    for _ in range(_PASSES):
        sign_N = 2 * np.array(side) - 1
        if not _improve(side, (-sign_N * (adjacency @ sign_N)).astype(int).tolist(), around):
            break
    return np.array(side, dtype=np.bool_)


def _improve(side: list[int], gains: list[int], around: list[list[int]]) -> int:
    """A pass that moves each node at most once to the other side, and keeps what was best; how many fewer links are then cut.

    A node's gain is how many fewer links would be cut if it were on the other side.
    """
    is_free, patience = [True] * len(side), max(64, int(_SHARE_IN_VAIN * len(side)))
    queues: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for node, (own, gain) in enumerate(zip(side, gains, strict=True)):
        queues[own].append((-gain, node))
    for queue in queues:
        heapify(queue)
    moved: list[int] = []
    total = best = best_at = 0
    while len(moved) - best_at <= patience:
        pair = [_move_from(source, side, gains, is_free, queues, around) for source in (0, 1)]
        moved += [node for node, _ in filter(None, pair)]
        if pair[0] is None or pair[1] is None:
            break
        total += pair[0][1] + pair[1][1]
        if total > best:
            best, best_at = total, len(moved)
    for node in moved[best_at:]:
        side[node] = 1 - side[node]
    return best


def _move_from(
    source: int, side: list[int], gains: list[int], is_free: list[bool], queues: Sequence[list[tuple[int, int]]], around: list[list[int]]
) -> tuple[int, int] | None:
    """Move the node of the largest gain to the other side; it, and what it gained, or None where all have moved."""
    queue = queues[source]
    while queue:
        less, node = heappop(queue)
        if is_free[node] and -less == gains[node]:  # else it has moved, or its gain is another by now
            break
    else:
        return None
    is_free[node], side[node] = False, 1 - source
    for other in around[node]:
        if is_free[other]:
            gains[other] += 2 if side[other] == source else -2
            heappush(queues[side[other]], (-gains[other], other))
    return node, -less
