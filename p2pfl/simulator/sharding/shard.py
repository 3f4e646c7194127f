"""Which of the network's rows are computed here, and what of a round crosses to and from other ranks.

Shapes: N nodes, M rows of this rank, K neighbour slots, G rows of others that are needed here.
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

from p2pfl.algorithms import Channel
from p2pfl.errors import ConfigError
from p2pfl.simulator.sharding.ranks import Posted, Ranks
from p2pfl.topology import Topology, num_crossing, partition

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One rank's share of the nodes."""

    ranks: Ranks
    rank_N: Ints
    """Which rank has each node."""

    nodes: tuple[Ints, ...]
    """Of each rank, in the order of its rows: first those that never hear from another rank."""

    num_inner: int
    """How many rows of this rank never do."""

    num_crossing: int
    """Links between ranks."""

    @classmethod
    def of(cls, ranks: Ranks, links: Topology) -> Part:
        """What this rank has, the same cut at all of them.

        Args:
            ranks: no more than nodes.
            links: everybody who ever exchanges with whom.
        """
        num_nodes = links.num_nodes
        if ranks.count == 1:
            return cls.cut_so(ranks, links, np.zeros(num_nodes, dtype=np.int64))
        decided = torch.from_numpy(partition(links, ranks.count)) if ranks.is_first else None  # once: libraries may differ between machines
        rank_N = ranks.from_first(
            [decided] * ranks.count if decided is not None else None, torch.empty(num_nodes, dtype=torch.int64)
        ).numpy()
        return cls.cut_so(ranks, links, rank_N)

    @classmethod
    def cut_so(cls, ranks: Ranks, links: Topology, rank_N: Ints) -> Part:
        """What this rank has where everybody's rank is known."""
        hears_N = np.zeros(links.num_nodes, dtype=np.bool_)
        hears_N[links.receivers[rank_N[links.receivers] != rank_N[links.senders]]] = True
        order = np.lexsort((hears_N, rank_N))
        nodes = tuple(np.split(order, np.cumsum(np.bincount(rank_N, minlength=ranks.count))[:-1]))
        num_inner = int((~hears_N[nodes[ranks.rank]]).sum())
        return cls(ranks=ranks, rank_N=rank_N, nodes=nodes, num_inner=num_inner, num_crossing=num_crossing(links, rank_N))

    @property
    def mine(self) -> Ints:
        """The nodes of this rank's rows, (M,)."""
        return self.nodes[self.ranks.rank]

    @property
    def is_all(self) -> bool:
        """Whether every row is here."""
        return self.ranks.count == 1

    @property
    def sizes(self) -> list[int]:
        """How many rows each rank has."""
        return [len(nodes) for nodes in self.nodes]

    @cached_property
    def row_of(self) -> Mapping[int, int]:
        """Where each node of this rank stands."""
        return {int(node): row for row, node in enumerate(self.mine)}

    @cached_property
    def place_of_node(self) -> Ints:
        """Where each node stands at its rank."""
        place_N = np.empty(len(self.rank_N), dtype=np.int64)
        for nodes in self.nodes:
            place_N[nodes] = np.arange(len(nodes))
        return place_N

    @cached_property
    def slices(self) -> list[slice]:
        """Rows that are mixed together: those that need nobody else's, then the others."""
        bounds = sorted({0, self.num_inner, len(self.mine)})
        return [slice(first, last) for first, last in pairwise(bounds)]

    def own(self, values_N: Tensor) -> Tensor:
        """This rank's of what all hold of everybody, (N, ...) -> (M, ...)."""
        return values_N if self.is_all else values_N[torch.from_numpy(self.mine).to(values_N.device)]

    def everybodys(self, values_M: Tensor) -> Tensor:
        """What all ranks then hold of everybody, (M, ...) -> (N, ...), on the CPU."""
        return values_M if self.is_all else self._in_order(self.ranks.everybodys(values_M.cpu(), self.sizes))

    def to_first(self, values_M: Tensor) -> Tensor | None:
        """Everybody's at the first rank, (N, ...), on the CPU; None at the others."""
        if self.is_all:
            return values_M
        parts = self.ranks.to_first(values_M, self.sizes)
        return self._in_order(parts) if parts is not None else None

    def from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Each rank's rows of what the first one has of everybody; the others give None."""
        if self.is_all:
            return dict(tensors or {})
        found = {}
        for name, dtype, shape in self._kinds(tensors):
            parts = [tensors[name][nodes] for nodes in self.nodes] if tensors is not None else None
            found[name] = self.ranks.from_first(parts, torch.empty((len(self.mine), *shape[1:]), dtype=dtype))
        return found

    def whole_from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """All of what the first one has, at every rank; the others give None."""
        if self.is_all:
            return dict(tensors or {})
        found = {}
        for name, dtype, shape in self._kinds(tensors):
            parts = [tensors[name]] * self.ranks.count if tensors is not None else None
            found[name] = self.ranks.from_first(parts, torch.empty(shape, dtype=dtype))
        return found

    def _kinds(self, tensors: Mapping[str, Tensor] | None) -> list[tuple[str, torch.dtype, list[int]]]:
        """Names, dtypes and shapes of what the first rank has."""
        told = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()] if tensors is not None else None
        return [(name, getattr(torch, dtype.removeprefix("torch.")), shape) for name, dtype, shape in self.ranks.told_by_first(told)]

    def record(self) -> dict[str, Any]:
        """What topology.json says of it."""
        return {"ranks": self.ranks.count, "nodes": self.sizes, "crossing": self.num_crossing}

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        whole = parts[0].new_empty((len(self.rank_N), *parts[0].shape[1:]))
        for nodes, values in zip(self.nodes, parts, strict=True):
            whole[torch.from_numpy(nodes)] = values
        return whole


