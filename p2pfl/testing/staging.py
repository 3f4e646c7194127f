"""The processes, cables and faults of a rehearsal: started, disturbed as a script says, and looked after until all have ended."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import OF_EDGES, Fault, FaultKind, FaultScript
from p2pfl.launcher.founding import found_network
from p2pfl.launcher.processes import ForkServer, Process, start_plainly
from p2pfl.launcher.watched import WatchedNode
from p2pfl.testing.diallers import dialler_at
from p2pfl.testing.disturbance import DOMAIN, write_conditions
from p2pfl.testing.tcp_proxy import Disturbance, TcpProxy
from p2pfl.transports.base import dials

POLL_S = 0.03
END_S = 20.0
"""For a process that was killed to be gone."""

_OF_CABLES = OF_EDGES | {FaultKind.PARTITION, FaultKind.DNS}
_OF_CONDITIONS = frozenset({FaultKind.CLOCK, FaultKind.DNS})

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultTimes:
    """When a fault began and was over; NaN: never."""

    fault: Fault
    began_s: float = math.nan
    began_round: int = -1
    """Round of the furthest node."""
    ended_s: float = math.nan


@dataclass(kw_only=True)
class StagedNode:
    """One daemon of a rehearsal and the fault that it is in."""

    watched: WatchedNode
    process: Process | None = None
    code: int | None = None
    """Exit code of the last process that has ended."""

    is_paused: bool = False
    is_killed: bool = False
    """Whether it is to be started again when its fault is over."""
    is_stopped: bool = False
    """Whether its process stands still now, paused or for a turn."""

    owed_s: float = 0.0
    """Seconds for which a slow node has to stand still for those that it ran."""

    looked_s: float = 0.0

    def look(self) -> None:
        """Take up the end of the process."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self.code, self.process, self.is_stopped = code, None, False

    def rests(self, slowness: float, elapsed_s: float) -> bool:
        """Whether the process has to stand still until the next look, so that it runs 1 / slowness of the time."""
        passed_s, self.looked_s = elapsed_s - self.looked_s, elapsed_s
        if slowness == 1 or self.is_paused or self.process is None:
            self.owed_s = 0.0
        else:
            self.owed_s += -passed_s if self.is_stopped else passed_s * (slowness - 1)
        return self.owed_s > 0

    @property
    def is_over(self) -> bool:
        """Whether it runs no more and is not to be started again."""
        return self.process is None and not self.is_killed


