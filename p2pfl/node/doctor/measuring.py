"""Measurement of a site's edges from its own end, over the links that its node would use.

Nothing here says Hello: a neighbour's node that waits for its members, or trains, takes no notice of a doctor but for an answer to its
questions. A node of an earlier version says Hello itself, which tells what it holds, and is asked nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from p2pfl.errors import PeerError, TransportError
from p2pfl.node.doctor.loss import repeated_fraction
from p2pfl.protocol.probes import Probes
from p2pfl.transports import LinkCondition, Transport
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.messages import MAX_PROBE_BYTES, NEWEST_SCHEMA, SCHEMA_OF, Hello, Message, Probe, ProbeAnswer
from p2pfl.wire.negotiation import announced_schema

HELLO_WITHIN_S = 1.5
"""A node says Hello twice a second over a link that is up; who says nothing is a doctor, too."""
DIAL_WITHIN_S = 12.0
"""A dialled address that is silent is given up by the transport after ten seconds, and only then is it known why."""
LOOK_S = 0.05
PINGS, PING_WITHIN_S = 5, 3.0
LARGE_WITHIN_S = 6.0
AT_ONCE, MOST_LARGE, LONG_ENOUGH_S = 16, 48, 0.3
"""Large questions on their way at once, and in all; fewer where they take so long."""
QUIET_S = 1.0
"""A neighbour that has asked nothing for so long has measured its own end."""
SEND_WITHIN_S = 1.0

_DIALLING = frozenset({LinkCondition.CONNECTING, LinkCondition.RESOLVING})


@dataclass(kw_only=True)
class EdgeMeasurement:
    """Findings on one edge as this end sees it; None where something is unknown."""

    peer: str
    is_dialled: bool
    """Whether this site dials; else the neighbour does."""
    condition: LinkCondition = LinkCondition.CLOSED
    detail: str = ""
    hello: Hello | None = None
    """The greeting of the neighbour's node."""
    schema: int | None = None
    """The newest that both ends speak."""
    answer: ProbeAnswer | None = None
    round_trip_s: float | None = None
    clock_ahead_s: float | None = None
    """How far the neighbour's clock is ahead of this one, to half a round trip."""
    mbit_s: float | None = None
    """Capacity with both directions in use at once."""
    loses_large: bool = False
    """Whether small messages came through, and a large one did not."""
    loss: float | None = None
    """Fraction of this end's segments that the kernel had to send again."""

    @property
    def was_heard(self) -> bool:
        """Whether the neighbour has said anything."""
        return self.hello is not None or self.answer is not None


Ask = Callable[[str, Probe], Awaitable[None]]
"""Sends a question to a neighbour; TransportError where there is no link."""


@dataclass
class Interview:
    """Questions to neighbours on their way, and the answers that come."""

    ask: Ask
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _awaited: dict[int, asyncio.Future[ProbeAnswer]] = field(default_factory=dict)

    def take(self, answer: ProbeAnswer) -> None:
        """Take an answer that has come."""
        future = self._awaited.pop(answer.number, None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def question(self, peer: str, size_bytes: int, within_s: float) -> tuple[ProbeAnswer, float]:
        """Ask one question, and wait for its answer; also returns the seconds that it took.

        Raises:
            TimeoutError: no answer came in time.
            TransportError: there is no link.
        """
        number = next(self._numbers)
        self._awaited[number] = future = asyncio.get_running_loop().create_future()
        began_s = time.perf_counter()
        try:
            async with asyncio.timeout(within_s):
                await self.ask(peer, Probe(number=number, pad=bytes(size_bytes)))
                answer = await future
        finally:
            self._awaited.pop(number, None)
        return answer, time.perf_counter() - began_s

    async def examine(self, edge: EdgeMeasurement) -> None:
        """Measure round trip, clock and capacity of an edge whose neighbour answers."""
        for _ in range(PINGS):
            with suppress(TimeoutError, TransportError):
                answer, took_s = await self.question(edge.peer, 0, PING_WITHIN_S)
                if edge.round_trip_s is None or took_s < edge.round_trip_s:
                    edge.answer, edge.round_trip_s = answer, took_s
                    edge.clock_ahead_s = answer.clock / 1000 + took_s / 2 - time.time()
            if edge.answer is None:
                return  # nobody here who answers
        try:
            _, took_s = await self.question(edge.peer, MAX_PROBE_BYTES, LARGE_WITHIN_S)
        except TimeoutError:
            edge.loses_large = True
            return
        except TransportError:
            return
        edge.mbit_s = _mbit_s(1, took_s - (edge.round_trip_s or 0))
        if took_s < LONG_ENOUGH_S:
            with suppress(TimeoutError, TransportError):
                edge.mbit_s = await self._capacity(edge)

    async def _capacity(self, edge: EdgeMeasurement) -> float:
        """Megabits a second that go each way while the link is kept full."""
        began_s, left = time.perf_counter(), iter(range(MOST_LARGE))

        async def keep_asking() -> int:
            asked = 0
            for _ in left:
                await self.question(edge.peer, MAX_PROBE_BYTES, LARGE_WITHIN_S)
                asked += 1
                if time.perf_counter() - began_s > LONG_ENOUGH_S:
                    break
            return asked

        asked = sum(await asyncio.gather(*(keep_asking() for _ in range(AT_ONCE))))
        return _mbit_s(asked, time.perf_counter() - began_s - (edge.round_trip_s or 0))


async def measure_edges(
    transport: Transport, dialled: Mapping[str, Collection[str]], neighbours: Sequence[str], probes: Probes, wait_s: float
) -> dict[str, EdgeMeasurement]:
    """Open a site's links as its node would, and measure those that come up; answers neighbours' doctors meanwhile.

    Args:
        transport: not yet entered.
        dialled: the addresses of the neighbours that this site dials, by name.
        neighbours: names of all.
        probes: the facts that this end tells.
        wait_s: how long a neighbour has to be there.
    """
    edges = {name: EdgeMeasurement(peer=name, is_dialled=name in dialled) for name in neighbours}
    async with transport:
        measuring = _Measuring(transport, edges, dialled, probes)
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
        self._interview = Interview(self._send)
        self._asked_s: defaultdict[str, float] = defaultdict(lambda: float("-inf"))

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
            elif isinstance(message, ProbeAnswer):
                self._interview.take(message)
            elif isinstance(message, Probe):
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
        if edge.schema >= SCHEMA_OF[Probe.code]:
            await self._interview.examine(edge)
        if edge.is_dialled:  # an accepted connection has no port by which it could be told from others
            edge.loss = repeated_fraction(self._dialled[edge.peer])

    async def linger(self) -> None:
        """Answer until no neighbour's doctor asks any more."""
        while time.monotonic() - max(self._asked_s.values(), default=float("-inf")) < QUIET_S:  # noqa: ASYNC110  # until time has passed
            await asyncio.sleep(LOOK_S)


def _mbit_s(count: int, seconds: float) -> float:
    return 8 * count * MAX_PROBE_BYTES / 1e6 / max(seconds, 1e-6)
