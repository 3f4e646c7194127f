"""What the tests of nodes share: whole networks of daemons in one process, with faults that happen when the test says so."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from commands import hear_interrupts
from links import MemoryLinks, ZeroMQLinks
from p2pfl.errors import P2PFLError, TransportError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.clock import Timeouts
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.node.status import read_status
from p2pfl.protocol.agreed_start import Signing
from p2pfl.runs.events import departures_in
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.transports import Received, Transport, reserve_port
from p2pfl.yaml_files import dump_yaml

DEADLINE_S = 240.0  # for a machine that has much else to do
STUDY = "ab" * 32
PATIENT = Timeouts(deadline_floor_s=30.0, linger_s=20.0, start_within_s=30.0)
"""Nobody is ever given up."""
HASTY = Timeouts(deadline_floor_s=0.2, deadline_factor=1.0, linger_s=20.0, start_within_s=30.0)
"""Who is late is skipped at once."""


def finish(test: Coroutine[Any, Any, Any], deadline_s: float = DEADLINE_S) -> Any:
    return asyncio.run(asyncio.wait_for(test, deadline_s))


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; the deadline is that of the whole test."""
    while not condition():  # noqa: ASYNC110 - counters of another task, not an event
        await asyncio.sleep(0.002)


def averaging(
    topology: dict[str, Any], nodes: int, *, seed: int = 0, tolerance: float = 1e-6, dimension: int = 5, algorithm: str = "dpsgd"
) -> Plan:
    """Nothing to learn in float64, until everybody agrees."""
    return plan_of(
        task={"name": "averaging", "dimension": dimension},
        nodes=nodes,
        topology=topology,
        algorithm={"name": algorithm},
        rounds=0,
        stop={"relative_consensus": tolerance, "settle": 2000},
        seed=seed,
    )


def plan_of(**experiment: Any) -> Plan:
    resolved = experiment_from({"baselines": [], **experiment})
    return make_plan(resolved, load_sites(resolved))


def starts(plan: Plan) -> Tensor:
    """Every node's vector before the first round, (N, P)."""
    return plan.population(plan.names).estimate()


def signing_of(plan: Plan) -> dict[str, Signing]:
    """New keys for every node."""
    secrets = {name: Ed25519PrivateKey.generate() for name in plan.names}
    keys = {name: secret.public_key().public_bytes_raw() for name, secret in secrets.items()}
    return {name: Signing(keys=keys, sign=secret.sign) for name, secret in secrets.items()}


