"""The clock of rounds: when each node of a simulated network begins and ends each round, and whose messages come too late or never.

A node trains, sends, and waits as its daemon does: until everybody whom it waits for has come or the deadline is over. The clock never
looks at a model: who is slow, whose messages are lost and who is away are drawn from the seed, so that all of a round is known before it
is computed. Mixing and evaluating take no time.

Shapes: N nodes, E directed edges of a round, W durations that are remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from p2pfl.algorithms import over_an_edge
from p2pfl.experiment.graph import link_costs
from p2pfl.experiment.plan import Plan, counts_of
from p2pfl.experiment.requirements import NEEDS_ALL, matches_flows
from p2pfl.faults.script import FaultScript
from p2pfl.protocol.deadlines import CEILING_S, QUANTILE, WINDOW
from p2pfl.simulator.events.delays import Bools, Delays, Edges, Floats, Ints
from p2pfl.topology import Schedule
from p2pfl.wire.update import UpdateFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTimes:
    """Times of one round, and whose messages came in time."""

    active_N: Bools
    """Nodes that take part: neither away nor so late that all its neighbours were over before it began."""
    trains_N: Bools
    """Nodes that take local steps, where the round has any: a node that is back after missed rounds mixes first."""
    came: tuple[Bools, ...]
    """By phase, (E,): which messages came in time, in the order of the round's edges."""
    ended_N: Floats
    """Seconds since the start; NaN for who took no part."""
    now_s: float
    """When the last of them ended this round or one before."""

    @property
    def is_whole(self) -> bool:
        """Whether every node took part in the round, and every message came in time."""
        return bool(self.active_N.all()) and all(bool(came_E.all()) for came_E in self.came)


