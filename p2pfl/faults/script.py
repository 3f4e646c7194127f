"""Scripts of faults: which node or edge fails when, read by the simulator and by whoever runs real processes.

A script decides nothing about time: it is asked for a round, for seconds since the start, or for both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from p2pfl.errors import ConfigError, some

NOT_TIMED = -math.inf
"""Seconds since the start where nobody counts them: only faults of rounds hold."""


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
    """Messages of the first node do not reach the second one; the other direction works."""


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

    def holds(self, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether the node or edge fails in this round or at this moment."""
        return round in self.rounds or self.from_s <= elapsed_s < self.until_s


@dataclass(frozen=True)
class FaultScript:
    """All faults of one run, by round or by seconds since its start.

    A paused or killed process makes no rounds: whoever runs processes asks with the furthest round of all nodes; slow ones have their own.
    """

    faults: tuple[Fault, ...] = ()

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

    def slowness(self, node: str, round: int, elapsed_s: float = NOT_TIMED) -> float:
        """How many times as long a node's local steps take."""
        return math.prod(fault.factor for fault in self._by_target.get((FaultKind.SLOW, (node,)), ()) if fault.holds(round, elapsed_s))

    def training_s(self, node: str, round: int, work_s: float, began_s: float) -> float:
        """Seconds that local steps of `work_s` take which begin at some moment, also where a fault begins or ends meanwhile."""
        slow, slowness = self._by_target.get((FaultKind.SLOW, (node,)), ()), self.slowness(node, round, began_s)
        change_s = min((end_s for fault in slow for end_s in (fault.from_s, fault.until_s) if began_s < end_s), default=math.inf)
        done_s = (change_s - began_s) / slowness
        return work_s * slowness if done_s >= work_s else change_s - began_s + self.training_s(node, round, work_s - done_s, change_s)

    def is_cut(self, sender: str, receiver: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether what one node sends is lost on its way to another, by a cut or a loss."""
        found = [(FaultKind.CUT, (sender, receiver)), (FaultKind.CUT, (receiver, sender)), (FaultKind.LOSS, (sender, receiver))]
        return any(self._holds(kind, ends, round, elapsed_s) for kind, ends in found)

    def delivers(self, sender: str, receiver: str, round: int, elapsed_s: float = NOT_TIMED) -> bool:
        """Whether a message reaches its receiver: neither end is paused or killed, and nothing is lost on the way."""
        when = (round, elapsed_s)
        is_gone = any(self.is_paused(node, *when) or self.is_killed(node, *when) for node in (sender, receiver))
        return not is_gone and not self.is_cut(sender, receiver, *when)

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
            said = f"faults: {fault.kind.value} of {' - '.join(fault.nodes)}"
            findings += [f"{said}: no node {name}; known: {some(sorted(names))}" for name in fault.nodes if name not in names]
            if fault.kind not in kinds:
                findings.append(f"{said}: cannot be done here; possible: {', '.join(kind.value for kind in kinds)}")
            if fault.kind is FaultKind.SLOW and not 1 < fault.factor < math.inf:
                findings.append(f"{said}: factor = {fault.factor}: expected more than 1, how many times as long local steps take")
            if fault.from_s < math.inf and not in_seconds:
                findings.append(f"{said}: seconds are not counted here; give rounds")
        if findings:
            raise ConfigError(findings)
