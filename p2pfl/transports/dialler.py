"""Keep the connection to one neighbour that this node dials: its addresses in order, and all over again when it has ended.

libzmq is given numeric addresses only, and one at a time: it would resolve names in the thread that serves all links.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import zmq

from p2pfl.errors import ConfigError, TransportError
from p2pfl.transports import sockets
from p2pfl.transports.base import Endpoint, LinkCondition, LinkStates
from p2pfl.transports.resolver import Resolver, connection_fault
from p2pfl.transports.sockets import LinkSocket
from p2pfl.transports.streams import BUFFER_BYTES
from p2pfl.transports.tunnels import Tunnels, UnreachableError, WayOut
from p2pfl.transports.zap import NOT_NOW

RECONNECT_S = 0.1
RECONNECT_MAX_S = 2.0
RESOLVE_S = 5.0
CONNECT_SOON_S = 3.0
"""How long one of several addresses is tried; a single one is tried for HANDSHAKE_S."""
PROBE_S = 1.0
LOOK_AFTER_S = 0.05
"""After a connection has ended, libzmq's queues for it are gone soon, and not at once."""

_ADDRESS = re.compile(r"tcp://(?:\[([^\]]+)\]|([^\[\]:/]+)):([0-9]{1,5})")
_TELLING = (
    LinkCondition.WRONG_KEY,
    LinkCondition.HANDSHAKE_FAILED,
    LinkCondition.PROXY,
    LinkCondition.RELAY,
    LinkCondition.BROKER,
    LinkCondition.REFUSED,
    LinkCondition.NO_ANSWER,
    LinkCondition.NO_ROUTE,
    LinkCondition.UNKNOWN_NAME,
)
"""Failures, the one that led furthest first: it tells what several addresses lead to."""
_ANSWERED = {zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_DISCONNECTED}
"""Events of an attempt that somebody has answered."""
_OVER = {zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED}
"""Events at the end of an attempt, or of the connection that it made."""
_NOT_IT = "another key than on its card, another program at this port, or it was just stopping"


