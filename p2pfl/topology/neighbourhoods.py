"""Neighbourhoods of a node, round by round: the same for every node that knows the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from p2pfl.topology import Schedule


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """One node's neighbours in one round, with its row of the mixing matrix."""

    weights: Mapping[str, float]
    """w_ij by the name of the sender j, in the roster's order."""

    receivers: frozenset[str]
    """Names of the neighbours that this node sends to."""

    self_weight: float
    """Weight of the node's own message."""

    in_step: bool = True
    """Whether both ends of an edge merge each other's message of the same exchange."""

    @property
    def both(self) -> frozenset[str]:
        """Edges over which what one side takes in the other side gives: those that go both ways, where nodes are in step."""
        return self.receivers & self.weights.keys() if self.in_step else frozenset()


def neighbourhoods_of(schedule: Schedule, row: int, *, splits_mass: bool, in_step: bool = True) -> Callable[[int], Neighbourhood]:
    """Find a node's neighbourhood by round.

    Args:
        schedule: with names.
        row: the node's number.
        splits_mass: the sender keeps what it does not give away, 1 - sum_i w_ij, and not the receiver what it does not take.
        in_step: as in Neighbourhood.
    """
    names = schedule.names
    assert names is not None

    @lru_cache(maxsize=64)
    def in_phase(phase_of_schedule: int) -> Neighbourhood:
        graph = schedule.at(phase_of_schedule)
        assert graph.weights is not None
        mine, given = graph.receivers == row, graph.senders == row
        weights = {names[j]: float(w) for j, w in zip(graph.senders[mine], graph.weights[mine], strict=True)}
        kept = 1 - float(graph.weights[given].sum()) if splits_mass else float(graph.self_weights[row])
        receivers = frozenset(names[i] for i in graph.receivers[given])
        return Neighbourhood(weights=weights, receivers=receivers, self_weight=kept, in_step=in_step)

    def in_round(round: int) -> Neighbourhood:
        return in_phase(round % schedule.period if schedule.period else round)

    return in_round
