"""Agreeing to stop without a server: each node's local test, how long its neighbourhood has passed it, and when everybody stops.

The same functions serve one node (a daemon) and N rows (the simulator). Shapes: N nodes, K neighbour slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEVER = np.iinfo(np.int64).max
"""The stop round while none is announced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """When a network may stop. All nodes hold the same numbers, computed from the roster's graph."""

    tolerance: float
    """Bound on the network's disagreement relative to the models' root mean square norm."""

    patience: int
    """Rounds for which every node must have passed."""

    diameter: int
    """Of the roster's graph: rounds that news needs to reach everybody."""

    lambda_2: float
    """Second smallest eigenvalue of the graph's Laplacian."""

    def earliest(self, rounds: int) -> int:
        """The smallest stop round that can ever be announced after so many training rounds."""
        return rounds + self.patience + self.diameter - 1 + 2 * self.diameter

    def passes(self, squared_distances_N: NDArray[np.float64], squared_norms_N: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The local test on the models exchanged in one round.

        Args:
            squared_distances_N: sum over a node's neighbours of ||x_i - x_j||**2.
            squared_norms_N: ||x_i||**2.

        Returns:
            1/2 sum_j ||x_i - x_j||**2 <= lambda_2(L) (tolerance ||x_i||)**2. Where it holds at every node, the network's disagreement
            sqrt(1/n sum ||x_i - mean||**2) is at most tolerance times the root mean square of the norms: sum over the nodes and use
            tr(X' L X) >= lambda_2 sum ||x_i - mean||**2.
        """
        return np.asarray(squared_distances_N / 2 <= self.lambda_2 * self.tolerance**2 * squared_norms_N)

    def agreed_for(self, passed_N: NDArray[np.bool_], own_N: NDArray[np.int64], heard_NK: NDArray[np.int64]) -> NDArray[np.int64]:
        """h_i of this round: 0 where the test failed, else one more than the least h of the round before over self and neighbours.

        Args:
            passed_N: the test of this round; False too where a neighbour was skipped.
            own_N: h_i of the round before.
            heard_NK: h_j of the round before, NEVER in padding.
        """
        least_N = np.minimum(own_N, heard_NK.min(axis=1, initial=NEVER))
        return np.where(passed_N, least_N + 1, 0)

    def stop_round(
        self,
        round: int,
        agreed_for_N: NDArray[np.int64],
        own_N: NDArray[np.int64],
        heard_NK: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The smallest stop round that a node knows of after this round, NEVER where it knows of none.

        A node that has agreed for patience + diameter rounds announces round + 2 diameter: everybody has passed for `patience` rounds, and
        the news has time to cross the graph and be met by an earlier announcement.
        """
        announced_N = np.where(agreed_for_N >= self.patience + self.diameter, round + 2 * self.diameter, NEVER)
        return np.asarray(np.minimum(np.minimum(own_N, announced_N), heard_NK.min(axis=1, initial=NEVER)), dtype=np.int64)
