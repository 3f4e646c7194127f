"""The shard of a rank: which of the network's rows are computed there.

Shapes: N nodes, M rows of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.simulator.sharding.ranks import Ranks
from p2pfl.topology import Topology, num_crossing, partition

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The nodes whose rows one rank computes, and where all others are."""

    ranks: Ranks
    rank_N: Ints
    """Which rank has each node."""
    nodes: tuple[Ints, ...]
    """Nodes of each rank, in the order of its rows: first those that never hear from another rank."""
    num_inner: int
    """How many rows of this rank never hear from another rank."""
    num_crossing: int
    """Number of edges between ranks."""

    @classmethod
    def of(cls, ranks: Ranks, links: Topology) -> Shard:
        """Shard of this rank, by one partition of all `links` that are ever used, for no more ranks than nodes."""
        num_nodes = links.num_nodes
        if ranks.count == 1:
            everybody_N = np.arange(num_nodes)
            return cls(ranks=ranks, rank_N=np.zeros_like(everybody_N), nodes=(everybody_N,), num_inner=num_nodes, num_crossing=0)
        decided = torch.from_numpy(partition(links, ranks.count)) if ranks.is_first else None  # once: libraries may differ between machines
        rank_N = ranks.scatter([decided] * ranks.count if decided is not None else None, torch.empty(num_nodes, dtype=torch.int64)).numpy()
        return cls.from_partition(ranks, links, rank_N)

    @classmethod
    def from_partition(cls, ranks: Ranks, links: Topology, rank_N: Ints) -> Shard:
        """Shard of this rank where the rank of every node is known."""
        hears_N = np.zeros(links.num_nodes, dtype=np.bool_)
        hears_N[links.receivers[rank_N[links.receivers] != rank_N[links.senders]]] = True
        order = np.lexsort((hears_N, rank_N))
        nodes = tuple(np.split(order, np.cumsum(np.bincount(rank_N, minlength=ranks.count))[:-1]))
        num_inner = int((~hears_N[nodes[ranks.rank]]).sum())
        return cls(ranks=ranks, rank_N=rank_N, nodes=nodes, num_inner=num_inner, num_crossing=num_crossing(links, rank_N))

    @property
    def mine(self) -> Ints:
        """Nodes of this rank's rows, (M,)."""
        return self.nodes[self.ranks.rank]

    @property
    def is_all(self) -> bool:
        """Whether this rank computes every row."""
        return self.ranks.count == 1

    @property
    def sizes(self) -> list[int]:
        """How many rows each rank has."""
        return [len(nodes) for nodes in self.nodes]

    @cached_property
    def row_of(self) -> Mapping[int, int]:
        """Row of each node of this rank."""
        return {int(node): row for row, node in enumerate(self.mine)}

    @cached_property
    def place_of_node(self) -> Ints:
        """Row of each node at its own rank, (N,)."""
        place_N = np.empty(len(self.rank_N), dtype=np.int64)
        for nodes in self.nodes:
            place_N[nodes] = np.arange(len(nodes))
        return place_N

    @cached_property
    def slices(self) -> list[slice]:
        """Rows that are mixed together: those that need no other rank's rows, then the others."""
        bounds = sorted({0, self.num_inner, len(self.mine)})
        return [slice(first, last) for first, last in pairwise(bounds)]

    def local(self, values_N: Tensor) -> Tensor:
        """Select this rank's rows of values of all nodes, (N, ...) -> (M, ...)."""
        return values_N if self.is_all else values_N[torch.from_numpy(self.mine).to(values_N.device)]

    def all_gather(self, values_M: Tensor) -> Tensor:
        """Gather the rows of all ranks at every rank, (M, ...) -> (N, ...), on the CPU."""
        return values_M if self.is_all else self._in_order(self.ranks.all_gather(values_M.cpu(), self.sizes))

    def gather(self, values_M: Tensor) -> Tensor | None:
        """Gather the rows of all ranks at the first one, (N, ...), on the CPU; None at the others."""
        if self.is_all:
            return values_M
        parts = self.ranks.gather(values_M, self.sizes)
        return self._in_order(parts) if parts is not None else None

    def scatter(self, tensors: Mapping[str, Tensor] | None, whole: tuple[str, ...]) -> dict[str, Tensor]:
        """Give each rank its rows of the first rank's tensors of all nodes, and all of those whose names begin as one in `whole`.

        The other ranks pass None.
        """
        if self.is_all:
            return dict(tensors or {})
        told = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()] if tensors is not None else None
        found = {}
        for name, dtype, shape in self.ranks.broadcast_object(told):
            is_whole = name.startswith(whole)
            parts = [tensors[name] if is_whole else tensors[name][nodes] for nodes in self.nodes] if tensors is not None else None
            own = torch.empty(shape if is_whole else [len(self.mine), *shape[1:]], dtype=getattr(torch, dtype.removeprefix("torch.")))
            found[name] = self.ranks.scatter(parts, own)
        return found

    def record(self) -> dict[str, Any]:
        """Sizes of the shards, as topology.json holds them."""
        return {"ranks": self.ranks.count, "nodes": self.sizes, "crossing": self.num_crossing}

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        whole = parts[0].new_empty((len(self.rank_N), *parts[0].shape[1:]))
        for nodes, values in zip(self.nodes, parts, strict=True):
            whole[torch.from_numpy(nodes)] = values
        return whole


def partition_record(links: Topology, num_ranks: int) -> dict[str, Any]:
    """Sizes of the shards before any rank has started, as topology.json holds them.

    Raises:
        ConfigError: there are more ranks than nodes.
    """
    check_enough(links.num_nodes, num_ranks)
    return Shard.from_partition(Ranks(count=num_ranks), links, partition(links, num_ranks)).record()


def check_enough(num_nodes: int, num_ranks: int) -> None:
    """Refuse more ranks than nodes.

    Raises:
        ConfigError: there are more ranks than nodes.
    """
    if num_ranks > num_nodes:
        raise ConfigError(f"nodes = {num_nodes}: {num_ranks} ranks would share them; start at most as many ranks as nodes")