def record_of(links: Topology, num_ranks: int) -> dict[str, Any]:
    """The same before any rank is there.

    Raises:
        ConfigError: there are more ranks than nodes.
    """
    check_enough(links.num_nodes, num_ranks)
    rank_N = partition(links, num_ranks)
    sizes = np.bincount(rank_N, minlength=num_ranks).tolist()
    return {"ranks": num_ranks, "nodes": sizes, "crossing": num_crossing(links, rank_N)}


def check_enough(num_nodes: int, num_ranks: int) -> None:
    """Nothing, if every rank has a node.

    Raises:
        ConfigError: there are more ranks than nodes.
    """
    if num_ranks > num_nodes:
        raise ConfigError(f"nodes = {num_nodes}: {num_ranks} ranks would share them; start at most as many ranks as nodes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """What crosses in one round, seen from one rank."""

    sends: Mapping[int, Tensor]
    """By rank: the rows that it needs."""

    receives: Mapping[int, slice]
    """By rank: where its rows come to lie among the G."""

    single_sends: Mapping[int, tuple[Tensor, Tensor]]
    """By rank: rows and slots, where each neighbour gets a message of its own."""

    single_receives: Mapping[int, slice]
    near_MK: Tensor
    """int64, the row here in each slot; 0 where it is another rank's."""

    far_MK: Tensor
    """int64, which of the G rows it is; -1 where it is here."""

    single_far_MK: Tensor
    """int64, the same among single messages."""

    @classmethod
    def of(cls, part: Part, graph: Topology, index_NK: Ints, reverse_NK: Ints | None, device: torch.device) -> Crossing:
        """That of one round.

        Args:
            part: whose rows are where.
            graph: of the round.
            index_NK: the neighbour in each slot, the own number in padding.
            reverse_NK: in which slot of that neighbour the node itself stands; None: nobody has messages of its own for anybody.
            device: for what is gathered by.
        """
        rank_N, place_N, here = part.rank_N, part.place_of_node, part.ranks.rank
        from_E, to_E = rank_N[graph.senders], rank_N[graph.receivers]
        sends, receives, single_sends, single_receives = {}, {}, {}, {}
        far_N = np.full(len(rank_N), -1)
        single_far_NK = np.full(index_NK.shape if reverse_NK is not None else (len(rank_N), 0), -1)
        num_far = num_single = 0
        for peer in part.ranks.others:
            out_E, in_E = (from_E == here) & (to_E == peer), (from_E == peer) & (to_E == here)
            if out_E.any():
                sends[peer] = torch.from_numpy(place_N[np.unique(graph.senders[out_E])]).to(device)
            if in_E.any():
                nodes = np.unique(graph.senders[in_E])
                far_N[nodes] = num_far + np.arange(len(nodes))
                receives[peer] = slice(num_far, num_far + len(nodes))
                num_far += len(nodes)
            if reverse_NK is None:
                continue
            # edges in the order of (receiver, sender), the same at both ends
            if out_E.any():
                senders, receivers = graph.senders[out_E], graph.receivers[out_E]
                slots = (index_NK[senders] == receivers[:, None]).argmax(axis=1)
                single_sends[peer] = torch.from_numpy(place_N[senders]).to(device), torch.from_numpy(slots).to(device)
            if in_E.any():
                senders, receivers = graph.senders[in_E], graph.receivers[in_E]
                slots = (index_NK[receivers] == senders[:, None]).argmax(axis=1)
                single_far_NK[receivers, slots] = num_single + np.arange(len(senders))
                single_receives[peer] = slice(num_single, num_single + len(senders))
                num_single += len(senders)
        index_MK = index_NK[part.mine]
        far_MK = far_N[index_MK]
        return cls(
            sends=sends,
            receives=receives,
            single_sends=single_sends,
            single_receives=single_receives,
            near_MK=torch.from_numpy(np.where(rank_N[index_MK] == here, place_N[index_MK], 0)).to(device),
            far_MK=torch.from_numpy(far_MK).to(device),
            single_far_MK=torch.from_numpy(single_far_NK[part.mine]).to(device),
        )

    @property
    def num_rows(self) -> int:
        """G, of all ranks."""
        return max((place.stop for place in self.receives.values()), default=0)

    @property
    def num_single(self) -> int:
        """How many messages for one neighbour alone come here."""
        return max((place.stop for place in self.single_receives.values()), default=0)


class Mail:
    """One exchange's messages between ranks.

    Args:
        ranks: to and from whom.
        crossing: which rows.
        channels: the algorithm's.
        sent: this rank's rows, (M, ...), by channel.
    """

    def __init__(self, ranks: Ranks, crossing: Crossing, channels: Mapping[str, Channel], sent: Mapping[str, Tensor]) -> None:
        self._far: dict[str, Tensor] = {}
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        for name in sorted(sent):
            if channels[name].encodes is not None:
                continue  # an inbox shows the value, never what encodes it
            tensor, single = sent[name], channels[name].per_edge
            for peer, (rows, slots) in crossing.single_sends.items() if single else ():
                sends.setdefault(peer, []).append(tensor[rows, slots])
            for peer, rows in crossing.sends.items() if not single else ():
                sends.setdefault(peer, []).append(tensor.index_select(0, rows))
            shape = (crossing.num_single, *tensor.shape[2:]) if single else (crossing.num_rows, *tensor.shape[1:])
            self._far[name] = tensor.new_empty(shape)
            for peer, place in (crossing.single_receives if single else crossing.receives).items():
                receives.setdefault(peer, []).append(self._far[name][place])
        self._posted = ranks.post(sends, receives)

    def far(self, channel: str) -> Tensor:
        """What other ranks' rows sent, (G, ...); waits for it."""
        self._posted.arrived()
        return self._far[channel]

    def done(self) -> None:
        """Wait until everything has gone and come."""
        self._posted.done()


class Columns:
    """Rows that cross, a block of columns at a time: the next block travels while one is mixed.

    Args:
        ranks: to and from whom.
        crossing: which rows.
        num_inner: how many rows here, the first ones, need none of them.
    """

    def __init__(self, ranks: Ranks, crossing: Crossing, num_inner: int) -> None:
        self._ranks, self._crossing = ranks, crossing
        self.num_rows, self.num_inner = crossing.num_rows, num_inner
        self._on_their_way: list[Posted] = []
        self._left: list[Posted] = []

    def post(self, block_MW: Tensor, into_GW: Tensor) -> None:
        """Send what others need of these columns, and take what comes of them."""
        sends = {peer: [block_MW.index_select(0, rows)] for peer, rows in self._crossing.sends.items()}
        receives = {peer: [into_GW[place]] for peer, place in self._crossing.receives.items()}
        self._on_their_way.append(self._ranks.post(sends, receives))

    def arrived(self) -> None:
        """Wait for the first columns that were not waited for yet."""
        self.done()
        posted = self._on_their_way.pop(0)
        posted.arrived()
        self._left.append(posted)

    def done(self) -> None:
        """Wait until what was sent with columns that have arrived has gone."""
        while self._left:
            self._left.pop().done()
