"""Agreeing to stop without a server: each node's local test, how long its neighbourhood has passed it, and when everybody stops.

The same functions serve one node (a daemon) and N rows (the simulator). Shapes: N nodes, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """Diameter of the roster's graph: rounds that news needs to reach everybody."""

    lambda_2: float
    """Second smallest eigenvalue of the Laplacian of the edges of `window` rounds."""

    window: int = 1
    """Rounds that a graph which changes needs until its edges together connect everybody; 1: it stays as it is."""

    def earliest(self, rounds: int) -> int:
        """The smallest stop round that can ever be announced after so many training rounds."""
        return rounds + self.patience + self.diameter - 1 + 2 * self.diameter

    def admits(self, stop_round: int, counters: Mapping[int, int]) -> bool | None:
        """Whether a stop round can be true, by what a node knows of itself; None: it cannot tell yet, or was away.

        Whoever announces it has agreed for patience + diameter rounds 2 diameter rounds before it. Each node's own counter of d rounds
        earlier, d being its distance, was then at least patience + diameter - d, so that after the diameter it is at least the patience.

        Args:
            stop_round: as somebody says.
            counters: the node's consensus counter by round, of the rounds that it has made.
        """
        number = stop_round - 3 * self.diameter
        if number not in counters:
            return None
        return counters[number] >= self.patience

    def passes(self, squared_distances_N: NDArray[np.float64], squared_norms_N: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The local test on the models exchanged in one round.

        Args:
            squared_distances_N: sum over a node's neighbours of ||x_i - x_j||**2; where the graph changes, its part of
                `TimeVaryingBound.bound`.
            squared_norms_N: ||x_i||**2.

        Returns:
            1/2 sum_j ||x_i - x_j||**2 <= lambda_2(L) (tolerance ||x_i||)**2. Where it holds at every node, the network's disagreement
            sqrt(1/n sum ||x_i - mean||**2) is at most tolerance times the root mean square of the norms: sum over the nodes and use
            tr(X' L X) >= lambda_2 sum ||x_i - mean||**2.
        """
        return np.asarray(squared_distances_N / 2 <= self.lambda_2 * self.tolerance**2 * squared_norms_N)

    def consensus_counter(self, passed_N: NDArray[np.bool_], own_N: NDArray[np.int64], heard_NK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Consensus counters of this round: 0 where the test failed, else 1 + the least of the round before over self and neighbours.

        Args:
            passed_N: the test of this round; False too where a neighbour was skipped.
            own_N: the counter of the round before.
            heard_NK: the neighbours' counters of the round before, NEVER in padding.
        """
        least_N = np.minimum(own_N, heard_NK.min(axis=1, initial=NEVER))
        return np.where(passed_N, least_N + 1, 0)

    def stop_round(
        self, round: int, counter_N: NDArray[np.int64], own_N: NDArray[np.int64], heard_NK: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The smallest stop round that a node knows of after this round, NEVER where it knows of none.

        A node that has agreed for patience + diameter rounds announces round + 2 diameter: everybody has passed for `patience` rounds, and
        the news has time to cross the graph and be met by an earlier announcement.
        """
        announced_N = np.where(counter_N >= self.patience + self.diameter, round + 2 * self.diameter, NEVER)
        return np.asarray(np.minimum(np.minimum(own_N, announced_N), heard_NK.min(axis=1, initial=NEVER)), dtype=np.int64)


@dataclass(kw_only=True)
class TimeVaryingBound:
    """The bound on distances where the graph changes from round to round, and so not all neighbours are compared in one.

    Two that compared their models in round r and have since moved by m_i and m_j are now at a distance of at most d_ij + m_i + m_j, and
    (d + m_i + m_j)**2 is at most 3 (d**2 + m_i**2 + m_j**2). Summed over the edges of a window, each row can count its own part: half of
    each d**2 and its own m_i**2 for each of its edges.
    """

    window: int
    num_neighbours_N: NDArray[np.int64]
    """Number of others that each row ever exchanges with."""

    squared: list[NDArray[np.float64]] = field(default_factory=list)
    """sum_j ||x_i - x_j||**2 of the last rounds, the newest last."""

    moved: list[NDArray[np.float64]] = field(default_factory=list)
    """||x_i - x_i of the round before||, as long; the first is 0."""

    def bound(self, squared_N: NDArray[np.float64], moved_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take in a round.

        Returns:
            Parts of an upper bound on the sum of ||x_i - x_j||**2 over all edges of the window; infinite until one is over.
        """
        self.squared = [*self.squared, squared_N][-self.window :]
        self.moved = [*self.moved, moved_N][-self.window :]
        if len(self.squared) < self.window:
            return np.full_like(squared_N, np.inf)
        way_N = np.sum(self.moved[1:], axis=0) if self.window > 1 else np.zeros_like(moved_N)
        return np.asarray(3 * np.sum(self.squared, axis=0) + 6 * self.num_neighbours_N * way_N**2)

    def forget(self) -> None:
        """Forget what was seen before a round that was left out."""
        self.squared, self.moved = [], []

    def metadata(self) -> dict[str, Any]:
        """Metadata for a checkpoint, as JSON values."""
        return {"squared": [values.tolist() for values in self.squared], "moved": [values.tolist() for values in self.moved]}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take up what `metadata` gave."""
        self.squared = [np.array(values) for values in metadata["squared"]]
        self.moved = [np.array(values) for values in metadata["moved"]]
