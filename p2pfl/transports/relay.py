"""Links through a member that relays: two members that cannot dial each other both dial it, and CURVE runs between the two.

Either end is a ZeroMQTransport that listens at a port of its own machine only. The end that would dial has its connection carried to the
relay; the other keeps a connection there, and passes on to its own listener what comes. So everything that holds for a link over ZeroMQ
holds here: authentication by the members' keys, forward secrecy, protection against replay, back pressure, and the door.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from p2pfl.transports.base import MAX_QUEUED, Endpoint, LinkCondition
from p2pfl.transports.carried import CarriedLinks
from p2pfl.transports.direct import DirectWay
from p2pfl.transports.relay_words import CHALLENGE_BYTES, GO, OPENING, PROOF_BYTES, WAIT, Answer, relay_proof, request
from p2pfl.transports.sockets import HANDSHAKE_S, MISSED_HEARTBEATS
from p2pfl.transports.streams import SocketStream, hold_little
from p2pfl.transports.tunnels import SocketWay, UnreachableError

ALIVE_AT_LEAST_S = 10.0


class RelayWay:
    """Carries connections with neighbours through their relays; see Carrier."""

    through = "through a relay"

    def __init__(
        self, me: Endpoint, secret_key: bytes, relays: Mapping[str, Endpoint], way_out: SocketWay, *, heartbeat_s: int = 5
    ) -> None:
        self._keys = me.public_key, secret_key
        self._me = me.name
        self._relays = relays
        self._way_out = way_out
        self._faults: dict[str, UnreachableError] = {}
        self.counters: Counter[str] = Counter()
        self._silence_s = max(ALIVE_AT_LEAST_S, MISSED_HEARTBEATS * heartbeat_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Leave what is open to the streams."""

    async def next_stream(self, peer: Endpoint) -> SocketStream:
        """Wait at a neighbour's relay until it comes; see Carrier.next_stream."""
        for address in peer.addresses:
            try:
                stream = await self.meet(peer, address, HANDSHAKE_S)
            except UnreachableError as fault:
                self._faults[peer.name] = fault
            else:
                self._faults.pop(peer.name, None)
                return stream
        raise self._faults[peer.name]

    def awaited(self, peer: str) -> str:
        """Words for a neighbour that has not come; see Carrier.awaited."""
        return f"it has not come to its relay {self._relays[peer].name} yet"

    def fault(self, peer: str) -> UnreachableError | None:
        """Tell why a neighbour was not met at its relay; see Carrier.fault."""
        return self._faults.get(peer)

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


def join_relays(
    me: Endpoint,
    secret_key: bytes,
    neighbours: Iterable[Endpoint],
    *,
    relays: Mapping[str, Endpoint],
    way_out: SocketWay | None = None,
    heartbeat_s: int = 5,
    max_queued: int = MAX_QUEUED,
    linger_s: float = 2.0,
) -> CarriedLinks:
    """Make a member's links through relays.

    Args:
        me: this member; its address does not matter.
        secret_key: CURVE, z85, belonging to me.public_key.
        neighbours: the members at the other ends.
        relays: by neighbour, the member that relays, with the addresses and the key of its relay.
        way_out: how relays are dialled; None: directly.
        heartbeat_s: as for `ZeroMQTransport`.
        max_queued: as for `ZeroMQTransport`.
        linger_s: as for `ZeroMQTransport`.
    """
    return CarriedLinks(
        me,
        secret_key,
        neighbours,
        carrier=RelayWay(me, secret_key, relays, way_out or DirectWay(heartbeat_s=heartbeat_s), heartbeat_s=heartbeat_s),
        addresses={name: relay.address for name, relay in relays.items()},
        heartbeat_s=heartbeat_s,
        max_queued=max_queued,
        linger_s=linger_s,
    )
