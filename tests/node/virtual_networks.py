"""Networks of real daemon objects in virtual time, over memory links with latency, while a script of faults is carried out."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from networks import STUDY, signing_of
from p2pfl.errors import QueueFull, TransportError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.clock import Timeouts
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import RunRecords, read_run
from p2pfl.transports import MemoryNetwork, Received, Transport
from virtual_time import VirtualProcess, run_virtually

LOOK_S = 0.05
"""How often the script is looked at."""

MEMORY = Path("/dev/shm")

TIMEOUTS = Timeouts(deadline_floor_s=2.0, linger_s=30.0, start_within_s=60.0)


class Line:
    """One process's end of its links: each message takes a while, and the network's faults have their way with it."""

    def __init__(self, inner: Transport, name: str, network: VirtualNetwork) -> None:
        self._inner, self._name, self._network = inner, name, network
        self.counters, self.link_counters, self.link = inner.counters, inner.link_counters, inner.link
        self.disconnect, self.receive = inner.disconnect, inner.receive
        self.dead = False

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._inner.__aexit__(*error)

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        if self.dead:
            raise TransportError("killed")
        until_s = asyncio.get_running_loop().time() + timeout_s
        size_bytes = sum(memoryview(frame).nbytes for frame in frames)
        await asyncio.sleep(self._network.takes_s(self._name, peer, size_bytes))
        while self._network.holds(self._name, peer):
            if asyncio.get_running_loop().time() >= until_s:
                raise QueueFull(f"nothing goes from {self._name} to {peer}")
            await asyncio.sleep(LOOK_S)
        if self._network.is_down(self._name, peer):
            raise TransportError(f"no link from {self._name} to {peer}")
        await self._inner.send(peer, frames, max(LOOK_S, until_s - asyncio.get_running_loop().time()))

    async def receive(self) -> Received:
        return await self._inner.receive()


class VirtualNetwork:
    """The daemons of one plan. A cut edge drops what is sent, holds it up, or refuses it at once, as the seed says for each.

    Args:
        plan: of all.
        place: for the states.
        script: in seconds since the start.
        seed: of latencies and of all that the script leaves open.
    """

    def __init__(
        self, plan: Plan, place: Path, script: FaultScript, *, seed: int, timeouts: Timeouts = TIMEOUTS, view: ViewPolicy | None = None
    ) -> None:
        self.plan, self.place, self.script, self.timeouts, self.view = plan, place, script, timeouts, view
        self.states = {name: place / name / "0" for name in plan.names}
        self.reasons: dict[str, str] = {}
        self.processes: dict[str, VirtualProcess] = {}
        self.daemons: dict[str, Daemon] = {}
        self.disturbed = {name for fault in script.faults for name in fault.nodes}
        self._chance = np.random.default_rng([seed, 2])
        self._styles = {fault: self._chance.choice(["drop", "hold", "down"]) for fault in script.faults}
        self._lines: dict[str, Line] = {}
        self._tasks: dict[str, asyncio.Task[str]] = {}
        self._killed: set[str] = set()
        self._starts = count(1)
        self._signing = signing_of(plan)
        self._memory = MemoryNetwork(lost=self._loses)
        self.end_s = 0.0

    # ---- what the network does to messages

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def takes_s(self, sender: str, receiver: str, size_bytes: int) -> float:
        rate = min((f.bytes_per_s for f in self._on(FaultKind.THROTTLE, sender, receiver)), default=np.inf)
        return float(self._chance.uniform(0.005, 0.03)) + size_bytes / rate

    def holds(self, sender: str, receiver: str) -> bool:
        return any(self._styles[f] == "hold" for f in self._cuts(sender, receiver))

    def is_down(self, sender: str, receiver: str) -> bool:
        if any(self._on(FaultKind.CORRUPT, sender, receiver)) and self._chance.random() < 0.2:  # the connection ends, and is made anew
            return True
        if any(f.holds(-1, self.now_s()) for f in self.script.faults if f.kind is FaultKind.DNS and f.nodes[0] in (sender, receiver)):
            return True
        return any(self._styles[f] == "down" for f in self._cuts(sender, receiver))

    def _loses(self, sender: str, receiver: str, _frames: object) -> bool:
        if any(self._styles[f] == "drop" for f in self._cuts(sender, receiver)):
            return True
        return any(self._chance.random() < f.probability for f in self._on(FaultKind.LOSS, sender, receiver))

    def _on(self, kind: FaultKind, sender: str, receiver: str) -> list[Any]:
        now_s = self.now_s()
        return [f for f in self.script.faults if f.kind is kind and f.holds(-1, now_s) and f.is_on(sender, receiver)]

    def _cuts(self, sender: str, receiver: str) -> list[Any]:
        return [f for kind in (FaultKind.CUT, FaultKind.PARTITION) for f in self._on(kind, sender, receiver)]

    # ---- processes

    async def run(self) -> None:
        """Start every daemon and carry out the script until all have ended."""
        for name in self.plan.names:
            self._start(name)
        while len(self.reasons) < len(self.plan.names):
            for name in self.plan.names:
                self._look_after(name)
            for name in sorted(self._due_kills):
                await self._kill(name)
            for name, task in list(self._tasks.items()):
                if task.done():
                    self.reasons[name] = task.result()
                    del self._tasks[name]
            await asyncio.sleep(LOOK_S)
        self.end_s = self.now_s()

    @property
    def _due_kills(self) -> set[str]:
        now_s = self.now_s()
        return {name for name in self._tasks if self.script.is_killed(name, -1, now_s)}

    def _look_after(self, name: str) -> None:
        now_s, process = self.now_s(), self.processes[name]
        is_killed = self.script.is_killed(name, -1, now_s)
        if name in self._killed and not is_killed:
            self._killed.discard(name)
            self._start(name)
        process = self.processes[name]
        process.clock_offset_s = self.script.clock_offset_s(name, -1, now_s)
        is_paused = self.script.is_paused(name, -1, now_s)
        if is_paused and not process.is_stopped:
            process.stop()
        elif not is_paused and process.is_stopped:
            process.go_on()

    def _start(self, name: str) -> None:
        line = Line(self._memory.transport(name, self.plan.neighbours(name)), name, self)
        node = Node(
            self.plan,
            name,
            line,
            state=self.states[name],
            timeouts=self.timeouts,
            incarnation=next(self._starts),
            study_digest=STUDY,
            signing=self._signing[name],
            view=self.view,
        )
        self._lines[name], self.daemons[name] = line, Daemon(node, status_port=None)
        self.processes[name] = VirtualProcess(name)
        self._tasks[name] = self.processes[name].start(self.daemons[name].run())

    async def _kill(self, name: str) -> None:
        if self._tasks[name].done():
            return
        self._lines[name].dead = True
        old = self.states[name]
        self.states[name] = old.with_name(str(int(old.name) + 1))
        if old.exists():
            shutil.copytree(old, self.states[name])
        del self._tasks[name]
        self._killed.add(name)
        await self.processes[name].kill()

    # ---- what they leave behind

    def models(self) -> Tensor:
        """Every node's vector at its end, (N, P)."""
        return torch.stack([read_models(self.states[name] / "run")[name] for name in self.plan.names])

    def records(self, name: str) -> RunRecords:
        return read_run(self.states[name] / "run")

    def last_rounds(self) -> set[int]:
        """Numbers of rounds after which nodes have ended: one, where they agree."""
        found = [self.records(name).summary for name in self.plan.names]
        return {summary["rounds"] for summary in found if summary is not None} if None not in found else set()

    def check_checkpoints(self) -> None:
        for state in self.place.glob("*/*"):
            if (state / CHECKPOINT).exists():
                read_checkpoint(state / CHECKPOINT)


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder for states, in memory where the system has such a place: a disk takes milliseconds for each checkpoint."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        yield Path(place)


def run_script(
    plan: Plan,
    place: Path,
    script: FaultScript,
    *,
    seed: int,
    at_most_s: float = 3600.0,
    work_s: tuple[float, float] = (0.005, 0.05),
    timeouts: Timeouts = TIMEOUTS,
    view: ViewPolicy | None = None,
) -> VirtualNetwork:
    """Run a plan under a script in virtual time, to its end."""
    network = VirtualNetwork(plan, place, script, seed=seed, timeouts=timeouts, view=view)
    with patch.object(os, "fsync", lambda _: None):  # no power fails here, and a disk takes its time
        run_virtually(network.run(), seed=seed, at_most_s=at_most_s, work_s=work_s)
    return network
