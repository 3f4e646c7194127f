"""One transport of a member whose links are of several kinds: each link goes to the transport of its kind, and nobody else asks for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from p2pfl.errors import TransportError
from p2pfl.transports.base import LinkState, Received, Service, Transport


class LinksByKind:
    """A member's links, each of one kind; see Transport.

    Args:
        me: name of this member.
        transports: by neighbour, what its link goes over; one object may serve many neighbours.
        services: more that this member runs as long as it is open, such as a relay for others; their counters are added.
    """

    def __init__(self, me: str, transports: Mapping[str, Transport], services: Sequence[Service] = ()) -> None:
        self._me = me
        self._by_peer = dict(transports)
        self._all = list({id(transport): transport for transport in transports.values()}.values())
        self._services = services
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(1)  # their own queues are the links'
        self._group = await asyncio.TaskGroup().__aenter__()
        self._stack = AsyncExitStack()
        try:
            for service in self._services:
                await self._stack.enter_async_context(service)
            for transport in self._all:
                await self._stack.enter_async_context(transport)
        except BaseException:
            await self._stack.aclose()
            await self._group.__aexit__(None, None, None)
            raise
        self._readers = [self._group.create_task(self._read(each), name=f"{self._me} reads") for each in self._all]
        self._is_open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._is_open = False
        for reader in self._readers:
            reader.cancel()
        try:
            await self._stack.__aexit__(kind, error, traceback)
        finally:
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    @property
    def counters(self) -> Counter[str]:
        """Count events of all kinds of links; see Transport.counters."""
        found: Counter[str] = Counter()
        for counters in [*(each.counters for each in self._all), *(each.counters for each in self._services)]:
            found.update(counters)
        return found

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Send a message; see Transport.send."""
        if peer not in self._by_peer:
            raise ValueError(f"{peer!r} is no neighbour of {self._me!r}")
        await self._by_peer[peer].send(peer, frames, timeout_s)

    async def receive(self) -> Received:
        """Wait for a message; see Transport.receive."""
        if not self._is_open:
            raise TransportError(f"{self._me} is closed")
        return await self._inbox.get()

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """Count events by link; see Transport.link_counters."""
        return {peer: transport.link_counters[peer] for peer, transport in self._by_peer.items()}

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """End a link for a while; see Transport.disconnect."""
        self._by_peer[peer].disconnect(peer, for_s, why)

    def link(self, peer: str) -> LinkState:
        """State of a link; see Transport.link."""
        if peer not in self._by_peer:
            raise ValueError(f"{peer!r} is no neighbour")
        return self._by_peer[peer].link(peer)

    async def _read(self, transport: Transport) -> None:
        while True:
            await self._inbox.put(await transport.receive())
