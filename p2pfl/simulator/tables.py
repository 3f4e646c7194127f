"""Neighbour tables: who exchanges with whom in a round, by row and slot.

Shapes: N nodes, K neighbour slots, E directed edges of the round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


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