class RoundClock:
    """Clock of nodes that go round by round. Owned by one simulation, which asks it for one round after the other.

    Args:
        bytes_of: what one message of an exchange has, as counted.
        trains_N: bool, who has anything to train on.
        gives_up: whether who is late is left behind; False: it is waited for however long it takes.
    """

    def __init__(
        self, schedule: Schedule, delays: Delays, *, bytes_of: Callable[[int], int], phases: int, trains_N: Bools, gives_up: bool = True
    ) -> None:
        num_nodes = schedule.num_nodes
        self._schedule, self._delays, self._bytes_of, self._phases = schedule, delays, bytes_of, phases
        self._trains_N, self.gives_up = trains_N, gives_up
        # a node may be further ahead of one that it does not wait for where the graph changes: whatever comes from there is news
        self._reach = 1 if schedule.is_steady else math.inf
        self.now_s = 0.0
        self.ready_N = np.zeros(num_nodes)
        """Seconds at which each node ended its last round."""
        self.back_N = np.zeros(num_nodes, dtype=np.int64)
        """Round from which on each node is there."""
        self._was_out_N = np.zeros(num_nodes, dtype=np.bool_)
        self._missed = np.zeros(0, dtype=np.int64)
        """Codes of edges whose receiver waits for the sender no more, rising."""
        self._late = np.zeros((4, 0))
        """Messages that came after their exchange, or will: code, when, exchange, and what it would have taken to wait for it."""
        self._paces = RoundPaces(num_nodes, factor=delays.spec.deadline_factor, floor_s=delays.spec.deadline_floor_s)
        self._edges_at = lru_cache(maxsize=schedule.period or 4)(lambda number: delays.edges_of(schedule.at(number)))

    @classmethod
    def of(cls, plan: Plan, faults: FaultScript | None = None) -> RoundClock:
        """Make the clock of a plan whose experiment has one."""
        assert plan.experiment.clock is not None
        algorithm, names = plan.recipe.algorithm, plan.names
        delays = Delays(plan.experiment.clock, link_costs(plan.experiment, plan.topology, names), names, plan.experiment.seed, faults)
        sample = plan.population(names[:2])
        formats = []
        for phase in range(algorithm.phases):
            sent = sample.outgoing(0, phase, local_steps=0)
            formats.append(UpdateFormat.of(over_an_edge(algorithm.channels, sent), over_an_edge(algorithm.channels, sent, whole=True)))
        counts = counts_of(plan.task.sites)
        return cls(
            plan.schedule,
            delays,
            bytes_of=lambda exchange: formats[exchange % algorithm.phases].encoded_bytes(exchange),
            phases=algorithm.phases,
            trains_N=np.array([plan.task.loss is not None and counts[name] > 0 for name in names]),
            gives_up=NEEDS_ALL.isdisjoint(algorithm.requires) and matches_flows(algorithm, plan.topology),
        )

    def round(self, number: int, *, local_steps: int, running_N: Bools) -> RoundTimes:
        """Compute the times of the round after the last one asked for; who has stopped is not waited for, and its news of that comes."""
        edges = self._edges_at(number % self._schedule.period if self._schedule.period else number)
        here_N = self._here(number, edges) & running_N
        joins_N = self._was_out_N & here_N
        trains_N = here_N & ~joins_N & self._trains_N & (local_steps > 0)
        began_N = self.ready_N
        sends_N = began_N + np.where(trains_N, self._delays.training_from(number, began_N), 0.0)
        exchange = number * self._phases
        active_N = here_N
        over_N, arrival_E = self._wait(edges, exchange, sends_N, active_N, running_N)
        # who begins after all its neighbours are over has no part in this round: its messages would change nothing for anybody
        known_N = np.where(here_N, over_N, -math.inf)
        last_N = np.full(len(here_N), -math.inf)
        np.maximum.at(last_N, edges.senders, known_N[edges.receivers])
        out_N = here_N & (last_N > -math.inf) & (began_N > last_N)
        if out_N.any():
            active_N = here_N & ~out_N
            over_N, arrival_E = self._wait(edges, exchange, sends_N, active_N, running_N)
        came = []
        for phase in range(self._phases):
            if phase:
                over_N, arrival_E = self._wait(edges, exchange + phase, began_N, active_N, running_N)
            came.append(self._close(edges, exchange + phase, over_N, arrival_E, began_N, active_N, running_N))
            began_N = np.where(active_N, over_N, began_N)
        self.ready_N = began_N
        self._was_out_N = running_N & ~active_N
        self.now_s = max(self.now_s, float(self.ready_N[active_N].max(initial=0.0)))
        return RoundTimes(
            active_N=active_N,
            trains_N=active_N & ~joins_N,
            came=tuple(came),
            ended_N=np.where(active_N, self.ready_N, np.nan),
            now_s=self.now_s,
        )

    def _here(self, number: int, edges: Edges) -> Bools:
        """Nodes that are there; who comes back does so when the first of its neighbours begins the round."""
        churn = self._delays.spec.churn
        if churn is None:
            return np.ones(len(self.ready_N), dtype=np.bool_)
        returns_N = (self.back_N == number) & (number > 0)
        leaves_N = (self.back_N <= number) & self._delays.leaving(number)
        self.back_N = np.where(leaves_N, number + churn.rounds, self.back_N)
        here_N = self.back_N <= number
        returns_N &= here_N
        if returns_N.any():
            others_N = np.where(here_N & ~returns_N, self.ready_N, math.inf)
            first_N = edges.earliest(others_N[edges.senders])
            anybody = others_N.min()
            first_N = np.where(np.isfinite(first_N), first_N, anybody if np.isfinite(anybody) else 0.0)
            self.ready_N = np.where(returns_N, np.maximum(self.ready_N, first_N), self.ready_N)
        return here_N

    def _wait(self, edges: Edges, exchange: int, sends_N: Floats, active_N: Bools, running_N: Bools) -> tuple[Floats, Floats]:
        """Compute until when each receiver waits in an exchange, (N,), and when each message is there, (E,); inf: never."""
        begins_E, takes_E = self._delays.message_s(edges, self._bytes_of(exchange))
        lost_E = self._delays.lost(exchange, edges.senders, edges.receivers)
        sent_E = active_N[edges.senders] & ~lost_E
        stopped_E = ~running_N[edges.senders] & ~lost_E
        arrival_E = np.where(sent_E, sends_N[edges.senders] + takes_E, np.where(stopped_E, -math.inf, math.inf))
        begun_E = np.where(sent_E, sends_N[edges.senders] + begins_E, arrival_E)
        deadline_N = sends_N + (self._paces.allowances_s() if self.gives_up else math.inf)
        # what has begun to come in is waited for
        until_E = np.where(begun_E <= deadline_N[edges.receivers], arrival_E, np.minimum(arrival_E, deadline_N[edges.receivers]))
        waited_E = _not_among(edges.codes, self._missed) & running_N[edges.senders]
        first_N = edges.earliest(arrival_E)
        alone_N = np.where(edges.hears_N, np.minimum(first_N, deadline_N), -math.inf)
        late = self._late[:, exchange - self._late[2] <= self._reach]
        late_codes = late[0].astype(np.int64)
        latest_N = edges.latest(np.where(waited_E, until_E, -math.inf))
        someone_N = np.bincount(edges.receivers[waited_E], minlength=len(sends_N)) > 0
        while True:
            over_N = np.maximum(sends_N, np.where(someone_N, latest_N, alone_N))
            # who is heard while the others are waited for is waited for again
            heard = np.unique(late_codes[late[1] <= over_N[late_codes // len(over_N)]])
            again_E = ~waited_E & ~_not_among(edges.codes, heard) & running_N[edges.senders]
            if not again_E.any():
                break
            waited_E = waited_E | again_E
            np.maximum.at(latest_N, edges.receivers[again_E], until_E[again_E])
            someone_N[edges.receivers[again_E]] = True
        return over_N, arrival_E

    def _close(
        self, edges: Edges, exchange: int, over_N: Floats, arrival_E: Floats, began_N: Floats, active_N: Bools, running_N: Bools
    ) -> Bools:
        """End an exchange, and remember who came late; returns which messages came, (E,)."""
        receives_E = active_N[edges.receivers]
        came_E: Bools = receives_E & (arrival_E <= over_N[edges.receivers])
        if not self.gives_up:
            return came_E
        num_nodes = len(active_N)
        # who came late has been heard, and how long it would have taken is remembered
        codes = self._late[0].astype(np.int64)
        to_N = codes // num_nodes
        heard = active_N[to_N] & (self._late[1] <= over_N[to_N])
        near = heard & (exchange - self._late[2] <= self._reach)
        for code, waited_s in zip(codes[near].tolist(), self._late[3][near].tolist(), strict=True):
            self._paces.record(np.array([code // num_nodes]), np.array([waited_s]))
        skipped_E = receives_E & ~came_E & running_N[edges.senders]
        if skipped_E.any() or len(self._missed):
            gone = np.concatenate([edges.codes[came_E], codes[near]])
            self._missed = np.union1d(self._missed[_not_among(self._missed, np.unique(gone))], edges.codes[skipped_E])
        late_E = skipped_E & np.isfinite(arrival_E)
        to_E = edges.receivers[late_E]
        new = [edges.codes[late_E], arrival_E[late_E], np.full(len(to_E), exchange), arrival_E[late_E] - began_N[to_E]]
        self._late = np.concatenate([self._late[:, ~heard], np.array(new, dtype=np.float64).reshape(4, -1)], axis=1)
        missing_N = np.bincount(edges.receivers[receives_E & ~came_E], minlength=num_nodes) > 0
        in_company = np.flatnonzero(active_N & ~missing_N)
        self._paces.record(in_company, (over_N - began_N)[in_company])
        return came_E

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays of a checkpoint."""
        return {
            "now_s": np.array([self.now_s]),
            "ready": self.ready_N,
            "back": self.back_N,
            "was_out": self._was_out_N,
            "missed": self._missed,
            "late": self._late,
            "durations": self._paces.durations_NW,
            "counts": self._paces.count_N,
        }

    def restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Take up the `arrays` of a checkpoint."""
        self.now_s = float(arrays["now_s"][0])
        self.ready_N, self.back_N = arrays["ready"].astype(np.float64), arrays["back"].astype(np.int64)
        self._was_out_N, self._missed = arrays["was_out"].astype(np.bool_), arrays["missed"].astype(np.int64)
        self._late = arrays["late"].astype(np.float64)
        self._paces.durations_NW, self._paces.count_N = arrays["durations"].astype(np.float64), arrays["counts"].astype(np.int64)


class RoundPaces:
    """Deadlines of many nodes at once, as `RoundDurations` keeps them for one."""

    def __init__(self, num_nodes: int, *, factor: float, floor_s: float) -> None:
        self._factor, self._floor_s = factor, floor_s
        self.durations_NW = np.full((num_nodes, WINDOW), np.nan)
        self.count_N = np.zeros(num_nodes, dtype=np.int64)
        """Number of durations ever recorded."""

    def record(self, rows: Ints, durations_s: Floats) -> None:
        """Record durations of one exchange each of some different nodes."""
        self.durations_NW[rows, self.count_N[rows] % WINDOW] = durations_s
        self.count_N[rows] += 1

    def allowances_s(self) -> Floats:
        """Seconds that the next exchange of each node may wait, (N,)."""
        known_N = np.minimum(self.count_N, WINDOW)
        place_N = np.maximum(np.ceil(QUANTILE * known_N).astype(np.int64) - 1, 0)
        ordered_NW = np.sort(self.durations_NW, axis=1)  # what is not known yet comes last
        share_N = np.take_along_axis(ordered_NW, place_N[:, None], axis=1)[:, 0]
        allowance_N = np.maximum(self._floor_s, self._factor * np.where(known_N > 0, share_N, 0.0))
        return np.minimum(allowance_N, max(CEILING_S, self._floor_s))


def _not_among(codes: Ints, known: Ints) -> Bools:
    """Mask of codes that are not among some known ones, which rise."""
    if not len(known):
        return np.ones(len(codes), dtype=np.bool_)
    found: Bools = known[np.searchsorted(known, codes).clip(max=len(known) - 1)] != codes
    return found
