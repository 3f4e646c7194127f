"""What the tests of transports share: members with keys and ports, and waits that end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any

import zmq

from mosquitto import Mosquitto
from p2pfl.errors import TransportError
from p2pfl.transports import TRANSPORTS, Endpoint, LinksByKind, MemoryNetwork, Received, ReservedPort, Transport, reserve_port
from p2pfl.transports.proxies import Proxy, ProxyWay
from p2pfl.transports.relay_service import RelayService
from site_proxy import SiteProxy

DEADLINE_S = 20.0
STUDY = "5" * 64


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


class Beside:
    """Things that are open in a thread's loop of their own, beside the loop of the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="beside the test", daemon=True)
        self.thread.start()
        self.opened: list[tuple[asyncio.Event, Future[None]]] = []

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def open(self, thing: Any) -> Any:
        """Enter a context in the other loop, and leave it there when all are closed."""
        is_open, end = threading.Event(), asyncio.Event()

        async def hold() -> None:
            try:
                async with thing:
                    is_open.set()
                    await end.wait()
            finally:
                is_open.set()

        self.opened.append((end, asyncio.run_coroutine_threadsafe(hold(), self.loop)))
        assert is_open.wait(DEADLINE_S)
        return thing

    def close(self) -> None:
        for end, held in reversed(self.opened):
            self.loop.call_soon_threadsafe(end.set)
            held.result(DEADLINE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.loop.close()


class ProxiedLinks(Links):
    """Members that dial through a proxy, which alone knows the neighbours' host."""

    def __init__(self, kind: str, max_queued: int = 32) -> None:
        super().__init__("zeromq", max_queued)
        self.beside = Beside()
        self.proxy = self.beside.open(SiteProxy(kind, login=("site", "p:assword"), names={"node.hospital.test": "127.0.0.1"}))

    def endpoint(self, name: str) -> Endpoint:
        end = super().endpoint(name)
        return replace(end, address=f"tcp://node.hospital.test:{self.ports[name].port}")

    def member(self, name: str, neighbours: Iterable[str], **options: Any) -> Any:
        user, password = self.proxy.login
        proxy = Proxy(kind=self.proxy.kind, host="127.0.0.1", port=self.proxy.port, user=user, password=password)
        listen = f"tcp://127.0.0.1:{self.endpoint(name) and self.ports[name].port}"
        return super().member(name, neighbours, listen=listen, way_out=ProxyWay(proxy), **options)

    def close(self) -> None:
        super().close()
        self.beside.close()


class RelayedLinks(Links):
    """Members without a listener, that meet at a relay; every pair of a to d is relayed."""

    def __init__(self, max_queued: int = 32, **options: Any) -> None:
        super().__init__("relay", max_queued, hidden="abcd")
        self.beside = Beside()
        self.relay = super().endpoint("relay")
        pairs = list(combinations(map(self.endpoint, "abcd"), 2))
        service = {"listen": self.ports["relay"].address, "mbit_s": 100_000, "heartbeat_s": 1, **options}
        self.service = self.beside.open(RelayService(self.relay, self.keys["relay"][1], pairs, **service))

    def member(self, name: str, neighbours: Iterable[str], **options: Any) -> Any:
        return super().member(name, neighbours, relays=dict.fromkeys(neighbours, self.relay), **options)

    def close(self) -> None:
        super().close()
        self.beside.close()


class BrokerLinks(Links):
    """Members without a listener, that meet at a broker."""

    def __init__(self, max_queued: int = 32, **settings: Any) -> None:
        super().__init__("mqtt", max_queued, hidden="abcd")
        self.mosquitto = Mosquitto().start()
        self.broker = self.mosquitto.broker(**settings)

    def member(self, name: str, neighbours: Iterable[str], **options: Any) -> Any:
        return super().member(name, neighbours, **{"broker": self.broker, "study": STUDY, **options})

    def close(self) -> None:
        super().close()
        self.mosquitto.close()


class KindLinks(Links):
    """Members whose links are one transport over the transports of their kinds, of which there is one here."""

    def __init__(self, max_queued: int = 32) -> None:
        super().__init__("memory", max_queued)

    def member(self, name: str, neighbours: Iterable[str], **options: Any) -> Any:
        return LinksByKind(name, dict.fromkeys(neighbours, super().member(name, neighbours, **options)))


class ZeroMQLinks(Links):
    """Members that talk over ZeroMQ."""

    def __init__(self, max_queued: int = 32, hidden: Iterable[str] = ()) -> None:
        super().__init__("zeromq", max_queued, hidden)
