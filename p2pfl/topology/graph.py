"""The graph that gossip runs on: one sparse, frozen object for three hospitals and for a million simulated nodes.

Shapes: N nodes, E directed edges, K neighbour slots (the largest degree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2pfl.errors import TopologyError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_MAX_SLOTS = 2 * 10**8


@dataclass(frozen=True, kw_only=True, eq=False)
class Topology:
    """Edges of a graph, each with the weight at its receiver. Nodes are 0 ... N - 1, in the order of their sorted names."""

    name: str

    num_nodes: int

    senders: IntArray
    """(E,) every directed edge once, sorted by (receiver, sender), no self loops; an undirected edge is two entries."""

    receivers: IntArray
    """(E,)"""

    weights: FloatArray | None = None
    """(E,) what the receiver multiplies the sender's message with; None until a rule of `weighted` has set them."""

    names: tuple[str, ...] | None = None
    """Sorted; names[i] is node i. None: only numbers."""

    latency_ms: FloatArray | None = None
    """(E,) one way."""

    bandwidth_mbps: FloatArray | None = None
    """(E,)"""

    masses: FloatArray | None = None
    """(N,) positive: how much each node counts where the mean is to be weighted; None: nobody has said."""

    directed: bool = False
    """Whether what goes one way is not what comes back: a link goes one way only, or weighs differently at its two ends."""

    periods: tuple[int, ...] | None = None
    """Set where nodes are the points of a periodic lattice of this shape (row-major) and edges and weights look the same from every one of
    them: the spectrum is then a Fourier transform and the diameter one search, at any N."""

    def __post_init__(self) -> None:
        order = self.receivers * self.num_nodes + self.senders
        if np.any(np.diff(order) <= 0) or np.any(self.senders == self.receivers):
            raise ValueError(f"edges of {self.name}: expected each once, sorted by (receiver, sender), without self loops")
        if self.names is not None and (len(self.names) != self.num_nodes or any(a >= b for a, b in pairwise(self.names))):
            raise ValueError(f"names of {self.name}: expected {self.num_nodes} different ones, sorted")

    @classmethod
    def from_edges(
        cls,
        name: str,
        num_nodes: int,
        senders: ArrayLike,
        receivers: ArrayLike,
        *,
        directed: bool = False,
        names: Sequence[str] | None = None,
        periods: tuple[int, ...] | None = None,
        masses: ArrayLike | None = None,
        **values: ArrayLike | None,
    ) -> Topology:
        """Edges in any order, each at least once, an undirected one in either direction; self loops are dropped.

        Args:
            name: what the graph is called.
            num_nodes: N.
            senders: one end of each edge; in a directed graph the one that sends.
            receivers: the other end.
            directed: whether messages go one way only.
            names: names[i] is node i; any order, the rows are sorted by them.
            periods: see the field.
            masses: see the field; masses[i] is of names[i].
            values: weights, latency_ms, bandwidth_mbps, one number for each edge given; the first one counts where an edge is repeated.
        """
        ends = np.asarray(senders, dtype=np.int64).ravel(), np.asarray(receivers, dtype=np.int64).ravel()
        masses_N = None if masses is None else np.array(masses, dtype=np.float64)
        if names is not None:
            rank = np.empty(num_nodes, dtype=np.int64)
            order = sorted(range(num_nodes), key=names.__getitem__)
            rank[order] = np.arange(num_nodes)
            ends = rank[ends[0]], rank[ends[1]]
            names = [names[i] for i in order]
            masses_N = None if masses_N is None else masses_N[order]
        # both directions of an edge next to each other, so that the first of repeated edges is the same one in both
        sender, receiver = ends if directed else (np.stack(ends, axis=1).ravel(), np.stack(ends[::-1], axis=1).ravel())
        codes = receiver * num_nodes + sender
        there = {key: np.asarray(value, dtype=np.float64) for key, value in values.items() if value is not None}
        if there:
            codes, first = np.unique(codes, return_index=True)
        else:
            first = None
            codes = np.sort(codes)  # np.unique without an index hashes, several times slower on 10**7 edges
            codes = codes[np.diff(codes, prepend=-1) != 0]
        apart = codes // num_nodes != codes % num_nodes
        origin = first[apart] // (1 if directed else 2) if first is not None else None
        per_edge = {key: value[origin] for key, value in there.items()}
        codes = codes[apart]
        return cls(
            name=name,
            num_nodes=num_nodes,
            senders=codes % num_nodes,
            receivers=codes // num_nodes,
            names=tuple(names) if names is not None else None,
            masses=masses_N,
            directed=directed,
            periods=periods,
            **per_edge,
        )

    @property
    def num_edges(self) -> int:
        """Links between nodes: an undirected edge counts once."""
        return len(self.senders) if self.directed else len(self.senders) // 2

    @cached_property
    def degrees(self) -> IntArray:
        """(N,) from how many nodes each node receives."""
        return np.bincount(self.receivers, minlength=self.num_nodes).astype(np.int64)

    @cached_property
    def self_weights(self) -> FloatArray:
        """(N,) what is left of each row for the node's own message: 1 - the row's sum."""
        row_sums: FloatArray = np.bincount(self.receivers, weights=self._weights, minlength=self.num_nodes).astype(np.float64)
        return 1 - row_sums

    @cached_property
    def _starts(self) -> IntArray:
        """(N + 1,) where each receiver's edges begin."""
        return np.concatenate([[0], np.cumsum(self.degrees)])

    @property
    def _weights(self) -> FloatArray:
        if self.weights is None:
            raise ValueError(f"topology {self.name} has no weights yet: pass it through weighted()")
        return self.weights

    def label(self, node: int) -> str:
        """A node's name, or its number where it has none."""
        return self.names[node] if self.names is not None else str(node)

    def neighbours(self, node: int) -> IntArray:
        """The nodes that a node receives from, sorted."""
        return self.senders[self._starts[node] : self._starts[node + 1]]

    def padded(self) -> tuple[IntArray, FloatArray, NDArray[np.bool_]]:
        """Neighbours, weights and presence as (N, K) tables, in sorted neighbour order; padding is the own index, weight 0, False.

        Raises:
            TopologyError: one node has so many neighbours that N x K numbers are more than a machine should hold.
        """
        num_slots = int(self.degrees.max(initial=0))
        if self.num_nodes * num_slots > _MAX_SLOTS:
            raise TopologyError(
                f"topology {self.name}: {self.num_nodes} nodes x {num_slots} neighbours of one of them is more than {_MAX_SLOTS} slots;"
                " take a graph of smaller largest degree or fewer nodes"
            )
        slots = np.arange(len(self.receivers)) - self._starts[self.receivers]
        index_NK = np.repeat(np.arange(self.num_nodes)[:, None], num_slots, axis=1)
        weights_NK = np.zeros((self.num_nodes, num_slots))
        present_NK = np.zeros((self.num_nodes, num_slots), dtype=np.bool_)
        index_NK[self.receivers, slots] = self.senders
        weights_NK[self.receivers, slots] = self._weights
        present_NK[self.receivers, slots] = True
        return index_NK, weights_NK, present_NK

    def adjacency(self) -> Any:
        """(N, N) float64 as scipy's csr_array, a 1 at (receiver, sender)."""
        return _csr(self, np.ones(len(self.senders)))

    def laplacian(self) -> Any:
        """(N, N) unweighted, as scipy's csr_array: x' L x = 1/2 sum over directed edges of (x_i - x_j)**2, also in a directed graph."""
        from scipy.sparse import diags_array

        outgoing = np.bincount(self.senders, minlength=self.num_nodes)
        adjacency = self.adjacency()
        return (diags_array((self.degrees + outgoing) / 2) - (adjacency + adjacency.T) / 2).tocsr()

    def mixing_matrix(self) -> Any:
        """W (N, N) as scipy's csr_array: one round of gossip is W @ X."""
        from scipy.sparse import diags_array

        return (_csr(self, self._weights) + diags_array(self.self_weights)).tocsr()

    def with_weights(self, weights: ArrayLike, *, invariant: bool = False) -> Topology:
        """Copy with other weights (E,), or one number for all edges.

        Args:
            weights: in the order of the edges here.
            invariant: they look the same from every node of a lattice, so that `periods` still holds.
        """
        array = np.broadcast_to(np.asarray(weights, dtype=np.float64), self.senders.shape).copy()
        return replace(self, weights=array, periods=self.periods if invariant else None)

    def undirected(self) -> Topology:
        """Each edge in both directions, and without weights where the graph was directed."""
        if not self.directed:
            return self
        return Topology.from_edges(self.name, self.num_nodes, self.senders, self.receivers, names=self.names)

    def renamed(self, names: Sequence[str]) -> Topology:
        """Copy with names[i] for node i; where they are not sorted, the nodes are put in the order of their names."""
        if len(names) != self.num_nodes or len(set(names)) != self.num_nodes:
            raise ValueError(f"{len(set(names))} different names: topology {self.name} has {self.num_nodes} nodes")
        if all(a < b for a, b in pairwise(names)):
            return replace(self, names=tuple(names))
        values: dict[str, Any] = {"weights": self.weights, "latency_ms": self.latency_ms, "bandwidth_mbps": self.bandwidth_mbps}
        edges = self.senders, self.receivers
        moved = Topology.from_edges(self.name, self.num_nodes, *edges, directed=True, names=names, masses=self.masses, **values)
        return replace(moved, directed=self.directed)


def check_connected(topology: Topology) -> None:
    """Check that every node's messages reach every other.

    Raises:
        TopologyError: naming two nodes of which one cannot reach the other.
    """
    from scipy.sparse.csgraph import breadth_first_order

    adjacency = topology.adjacency()
    # rows are receivers: the transpose's paths run from senders to receivers
    for matrix, forwards in ((adjacency.T.tocsr(), True), (adjacency, False)):
        reached = np.zeros(topology.num_nodes, dtype=np.bool_)
        reached[breadth_first_order(matrix, 0, directed=True, return_predecessors=False)] = True
        if not reached.all():
            near, far = topology.label(0), topology.label(int(np.flatnonzero(~reached)[0]))
            source, target = (near, far) if forwards else (far, near)
            raise TopologyError(
                f"topology {topology.name} is not connected: nothing from {source} can reach {target}; add an edge on the way between them"
            )


def _csr(topology: Topology, values: FloatArray) -> Any:
    from scipy.sparse import csr_array

    return csr_array((values, topology.senders, topology._starts), shape=(topology.num_nodes, topology.num_nodes))  # noqa: SLF001
