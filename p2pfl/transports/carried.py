"""Links of libzmq whose connections something else carries: neither end listens for others, and CURVE runs between the two.

A member has a ZeroMQTransport that listens at a port of its own machine only. Of each pair, the end that would dial has its connection
carried away; the other end waits for streams, and brings each to its own listener.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from p2pfl.transports.base import MAX_QUEUED, Endpoint, LinkCondition, LinkState, Received, dials
from p2pfl.transports.dialler import RECONNECT_MAX_S, RECONNECT_S
from p2pfl.transports.streams import Stream
from p2pfl.transports.tunnels import LOOPBACK, Tunnels, UnreachableError, WayOut
from p2pfl.transports.zeromq import ZeroMQTransport

_BEFORE = frozenset({LinkCondition.AWAITED, LinkCondition.DOWN})


class Carrier(WayOut, Protocol):
    """Carries connections in both directions; used inside `async with`."""

    counters: Counter[str]
    """Numbers of its events, by name."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    async def next_stream(self, peer: Endpoint) -> Stream:
        """Wait for the next stream that a neighbour asks for; UnreachableError where it cannot come now."""
        ...

    def awaited(self, peer: str) -> str:
        """Words for a neighbour that may come and has not done so yet."""
        ...

    def fault(self, peer: str) -> UnreachableError | None:
        """Tell why a neighbour cannot come now; None: it may."""
        ...


class CarriedLinks:
    """A member's links over a carrier; see Transport.

    Args:
        me: this member; its address does not matter.
        secret_key: CURVE, z85, belonging to me.public_key.
        neighbours: the members at the other ends; their addresses do not matter.
        carrier: what carries the connections.
        addresses: by neighbour, where the carrier is reached for it.
        heartbeat_s, max_queued, linger_s: as for `ZeroMQTransport`.
    """

    def __init__(
        self,
        me: Endpoint,
        secret_key: bytes,
        neighbours: Iterable[Endpoint],
        *,
        carrier: Carrier,
        addresses: Mapping[str, str | Sequence[str] | None],
        heartbeat_s: int = 5,
        max_queued: int = MAX_QUEUED,
        linger_s: float = 2.0,
    ) -> None:
        peers = [replace(peer, address=addresses[peer.name]) for peer in neighbours]
        own = replace(me, address=peers[0].address if peers else None)
        self._carrier, self._linger_s = carrier, linger_s
        self._coming: dict[tuple[str, int], str] = {}  # members by the place that their connection to the own listener comes from
        self._awaited = {peer.name: peer for peer in peers if not dials(own.name, own.address, peer.name, peer.address)}
        self._links = ZeroMQTransport(
            own,
            secret_key,
            peers,
            listen=f"tcp://{LOOPBACK}:0",
            heartbeat_s=heartbeat_s,
            max_queued=max_queued,
            linger_s=linger_s,
            way_out=carrier,
            relayed=self._coming,
        )

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tunnels = Tunnels(self._group)
        try:
            await self._carrier.__aenter__()
            try:
                await self._links.__aenter__()
            except BaseException:
                await self._carrier.__aexit__(None, None, None)
                raise
        except BaseException:
            await self._group.__aexit__(None, None, None)
            raise
        self._tasks = [self._group.create_task(self._await(peer), name=f"awaits {peer.name}") for peer in self._awaited.values()]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            await self._links.__aexit__(kind, error, traceback)
        finally:
            try:
                await self._tunnels.close(self._linger_s)
            finally:
                await self._carrier.__aexit__(kind, error, traceback)
                cancelled = isinstance(error, asyncio.CancelledError)
                await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    @property
    def counters(self) -> Counter[str]:
        """Count events, those of the carrier as well; see Transport.counters."""
        return self._links.counters + self._carrier.counters

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Send a message; see Transport.send."""
        await self._links.send(peer, frames, timeout_s)

    async def receive(self) -> Received:
        """Wait for a message; see Transport.receive."""
        return await self._links.receive()

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """Count events by link; see Transport.link_counters."""
        return self._links.link_counters

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """End a link for a while; see Transport.disconnect."""
        self._links.disconnect(peer, for_s, why)

    def link(self, peer: str) -> LinkState:
        """State of a link; see Transport.link."""
        link = self._links.link(peer)
        if link.state not in _BEFORE or peer not in self._awaited:
            return link
        fault = self._carrier.fault(peer)
        if fault is not None:
            return replace(link, state=fault.state, detail=str(fault))
        if link.state == LinkCondition.AWAITED:
            return replace(link, detail=self._carrier.awaited(peer))
        return link

    async def _await(self, peer: Endpoint) -> None:
        """Bring each stream of a neighbour that would dial to the own listener."""
        pause_s = RECONNECT_S
        while True:
            try:
                stream = await self._carrier.next_stream(peer)
            except UnreachableError:
                pause_s = min(2 * pause_s, RECONNECT_MAX_S)
            else:
                _, _, port = str(self._links.bound_address).rpartition(":")
                self._tunnels.bring(stream, int(port), self._coming, peer.name)
                pause_s = RECONNECT_S
            await asyncio.sleep(pause_s)  # after a stream, too: a carrier that lies must not have this end run in a circle
