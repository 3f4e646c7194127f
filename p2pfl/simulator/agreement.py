"""The agreement to stop: consensus counters and stop rounds of all nodes, as the messages of each round carry them.

Shapes: N nodes, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.algorithms.stopping import NEVER, StopRule, TimeVaryingBound

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Agreement:
    """Consensus counters and stop rounds of all nodes; with a rule they are tested from the first mixing-only round on."""

    def __init__(self, num_nodes: int, rule: StopRule | None, bound: TimeVaryingBound | None, *, first_round: int) -> None:
        self._rule, self._bound, self._first_round = rule, bound, first_round
        self.consensus_counter_N = np.zeros(num_nodes, dtype=np.int64)
        self.stop_round_N = np.full(num_nodes, NEVER, dtype=np.int64)

    def is_reached(self, number: int) -> bool:
        """Whether every node has stopped before a round."""
        return bool((self.stop_round_N < number).all())

    def stop_round(self, node: int) -> int | None:
        """Stop round that a node knows; None: it knows none."""
        return None if self.stop_round_N[node] == NEVER else int(self.stop_round_N[node])

    def end_round(
        self, number: int, squared_N: Floats, moved_N: Floats, norms_N: Floats, index_NK: Ints, heard_NK: Bools, skipped_N: Bools
    ) -> None:
        """Let every node test its neighbours' models, and take in what they say.

        Args:
            number: of the round.
            squared_N: sum_j ||x_i - x_j||**2 of the models exchanged.
            moved_N: ||x_i - x_i of the round before||.
            norms_N: ||x_i||**2.
            index_NK: the neighbour in each slot.
            heard_NK: whether it was heard.
            skipped_N: whether anybody was not.
        """
        met_N = self._bound.bound(squared_N, moved_N) if self._bound is not None else squared_N
        if self._rule is None or number < self._first_round:
            return
        running_N = self.stop_round_N >= number
        passed_N = np.logical_and(self._rule.passes(met_N, norms_N), ~skipped_N)
        agreed_NK = np.where(heard_NK, self.consensus_counter_N[index_NK], NEVER)
        stops_NK = np.where(heard_NK, self.stop_round_N[index_NK], NEVER)
        agreed_N = self._rule.consensus_counter(passed_N, self.consensus_counter_N, agreed_NK)
        stop_N = self._rule.stop_round(number, agreed_N, self.stop_round_N, stops_NK)
        self.consensus_counter_N = np.where(running_N, agreed_N, self.consensus_counter_N)
        self.stop_round_N = np.where(running_N, stop_N, self.stop_round_N)

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint; without a stop rule nobody ever stops before the others."""
        return {
            "agreed_for": self.consensus_counter_N.tolist() if self._rule is not None else None,
            "stop_round": self.stop_round_N.tolist() if self._rule is not None else None,
            "meetings": self._bound.metadata() if self._bound is not None else None,
        }

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take up the metadata of a checkpoint."""
        if metadata["agreed_for"] is not None:
            self.consensus_counter_N, self.stop_round_N = np.array(metadata["agreed_for"]), np.array(metadata["stop_round"])
        if self._bound is not None:
            self._bound.restore(metadata["meetings"])
