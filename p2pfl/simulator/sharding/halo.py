"""The halo of a shard: rows of other ranks that its own rows hear from, and how they travel.

Shapes: N nodes, M rows of this rank, K neighbour slots, G rows of other ranks that are needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2pfl.algorithms import Channel
from p2pfl.simulator.sharding.ranks import PendingTransfers, Ranks
from p2pfl.simulator.sharding.shard import Ints, Shard
from p2pfl.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class HaloPlan:
    """Rows that one rank sends to and receives from other ranks in one round."""

    sends: Mapping[int, Tensor]
    """By rank: the rows here that it needs."""
    receives: Mapping[int, slice]
    """By rank: the places of its rows among the G."""
    single_sends: Mapping[int, tuple[Tensor, Tensor]]
    """By rank: rows and slots, where each neighbour gets a message of its own."""
    single_receives: Mapping[int, slice]
    """By rank: the places of its single messages."""
    near_MK: Tensor
    """int64, the row here in each slot; 0 where it is another rank's."""
    far_MK: Tensor
    """int64, which of the G rows it is; -1 where it is here."""
    single_far_MK: Tensor
    """int64, which of the single messages it is; -1 where it is here."""
    num_rows: int
    """G, the rows of all other ranks that are needed here."""
    num_single: int
    """Number of messages for one neighbour alone that come here."""

    @classmethod
    def of(cls, shard: Shard, graph: Topology, index_NK: Ints, reverse_NK: Ints | None, device: torch.device) -> HaloPlan:
        """Plan of one round, from the neighbour in each slot (the own number in padding) and in which of its slots the node itself stands.

        `reverse_NK` is None where nobody has messages of its own for anybody.
        """
        rank_N, place_N, here = shard.rank_N, shard.place_of_node, shard.ranks.rank
        from_E, to_E = rank_N[graph.senders], rank_N[graph.receivers]
        sends, receives, single_sends, single_receives = {}, {}, {}, {}
        far_N = np.full(len(rank_N), -1)
        single_far_NK = np.full(index_NK.shape if reverse_NK is not None else (len(rank_N), 0), -1)
        num_far = num_single = 0
        for peer in shard.ranks.others:
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
        index_MK = index_NK[shard.mine]
        far_MK = far_N[index_MK]
        return cls(
            sends=sends,
            receives=receives,
            single_sends=single_sends,
            single_receives=single_receives,
            near_MK=torch.from_numpy(np.where(rank_N[index_MK] == here, place_N[index_MK], 0)).to(device),
            far_MK=torch.from_numpy(far_MK).to(device),
            single_far_MK=torch.from_numpy(single_far_NK[shard.mine]).to(device),
            num_rows=num_far,
            num_single=num_single,
        )


class HaloExchange:
    """Messages of one exchange that travel between ranks: what this rank's rows have sent, (M, ...), by channel."""

    def __init__(self, ranks: Ranks, plan: HaloPlan, channels: Mapping[str, Channel], sent: Mapping[str, Tensor]) -> None:
        self._plan, self._channels = plan, channels
        self._far: dict[str, Tensor] = {}
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        for name in sorted(sent):
            if channels[name].encodes is not None:
                continue  # an inbox shows the value, never what encodes it
            tensor, single = sent[name], channels[name].per_edge
            for peer, (rows, slots) in plan.single_sends.items() if single else ():
                sends.setdefault(peer, []).append(tensor[rows, slots])
            for peer, rows in plan.sends.items() if not single else ():
                sends.setdefault(peer, []).append(tensor.index_select(0, rows))
            shape = (plan.num_single, *tensor.shape[2:]) if single else (plan.num_rows, *tensor.shape[1:])
            self._far[name] = tensor.new_empty(shape)
            for peer, place in (plan.single_receives if single else plan.receives).items():
                receives.setdefault(peer, []).append(self._far[name][place])
        self._transfers = ranks.post(sends, receives)

    def fill(self, theirs: Tensor, channel: str, rows: Tensor | slice, k: int) -> None:
        """Put what other ranks' rows sent, once it is here, among the messages of some rows' k-th neighbours."""
        far = (self._plan.single_far_MK if self._channels[channel].per_edge else self._plan.far_MK)[rows, k]
        away = (far >= 0).nonzero().squeeze(-1)
        if len(away):
            self._transfers.arrived()
            theirs[away] = self._far[channel][far[away]]

    def done(self) -> None:
        """Wait until everything has gone and come."""
        self._transfers.done()


class BlockedExchange:
    """Exchange of the halo's rows, a block of columns at a time: the next block travels while one is mixed.

    The first `num_inner` of the rows here need none of them.
    """

    def __init__(self, ranks: Ranks, plan: HaloPlan, num_inner: int) -> None:
        self._ranks, self._plan = ranks, plan
        self.num_rows, self.num_inner = plan.num_rows, num_inner
        self._on_their_way: list[PendingTransfers] = []
        self._left: list[PendingTransfers] = []

    def post(self, block_MW: Tensor, into_GW: Tensor) -> None:
        """Start to send what others need of these columns, and to receive theirs."""
        sends = {peer: [block_MW.index_select(0, rows)] for peer, rows in self._plan.sends.items()}
        receives = {peer: [into_GW[place]] for peer, place in self._plan.receives.items()}
        self._on_their_way.append(self._ranks.post(sends, receives))

    def arrived(self) -> None:
        """Wait until the oldest columns on their way are here."""
        self.done()
        transfers = self._on_their_way.pop(0)
        transfers.arrived()
        self._left.append(transfers)

    def done(self) -> None:
        """Wait until what was sent with columns that have arrived has gone."""
        while self._left:
            self._left.pop().done()
