"""A member that breaks the rules: a daemon with its own keys takes part in the start and some rounds, and lies from then on.

    python tests/lying_members.py PROGRAM EXCHANGE SITE

It is a process of its own, so that it can have a core of its own.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.cli import app
from p2pfl.errors import P2PFLError
from p2pfl.node.daemon import Daemon
from p2pfl.node.mixing import Mixing
from p2pfl.node.sending import Sending
from p2pfl.paces.lockstep import Lockstep
from p2pfl.protocol.claims import Claims
from p2pfl.protocol.neighbour import Neighbour, SendUpdate
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.stop_agreement import StopAgreement
from p2pfl.wire.codec import encode
from p2pfl.wire.messages import NO_STOP, Heartbeat, Report, StopNews

LIE_EVERY_S = 0.2


def alive(exchange: int) -> Heartbeat:
    return Heartbeat(exchange=exchange, report=Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1), stop=NO_STOP)


def ahead(daemon: Daemon, neighbour: Neighbour, _: int) -> Iterator[list]:
    """A ladder of exchange numbers, so that the largest that is believed is among them."""
    at = daemon.protocol.edges.exchange + 2
    while at < daemon.protocol._num_exchanges:
        yield encode(alive(at))
        at = int(1.15 * at) + 1
    yield encode(alive(daemon.protocol._num_exchanges))


def only_alive(daemon: Daemon, neighbour: Neighbour, _: int) -> Iterator[list]:
    yield encode(alive(max(neighbour.heard_exchange, 0)))


def waiting(daemon: Daemon, neighbour: Neighbour, _: int) -> Iterator[list]:
    """That it still waits in the exchange before."""
    yield encode(alive(max(neighbour.heard_exchange - 1, 0)))


def endless(daemon: Daemon, neighbour: Neighbour, step: int) -> Iterator[list]:
    """An update that is begun, goes on for a chunk, and is begun again."""
    exchange, update_format = max(neighbour.heard_exchange, 0), daemon.node.formats[0]
    arrays = {name: np.zeros(shape, dtype) for name, dtype, shape in update_format.channels}
    frames = update_format.pack(exchange, arrays).messages(alive(exchange).report, NO_STOP)
    if step % 5 == 0:
        yield next(iter(frames))
    elif step % 5 == 2:
        yield [*frames][1]


def restarts(daemon: Daemon, neighbour: Neighbour, step: int) -> Iterator[list]:
    """A greeting from another process each time."""
    yield encode(replace(daemon.protocol.stopping.hello(neighbour), incarnation=2**40 + step, exchange=max(neighbour.heard_exchange, 0)))


def silent(daemon: Daemon, neighbour: Neighbour, _: int) -> Iterator[list]:
    """It says nothing more and stays connected."""
    yield from ()


PROGRAMS: dict[str, Callable[[Daemon, Neighbour, int], Iterator[list]]] = {
    "ahead": ahead,
    "only_alive": only_alive,
    "waiting": waiting,
    "endless": endless,
    "restarts": restarts,
    "silent": silent,
}


POISONS: dict[str, Callable[[int, int], float | None]] = {
    "poison_once": lambda number, first: 1e38 if number == first else None,
    "poison_always": lambda number, first: 3.4e38 if number >= first else None,
}
"""What every number of an update is, by its exchange and the first one with a lie; None: as it should be."""


def poison(value_at: Callable[[int, int], float | None], first: int) -> None:
    """Send updates that are full of one number."""
    pack = Mixing.pack

    def poisoned(self: Mixing, outgoing: Mapping[str, Tensor], phase: int) -> Any:
        value = value_at(self._protocol.edges.exchange, first)
        sent = outgoing if value is None else {name: torch.full_like(tensor, value) for name, tensor in outgoing.items()}
        return pack(self, sent, phase)

    Mixing.pack = poisoned


async def say_lies(daemon: Daemon, program: Callable[[Daemon, Neighbour, int], Iterator[list]], step: int) -> None:
    for neighbour in daemon.protocol.neighbours.values():
        for frames in program(daemon, neighbour, step):
            try:
                await daemon.node.transport.send(neighbour.name, frames, 0.1)
            except P2PFLError:
                break


def lie(program: str, exchange: int, site: str) -> None:  # noqa: C901  # one closure for each place where it lies
    """Run a daemon that lies from an exchange on; "early_stop" takes part in all of them and announces a stop as early as it can."""
    send_update, tick, is_over, is_behind = Sending._send_update, Daemon._tick, Lockstep.is_over, Claims.is_behind
    running: list[Protocol] = []

    def lies(protocol: Protocol) -> bool:
        return protocol.edges.exchange >= exchange and program in PROGRAMS and bool(protocol.transfers.sent)

    def is_lying() -> bool:
        return any(lies(protocol) for protocol in running)

    async def send_no_update(self: Sending, neighbour: Neighbour, item: SendUpdate) -> None:
        if not lies(self._protocol):
            await send_update(self, neighbour, item)

    async def tick_and_lie(self: Daemon) -> None:
        running.append(self.protocol)
        async with asyncio.TaskGroup() as group:
            group.create_task(tick(self), name="honest tick")
            for step in count():
                if lies(self.protocol):
                    await say_lies(self, PROGRAMS[program], step)
                await asyncio.sleep(LIE_EVERY_S)

    def announce(self: StopAgreement, consensus_counter: int | None = None) -> StopNews:
        return StopNews(agreed_for=10**6, stop_round=self._earliest)

    Sending._send_update, Daemon._tick = send_no_update, tick_and_lie
    Lockstep.is_over = lambda self, now_s: not is_lying() and is_over(self, now_s)
    Claims.is_behind = lambda self: not is_lying() and is_behind(self)
    if program in POISONS:
        poison(POISONS[program], exchange)
    if program == "early_stop":
        StopAgreement.news = announce
    app(["node", "start", site])


def start_liar(program: str, exchange: int, site: Path) -> subprocess.Popen[bytes]:
    """A process that lies, with the member's own log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (site.parent / "node.log").open("ab") as log:
        return subprocess.Popen([sys.executable, __file__, program, str(exchange), str(site)], stdout=log, stderr=log, env=environment)


if __name__ == "__main__":
    lie(sys.argv[1], int(sys.argv[2]), sys.argv[3])
