"""Links over an MQTT broker, for members that can reach a broker and not each other. Needs aiomqtt (extra `mqtt`).

Each edge has two topics under the study's digest, one a direction, and each end its own client at the broker. What the broker passes on
are the bytes of a connection that CURVE has encrypted from end to end: authentication, forward secrecy and protection against replay are
CURVE's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from p2pfl.transports.base import MAX_QUEUED, Endpoint, LinkCondition
from p2pfl.transports.broker import Broker, check_library
from p2pfl.transports.carried import CarriedLinks
from p2pfl.transports.direct import DirectWay
from p2pfl.transports.mqtt_session import BrokerSession
from p2pfl.transports.mqtt_stream import MqttStream
from p2pfl.transports.mqtt_words import Words
from p2pfl.transports.sockets import MISSED_HEARTBEATS
from p2pfl.transports.tunnels import SocketWay, UnreachableError

STUCK_AT_LEAST_S = 10.0


class BrokerCarrier:
    """Carries a member's connections over a broker; see Carrier."""

    def __init__(
        self,
        me: Endpoint,
        secret_key: bytes,
        peers: Iterable[Endpoint],
        *,
        broker: Broker,
        study: str,
        way_out: SocketWay,
        patience_s: float,
        linger_s: float,
    ) -> None:
        self.through = f"over the broker {broker}"
        self.counters: Counter[str] = Counter()
        self._linger_s = linger_s
        place = broker, broker.tls_context()
        self._sessions: dict[str, BrokerSession] = {}
        self._no_keys: dict[str, UnreachableError] = {}
        for peer in peers:
            try:
                words = Words(secret_key, me.public_key, peer.public_key, study)
            except ValueError:  # nobody has made such a key honestly
                self._no_keys[peer.name] = UnreachableError(LinkCondition.WRONG_KEY, f"{peer.name} has a key on its card that is none")
                continue
            names = me.name, peer.name
            self._sessions[peer.name] = BrokerSession(names, words, place, way_out, self.counters, patience_s=patience_s)

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tasks = [self._group.create_task(session.run(), name=f"meets {peer}") for peer, session in self._sessions.items()]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            await asyncio.gather(*(session.close(self._linger_s) for session in self._sessions.values()))
        finally:
            for task in self._tasks:
                task.cancel()
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    async def open(self, peer: Endpoint, _address: str, patience_s: float) -> MqttStream:
        """Ask a neighbour for a stream; see WayOut.open."""
        self._check(peer.name)
        return await self._sessions[peer.name].open(patience_s)

    async def next_stream(self, peer: Endpoint) -> MqttStream:
        """Wait for a neighbour's stream; see Carrier.next_stream."""
        self._check(peer.name)
        return await self._sessions[peer.name].next_stream()

    def awaited(self, _peer: str) -> str:
        """Words for a neighbour that has not come; see Carrier.awaited."""
        return f"it has not dialled this node {self.through} yet"

    def fault(self, peer: str) -> UnreachableError | None:
        """Tell why there is no connection with the broker; see Carrier.fault."""
        return self._no_keys[peer] if peer in self._no_keys else self._sessions[peer].fault

    def _check(self, peer: str) -> None:
        if peer in self._no_keys:
            raise self._no_keys[peer]


def join_broker(
    me: Endpoint,
    secret_key: bytes,
    neighbours: Iterable[Endpoint],
    *,
    broker: Broker,
    study: str,
    way_out: SocketWay | None = None,
    heartbeat_s: int = 5,
    max_queued: int = MAX_QUEUED,
    linger_s: float = 2.0,
) -> CarriedLinks:
    """Make a member's links over a broker.

    Args:
        me: this member.
        secret_key: CURVE, z85, belonging to me.public_key.
        neighbours: the members at the other ends.
        broker: where they meet.
        study: the study's digest, under which the topics are.
        way_out: how the broker is dialled; None: directly.
        heartbeat_s: as for `ZeroMQTransport`.
        max_queued: as for `ZeroMQTransport`.
        linger_s: as for `ZeroMQTransport`.

    Raises:
        ConfigError: the certificates of the broker's authority cannot be read.
        MissingExtraError: aiomqtt is not installed.
    """
    check_library()
    peers = list(neighbours)
    carrier = BrokerCarrier(
        me,
        secret_key,
        peers,
        broker=broker,
        study=study,
        way_out=way_out or DirectWay(heartbeat_s=heartbeat_s),
        patience_s=max(STUCK_AT_LEAST_S, MISSED_HEARTBEATS * heartbeat_s),
        linger_s=linger_s,
    )
    return CarriedLinks(
        me,
        secret_key,
        peers,
        carrier=carrier,
        addresses={peer.name: broker.address for peer in peers},
        heartbeat_s=heartbeat_s,
        max_queued=max_queued,
        linger_s=linger_s,
    )
