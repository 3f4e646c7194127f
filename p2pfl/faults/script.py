"""Scripts of faults: which node or edge fails when, read by the simulator and by whoever runs real processes.

A script decides nothing about time: it is asked for a round, for seconds since the start, or for both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from p2pfl.errors import ConfigError, some

NOT_TIMED = -math.inf
"""Seconds since the start where nobody counts them: only faults of rounds hold."""

MOST_OFF_S = 10 * 366 * 86400.0


class FaultKind(Enum):
    """Kinds of faults, by the key of a user's file."""

    PAUSE = "pause"
    """The node is paused: it neither trains nor receives nor sends, and goes on afterwards."""

    KILL = "kill"
    """The node's process is killed, and started again from its state when the fault is over."""

    SLOW = "slow"
    """The node's local steps take `factor` times as long."""

    CUT = "cut"
    """The edge carries nothing, in either direction."""

    LOSS = "loss"
    """Messages of the first node do not reach the second one, or each with a `probability`; the other direction works."""

    PARTITION = "partition"
    """Every edge between these nodes and all others is cut."""

    THROTTLE = "throttle"
    """The edge carries at most `bytes_per_s` in each direction."""

    CORRUPT = "corrupt"
    """Bits of what the edge carries are changed."""

    CLOCK = "clock"
    """The node's clock of the day is off by `offset_s`."""

    DNS = "dns"
    """The node's host name has no address, and every connection that was made by it ends."""