class Line:
    """One process's end of its links, which ends with the process and stands still with it."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.counters, self.link_counters, self.link = inner.counters, inner.link_counters, inner.link
        self.disconnect = inner.disconnect
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.dead = False

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._inner.__aexit__(*error)

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        await self.flowing.wait()
        if self.dead:
            raise TransportError("killed")
        await self._inner.send(peer, frames, timeout_s)

    async def receive(self) -> Received:
        received = await self._inner.receive()
        await self.flowing.wait()
        if self.dead:
            await asyncio.Event().wait()  # the process that would have read this is gone
        return received


class Running:
    """A daemon that was started."""

    def __init__(self, daemon: Daemon, line: Line, task: asyncio.Task[str]) -> None:
        self.daemon, self.line, self.task = daemon, line, task


class Network:
    """The daemons of one plan in this process. Used inside `async with`, which ends what still runs."""

    def __init__(
        self,
        plan: Plan,
        place: Path,
        *,
        timeouts: Timeouts = PATIENT,
        timeouts_of: Mapping[str, Timeouts] | None = None,
        links: MemoryLinks | ZeroMQLinks | None = None,
        **options: Any,
    ) -> None:
        self.plan, self.place, self.timeouts, self.timeouts_of = plan, place, timeouts, timeouts_of or {}
        self.links = links if links is not None else MemoryLinks(max_queued=32)
        self.options = {"study_digest": STUDY, "status_port": None, **options}
        self.nodes: dict[str, Running] = {}
        self.states = {name: place / name / "0" for name in plan.names}
        self.signing = signing_of(plan)
        self.cut: set[tuple[str, str]] = set()
        """(sender, receiver) whose messages are lost; over memory only."""
        self._starts = count(1)
        if isinstance(self.links, MemoryLinks):
            self.links.network.lost = lambda sender, receiver, frames: (sender, receiver) in self.cut

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for node in self.nodes.values():
            node.task.cancel()
        await asyncio.gather(*(node.task for node in self.nodes.values()), return_exceptions=True)

    def neighbours(self, name: str) -> list[str]:
        return self.plan.neighbours(name)

    def start(self, *names: str, **options: Any) -> None:
        """Start some daemons, or all, from what lies in their state folders.

        Args:
            names: of the daemons.
            options: for these, beside those of the network.
        """
        for name in names or self.plan.names:
            line = Line(self.links.member(name, self.neighbours(name)))
            timeouts = self.timeouts_of.get(name, self.timeouts)
            given = {"signing": self.signing[name], "incarnation": next(self._starts), **self.options, **options}
            page = {key: given.pop(key) for key in ("status_port", "status_host") if key in given}
            node = Node(self.plan, name, line, state=self.states[name], timeouts=timeouts, **given)
            daemon = Daemon(node, **page)
            self.nodes[name] = Running(daemon, line, asyncio.create_task(daemon.run(), name=name))

    async def ended(self, *, dishonest: str | None = None) -> list[str]:
        """Every daemon's stop reason, in the order of the names; only a dishonest neighbour may be above its limits."""
        reasons = await asyncio.gather(*(self.nodes[name].task for name in self.plan.names))
        for name in self.plan.names:
            for of, neighbour in self.nodes[name].daemon.protocol.neighbours.items():
                assert of == dishonest or neighbour.allowance.num_dropped == neighbour.allowance.times_excluded == 0, (name, of)
        return reasons

    def round(self, name: str) -> int:
        return self.nodes[name].daemon.status()["round"]

    async def reached(self, number: int, names: Iterable[str] | None = None) -> None:
        """Wait until some nodes, or all, are in this round."""
        waited_for = list(names if names is not None else self.plan.names)
        await until(lambda: all(self.round(name) >= number or self.nodes[name].task.done() for name in waited_for))

    async def kill(self, name: str) -> None:
        """As `kill -9` does: what is on the disk stays, nothing more is sent or written."""
        node = self.nodes[name]
        node.line.dead = True
        node.line.flowing.set()
        old, new = self.states[name], self.states[name].with_name(str(int(self.states[name].name) + 1))
        # a thread of the dead process may still be writing: its folder is left to it
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("*.tmp"))
        self.states[name] = new
        node.task.cancel()
        await asyncio.wait([node.task])

    def pause(self, name: str) -> None:
        """As SIGSTOP does: it neither sends nor reads, its clock stands, and what is sent to it waits."""
        node = self.nodes[name]
        now_s = time.monotonic()
        node.daemon.clock.now_s = lambda: now_s
        node.line.flowing.clear()

    def wake(self, name: str) -> None:
        """As SIGCONT does: it sees how late it is."""
        node = self.nodes[name]
        del node.daemon.clock.now_s
        node.line.flowing.set()

    def models(self, after: int | None = None) -> Tensor:
        """Every node's vector at its end or after a round, (N, P)."""
        return torch.stack([read_models(self.states[name] / "run", after)[name] for name in self.plan.names])

    def summary(self, name: str) -> dict[str, Any]:
        found = read_run(self.states[name] / "run").summary
        assert found is not None
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_run(self.states[name] / "run").nodes

    def events(self, name: str) -> list[str]:
        return [event["event"] for event in read_run(self.states[name] / "run").events]


def gathered(network: Network, place: Path, experiment: dict[str, Any]) -> None:
    """The nodes' records in one run folder, as `p2pfl up` puts them together."""
    folder = RunFolder.create(place, experiment_from(experiment).as_dict())
    folder.append_node(*(row for name in network.plan.names for row in network.rows(name)))
    folder.write_summary({"rounds": 0})


