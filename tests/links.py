"""What the tests of transports share: members with keys and ports, and waits that end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

import zmq

from p2pfl.errors import TransportError
from p2pfl.transports import TRANSPORTS, Endpoint, MemoryNetwork, Received, ReservedPort, Transport, reserve_port

DEADLINE_S = 20.0


def finish(test: Coroutine[Any, Any, None], deadline_s: float = DEADLINE_S) -> None:
    asyncio.run(asyncio.wait_for(test, deadline_s))


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; the deadline is that of the whole test."""
    while not condition():  # noqa: ASYNC110 - counters of another task, not an event
        await asyncio.sleep(0.005)


async def send_when_up(sender: Transport, peer: str, frames: Sequence[bytes]) -> None:
    """Send as soon as there is a link."""
    while True:
        try:
            return await sender.send(peer, frames, 1.0)
        except TransportError:
            await asyncio.sleep(0.005)


async def send_until_refused(sender: Transport, peer: str, payload: bytes, timeout_s: float = 1.0, at_least: int = 0) -> tuple[int, str]:
    """Send numbered messages; how many were taken and why the next one was not. So many *at least* are taken, however slowly."""
    number = 0
    while True:
        await asyncio.sleep(0)  # a send that never waits would leave the deadline no chance
        try:
            await sender.send(peer, [b"%d" % number, payload], timeout_s)
            number += 1
        except TransportError as error:
            if number >= at_least:
                return number, str(error)


async def arrives(sender: Transport, receiver: Transport, name: str, frames: Sequence[bytes]) -> None:
    """Send to a receiver of this name until it arrives: a connection that is ending takes messages still, and loses them."""
    while True:
        await send_when_up(sender, name, frames)
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while [bytes(frame) for frame in (await receiver.receive()).frames] != list(frames):
                    pass
                return


async def receive(receiver: Transport, num_messages: int) -> list[tuple[str, list[bytes]]]:
    """The next messages as (peer, frames)."""
    messages: list[Received] = [await receiver.receive() for _ in range(num_messages)]
    return [(message.peer, [bytes(frame) for frame in message.frames]) for message in messages]


class MemoryLinks:
    """Members of a memory network."""

    def __init__(self, max_queued: int) -> None:
        self.network = MemoryNetwork(max_queued=max_queued)

    def member(self, name: str, neighbours: Iterable[str]) -> Transport:
        return self.network.transport(name, neighbours)

    def close(self) -> None:
        pass


class Links:
    """Members of a registered transport with keys, and ports that stay theirs over a restart. Names in *hidden* have no address."""

    def __init__(self, transport: str, max_queued: int = 32, hidden: Iterable[str] = ()) -> None:
        self.transport = transport
        self.max_queued = max_queued
        self.hidden = frozenset(hidden)
        self.keys: dict[str, tuple[bytes, bytes]] = {}
        self.ports: dict[str, ReservedPort] = {}

    def endpoint(self, name: str) -> Endpoint:
        if name not in self.keys:
            self.keys[name] = zmq.curve_keypair()
            self.ports[name] = reserve_port()
        return Endpoint(name, None if name in self.hidden else self.ports[name].address, self.keys[name][0])

    def member(self, name: str, neighbours: Iterable[str], **options: Any) -> Any:
        peers = [self.endpoint(peer) for peer in neighbours]
        options = {"max_queued": self.max_queued, **options}
        return TRANSPORTS[self.transport](self.endpoint(name), self.keys[name][1], peers, **options)

    def close(self) -> None:
        for port in self.ports.values():
            port.close()


class ZeroMQLinks(Links):
    """Members that talk over ZeroMQ."""

    def __init__(self, max_queued: int = 32, hidden: Iterable[str] = ()) -> None:
        super().__init__("zeromq", max_queued, hidden)