OF_EDGES = frozenset({FaultKind.CUT, FaultKind.LOSS, FaultKind.THROTTLE, FaultKind.CORRUPT})
"""Kinds of faults that concern one edge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault, and when it holds: in some rounds, or between two moments."""

    kind: FaultKind
    nodes: tuple[str, ...]
    rounds: frozenset[int] = frozenset()
    from_s: float = math.inf
    """Seconds since the start."""

    until_s: float = math.inf
    """Seconds since the start; inf: for ever."""

    factor: float = 1.0
    """How many times as long local steps take; of SLOW alone."""

    probability: float = 1.0
    """How likely each message is lost; of LOSS alone."""

    bytes_per_s: float = math.inf
    """Most that the edge carries in each direction; of THROTTLE alone."""

    offset_s: float = 0.0
    """By how much the clock is ahead; of CLOCK alone."""

    @property
    def has_end(self) -> bool:
        """Whether it is over at some time."""
        return bool(self.rounds) or self.until_s < math.inf

    @property
    def text(self) -> str:
        """Name the fault and what fails, such as "cut of a - b"."""
        return f"{self.kind.value} of {(' - ' if self.kind in OF_EDGES else ', ').join(self.nodes)}"

    @property
    def when(self) -> str:
        """Say when it holds, such as "rounds 3 to 5"."""
        if self.rounds:
            first, last = min(self.rounds), max(self.rounds)
            return f"round {first}" if first == last else f"rounds {first} to {last}"
        return f"from {self.from_s:g} s on" if self.until_s == math.inf else f"{self.from_s:g} s to {self.until_s:g} s"

    def is_on(self, sender: str, receiver: str) -> bool:
        """Whether it concerns what one node sends to another, where it is a fault of edges."""
        if self.kind is FaultKind.PARTITION:
            return (sender in self.nodes) != (receiver in self.nodes)
        return self.nodes == (sender, receiver) or (self.kind is not FaultKind.LOSS and self.nodes == (receiver, sender))

    def holds(self, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether the node or edge fails in this round or at this moment."""
        return round in self.rounds or self.from_s <= elapsed_s < self.until_s


@dataclass(frozen=True)
class FaultScript:
    """All faults of one run, by round or by seconds since its start.

    A paused or killed process makes no rounds: whoever runs processes asks with the furthest round of all nodes; slow ones have their own.
    """

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    """Seed of the messages that are lost with some probability."""

    @classmethod
    def in_rounds(
        cls,
        *,
        paused: Mapping[str, Iterable[int]] | None = None,
        cut: Mapping[tuple[str, str], Iterable[int]] | None = None,
        lost: Mapping[tuple[str, str], Iterable[int]] | None = None,
    ) -> FaultScript:
        """Script of pauses, cuts and losses by round.

        Args:
            paused: rounds by node.
            cut: rounds by edge, whose ends come in either order.
            lost: rounds by sender and receiver.
        """
        of_nodes = [(FaultKind.PAUSE, (node,), rounds) for node, rounds in (paused or {}).items()]
        of_edges = [
            (kind, ends, rounds)
            for kind, by_edge in ((FaultKind.CUT, cut), (FaultKind.LOSS, lost))
            for ends, rounds in (by_edge or {}).items()
        ]
        return cls(tuple(Fault(kind=kind, nodes=nodes, rounds=frozenset(rounds)) for kind, nodes, rounds in [*of_nodes, *of_edges]))

    @cached_property
    def _by_target(self) -> Mapping[tuple[FaultKind, tuple[str, ...]], list[Fault]]:
        found: dict[tuple[FaultKind, tuple[str, ...]], list[Fault]] = {}
        for fault in self.faults:
            found.setdefault((fault.kind, fault.nodes), []).append(fault)
        return found

    def _holds(self, kind: FaultKind, nodes: tuple[str, ...], round: int, elapsed_s: float) -> bool:
        return any(fault.holds(round, elapsed_s) for fault in self._by_target.get((kind, nodes), ()))

    def is_paused(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether a node is paused: its process is to be stopped, and to be continued afterwards."""
        return self._holds(FaultKind.PAUSE, (node,), round, elapsed_s)

    def is_killed(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether a node's process is to be killed, and to be started again afterwards."""
        return self._holds(FaultKind.KILL, (node,), round, elapsed_s)

    def is_away(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether a node neither sends nor receives, paused or killed."""
        return self.is_paused(node, round, elapsed_s) or self.is_killed(node, round, elapsed_s)

    def clock_offset_s(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> float:
        """By how much a node's clock of the day is ahead."""
        return math.fsum(f.offset_s for f in self._by_target.get((FaultKind.CLOCK, (node,)), ()) if f.holds(round, elapsed_s))

    def slowness(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> float:
        """How many times as long a node's local steps take."""
        return math.prod(fault.factor for fault in self._by_target.get((FaultKind.SLOW, (node,)), ()) if fault.holds(round, elapsed_s))

    def training_s(self, node: str, round: int, work_s: float, began_s: float) -> float:
        """Seconds that local steps of `work_s` take which begin at some moment, also where a fault begins or ends meanwhile."""
        slow, slowness = self._by_target.get((FaultKind.SLOW, (node,)), ()), self.slowness(node, round, began_s)
        change_s = min((end_s for fault in slow for end_s in (fault.from_s, fault.until_s) if began_s < end_s), default=math.inf)
        done_s = (change_s - began_s) / slowness
        return work_s * slowness if done_s >= work_s else change_s - began_s + self.training_s(node, round, work_s - done_s, change_s)

    @cached_property
    def _sides(self) -> list[tuple[Fault, frozenset[str]]]:
        return [(fault, frozenset(fault.nodes)) for fault in self.faults if fault.kind is FaultKind.PARTITION]

    def is_cut(self, sender: str, receiver: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether what one node sends is lost on its way to another, by a cut, a partition or a loss."""
        cut = (self._holds(FaultKind.CUT, ends, round, elapsed_s) for ends in ((sender, receiver), (receiver, sender)))
        return (
            any(cut)
            or any((sender in side) != (receiver in side) and fault.holds(round, elapsed_s) for fault, side in self._sides)
            or self._loses(sender, receiver, round, elapsed_s)
        )

    def _loses(self, sender: str, receiver: str, round: int, elapsed_s: float) -> bool:
        """Whether a loss takes a round's message; the same answer whenever it is asked for."""
        lossy = [f for f in self._by_target.get((FaultKind.LOSS, (sender, receiver)), ()) if f.holds(round, elapsed_s)]
        if not lossy:
            return False
        drawn = hashlib.blake2b(f"{self.seed}/{sender}/{receiver}/{round}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn) / 2**64 < 1 - math.prod(1 - fault.probability for fault in lossy)

    def delivers(self, sender: str, receiver: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether a message reaches its receiver: neither end is paused or killed, and nothing is lost on the way."""
        when = (round, elapsed_s)
        return not any(self.is_away(node, *when) for node in (sender, receiver)) and not self.is_cut(sender, receiver, *when)

    def only(self, kinds: Collection[FaultKind], *, in_seconds: bool = True) -> FaultScript:
        """Take the faults of some kinds, with or without those that are given in seconds."""
        kept = (fault for fault in self.faults if fault.kind in kinds and (in_seconds or fault.from_s == math.inf))
        return FaultScript(tuple(kept), self.seed)

    def check(self, names: Collection[str], *, kinds: Collection[FaultKind] = tuple(FaultKind), in_seconds: bool = True) -> None:
        """Refuse a script that somebody cannot carry out.

        Args:
            names: nodes of the run.
            kinds: those that can be carried out.
            in_seconds: whether seconds are counted.

        Raises:
            ConfigError: all that is wrong, a sentence each.
        """
        findings = []
        for fault in self.faults:
            said = f"faults: {fault.text}"
            findings += [f"{said}: no node {name}; known: {some(sorted(names))}" for name in fault.nodes if name not in names]
            if fault.kind not in kinds:
                findings.append(f"{said}: cannot be done here; possible: {', '.join(kind.value for kind in kinds)}")
            if fault.kind is FaultKind.SLOW and not 1 < fault.factor < math.inf:
                findings.append(f"{said}: factor = {fault.factor}: expected more than 1, how many times as long local steps take")
            if not 0 < fault.probability <= 1:
                findings.append(f"{said}: probability = {fault.probability}: expected more than 0 and at most 1")
            if fault.kind is FaultKind.THROTTLE and not 0 < fault.bytes_per_s < math.inf:
                findings.append(f"{said}: bytes_per_s = {fault.bytes_per_s}: expected a number above 0")
            if fault.kind is FaultKind.CLOCK and not 0 < abs(fault.offset_s) <= MOST_OFF_S:
                findings.append(f"{said}: offset_s = {fault.offset_s}: expected seconds other than 0, at most ten years")
            if fault.from_s < math.inf and not in_seconds:
                findings.append(f"{said}: seconds are not counted here; give rounds")
        if findings:
            raise ConfigError(findings)