class Process(Protocol):
    """As much of a process as tests of nodes need; see `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, number: signal.Signals) -> None: ...
    def kill(self) -> None: ...


class Institutions:
    """The daemons of one plan as processes, each with what its institution would have. Used inside `with`, which ends what still runs.

    Args:
        plan: of all.
        place: one folder a member is made in it, and the public files.
        via: addresses that the others are told instead of a member's own; None: the member only dials out.
        relays: by member, the address on its card where it relays, and what its site.yaml says of that.
        transports: by the ends of an edge, how its link goes.
        settings_of: for single site.yaml files, over all else.
        settings: for every site.yaml.
    """

    def __init__(
        self,
        plan: Plan,
        place: Path,
        *,
        via: Callable[[str, str], str | None] | None = None,
        relays: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
        transports: Mapping[tuple[str, str], str] | None = None,
        settings_of: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.plan, self.place, relays, settings_of = plan, place, relays or {}, settings_of or {}
        self._held = ExitStack()
        self._processes: dict[str, Process] = {}
        cards: list[Any] = []
        listens: dict[str, str | None] = {}
        for name in plan.names:
            listens[name] = own = self._held.enter_context(reserve_port()).address
            identity = Identity.new()
            identity.save(place / name / "keys")
            train = plan.sites[name].train
            address = via(name, own) if via is not None else own
            relay = relays[name][0] if name in relays else None
            cards.append(identity.card(name, address, len(train[0]) if train else None, relay=relay))
            if address is None:
                listens[name] = None
        self.study = Study.create(plan.experiment.as_dict(), cards, plan.topology, transports=transports)
        self.study.save(place / "study.yaml")
        for name in plan.names:
            site = {"member": name, "study": "../study.yaml", "confirmed": self.study.digest, "listen": listens[name], "heartbeat_s": 1}
            site |= {"relay": dict(relays[name][1])} if name in relays else {}
            (place / name / "site.yaml").write_text(dump_yaml({**site, **settings, **settings_of.get(name, {})}), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(DEADLINE_S)
        self._held.close()

    def site(self, name: str) -> Path:
        return self.place / name / "site.yaml"

    def state(self, name: str) -> Path:
        return self.place / name / "state"

    def start(self, *names: str, options: Sequence[str] = ()) -> None:
        """Start some nodes, or all."""
        for name in names or self.plan.names:
            arguments = ("--verbose", "node", "start", str(self.site(name)), *options)
            self._processes[name] = self.start_one(name, *arguments, log=self.place / name / "node.log")

    def start_one(self, _name: str, *arguments: str, log: Path) -> Process:
        """Start the process of a node; see `start_process`."""
        return start_process(*arguments, log=log)

    def wait(self, name: str) -> int:
        """The exit code of a process that is about to end."""
        return self._processes[name].wait(DEADLINE_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def exit_code(self, name: str) -> int | None:
        return self._processes[name].poll()

    def end(self, name: str, number: signal.Signals) -> int:
        """Send a signal and wait for the process's end."""
        self.signal(name, number)
        return self._processes[name].wait(DEADLINE_S)

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self._processes.values())

    def status(self, name: str) -> dict[str, Any] | None:
        """What the node says of itself; None while it does not run."""
        try:
            return read_status(self.state(name))
        except P2PFLError:
            return None

    def round(self, name: str) -> int:
        """-1 while the node does not run."""
        status = self.status(name)
        return -1 if status is None else status["round"]

    def models(self) -> Tensor:
        return torch.stack([read_models(self.state(name) / "run")[name] for name in self.plan.names])

    def summary(self, name: str) -> dict[str, Any]:
        found = read_run(self.state(name) / "run").summary
        assert found is not None, (self.place / name / "node.log").read_text()[-2000:]
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_run(self.state(name) / "run").nodes

    def events(self, name: str) -> list[str]:
        return [event["event"] for event in read_run(self.state(name) / "run").events]

    def account_of(self, *names: str, last_lines: int = 60) -> str:
        """For the message of a test that fails: how each of these nodes, or all, ended by its own records and its own log."""
        told = []
        for name in names or self.plan.names:
            told.append(f"==== {name}: exit code {self.exit_code(name)}")
            folder, log = self.state(name) / "run", self.place / name / "node.log"
            if folder.is_dir():
                run = read_run(folder)
                told += [f"departure: {departure}" for departure in departures_in(run.summary)]
                told += [f"event: {dict(event)}" for event in run.events]
                skipped = {row["round"]: row["skipped"] for row in run.nodes if row["skipped"]}
                told.append(f"skipped by round: {skipped}")
            told += log.read_text(errors="replace").splitlines()[-last_lines:] if log.is_file() else ["no log"]
        return "\n".join(told)

    def all_ended_as_agreed(self) -> None:
        """Fail, with what the others say of themselves, unless every node has ended with exit code 0."""
        codes = {name: self.exit_code(name) for name in self.plan.names}
        if others := [name for name, code in codes.items() if code != 0]:
            raise AssertionError(f"exit codes: {codes}\n{self.account_of(*others)}")


def start_process(*arguments: str, log: Path, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`p2pfl` with some arguments, writing to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        command = [sys.executable, "-m", "p2pfl", *arguments]
        return subprocess.Popen(command, stdin=stdin, stdout=output, stderr=output, env=environment, preexec_fn=hear_interrupts)  # noqa: PLW1509


def wait_until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """The same as `until` where no event loop runs."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)
