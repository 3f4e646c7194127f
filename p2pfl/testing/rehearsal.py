"""A rehearsal: an experiment run by one real daemon a node on this machine, while a script of faults is carried out."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.loading import resolve
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.launcher.founding import found_network
from p2pfl.launcher.processes import start_plainly
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.records import RunRecords, read_run
from p2pfl.tasks.permission import options_of
from p2pfl.testing.tcp_proxy import TcpProxy

POSSIBLE = (FaultKind.PAUSE, FaultKind.KILL, FaultKind.SLOW, FaultKind.CUT)
SITE: Mapping[str, Any] = {"deadline_floor_s": 2.0, "heartbeat_s": 1, "linger_s": 10.0}
"""Settings of site.yaml for a rehearsal, whose links are fast and whose neighbours answer at once."""

ROUND_AT_LEAST_S = 0.25
"""Where faults happen in rounds, so that no round goes by between two looks; not for slow nodes, which would only wait less."""

POLL_S = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsed:
    """Everything that a rehearsal left behind, by node."""

    place: Path
    """Folder with the study and, under sites/, keys, records and logs of every node."""

    exit_codes: Mapping[str, int]
    """Exit code of the last process of every node; minus the signal that ended it."""

    def records(self, node: str) -> RunRecords:
        """Read the rows, events and summary of one node."""
        return read_run(self._run(node))

    def models(self) -> dict[str, Tensor]:
        """Read the last model of every node as a flat vector, (P,)."""
        return {node: read_models(self._run(node))[node] for node in self.exit_codes}

    def log(self, node: str) -> str:
        """Read what a node printed, over all its starts."""
        return (self.place / "sites" / node / "node.log").read_text(encoding="utf-8", errors="replace")

    def _run(self, node: str) -> Path:
        return self.place / "sites" / node / "state" / "run"


def rehearse(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    place: Path,
    faults: FaultScript | None = None,
    site: Mapping[str, Any] | None = None,
    bytes_per_s: float | None = None,
    latency_s: float = 0.0,
    allow_tasks: Collection[str] = (),
    deadline_s: float = 240.0,
    **more: Any,
) -> Rehearsed:
    """Run an experiment with one real daemon a node and carry out faults while it runs.

    Args:
        experiment: its file, a mapping as the file would hold, or an Experiment.
        place: a new folder for keys, study, records and logs.
        faults: pauses, kills, cuts and slow nodes, in rounds of the furthest node (slow: its own) or in seconds since the start. A killed
            node starts again from its checkpoint when its fault is over; one whose fault has no end stays away. A slow node is stopped and
            continued in turns: what it computes takes longer, not what it waits for.
        site: settings for every site.yaml, over those of `SITE`.
        bytes_per_s: capacity of every link in each direction; None: as much as the machine gives.
        latency_s: delay of every link in each direction.
        allow_tasks: tasks that may run beside the built-in ones.
        deadline_s: how long the whole run may take.
        more: top-level keys of the experiment to replace, such as rounds=10.

    Raises:
        ConfigError: the experiment or the script cannot be; all findings at once.
        TimeoutError: nodes still ran at the deadline; the message names them. None of them is left behind.
    """
    script = faults if faults is not None else FaultScript()
    plan = make_plan(resolved := resolve(experiment, more), load_sites(resolved, allow_tasks=allow_tasks))
    script.check(plan.names, kinds=POSSIBLE)
    if place.exists():
        raise ConfigError("exists already; choose a new folder", str(place))
    is_by_rounds = any(fault.rounds for fault in script.faults if fault.kind != FaultKind.SLOW)
    in_rounds = {"round_at_least_s": ROUND_AT_LEAST_S} if is_by_rounds else {}
    tasks = {"allow_tasks": [*allow_tasks]} if allow_tasks else {}
    rehearsal = _Rehearsal(plan, place, script, {**SITE, **in_rounds, **tasks, **(site or {})}, options_of(allow_tasks))
    asyncio.run(rehearsal.run(bytes_per_s, latency_s, deadline_s))
    return Rehearsed(place=place, exit_codes={node.watched.name: node.code for node in rehearsal.nodes if node.code is not None})


@dataclass(kw_only=True)
class _Node:
    """One daemon of a rehearsal and the fault that it is in."""

    watched: WatchedNode
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    """Exit code of the last process that has ended."""

    is_paused: bool = False
    is_killed: bool = False
    is_stopped: bool = False
    """Whether its process stands still now, paused or for a turn."""

    owed_s: float = 0.0
    """Seconds for which a slow node has to stand still for those that it ran."""

    looked_s: float = 0.0

    def kill(self) -> None:
        """End the process at once, and wait for its end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.code, self.process = self.process.poll(), None

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
class _Rehearsal:
    plan: Plan
    place: Path
    script: FaultScript
    settings: Mapping[str, Any]
    options: list[str]
    nodes: list[_Node] = field(default_factory=list)
    _cables: dict[str, TcpProxy] = field(default_factory=dict)
    _cut: set[tuple[str, str]] = field(default_factory=set)

    async def run(self, bytes_per_s: float | None, latency_s: float, deadline_s: float) -> None:
        """Found the network, start every daemon and carry out the script until all have ended."""
        needs_cables = bytes_per_s is not None or latency_s > 0 or any(fault.kind == FaultKind.CUT for fault in self.script.faults)
        self.place.mkdir(parents=True)
        async with AsyncExitStack() as cables:
            for name in self.plan.names if needs_cables else ():
                cable = TcpProxy(bytes_per_s=bytes_per_s, latency_s=latency_s, dialler_at=self._dialler_at)
                self._cables[name] = await cables.enter_async_context(cable)
            with ExitStack() as ports:
                found_network(self.plan, self.place, ports, self.settings, via=self._lead if needs_cables else None)
            self.nodes = [_Node(watched=WatchedNode(name=name, folder=self.place / "sites" / name)) for name in self.plan.names]
            try:
                async with asyncio.timeout(deadline_s):
                    await self._carry_out()
            except TimeoutError:
                running = ", ".join(node.watched.name for node in self.nodes if not node.is_over)
                raise TimeoutError(f"{running} still ran after {deadline_s:g} s; logs are in {self.place / 'sites'}") from None
            finally:
                for node in self.nodes:
                    node.kill()

    def _lead(self, name: str, address: str) -> str:
        self._cables[name].lead_to(address)
        return self._cables[name].address

    async def _carry_out(self) -> None:
        began_s = asyncio.get_running_loop().time()
        for node in self.nodes:
            self._start(node)
        while not all(node.is_over for node in self.nodes):
            furthest = 1 + max(node.watched.rounds_seen for node in self.nodes)
            elapsed_s = asyncio.get_running_loop().time() - began_s
            for node in self.nodes:
                self._look_after(node, furthest, elapsed_s)
            self._cut_edges(furthest, elapsed_s)
            await asyncio.sleep(POLL_S)

    def _look_after(self, node: _Node, furthest: int, elapsed_s: float) -> None:
        """Take up a node's rows, and begin or end its faults."""
        name = node.watched.name
        node.watched.read_new_rows()
        # where nobody else moves, no round would ever end a fault
        is_moving = any(other.process is not None and not other.is_paused for other in self.nodes if other is not node)
        killed = is_moving and self.script.is_killed(name, furthest, elapsed_s)
        node.is_paused = is_moving and self.script.is_paused(name, furthest, elapsed_s)
        if killed and node.process is not None:
            node.kill()
            node.is_killed, node.is_stopped = self._comes_back(name), False
        elif node.is_killed and not killed:
            node.is_killed = False
            self._start(node)
        if node.process is not None and (code := node.process.poll()) is not None:
            node.code, node.process = code, None
        rests = node.rests(self.script.slowness(name, 1 + node.watched.rounds_seen, elapsed_s), elapsed_s)
        if node.process is not None and (node.is_paused or rests) != node.is_stopped:
            node.is_stopped = node.is_paused or rests
            node.process.send_signal(signal.SIGSTOP if node.is_stopped else signal.SIGCONT)

    def _comes_back(self, name: str) -> bool:
        """Whether every kill of a node is over at some time."""
        kills = [fault for fault in self.script.faults if fault.kind == FaultKind.KILL and fault.nodes == (name,)]
        return all(fault.rounds or fault.until_s < math.inf for fault in kills)

    def _cut_edges(self, furthest: int, elapsed_s: float) -> None:
        cut = {
            (fault.nodes[0], fault.nodes[1])
            for fault in self.script.faults
            if fault.kind == FaultKind.CUT and fault.holds(furthest, elapsed_s)
        }
        for one, other in cut ^ self._cut:
            for listener, dialler in ((one, other), (other, one)):
                cable = self._cables[listener]
                (cable.cut_off if (one, other) in cut else cable.let_in)(dialler)
        self._cut = cut

    def _start(self, node: _Node) -> None:
        arguments = ["--verbose", "node", "start", str(node.watched.folder / "site.yaml"), "--until-stdin-closes", "--only-these-tasks"]
        node.process = start_plainly(node.watched.name, [*arguments, *self.options], node.watched.log)

    def _dialler_at(self, port: int) -> str | None:
        """Name the node whose process holds a port of this machine, from the system's table of sockets; None: no node, or not a Linux."""
        ours = {int(line.split()[9]) for line in _sockets() if int(line.split()[1].rpartition(":")[2], 16) == port}
        for node in self.nodes:
            if node.process is not None and ours & _sockets_of(node.process.pid):
                return node.watched.name
        return None


def _sockets() -> list[str]:
    """Lines of the system's table of IPv4 connections."""
    try:
        return Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []


def _sockets_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process has open."""
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            kind, _, number = str(entry.readlink()).partition(":")
            if kind == "socket":
                found.add(int(number.strip("[]")))
    except OSError:  # it has ended, or the file is closed by now
        pass
    return found
