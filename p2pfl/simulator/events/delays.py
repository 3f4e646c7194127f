"""Seconds of a virtual clock: how long training takes and a message travels, and which messages are lost.

Shapes: N nodes, E directed edges of a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfl.draws import Purpose, chances
from p2pfl.experiment.spec import ClockSpec
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.topology import Topology
from p2pfl.wire.codec import CHUNK_BYTES

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edges:
    """Directed edges of a round, and how long their messages take."""

    senders: Ints
    receivers: Ints
    codes: Ints
    """receiver * N + sender, rising."""
    firsts: Ints
    """Where the edges of each receiver that has any begin."""
    hears_N: Bools
    """Whether each node receives from anybody, (N,)."""
    latency_E: Floats
    seconds_a_byte_E: Floats
    place_E: Ints
    """Place of each edge's message among those of its sender, from 1."""

    def latest(self, values_E: Floats) -> Floats:
        """Largest value of each receiver, (N,); -inf without edges."""
        return self._reduced(np.maximum, values_E, -math.inf)

    def earliest(self, values_E: Floats) -> Floats:
        """Smallest value of each receiver, (N,); inf without edges."""
        return self._reduced(np.minimum, values_E, math.inf)

    def _reduced(self, ufunc: np.ufunc, values_E: Floats, nothing: float) -> Floats:
        reduced_N = np.full(len(self.hears_N), nothing)
        if len(self.firsts):
            reduced_N[self.hears_N] = ufunc.reduceat(values_E, self.firsts)
        return reduced_N


class Delays:
    """Delays: training by speed, chance and script, messages by their sender's uplink and by what `links` say of their edge."""

    def __init__(
        self, spec: ClockSpec, links: Topology | None, names: tuple[str, ...], seed: int, faults: FaultScript | None = None
    ) -> None:
        self._faults = faults or FaultScript()
        self._faults.check(names, kinds=[FaultKind.SLOW])
        self._scripted = {names.index(name): name for fault in self._faults.faults for name in fault.nodes}
        self.spec, self._links, self._seed = spec, links, seed
        self._speed_N = np.array([spec.speeds.get(name, 1.0) for name in names]) if spec.speeds else np.ones(len(names))
        self._rows_N = np.arange(len(names))

    def factors(self, round: int) -> Floats:
        """Factors by which each node's training takes longer in a round, (N,)."""
        stragglers = self.spec.stragglers
        if stragglers is None:
            return np.ones(len(self._rows_N))
        slow_N = chances(self._seed, Purpose.STRAGGLER, node=self._rows_N, round=round) < stragglers.share
        return np.where(slow_N, stragglers.factor, 1.0)

    def training(self, round: int) -> Floats:
        """Seconds of each node's training in a round, (N,)."""
        return self.spec.round_s / self._speed_N * self.factors(round)

    def training_from(self, round: int, began_N: Floats) -> Floats:
        """Seconds of each node's training in a round that began at some moment, with what the script adds, (N,)."""
        seconds_N = self.training(round)
        for row, name in self._scripted.items():
            seconds_N[row] = self._faults.training_s(name, round, seconds_N[row], began_N[row])
        return seconds_N

    def training_through(self, row: int, round: int) -> float:
        """Seconds of a node's training in all rounds up to one, that one included."""
        stragglers, slow = self.spec.stragglers, 0
        if stragglers is not None:
            slow_R = chances(self._seed, Purpose.STRAGGLER, node=row, round=np.arange(round + 1)) < stragglers.share
            slow = int(slow_R.sum())
        extra = slow * (stragglers.factor - 1) if stragglers is not None else 0.0
        return float((round + 1 + extra) * (self.spec.round_s / self._speed_N[row]))

    def lost(self, exchange: int, senders: Ints, receivers: Ints) -> Bools:
        """Draw which messages of an exchange are lost, (E,)."""
        if not self.spec.loss:
            return np.zeros(len(senders), dtype=np.bool_)
        return chances(self._seed, Purpose.LOSS, node=senders, round=exchange, index=receivers) < self.spec.loss

    def leaving(self, round: int) -> Bools:
        """Draw who would leave in a round, (N,)."""
        churn = self.spec.churn
        if churn is None or round == 0:
            return np.zeros(len(self._rows_N), dtype=np.bool_)
        return chances(self._seed, Purpose.CHURN, node=self._rows_N, round=round) < churn.share

    def message_s(self, edges: Edges, size_bytes: int) -> tuple[Floats, Floats]:
        """Seconds from sending until a message begins to be there and until it is there, each (E,)."""
        leaves_E = edges.place_E * (size_bytes * 8 / (self.spec.uplink_mbps * 1e6)) if self.spec.uplink_mbps else 0.0
        before_E = edges.latency_E + leaves_E
        return before_E + edges.seconds_a_byte_E * min(size_bytes, CHUNK_BYTES), before_E + edges.seconds_a_byte_E * size_bytes

    def edges_of(self, graph: Topology) -> Edges:
        """Edges of a graph, with latencies and bandwidths of its file, or else of the experiment."""
        num_nodes, senders, receivers = graph.num_nodes, graph.senders, graph.receivers
        codes = receivers * num_nodes + senders
        latency_E = np.full(len(codes), self.spec.latency_ms / 1e3)
        seconds_a_byte_E = np.full(len(codes), 8 / (self.spec.bandwidth_mbps * 1e6) if self.spec.bandwidth_mbps else 0.0)
        if self._links is not None:
            known = self._links.receivers * num_nodes + self._links.senders
            where = np.searchsorted(known, codes).clip(max=max(len(known) - 1, 0))
            there_E = known[where] == codes if len(known) else np.zeros(len(codes), dtype=np.bool_)
            if self._links.latency_ms is not None:
                latency_E = np.where(there_E, self._links.latency_ms[where] / 1e3, latency_E)
            if self._links.bandwidth_mbps is not None:
                seconds_a_byte_E = np.where(there_E, 8 / (self._links.bandwidth_mbps[where] * 1e6), seconds_a_byte_E)
        by_sender = np.lexsort((receivers, senders))
        sent_N = np.bincount(senders, minlength=num_nodes)
        place_E = np.empty(len(codes), dtype=np.int64)
        place_E[by_sender] = np.arange(1, len(codes) + 1) - np.repeat(np.cumsum(sent_N) - sent_N, sent_N)
        heard_N = np.bincount(receivers, minlength=num_nodes)
        return Edges(
            senders=senders,
            receivers=receivers,
            codes=codes,
            firsts=(np.cumsum(heard_N) - heard_N)[heard_N > 0],
            hears_N=heard_N > 0,
            latency_E=latency_E,
            seconds_a_byte_E=seconds_a_byte_E,
            place_E=place_E,
        )
