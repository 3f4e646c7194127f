"""Measurement of a site's edges from its own end, over the links that its node would use.

Nothing here says Hello: a neighbour's node that waits for its members, or trains, takes no notice of a doctor but for an answer to its
questions. A node of an earlier version says Hello itself, which tells what it holds, and is asked nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from p2pfl.errors import PeerError, TransportError
from p2pfl.governance.names import split_address
from p2pfl.node.doctor.interview import EdgeMeasurement, Interview
from p2pfl.node.doctor.loss import Place, repeated_fraction
from p2pfl.protocol.probes import Probes
from p2pfl.transports import LinkCondition, Transport
from p2pfl.transports.dialler import RESOLVE_S
from p2pfl.transports.resolver import Resolver
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.messages import NEWEST_SCHEMA, SCHEMA_OF, DoctorAnswer, DoctorQuestion, Hello, Message
from p2pfl.wire.negotiation import announced_schema

HELLO_WITHIN_S = 1.5
"""A node says Hello twice a second over a link that is up; who says nothing is a doctor, too."""
DIAL_WITHIN_S = 12.0
"""A dialled address that is silent is given up by the transport after ten seconds, and only then is it known why."""
LOOK_S = 0.05
QUIET_S = 1.0
"""A neighbour that has asked nothing for so long has measured its own end."""
LINGER_S = 15.0
"""A neighbour's doctor that has not begun by then will not."""
SEND_WITHIN_S = 1.0

_DIALLING = frozenset({LinkCondition.CONNECTING, LinkCondition.RESOLVING})


async def measure_edges(
    transport: Transport,
    dialled: Mapping[str, Collection[str]],
    neighbours: Sequence[str],
    probes: Probes,
    wait_s: float,
    *,
    by_proxy: bool = False,
) -> dict[str, EdgeMeasurement]:
    """Open a site's links as its node would, and measure those that come up; answers neighbours' doctors meanwhile.

    Args:
        transport: not yet entered.
        dialled: the addresses of the neighbours that this site dials, by name.
        neighbours: names of all.
        probes: the facts that this end tells.
        wait_s: how long a neighbour has to be there.
        by_proxy: a proxy dials for this site: what is lost is lost between the two, and host names are the proxy's to look up.
    """
    edges = {name: EdgeMeasurement(peer=name, is_dialled=name in dialled) for name in neighbours}
    async with transport:
        measuring = _Measuring(transport, edges, {} if by_proxy else dialled, probes)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(measuring.read(), name="reads")
            await asyncio.gather(*(measuring.measure(edge, wait_s) for edge in edges.values()))
            await measuring.linger()
            reader.cancel()
        unknown_keys = transport.counters["unauthorized"]
    for edge in edges.values():
        if unknown_keys and edge.condition == LinkCondition.AWAITED:
            edge.detail = f"{unknown_keys} connections with a key that is no neighbour's were refused"
    return edges


class _Measuring:
    def __init__(
        self, transport: Transport, edges: Mapping[str, EdgeMeasurement], dialled: Mapping[str, Collection[str]], probes: Probes
    ) -> None:
        self._transport, self._edges, self._dialled, self._probes = transport, edges, dialled, probes
        self._interview, self._resolver = Interview(self._send), Resolver()
        self._asked_s: dict[str, float] = {}
        """By neighbour, when its doctor asked last."""

    async def _send(self, peer: str, message: Message) -> None:
        await self._transport.send(peer, encode(message), SEND_WITHIN_S)

    async def read(self) -> None:
        while True:
            received = await self._transport.receive()
            try:
                message, _ = decode(received.frames)
            except PeerError:
                continue  # of a schema that is not known here
            if isinstance(message, Hello):
                self._edges[received.peer].hello = message
            elif isinstance(message, DoctorAnswer):
                self._interview.take(message)
            elif isinstance(message, DoctorQuestion):
                self._asked_s[received.peer] = time.monotonic()
                with suppress(TransportError):
                    await self._send(received.peer, self._probes.answer(message))

    async def measure(self, edge: EdgeMeasurement, wait_s: float) -> None:
        began_s = time.monotonic()
        while not (link := self._transport.link(edge.peer)).is_up:
            edge.condition, edge.detail = link.state, link.detail
            if time.monotonic() - began_s >= (max(wait_s, DIAL_WITHIN_S) if link.state in _DIALLING else wait_s):
                return
            await asyncio.sleep(LOOK_S)
        edge.condition, edge.detail = link.state, link.detail
        until_s = time.monotonic() + HELLO_WITHIN_S
        while edge.hello is None and time.monotonic() < until_s and edge.peer not in self._asked_s:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        announced = NEWEST_SCHEMA if edge.hello is None else announced_schema(edge.hello.incarnation)
        edge.schema = min(NEWEST_SCHEMA, announced)
        if edge.schema >= SCHEMA_OF[DoctorQuestion.code]:
            await self._interview.examine(edge)
            if edge.answer is None and edge.peer in self._asked_s:  # it asks, and does not get what is sent to it
                edge.loses_large = True
        if edge.peer in self._dialled:  # an accepted connection has no place by which it could be told from others
            edge.loss = repeated_fraction(await self._places(edge.peer))

    async def _places(self, peer: str) -> list[Place]:
        """Find the numeric hosts and ports of a neighbour that this site dials."""
        found: list[Place] = []
        for address in self._dialled[peer]:
            host, port = split_address(address)
            with suppress(TransportError):  # it is up at another address
                found += [(numeric, port) for numeric in await self._resolver.resolve(host.strip("[]"), RESOLVE_S)]
        return found

    async def linger(self) -> None:
        """Answer until each neighbour's doctor has measured its own end, and asks no more."""
        until_s = time.monotonic() + LINGER_S
        while time.monotonic() < until_s and not all(map(self._is_content, self._edges.values())):  # noqa: ASYNC110  # or time has passed
            await asyncio.sleep(LOOK_S)

    def _is_content(self, edge: EdgeMeasurement) -> bool:
        asked_s = self._asked_s.get(edge.peer)
        if asked_s is None:
            return edge.answer is None or edge.hello is not None  # nobody is there, or a node, which asks nothing
        return time.monotonic() - asked_s >= QUIET_S
