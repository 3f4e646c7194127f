"""The sum of one number of every node, known to all within bounds that hold: push-sum, for networks too large to hear of everybody.

A sum is taken of every `period`-th round. Each node begins with its number and the weight 1, and at the end of each of the next `steps`
rounds splits both evenly between itself and its neighbours. What it says over an edge is all that it ever gave over it, so that what a
lost message held comes with the next one. At any time the mean of all numbers is a mean, weighted by the weights, of the ratios number /
weight of what lies at the nodes and what is on its way; so it lies between the least and the largest of these ratios. After the last step
these two are passed on until they have come from everybody.

No clock, no socket. Source: Kempe, Dobra & Gehrke 2003; running sums after Hadjicostis, Vaidya & Dominguez-Garcia 2016.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pfl.wire.messages import PushSum

MAX_OUTAGE: Final = 4
"""Steps that a message may be late at the last step; what is on its way is then as old, and so are the ratios that must be counted in."""

_AHEAD = 8


@dataclass(slots=True)
class _Edge:
    """Amounts that one neighbour has given."""

    by_step: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Total that it had given by the end of a step, of steps not yet taken."""
    taken: tuple[float, float] = (0.0, 0.0)
    step: int = -1
    """The last one that is taken."""
    low: float = math.inf
    high: float = -math.inf
    outage: int = 0
    hops: int = 0
    """Everybody so far from it, and nearer, is in its extremes; 0: not even itself."""


class PushSumConversation:
    """One node's part in sums over all nodes, one after the other.

    Args:
        neighbours: their names; the graph is undirected and all of them are exchanged with in every round.
        diameter: of the graph, or more.
        steps: how often everybody splits.
    """

    def __init__(self, *, neighbours: Sequence[str], num_nodes: int, diameter: int, steps: int) -> None:
        self._neighbours, self._num_nodes, self._diameter, self._steps = tuple(neighbours), num_nodes, diameter, steps
        self.period = steps + diameter + 2 + MAX_OUTAGE
        """Rounds from one sum to the next."""
        self._round = -1  # whose sum is being taken; -1: none
        self._is_void = True
        self._known = True
        self._early: dict[str, PushSum] = {}
        self._begin(-1)

    def end_round(self, number: int, value: float | None) -> None:
        """A round is over, and this node's number in it was so; None: it has none. `message_for` says what is to be said then."""
        start = number - number % self.period
        if number == start:
            self._begin(start)
            if value is None:
                self._is_void = True
            else:
                self._sum, self._weight, self._is_void = value, 1.0, False
        elif self._round != start:  # it was away when the sum began
            self._begin(start)
        elif number - start <= self._steps:
            self._take(number - start)
        self._now_round = number + 1
        step = self._step = number - start
        self._recent.append(self._ratio)
        if step < self._steps:
            self._split()
        elif step == self._steps and not self._is_void:
            self._low, self._high = min(self._recent), max(self._recent)
            self._outage = max((step - 1 - edge.step for edge in self._edges.values()), default=0)
            self._hops = 1

    def message_for(self, name: str) -> PushSum:
        """Make the message to a neighbour at the end of a round."""
        given, ended = self._given[name], self._hops > 0
        return PushSum(
            round=max(self._round, 0),
            step=self._step,
            sum=given[0],
            weight=given[1],
            low=self._low if ended and math.isfinite(self._low) else None,
            high=self._high if ended and math.isfinite(self._high) else None,
            outage=self._outage,
            hops=self._hops,
            void=self._is_void,
        )

    def hear(self, name: str, said: PushSum) -> None:
        """Take in what a neighbour says; what is of another sum is left alone."""
        if said.round != self._round:
            if said.round == (self._round + self.period if self._round >= 0 else 0):
                self._early[name] = said  # this node has not begun that sum yet
            return
        edge = self._edges[name]
        if said.void:
            self._is_void = True
            return
        if said.step >= edge.step:
            edge.by_step[said.step] = (said.sum, said.weight)
            if len(edge.by_step) > _AHEAD:
                del edge.by_step[min(edge.by_step)]
        if said.low is not None and said.high is not None and said.hops >= edge.hops:
            edge.low, edge.high = min(edge.low, said.low), max(edge.high, said.high)
            edge.outage, edge.hops = max(edge.outage, said.outage), said.hops
        self._pass_on()

    def known(self) -> tuple[int, float, float, int] | None:
        """Return, once, the round that a sum is of, the bounds of the sum over all nodes, and the round in which they became known."""
        if self._known or self._is_void or self._hops <= self._diameter or self._outage > MAX_OUTAGE:
            return None
        self._known = True
        return self._round, self._num_nodes * self._low, self._num_nodes * self._high, self._now_round

    @property
    def _ratio(self) -> float:
        return self._sum / self._weight if self._weight > 0 else 0.0

    def _begin(self, start: int) -> None:
        early, self._early = self._early, {}
        self._round, self._is_void, self._known = start, True, start < 0
        self._sum = self._weight = 0.0
        self._step = 0
        self._now_round = max(start, 0)
        self._given = dict.fromkeys(self._neighbours, (0.0, 0.0))
        self._edges = {name: _Edge() for name in self._neighbours}
        self._recent: deque[float] = deque(maxlen=MAX_OUTAGE + 1)
        self._low, self._high, self._outage, self._hops = math.inf, -math.inf, 0, 0
        for name, said in early.items():
            if said.round == start:
                self.hear(name, said)

    def _take(self, step: int) -> None:
        """Take what neighbours had given by the end of the step before; what they have given since would not be in their own extremes."""
        for edge in self._edges.values():
            usable = [k for k in edge.by_step if k < step]
            if not usable:
                continue
            edge.step = max(usable)
            given = edge.by_step[edge.step]
            gained = given[0] - edge.taken[0], given[1] - edge.taken[1]
            if min(gained) < 0:
                self._is_void = True
            self._sum, self._weight, edge.taken = self._sum + gained[0], self._weight + gained[1], given
            edge.by_step = {k: given for k, given in edge.by_step.items() if k > edge.step}

    def _split(self) -> None:
        parts = len(self._neighbours) + 1
        part = self._sum / parts, self._weight / parts
        self._given = {name: (given[0] + part[0], given[1] + part[1]) for name, given in self._given.items()}
        self._sum, self._weight = part

    def _pass_on(self) -> None:
        """Everybody's extremes come one link further with each message."""
        if not self._hops:
            return
        edges = self._edges.values()
        self._low = min([self._low, *(edge.low for edge in edges)])
        self._high = max([self._high, *(edge.high for edge in edges)])
        self._outage = max([self._outage, *(edge.outage for edge in edges)])
        self._hops = max(self._hops, 1 + min((edge.hops for edge in edges), default=self._diameter))