class Dialler:
    """Dials one neighbour, which has an address, from `run` on until it is cancelled; notes attempts and causes of failures in *links*.

    Args:
        me: name of this node.
        peer: the neighbour.
        dealer: libzmq's socket for it.
        links: states of links, where attempts are noted.
        resolver: looks host names up where libzmq connects by itself.
        way_out: how connections are made instead, with the tunnels that bring them to libzmq; None: by libzmq itself.

    Raises:
        ConfigError: an address is none.
    """

    def __init__(
        self,
        me: str,
        peer: Endpoint,
        dealer: LinkSocket,
        links: LinkStates,
        resolver: Resolver,
        way_out: tuple[WayOut, Tunnels] | None = None,
    ) -> None:
        self._happened: asyncio.Queue[tuple[int, int]] = asyncio.Queue()  # kinds and values of the socket's events
        self.may_be_up = False
        """Whether an attempt has begun and nothing was heard of its end. For a moment after that libzmq still takes messages, and loses
        them: that it took one is no sign of a link."""
        self._me = me
        self._endpoint = peer
        self.peer = peer.name
        self._places = [_split(peer.name, address) for address in peer.addresses]
        self.dealer = dealer
        self._links = links
        self._resolver = resolver
        self._way_out = way_out
        if way_out is not None:  # a hop within this machine needs little
            dealer.set({zmq.SNDBUF: BUFFER_BYTES, zmq.RCVBUF: BUFFER_BYTES})

    def hear(self, kind: int, value: int) -> None:
        """Take an event of the socket."""
        if kind in _OVER:
            self.may_be_up = False
        self._happened.put_nowait((kind, value))

    async def run(self) -> None:
        """Keep the connection up."""
        pause_s = RECONNECT_S
        while True:
            failures: list[tuple[LinkCondition, str]] = []
            was_up = False
            for address, host, port in self._places:
                found = await self._try(address, host, port)
                was_up = found is None
                if found is None:
                    break
                failures += found
            if not was_up:
                state = min((state for state, _ in failures), key=_TELLING.index)
                self._links.note(self.peer, state, "; ".join(dict.fromkeys(detail for _, detail in failures)))
            pause_s = RECONNECT_S if was_up else min(2 * pause_s, RECONNECT_MAX_S)
            await asyncio.sleep(max(pause_s, self._links.excluded_for_s(self.peer)))

    async def _try(self, address: str, host: str, port: int) -> list[tuple[LinkCondition, str]] | None:
        """Try one address once; why that failed, or None where the link was up and is over."""
        if self._way_out is not None:
            return await self._connect_by(*self._way_out, address)
        try:
            hosts = await self._numeric(address, host)
        except TransportError as error:
            self._links.counters[self.peer]["unresolved"] += 1
            return [(LinkCondition.UNKNOWN_NAME, str(error))]
        failures: list[tuple[LinkCondition, str]] = []
        for numeric in hosts:
            failure = await self._connect(address, numeric, port, self._patience_s(len(hosts)))
            if failure is None:
                return None
            failures.append(failure)
        return failures

    def _patience_s(self, num_hosts: int = 1) -> float:
        return sockets.HANDSHAKE_S if len(self._places) == num_hosts == 1 else CONNECT_SOON_S

    async def _numeric(self, address: str, host: str) -> Sequence[str]:
        self._links.begin(self.peer, LinkCondition.RESOLVING, f"looking up its name {host}")
        found = await self._resolver.resolve(host, RESOLVE_S)
        self._links.begin(self.peer, LinkCondition.CONNECTING, f"dialling {address}")
        return found

    async def _connect_by(self, way_out: WayOut, tunnels: Tunnels, address: str) -> list[tuple[LinkCondition, str]] | None:
        """Have libzmq connect to an address once over another way; why that failed, or None where the link was up and is over."""
        patience_s = self._patience_s()
        self._links.begin(self.peer, LinkCondition.CONNECTING, f"dialling {address} {way_out.through}")
        try:
            offer = tunnels.offer(await way_out.open(self._endpoint, address, patience_s))
        except UnreachableError as fault:
            self._links.counters[self.peer]["not_connected"] += 1
            return [(fault.state, str(fault))]
        try:
            happened = await self._attempt(offer.address, patience_s, is_ipv6=False)
        except zmq.ZMQError as error:
            return [(LinkCondition.NO_ROUTE, f"{error.strerror} at {address} {way_out.through}")]
        finally:
            offer.withdraw()
        failure = self._failure(happened, f"{address} {way_out.through}")
        return None if failure is None else [failure]

    async def _connect(self, address: str, host: str, port: int, patience_s: float) -> tuple[LinkCondition, str] | None:
        """Have libzmq connect to a numeric host once; why that failed, or None where the link was up and is over."""
        numeric = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        said = address if numeric == address else f"{address} ({host})"
        began_s = time.monotonic()
        try:
            happened = await self._attempt(numeric, patience_s, is_ipv6=":" in host)
        except zmq.ZMQError as error:
            return LinkCondition.NO_ROUTE, f"{error.strerror} at {said}"
        if happened.keys() & _ANSWERED:
            return self._failure(happened, said)
        self._links.counters[self.peer]["not_connected"] += 1
        return await _why_not(host, port, said, patience_s, time.monotonic() - began_s)

    async def _attempt(self, numeric: str, patience_s: float, *, is_ipv6: bool) -> dict[int, int]:
        """Have libzmq connect once, until that has failed or the connection is over; values of the events by kind."""
        self.dealer.socket.setsockopt(zmq.IPV6, int(is_ipv6))
        self.dealer.socket.setsockopt(zmq.CONNECT_TIMEOUT, round(1000 * patience_s))
        self.may_be_up = True
        self.dealer.socket.connect(numeric)
        happened = {kind: value async for kind, value in self._until_over(patience_s)}
        self.may_be_up = False
        await asyncio.sleep(LOOK_AFTER_S)  # libzmq is done with the connection soon, and must be before it is told to forget it
        if not self.dealer.socket.closed:
            try:
                self.dealer.socket.disconnect(numeric)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:
                    raise
        return happened

    def _failure(self, happened: Mapping[int, int], said: str) -> tuple[LinkCondition, str] | None:
        """Find out of the events of an attempt why it has failed; None: the link was up."""
        if zmq.EVENT_HANDSHAKE_SUCCEEDED in happened:
            return None
        if happened.get(zmq.EVENT_HANDSHAKE_FAILED_AUTH) == NOT_NOW:
            return LinkCondition.HANDSHAKE_FAILED, f"{said} has excluded {self._me} for a while: it got too much from it"
        if zmq.EVENT_HANDSHAKE_FAILED_AUTH in happened:
            return LinkCondition.WRONG_KEY, f"{said} does not know the key of {self._me}: it holds another study or another card"
        return LinkCondition.HANDSHAKE_FAILED, f"{said} ended the connection before it was encrypted: {_NOT_IT}"

    async def _until_over(self, patience_s: float) -> AsyncIterator[tuple[int, int]]:
        """Pass on what libzmq says of one attempt to connect, until that has failed or the connection is over."""
        kind = 0
        while kind not in _OVER:
            try:
                # libzmq says nothing of a socket that the system did not give it; a connection that was made it always ends itself
                async with asyncio.timeout(None if kind else patience_s + PROBE_S):
                    kind, value = await self._happened.get()
            except TimeoutError:
                return
            yield kind, value


def _split(name: str, address: str) -> tuple[str, str, int]:
    """The address of a member, its host and its port."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"address of {name} = {address!r}: not an address such as tcp://node.hospital.example:7700")
    return address, match[1] or match[2], int(match[3])


async def _why_not(host: str, port: int, said: str, patience_s: float, took_s: float) -> tuple[LinkCondition, str]:
    """Find out why libzmq could not connect, which it does not say, by one more attempt by hand."""
    fault: OSError | None = TimeoutError()
    if took_s < patience_s / 2:
        fault = await connection_fault(host, port, PROBE_S)
    if fault is None:
        return LinkCondition.REFUSED, f"connection refused at {said}; it has come up since"
    if isinstance(fault, TimeoutError):
        return LinkCondition.NO_ANSWER, f"no answer at {said} (a firewall, or the machine is off)"
    if fault.errno == errno.ECONNREFUSED:
        return LinkCondition.REFUSED, f"connection refused at {said}"
    return LinkCondition.NO_ROUTE, f"{fault.strerror} at {said}"