@dataclass
class Stage:
    """One rehearsal while it runs.

    Args:
        plan: of the run.
        place: its folder.
        script: of the faults.
        settings: for every site.yaml.
        options: of every daemon's command line.
        fork: a fork server at work; None: each daemon is a Python of its own.
        progress: called with the furthest round and the number of faults that have begun.
    """

    plan: Plan
    place: Path
    script: FaultScript
    settings: Mapping[str, Any]
    options: Sequence[str]
    fork: ForkServer | None = None
    progress: Progress | None = None
    nodes: list[StagedNode] = field(default_factory=list)
    seen_s: dict[tuple[str, int], float] = field(default_factory=dict)
    """When a node's row of a round was first seen."""
    took_s: float = 0.0
    _cables: dict[str, TcpProxy] = field(default_factory=dict)
    _cut: set[tuple[str, str]] = field(default_factory=set)
    """Listener and dialling side."""
    _times: dict[int, FaultTimes] = field(default_factory=dict)
    _told: dict[str, tuple[float, frozenset[str]]] = field(default_factory=dict)
    """Clock and names that each process was last told."""
    _hosts: dict[str, str] = field(default_factory=dict)
    _struck: set[str] = field(default_factory=set)
    """Nodes whose process was killed by a fault that still holds."""

    @property
    def times(self) -> list[FaultTimes]:
        """When each fault of the script began and was over, in the script's order."""
        return [self._times.get(number, FaultTimes(fault=fault)) for number, fault in enumerate(self.script.faults)]

    async def run(self, bytes_per_s: float | None, latency_s: float, deadline_s: float) -> None:
        """Found the network, start every daemon and carry out the script until all have ended.

        Raises:
            TimeoutError: some still ran at the deadline.
        """
        kinds = {fault.kind for fault in self.script.faults}
        needs_cables = bytes_per_s is not None or latency_s > 0 or not kinds.isdisjoint(_OF_CABLES)
        if FaultKind.DNS in kinds:
            self._hosts = {name: f"node-{number}{DOMAIN}" for number, name in enumerate(self.plan.names)}
        async with AsyncExitStack() as cables:
            for name in self.plan.names if needs_cables else ():
                cable = TcpProxy(bytes_per_s=bytes_per_s, latency_s=latency_s, dialler_at=self._dialler_at)
                self._cables[name] = await cables.enter_async_context(cable)
            with ExitStack() as ports:
                found_network(self.plan, self.place, ports, self.settings, via=self._lead if needs_cables else None)
            self.nodes = [StagedNode(watched=WatchedNode(name=name, folder=self.place / "sites" / name)) for name in self.plan.names]
            try:
                async with asyncio.timeout(deadline_s):
                    await self._carry_out()
            except TimeoutError:
                running = ", ".join(node.watched.name for node in self.nodes if not node.is_over)
                raise TimeoutError(f"{running} still ran after {deadline_s:g} s; logs are in {self.place / 'sites'}") from None
            finally:
                await self._end_all()

    async def _end_all(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                node.process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(END_S):
            while any(node.process is not None for node in self.nodes):
                for node in self.nodes:
                    node.look()
                await asyncio.sleep(POLL_S)

    def _lead(self, name: str, address: str) -> str:
        cable = self._cables[name]
        cable.lead_to(address)
        return cable.address if name not in self._hosts else cable.address.replace("127.0.0.1", self._hosts[name])

    async def _carry_out(self) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        if self.fork is not None and not await self.fork.is_fit():
            self.fork = None
        self._tell(-1, 0.0)
        for node in self.nodes:
            self._start(node)
        while not all(node.is_over for node in self.nodes):
            furthest = 1 + max(node.watched.rounds_seen for node in self.nodes)
            elapsed_s = loop.time() - began_s
            for node in self.nodes:
                self._look_after(node, furthest, elapsed_s)
            self._disturb_cables(furthest, elapsed_s)
            self._tell(furthest, elapsed_s)
            self._note_times(furthest, elapsed_s)
            if self.progress is not None:
                self.progress(furthest, len(self._times))
            await asyncio.sleep(POLL_S)
        self.took_s = loop.time() - began_s

    # ---- processes

    def _look_after(self, node: StagedNode, furthest: int, elapsed_s: float) -> None:
        """Take up a node's rows, and begin or end its faults."""
        name = node.watched.name
        before = node.watched.rounds_seen
        node.watched.read_new_rows()
        for number in range(before + 1, node.watched.rounds_seen + 1):
            self.seen_s.setdefault((name, number), elapsed_s)
        node.look()
        # where nobody else moves, no round would ever end a fault
        is_moving = any(other.process is not None and not other.is_paused for other in self.nodes if other is not node)
        killed = is_moving and self.script.is_killed(name, furthest, elapsed_s)
        node.is_paused = is_moving and self.script.is_paused(name, furthest, elapsed_s)
        if not killed:
            self._struck.discard(name)
        if killed and node.process is not None:
            self._struck.add(name)
            node.process.send_signal(signal.SIGKILL)
        if name in self._struck:  # one without an end may begin while another one holds
            holding = self._holding((FaultKind.KILL,), furthest, elapsed_s)
            node.is_killed = all(fault.has_end for fault in holding if fault.nodes == (name,))
        elif node.is_killed and not killed and node.process is None:
            node.is_killed = False
            self._start(node)
        rests = node.rests(self.script.slowness(name, 1 + node.watched.rounds_seen, elapsed_s), elapsed_s)
        if node.process is not None and (node.is_paused or rests) != node.is_stopped:
            node.is_stopped = node.is_paused or rests
            node.process.send_signal(signal.SIGSTOP if node.is_stopped else signal.SIGCONT)

    def _start(self, node: StagedNode) -> None:
        arguments = ["--verbose", "node", "start", str(node.watched.folder / "site.yaml"), "--until-stdin-closes", "--only-these-tasks"]
        if self._tells:
            arguments += ["--disturbed-by", str(self._conditions_file(node.watched.name))]
        start = start_plainly if self.fork is None else self.fork.start
        node.watched.starts += 1
        node.process = start(node.watched.name, [*arguments, *self.options], node.watched.log)

    # ---- cables

    def _holding(self, kinds: Iterable[FaultKind], furthest: int, elapsed_s: float) -> list[Fault]:
        return [fault for fault in self.script.faults if fault.kind in kinds and fault.holds(furthest, elapsed_s)]

    def _disturb_cables(self, furthest: int, elapsed_s: float) -> None:
        """Make every cable as bad as the faults of this moment say."""
        if not self._cables:
            return
        bad = self._holding(OF_EDGES | {FaultKind.PARTITION}, furthest, elapsed_s)
        cuts = [fault for fault in bad if fault.kind in (FaultKind.CUT, FaultKind.PARTITION)]
        others = [fault for fault in bad if fault not in cuts]
        cut = {ends for ends in self._edges if any(fault.is_on(*ends) for fault in cuts)}
        for listener, dialler in cut ^ self._cut:
            cable = self._cables[listener]
            (cable.cut_off if (listener, dialler) in cut else cable.let_in)(dialler)
        self._cut = cut
        for listener, cable in self._cables.items():
            disturbed = {}
            for _, dialler in (ends for ends in self._edges if ends[0] == listener):
                there = [fault for fault in others if fault.is_on(dialler, listener)]
                back = [fault for fault in others if fault.is_on(listener, dialler)]
                if there or back:
                    disturbed[dialler] = Disturbance(
                        bytes_per_s=min((fault.bytes_per_s for fault in (*there, *back)), default=math.inf),
                        loss=(_loss(there), _loss(back)),
                        corrupts=any(fault.kind is FaultKind.CORRUPT for fault in (*there, *back)),
                    )
            cable.disturb(disturbed)

    @property
    def _edges(self) -> list[tuple[str, str]]:
        """Listener and dialling side of every edge: all have an address."""
        return [(a, b) for a in self.plan.names for b in self.plan.neighbours(a) if dials(b, "tcp", a, "tcp")]

    def _dialler_at(self, port: int) -> str | None:
        pids = {node.watched.name: node.process.pid for node in self.nodes if node.process is not None and node.process.pid is not None}
        return dialler_at(port, pids)

    # ---- clocks and names

    @property
    def _tells(self) -> bool:
        return any(fault.kind in _OF_CONDITIONS for fault in self.script.faults)

    def _conditions_file(self, name: str) -> Path:
        return self.place / "sites" / name / "conditions.json"

    def _tell(self, furthest: int, elapsed_s: float) -> None:
        """Tell every process how far its clock is off, and which names have no address."""
        if not self._tells:
            return
        unknown = {fault.nodes[0] for fault in self._holding((FaultKind.DNS,), furthest, elapsed_s)}
        hosts = frozenset(self._hosts[name] for name in unknown)
        for name in self.plan.names:
            now = (self.script.clock_offset_s(name, furthest, elapsed_s), hosts)
            before = self._told.get(name)
            if before != now:
                write_conditions(self._conditions_file(name), clock_offset_s=now[0], unknown_hosts=hosts)
                self._told[name] = now
            if before is not None and (host := self._hosts.get(name)) in hosts - before[1] and host is not None:
                self._cables[name].reset()  # whoever is connected need not look the name up

    # ---- times

    def _note_times(self, furthest: int, elapsed_s: float) -> None:
        own = {node.watched.name: 1 + node.watched.rounds_seen for node in self.nodes}
        for number, fault in enumerate(self.script.faults):
            at = own[fault.nodes[0]] if fault.kind is FaultKind.SLOW else furthest
            holds, known = fault.holds(at, elapsed_s), self._times.get(number)
            if holds and known is None and self._is_done(fault):
                self._times[number] = FaultTimes(fault=fault, began_s=elapsed_s, began_round=furthest)
            elif not holds and known is not None and math.isnan(known.ended_s):
                self._times[number] = FaultTimes(fault=fault, began_s=known.began_s, began_round=known.began_round, ended_s=elapsed_s)

    def _is_done(self, fault: Fault) -> bool:
        """Whether a fault that holds is carried out: on a process that runs, or on an edge between two of them."""
        running = {node.watched.name: node for node in self.nodes if node.process is not None}
        if fault.kind in OF_EDGES or fault.kind is FaultKind.PARTITION:
            return any(fault.is_on(a, b) and a in running and b in running for a in self.plan.names for b in self.plan.neighbours(a))
        (name,) = fault.nodes
        if fault.kind is FaultKind.KILL:
            return name in self._struck
        if fault.kind is FaultKind.DNS:
            return any(other in running for other in self.plan.neighbours(name))
        return name in running and (fault.kind is not FaultKind.PAUSE or running[name].is_paused)


def _loss(faults: Sequence[Fault]) -> float:
    return 1 - math.prod(1 - fault.probability for fault in faults if fault.kind is FaultKind.LOSS)
