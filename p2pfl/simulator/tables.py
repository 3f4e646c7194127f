"""Neighbour tables: who exchanges with whom in a round, by row and slot.

Shapes: N nodes, K neighbour slots, E directed edges of the round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.experiment.plan import Plan
from p2pfl.topology import Topology

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tables:
    """Neighbours of every row in one round."""

    index_NK: Tensor
    """int64, the neighbour in each slot."""
    linked_NK: Tensor
    """bool, whether it sends in this round."""
    weights_NK: Tensor
    self_weights_N: Tensor
    both_NK: Tensor
    """bool, whether the edge goes both ways in this round."""
    reverse_NK: Tensor
    """int64, the slot in which the neighbour has this node; 0 where the edge goes one way."""
    num_messages_N: Tensor
    """int64, to how many each node sends."""
    receivers_E: Tensor
    slots_E: Tensor
    """Places of the round's edges, in their order, in these tables."""

    def edges(self) -> Iterator[tuple[int, int, int]]:
        """Receiver, slot and sender of every edge."""
        for i, k in self.linked_NK.nonzero().tolist():
            yield i, k, int(self.index_NK[i, k])


class NeighbourTables:
    """Neighbours of every row, by round; lossy ones, whose messages may stay out, are looked up from both ends."""

    def __init__(self, plan: Plan, device: torch.device, *, is_lossy: bool) -> None:
        schedule, algorithm = plan.schedule, plan.recipe.algorithm
        self._schedule, self._dtype, self._device = schedule, plan.layout.dtype, device
        self._splits_mass, self._is_lossy = algorithm.splits_mass, is_lossy
        self._fixed_index_NK: Ints | None = None  # the same in every round
        self.reverse_NK: Tensor | None = None
        """int64, in fixed slots: the slot in which the neighbour has this node."""
        if "fixed slots" in algorithm.requires:
            links = plan.topology.undirected()
            self._fixed_index_NK = index_NK = links.with_weights(0.0).padded()[0]
            self.reverse_NK = torch.from_numpy(_slot_of(links, index_NK, np.arange(len(index_NK))[:, None])).to(device)
        self._cached = lru_cache(maxsize=schedule.period or 4)(self._make)

    def at(self, round: int) -> Tables:
        """Tables of a round."""
        return self._cached(round % self._schedule.period if self._schedule.period else round)

    def _make(self, round: int) -> Tables:
        graph = self._schedule.at(round)
        assert graph.weights is not None
        if self._fixed_index_NK is None:
            index_NK, weights_NK, linked_NK = graph.padded()
            slots_E = linked_NK.nonzero()[1]
        else:
            index_NK = self._fixed_index_NK
            weights_NK, linked_NK = np.zeros(index_NK.shape), np.zeros(index_NK.shape, dtype=np.bool_)
            slots_E = (index_NK[graph.receivers] == graph.senders[:, None]).argmax(axis=1)
            weights_NK[graph.receivers, slots_E], linked_NK[graph.receivers, slots_E] = graph.weights, True
        codes = graph.receivers * graph.num_nodes + graph.senders
        back_NK = index_NK * graph.num_nodes + np.arange(graph.num_nodes)[:, None]
        both_NK = linked_NK & (np.isin(back_NK, codes) if graph.directed else True)
        reverse_NK = np.zeros_like(index_NK)
        if self._is_lossy:
            back_E = np.searchsorted(codes, graph.senders * graph.num_nodes + graph.receivers).clip(max=max(len(codes) - 1, 0))
            reverse_NK[graph.receivers, slots_E] = slots_E[back_E]
            reverse_NK *= both_NK
        given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
        kept_N = 1 - given_N if self._splits_mass else graph.self_weights
        return Tables(
            index_NK=torch.from_numpy(index_NK).to(self._device),
            linked_NK=torch.from_numpy(linked_NK).to(self._device),
            weights_NK=torch.from_numpy(weights_NK).to(self._device, self._dtype),
            self_weights_N=torch.from_numpy(np.asarray(kept_N, dtype=np.float64)).to(self._device, self._dtype),
            both_NK=torch.from_numpy(both_NK).to(self._device),
            reverse_NK=torch.from_numpy(reverse_NK).to(self._device),
            num_messages_N=torch.from_numpy(np.bincount(graph.senders, minlength=graph.num_nodes)),
            receivers_E=torch.from_numpy(graph.receivers).to(self._device),
            slots_E=torch.from_numpy(slots_E).to(self._device),
        )


def _slot_of(links: Topology, receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
    """Slot of a sender at a receiver; 0 where they are no neighbours."""
    receivers, senders = np.broadcast_arrays(receivers, senders)
    codes = links.receivers * links.num_nodes + links.senders
    position = np.searchsorted(codes, receivers * links.num_nodes + senders).clip(max=max(len(codes) - 1, 0))
    starts = np.concatenate([[0], np.cumsum(links.degrees)])
    found = codes[position] == receivers * links.num_nodes + senders
    return np.where(found, position - starts[receivers], 0)
