"""Links through a member that relays: two members that cannot dial each other both dial it, and CURVE runs between the two.

Either end is a ZeroMQTransport that listens at a port of its own machine only. The end that would dial has its connection carried to the
relay; the other keeps a connection there, and passes on to its own listener what comes. So everything that holds for a link over ZeroMQ
holds here: authentication by the members' keys, forward secrecy, protection against replay, back pressure, and the door.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from p2pfl.transports.base import MAX_QUEUED, Endpoint, LinkCondition, LinkState, Received, dials
from p2pfl.transports.dialler import RECONNECT_MAX_S, RECONNECT_S
from p2pfl.transports.direct import DirectWay
from p2pfl.transports.relay_words import CHALLENGE_BYTES, GO, OPENING, PROOF_BYTES, WAIT, Answer, relay_proof, request
from p2pfl.transports.sockets import HANDSHAKE_S, MISSED_HEARTBEATS
from p2pfl.transports.streams import SocketStream, hold_little
from p2pfl.transports.tunnels import LOOPBACK, SocketWay, Tunnels, UnreachableError
from p2pfl.transports.zeromq import ZeroMQTransport

log = logging.getLogger(__name__)

ALIVE_AT_LEAST_S = 10.0
_BEFORE = frozenset({LinkCondition.AWAITED, LinkCondition.DOWN, LinkCondition.RELAY})


class RelayWay:
    """Opens streams to neighbours through their relays; see WayOut."""

    through = "through a relay"

    def __init__(
        self, me: Endpoint, secret_key: bytes, relays: Mapping[str, Endpoint], way_out: SocketWay, *, heartbeat_s: int = 5
    ) -> None:
        self._keys = me.public_key, secret_key
        self._me = me.name
        self._relays = relays
        self._way_out = way_out
        self._silence_s = max(ALIVE_AT_LEAST_S, MISSED_HEARTBEATS * heartbeat_s)

    async def open(self, peer: Endpoint, address: str, patience_s: float) -> SocketStream:
        """Meet a neighbour at its relay; see WayOut.open."""
        try:
            async with asyncio.timeout(patience_s):
                return await self.meet(peer, address, patience_s)
        except TimeoutError:
            relay = self._relays[peer.name].name
            raise UnreachableError(
                LinkCondition.NO_ANSWER, f"{peer.name} has not come to its relay {relay}: it is not running, or does not reach {relay}"
            ) from None

    async def meet(self, peer: Endpoint, address: str, patience_s: float) -> SocketStream:
        """Wait at a relay's address until a neighbour is there, too; *patience_s* is for reaching the relay.

        Raises:
            UnreachableError: the relay is not reached, or does not relay this link, or the connection with it broke.
        """
        relay = self._relays[peer.name]
        at = f"the relay {relay.name}"
        try:
            stream = await self._way_out.open(relay, address, patience_s)
        except UnreachableError as fault:
            raise UnreachableError(LinkCondition.RELAY, f"{at}: {fault}") from fault
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await self._come_in(stream, peer, relay)
            while True:
                async with asyncio.timeout(self._silence_s):
                    said = await stream.exactly(1)
                if said == GO:
                    hold_little(stream.socket)
                    return stream
                if said != WAIT:
                    raise UnreachableError(LinkCondition.RELAY, f"{at} at {address} says what no relay says: is it another program?")
        except (OSError, EOFError) as error:
            stream.close()
            raise UnreachableError(LinkCondition.RELAY, f"{at} at {address} has ended the connection, or is silent") from error
        except ValueError as error:  # nobody has made such a key honestly
            stream.close()
            raise UnreachableError(LinkCondition.RELAY, f"{at} has a key on its card that is none") from error
        except BaseException:
            stream.close()
            raise

    async def _come_in(self, stream: SocketStream, peer: Endpoint, relay: Endpoint) -> None:
        challenge = await stream.exactly(CHALLENGE_BYTES)
        if not challenge.startswith(OPENING):
            raise UnreachableError(LinkCondition.RELAY, f"the relay {relay.name} does not speak as a relay: another program has its port")
        asked = request(challenge, self._keys, peer.public_key, relay.public_key)
        await stream.send(asked.raw)
        if (await stream.exactly(1))[0] != Answer.TAKEN:
            raise UnreachableError(
                LinkCondition.RELAY,
                f"the relay {relay.name} does not relay between {self._me} and {peer.name}: it holds another study or another card",
            )
        if await stream.exactly(PROOF_BYTES) != relay_proof(asked, challenge, self._keys[1], relay.public_key):
            raise UnreachableError(LinkCondition.RELAY, f"the relay {relay.name} has another key than on its card")


class RelayTransport:
    """A member's links through relays; see Transport.

    Args:
        me: this member; its address does not matter.
        secret_key: CURVE, z85, belonging to me.public_key.
        neighbours: the members at the other ends.
        relays: by neighbour, the member that relays, with the addresses and the key of its relay.
        way_out: how relays are dialled; None: directly.
        heartbeat_s: as for `ZeroMQTransport`.
        options: more of `ZeroMQTransport`, but for listen and lookup.
    """

    def __init__(
        self,
        me: Endpoint,
        secret_key: bytes,
        neighbours: Iterable[Endpoint],
        *,
        relays: Mapping[str, Endpoint],
        way_out: SocketWay | None = None,
        heartbeat_s: int = 5,
        max_queued: int = MAX_QUEUED,
        linger_s: float = 2.0,
    ) -> None:
        self._way = RelayWay(me, secret_key, relays, way_out or DirectWay(heartbeat_s=heartbeat_s), heartbeat_s=heartbeat_s)
        self._relays = relays
        self._peers = {peer.name: replace(peer, address=relays[peer.name].address) for peer in neighbours}
        self._coming: dict[int, str] = {}  # members by the local port that their connection to the own listener comes from
        self._faults: dict[str, UnreachableError] = {}
        self._linger_s = linger_s
        own = replace(me, address=next(iter(self._peers.values())).address if self._peers else None)
        self._awaited = [peer for peer in self._peers.values() if not dials(own.name, own.address, peer.name, peer.address)]
        self._links = ZeroMQTransport(
            own,
            secret_key,
            self._peers.values(),
            listen=f"tcp://{LOOPBACK}:0",
            heartbeat_s=heartbeat_s,
            max_queued=max_queued,
            linger_s=linger_s,
            way_out=self._way,
            relayed=self._coming,
        )

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tunnels = Tunnels(self._group)
        self._tasks: list[asyncio.Task[None]] = []
        try:
            await self._links.__aenter__()
        except BaseException:
            await self._group.__aexit__(None, None, None)
            raise
        self._tasks += [self._group.create_task(self._await_at_relay(peer), name=f"awaits {peer.name}") for peer in self._awaited]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            await self._links.__aexit__(kind, error, traceback)
        finally:
            await self._tunnels.close(self._linger_s)
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    @property
    def counters(self) -> Counter[str]:
        """Count events; see Transport.counters."""
        return self._links.counters

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
        link, fault = self._links.link(peer), self._faults.get(peer)
        if fault is not None and link.state in _BEFORE:
            return replace(link, state=fault.state, detail=str(fault))
        if link.state == LinkCondition.AWAITED:
            return replace(link, detail=f"it has not come to its relay {self._relays[peer].name} yet")
        return link

    async def _await_at_relay(self, peer: Endpoint) -> None:
        """Keep a connection with a relay, over which a neighbour that would dial comes, and another one when it has come."""
        pause_s = RECONNECT_S
        while True:
            for address in peer.addresses:
                try:
                    stream = await self._way.meet(peer, address, HANDSHAKE_S)
                except UnreachableError as fault:
                    self._faults[peer.name] = fault
                    continue
                self._faults.pop(peer.name, None)
                _, _, port = str(self._links.bound_address).rpartition(":")
                self._tunnels.bring(stream, int(port), self._coming, peer.name)
                pause_s = RECONNECT_S
                await asyncio.sleep(pause_s)  # a relay that lies must not have this end run in a circle
                break
            else:
                pause_s = min(2 * pause_s, RECONNECT_MAX_S)
                await asyncio.sleep(pause_s)
