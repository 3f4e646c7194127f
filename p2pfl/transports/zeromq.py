"""Links over ZeroMQ: one TCP connection an edge, always encrypted and authenticated by CURVE.

A member listens on one ROUTER, if any neighbour dials it, and has one DEALER for each neighbour that it dials. Who sent a frame is
decided by the key that opened the connection: at the ROUTER libzmq stamps it on every frame (User-Id), at a DEALER only the holder of the
expected key can be at the other end. A dialler's first message on a connection is one empty frame (PROBE_ROUTER), by which the listener
learns the way back. Either end sends such a frame now and then as a sign of life, and looks in this way whether a connection still exists.

libzmq is given numeric addresses only, and one at a time: it would resolve names in the thread that serves all links. Dialling again, from
the first address of the card and with names looked up anew, is this module's.

libzmq accepts every connection, and its queues count whole messages. `Door` bounds both: how many connections nobody has authenticated,
and how many bytes a connection may send before its handshake and ahead of what was read.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import zmq
import zmq.asyncio
from zmq.utils import z85

from p2pfl.errors import ConfigError, QueueFull, TransportError
from p2pfl.transports.admission import Account, Admission, AdmissionLimits, source_of
from p2pfl.transports.base import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_QUEUED,
    MAX_RECEIVED,
    MAX_SENDING,
    Endpoint,
    LinkCondition,
    LinkState,
    LinkStates,
    Received,
    check_frames,
    dials,
)
from p2pfl.transports.door import BROKEN, WRAPPING_BYTES, Door, Events
from p2pfl.transports.resolver import Lookup, Resolver, connection_fault
from p2pfl.transports.zap import NOT_NOW, ZAP_ADDRESS, answer_for_keys

log = logging.getLogger(__name__)

CURVE_OVERHEAD_BYTES = 33  # command name, nonce, authenticator, flags: MAXMSGSIZE is compared with the encrypted frame
HANDSHAKE_S = 10.0
RECONNECT_S = 0.1
RECONNECT_MAX_S = 2.0
NEVER_S = 1_000_000.0  # libzmq dials again by itself after at least so long: this module does
RESOLVE_S = 5.0
CONNECT_SOON_S = 3.0
"""How long one of several addresses is tried; a single one is tried for HANDSHAKE_S."""
PROBE_S = 1.0
MISSED_HEARTBEATS = 4
SILENT_AT_LEAST_S = 10.0
LOOK_AFTER_S = 0.05
"""After a connection has ended, libzmq's queues for it are gone soon, and not at once."""
ROUTE_BYTES = 5  # routing ids that the ROUTER makes itself, from a random start: a zero and a counter
ROUTES_KEPT = 4
MESSAGES_HELD = 2
"""Beside those that wait in libzmq's queue for a link: one on its way out of it, one that is still incomplete."""
RETRY_S = 0.001
RETRY_MAX_S = 0.02
RETRY_FRACTION = 0.25
NEWS_S = 0.05
SIGN_OF_LIFE = b""

_ADDRESS = re.compile(r"tcp://(?:\[([^\]]+)\]|([^\[\]:/]+)):([0-9]{1,5})")
_TELLING = (
    LinkCondition.WRONG_KEY,
    LinkCondition.HANDSHAKE_FAILED,
    LinkCondition.REFUSED,
    LinkCondition.NO_ANSWER,
    LinkCondition.NO_ROUTE,
    LinkCondition.UNKNOWN_NAME,
)
"""What several addresses lead to is told by the one that led furthest."""

EVENTS: dict[int, str] = {
    zmq.Event.HANDSHAKE_SUCCEEDED: "connected",
    zmq.Event.DISCONNECTED: "disconnected",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "handshake_failed",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "handshake_failed",
}
"""HANDSHAKE_FAILED_PROTOCOL must not be among them: while libzmq 4.3.5 reports that a frame cannot be decrypted, it forgets that this is
an error (errno is overwritten), and leaves a connection that is neither read nor closed. Without the report it closes the connection."""


_NOT_IT = "another key than on its card, another program at this port, or it was just stopping"


@dataclass(frozen=True, slots=True)
class _Place:
    """One address of a neighbour."""

    address: str
    host: str
    port: int


class ZeroMQTransport:
    """A member's links to its neighbours.

    Counters: "connected" (encrypted link up), "disconnected" (any connection that ended, refused ones included), "handshake_failed" (those
    of them that went away or were refused before they were up), "unauthorized" (a key that is no neighbour's), "frame_count" (messages of
    too many frames), "routing_id" (messages over a connection with an id that its dialler chose). What libzmq refuses by itself shows as
    "disconnected": bytes that are not its protocol, no CURVE, a frame that was tampered with or is above the limit (before it is
    allocated). The dialler dials again. The door shuts connections, which then end as any other: "evicted" (a stranger, when too many are
    there), "replaced" (a neighbour has newer ones), "oversent" (more bytes than a connection may send).

    Args:
        me: this member, as the neighbours know it.
        secret_key: CURVE, z85, belonging to me.public_key.
        neighbours: the members that may talk to this one, in either direction; nobody else gets through the handshake.
        listen: where to bind, such as tcp://0.0.0.0:7700; me.address if not given. Port 0: see bound_address.
        max_frame_bytes: largest frame, in either direction.
        max_queued: messages in each direction of each link; a sender waits when they are used up.
        heartbeat_s: how often a sign of life is sent, and the kernel tries a silent link, which is lost when four in a row get no answer.
            Whole seconds.
        linger_s: how long closing waits for messages that are still on their way out. They then are with the peer's libzmq; if the peer is
            the dialler, what it has not read when the connection ends is lost, so an important last word wants an answer.
        lookup: how host names are resolved; None: by the system.

    Raises:
        ConfigError: two neighbours of which none has an address.
        ValueError: a key is not a CURVE key, two members share one, or the two keys of *me* do not belong together.
    """

    def __init__(
        self,
        me: Endpoint,
        secret_key: bytes,
        neighbours: Iterable[Endpoint],
        *,
        listen: str | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_queued: int = MAX_QUEUED,
        heartbeat_s: int = 5,
        linger_s: float = 2.0,
        lookup: Lookup | None = None,
    ) -> None:
        self.me = me
        self.neighbours = {peer.name: peer for peer in neighbours}
        for member in (me, *self.neighbours.values()):
            if len(member.public_key) != 40 or len(z85.decode(member.public_key)) != 32:  # noqa: PLR2004 - CURVE's
                raise ValueError(f"public key of {member.name} = {member.public_key!r}: 40 bytes of z85")
        if zmq.curve_public(secret_key) != me.public_key:
            raise ValueError(f"secret key of {me.name}: does not belong to the public key {me.public_key!r}")
        self._dialled = sorted(peer.name for peer in self.neighbours.values() if dials(me.name, me.address, peer.name, peer.address))
        self._names = {peer.public_key: peer.name for peer in self.neighbours.values()}
        if len({me.public_key, *self._names}) <= len(self.neighbours):
            raise ValueError(f"public keys of {me.name} and its neighbours: two members have the same")
        self._secret_key = secret_key
        self._listen = listen or next(iter(me.addresses), None)
        self._lookup = lookup
        self._links = LinkStates(sorted(self.neighbours))
        self._max_frame_bytes = max_frame_bytes
        self._max_queued = max_queued
        self._heartbeat_s = heartbeat_s
        self._linger_s = linger_s
        self.counters: Counter[str] = Counter()
        self.bound_address: str | None = None
        self._open = False

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(min(self._max_queued, MAX_RECEIVED))
        self._sockets: list[zmq.asyncio.Socket] = []  # the links', in the order in which they were opened
        self._plain: dict[zmq.asyncio.Socket, zmq.Socket[bytes]] = {}  # the same sockets, without futures
        self._own_sockets: list[zmq.asyncio.Socket] = []  # inside the process: ZAP
        self._accounts: dict[bytes, Account] = {}  # what was delivered over each way back
        self._dealers: dict[str, zmq.asyncio.Socket] = {}
        self._came = asyncio.Event()  # something has come over some link
        self._taken_s: dict[str, float] = {}  # when a link's queue last took a message
        self._up: set[str] = set()  # dialled neighbours with a link
        self._routes: dict[str, deque[bytes]] = {name: deque(maxlen=ROUTES_KEPT) for name in self.neighbours}  # newest last
        self._beating: set[str] = set()  # neighbours that send signs of life
        self._excluded_until_s: dict[str, float] = {}  # neighbours that have no link now because of disconnect()
        self._ended = asyncio.Event()  # a connection that somebody made to this node is over
        self._resolver = Resolver(self._lookup)
        self._door = Door(Admission(self._limits()), asyncio.get_running_loop(), self._shut)
        self._group = await asyncio.TaskGroup().__aenter__()
        self._readers: list[asyncio.Task[None]] = []
        self._monitors: list[asyncio.Task[None]] = []
        try:
            if len(self._dialled) < len(self.neighbours):
                self._start_listening()
            for name in self._dialled:
                self._start_dialling(self.neighbours[name])
            self._readers.append(self._group.create_task(self._beat(), name=f"{self.me.name} gives signs of life"))
            self._door.start()
        except BaseException:
            await self._close(linger_s=0)
            await self._group.__aexit__(None, None, None)
            raise
        self._open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._open = False
        try:
            await self._close(self._linger_s)
        finally:
            # a cancellation is the group's business; any other exception of the body stays what it is instead of becoming a group of one
            cancelled = isinstance(error, asyncio.CancelledError)
            await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """See Transport.send."""
        if peer not in self.neighbours:
            raise ValueError(f"{peer!r} is no neighbour of {self.me.name!r}")
        check_frames(frames, self._max_frame_bytes)
        self._check_open()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        # tried again instead of awaited: a ROUTER always says that it can be written to, and would be asked in a busy loop
        while not (self._send_dialled(peer, frames) if peer in self._dealers else self._send_back(peer, frames)):
            left_s = started_s + timeout_s - loop.time()
            # a DEALER says the same without a link and with a full queue, and the event that tells them apart may be under way
            if peer in self._dealers and peer not in self._up and loop.time() >= started_s + min(timeout_s, NEWS_S):
                raise self._no_link(peer)
            if left_s <= 0:
                raise QueueFull(f"queue from {self.me.name} to {peer} full for {timeout_s} s")
            # as long as the queue has been full, or some of it: what empties fast must not stand empty, nor a slow one be asked often
            full_s = loop.time() - self._taken_s.get(peer, started_s)
            self._came.clear()
            with suppress(TimeoutError):  # who is busy both ways is awake when something comes, and looks then
                async with asyncio.timeout(min(max(RETRY_S, RETRY_FRACTION * full_s), RETRY_MAX_S, left_s)):
                    await self._came.wait()
            self._check_open()
        self._taken_s[peer] = loop.time()

    async def receive(self) -> Received:
        """See Transport.receive."""
        self._check_open()
        return await self._inbox.get()

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """See Transport.link_counters. Of a neighbour that this node dials also "unresolved", "not_connected" and "handshake_failed"."""
        return self._links.counters

    def link(self, peer: str) -> LinkState:
        """See Transport.link."""
        return self._links.state(peer)

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """See Transport.disconnect."""
        self._excluded_until_s[peer] = time.monotonic() + for_s
        if peer not in self._dealers and self._links.state(peer).is_up:  # of a dialled one libzmq tells
            self._links.counters[peer]["disconnected"] += 1
        self._links.note(peer, LinkCondition.DOWN, f"this node has ended the connection for {for_s:g} s: {why}")
        self._door.disconnect(peer)

    def _is_excluded(self, peer: str) -> bool:
        return time.monotonic() < self._excluded_until_s.get(peer, 0.0)

    def _limits(self) -> AdmissionLimits:
        messages = min(self._max_queued, MAX_RECEIVED) + MESSAGES_HELD
        return AdmissionLimits(member_bytes=messages * MAX_FRAMES * (self._max_frame_bytes + WRAPPING_BYTES))

    def _check_open(self) -> None:
        if not self._open:
            raise TransportError(f"{self.me.name} is closed")

    def _no_link(self, peer: str) -> TransportError:
        return TransportError(f"no link from {self.me.name} to {peer}")

    def _send_dialled(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        """Whether a link's queue took it."""
        try:
            self._send_now(self._dealers[peer], frames)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EFAULT:  # the link went down between the first frame and the second
                raise
            raise self._no_link(peer) from None
        self._up.add(peer)  # the event that says so may be under way
        return True

    def _send_back(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        """The same for a neighbour that dials us, over its newest connection that still exists; raises if there is none."""
        routes = self._routes[peer]
        while routes:
            try:
                self._send_now(self._router, [routes[-1], *frames])
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                routes.pop()
            else:
                return True
        raise self._no_link(peer)

    def _send_now(self, link: zmq.asyncio.Socket, frames: Sequence[bytes | memoryview]) -> None:
        """Hand a message to libzmq, or raise zmq.Again where there is no room.

        Not by the asyncio socket's own method: an error that it puts into a Future holds the frames until Python looks for circles of
        garbage, and the frames may hold a model.
        """
        try:
            self._plain[link].send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
        finally:
            link.get(zmq.EVENTS)  # sending may have taken the notice that something has come

    def _start_listening(self) -> None:
        # before the ROUTER binds: without a ZAP handler libzmq would let every key in, and ZAP_ENFORCE_DOMAIN is there for the same reason
        zap = self._context.socket(zmq.REP)
        self._own_sockets.append(zap)
        zap.bind(ZAP_ADDRESS)
        allowed = frozenset(self._names)

        def is_excluded(key: bytes) -> bool:
            return self._is_excluded(self._names[key])

        self._readers.append(
            self._group.create_task(answer_for_keys(zap, allowed, self._refuse, is_excluded), name=f"{self.me.name} answers for keys")
        )
        self._router, events = self._link_socket(zmq.ROUTER)
        happened: asyncio.Queue[Events] = asyncio.Queue()
        self._monitors.append(self._group.create_task(self._watch(happened), name=f"{self.me.name} watches"))
        self._door.watch(events, happened.put_nowait)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.ZAP_DOMAIN, b"p2pfl")
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        address = cast(str, self._listen)  # dials() has seen to it unless nobody dials us
        families = _families(address)
        for ipv6 in families:
            self._router.setsockopt(zmq.IPV6, ipv6)
            try:
                self._router.bind(address)
                break
            except zmq.ZMQError as error:
                if ipv6 == families[-1] or error.errno == errno.EADDRINUSE:
                    raise _refused(f"listen = {address!r}", error) from error
        for name in sorted(self.neighbours.keys() - set(self._dialled)):
            self._links.note(name, LinkCondition.AWAITED)
        self.bound_address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._door.port = int(self.bound_address.rpartition(":")[2])
        self._readers.append(self._group.create_task(self._read_listener(), name=f"{self.me.name} reads"))

    def _start_dialling(self, peer: Endpoint) -> None:
        places = [_place(peer.name, address) for address in peer.addresses]  # dials() has seen to it that there is one
        dealer, events = self._link_socket(zmq.DEALER)
        news: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        happened: asyncio.Queue[Events] = asyncio.Queue()
        self._monitors.append(self._group.create_task(self._watch(happened, peer.name, news), name=f"{self.me.name} watches {peer.name}"))
        self._door.watch(events, happened.put_nowait, peer.name)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, peer.public_key)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues for a link that is not up
        dealer.setsockopt(zmq.PROBE_ROUTER, 1)
        self._dealers[peer.name] = dealer
        self._links.note(peer.name, LinkCondition.CONNECTING)
        self._readers.append(self._group.create_task(self._dial(peer.name, places, news), name=f"{self.me.name} dials {peer.name}"))
        self._readers.append(self._group.create_task(self._read_dialled(dealer, peer.name), name=f"{self.me.name} reads {peer.name}"))

    async def _dial(self, peer: str, places: Sequence[_Place], news: asyncio.Queue[tuple[int, int]]) -> None:
        """Keep a connection to a neighbour: try its addresses in order, and all over again when one that worked has ended."""
        pause_s = RECONNECT_S
        while True:
            failures: list[tuple[LinkCondition, str]] = []
            was_up = False
            for place in places:
                try:
                    hosts = await self._numeric(peer, place)
                except TransportError as error:
                    self._links.counters[peer]["unresolved"] += 1
                    failures.append((LinkCondition.UNKNOWN_NAME, str(error)))
                    continue
                for host in hosts:
                    patience_s = HANDSHAKE_S if len(places) == len(hosts) == 1 else CONNECT_SOON_S
                    failure = await self._connect(peer, place, host, patience_s, news)
                    if failure is None:
                        was_up = True
                        break
                    failures.append(failure)
                if was_up:
                    break
            if not was_up:
                state = min((state for state, _ in failures), key=_TELLING.index)
                self._links.note(peer, state, "; ".join(dict.fromkeys(detail for _, detail in failures)))
            pause_s = RECONNECT_S if was_up else min(2 * pause_s, RECONNECT_MAX_S)
            await asyncio.sleep(max(pause_s, self._excluded_until_s.get(peer, 0.0) - time.monotonic()))

    async def _numeric(self, peer: str, place: _Place) -> Sequence[str]:
        self._links.begin(peer, LinkCondition.RESOLVING, f"looking up its name {place.host}")
        found = await self._resolver.resolve(place.host, RESOLVE_S)
        self._links.begin(peer, LinkCondition.CONNECTING, f"dialling {place.address}")
        return found

    async def _connect(
        self, peer: str, place: _Place, host: str, patience_s: float, news: asyncio.Queue[tuple[int, int]]
    ) -> tuple[LinkCondition, str] | None:
        """Have libzmq connect to a numeric address once, until that has failed (and why), or until the link was up and is over (None)."""
        dealer = self._dealers[peer]
        numeric = f"tcp://[{host}]:{place.port}" if ":" in host else f"tcp://{host}:{place.port}"
        said = place.address if numeric == place.address else f"{place.address} ({host})"
        dealer.setsockopt(zmq.IPV6, int(":" in host))
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, round(1000 * patience_s))
        began_s = time.monotonic()
        try:
            dealer.connect(numeric)
        except zmq.ZMQError as error:
            return LinkCondition.NO_ROUTE, f"{error.strerror} at {said}"
        said_of = {kind: value async for kind, value in _until_over(news, patience_s)}
        await asyncio.sleep(LOOK_AFTER_S)  # libzmq is done with the connection soon, and must be before it is told to forget it
        if not dealer.closed:
            try:
                dealer.disconnect(numeric)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:
                    raise
        if zmq.EVENT_HANDSHAKE_SUCCEEDED in said_of:
            return None
        if said_of.get(zmq.EVENT_HANDSHAKE_FAILED_AUTH) == NOT_NOW:
            return LinkCondition.HANDSHAKE_FAILED, f"{said} has excluded {self.me.name} for a while: it got too much from it"
        if zmq.EVENT_HANDSHAKE_FAILED_AUTH in said_of:
            return LinkCondition.WRONG_KEY, f"{said} does not know the key of {self.me.name}: it holds another study or another card"
        if zmq.EVENT_DISCONNECTED in said_of:
            return LinkCondition.HANDSHAKE_FAILED, f"{said} ended the connection before it was encrypted: {_NOT_IT}"
        self._links.counters[peer]["not_connected"] += 1
        return await _why_not(host, place.port, said, patience_s, time.monotonic() - began_s)

    def _link_socket(self, kind: int) -> tuple[zmq.asyncio.Socket, zmq.Socket[bytes]]:
        """A socket that has all that must be set before it binds or connects, and where its events come."""
        link = self._context.socket(kind)
        self._sockets.append(link)
        self._plain[link] = zmq.Socket.shadow(link)
        link.setsockopt(zmq.CURVE_PUBLICKEY, self.me.public_key)
        link.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)
        patience_ms = 1000 * MISSED_HEARTBEATS * self._heartbeat_s
        options = {
            zmq.MAXMSGSIZE: self._max_frame_bytes + CURVE_OVERHEAD_BYTES,
            zmq.SNDHWM: min(self._max_queued, MAX_SENDING),  # libzmq tells of room only when half of them have gone
            zmq.RCVHWM: min(self._max_queued, MAX_RECEIVED),
            # The kernel's heartbeats, not libzmq's: libzmq 4.3.5 aborts the process when its heartbeat is due on a connection that ended
            # while its messages waited for us to read (!_io_error), and takes a slow reader for a dead one.
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: self._heartbeat_s,
            zmq.TCP_KEEPALIVE_INTVL: self._heartbeat_s,
            zmq.TCP_KEEPALIVE_CNT: MISSED_HEARTBEATS - 1,
            zmq.TCP_MAXRT: patience_ms,  # the same patience with data that nobody acknowledges
            zmq.HANDSHAKE_IVL: round(1000 * HANDSHAKE_S),
            zmq.RECONNECT_IVL: round(1000 * NEVER_S),
            zmq.LINGER: 0,  # until closing says otherwise
        }
        for option, number in options.items():
            link.setsockopt(option, number)
        events = cast("zmq.Socket[bytes]", self._context.socket(zmq.PAIR, socket_class=cast(Any, zmq.Socket)))
        # unbounded: libzmq's I/O thread would block on a full queue of events, and closing would wait for that thread for ever
        events.setsockopt(zmq.RCVHWM, 0)
        address = f"inproc://events-{len(self._sockets)}"
        link.monitor(address, sum(EVENTS) | zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_MONITOR_STOPPED)
        events.connect(address)
        return link, events

    async def _watch(
        self, happened: asyncio.Queue[Events], dialled: str | None = None, news: asyncio.Queue[tuple[int, int]] | None = None
    ) -> None:
        """Count what libzmq reports of a socket, and pass it on to whoever dials, until the socket is gone."""
        while True:
            for kind, value in await happened.get():
                if kind == zmq.EVENT_MONITOR_STOPPED:
                    return
                if kind == BROKEN:
                    raise RuntimeError(f"the door of {self.me.name} has broken")
                if kind in EVENTS:
                    self.counters[EVENTS[kind]] += 1
                if dialled is not None:
                    self._note(kind, dialled)
                elif kind == zmq.EVENT_DISCONNECTED:
                    self._ended.set()
                if news is not None:
                    news.put_nowait((kind, value))

    def _note(self, kind: int, dialled: str) -> None:
        """Put down what happened to the connection with a neighbour that this node dials."""
        if kind in EVENTS and (kind != zmq.EVENT_DISCONNECTED or dialled in self._up):
            self._links.counters[dialled][EVENTS[kind]] += 1
        if kind == zmq.EVENT_CONNECTED and self._is_excluded(dialled):
            self._door.disconnect(dialled)
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._up.add(dialled)
            self._links.note(dialled, LinkCondition.UP)
        else:
            self._up.discard(dialled)
            if kind == zmq.EVENT_DISCONNECTED and self._links.state(dialled).is_up:
                self._lost(dialled)

    def _lost(self, peer: str) -> None:
        self._beating.discard(peer)
        if not self._is_excluded(peer):  # else it has been said why
            self._links.note(peer, LinkCondition.DOWN, "the connection has ended")

    async def _beat(self) -> None:
        """Send signs of life, and notice who sends none and whose connection is gone."""
        loop = asyncio.get_running_loop()
        turn_s = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(turn_s + self._heartbeat_s):
                    await self._ended.wait()
            except TimeoutError:
                late_s, turn_s = loop.time() - turn_s - self._heartbeat_s, loop.time()
                for name in sorted(self._up):
                    self._sign_of_life(self._dealers[name], name, [SIGN_OF_LIFE])
                self._look_at_routes()
                if late_s < self._heartbeat_s:  # else this node itself was held up, and what came meanwhile is still to be read
                    self._look_for_silence()
            else:
                await asyncio.sleep(LOOK_AFTER_S)
                self._ended.clear()
                self._look_at_routes()

    def _sign_of_life(self, link: zmq.asyncio.Socket, peer: str, frames: Sequence[bytes]) -> bool:
        """Whether there is a connection; one whose queue is full is one."""
        try:
            self._send_now(link, frames)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EFAULT):
                raise
            log.debug("no sign of life to %s: %s", peer, error.strerror)
            return False
        return True

    def _look_at_routes(self) -> None:
        """Forget the ways back that are gone; a neighbour that dials this node and has none is not connected."""
        for name, routes in self._routes.items():
            while routes and not self._sign_of_life(self._router, name, [routes[-1], SIGN_OF_LIFE]):
                routes.pop()
            if not routes and name not in self._dealers and self._links.state(name).is_up:
                self._links.counters[name]["disconnected"] += 1
                self._lost(name)

    def _look_for_silence(self) -> None:
        patience_s = max(SILENT_AT_LEAST_S, MISSED_HEARTBEATS * self._heartbeat_s)
        for name in self._beating:
            link = self._links.state(name)
            if link.state == LinkCondition.UP and link.heard_s is not None and time.monotonic() - link.heard_s > patience_s:
                self._links.note(name, LinkCondition.SILENT, "connected, and yet no sign of life comes", since_s=link.heard_s)

    async def _read_listener(self) -> None:
        while True:
            route, *frames = await self._next_message(self._router)
            peer = self._sender(frames[0])
            if peer is None:
                self._refuse("unauthorized", "frames over a connection that nobody authenticated")
                continue
            if len(route) != ROUTE_BYTES or route.bytes[0] != 0:
                # the dialler chose it; taking the one that another member had before would bring it that member's messages
                self._refuse("routing_id", f"{peer} set {route.bytes!r}")
                self._links.counters[peer]["routing_id"] += 1
                self._name_connection(peer, frames[0], Account())
                continue
            if self._is_excluded(peer):  # it was let in before
                self._name_connection(peer, frames[0], Account())
                self._door.disconnect(peer)
                continue
            # a late message of an old connection must not change the way back: only a route not yet known is the newest
            if route.bytes not in self._routes[peer]:
                self._routes[peer].append(route.bytes)
                self._introduce(peer, route.bytes, frames[0])
                self._links.counters[peer]["connected"] += 1
                self._links.heard(peer)
            else:
                self._hear(peer, frames)
            self._book(self._accounts.get(route.bytes), None, frames)
            await self._deliver(peer, frames)

    async def _next_message(self, link: zmq.asyncio.Socket) -> list[zmq.Frame]:
        # a message that is there already is returned without a pause: a peer that keeps sending would hold the loop for itself
        await asyncio.sleep(0)
        try:
            return self._plain[link].recv_multipart(flags=zmq.DONTWAIT, copy=False)
        except zmq.Again:  # only to wait takes a future and a watch on the socket
            return await link.recv_multipart(copy=False)

    def _introduce(self, peer: str, route: bytes, frame: zmq.Frame) -> None:
        """Tell the door whose connection it is that a first message came over."""
        kept = {route for routes in self._routes.values() for route in routes}
        self._accounts = {known: account for known, account in self._accounts.items() if known in kept}
        self._accounts[route] = Account()
        self._name_connection(peer, frame, self._accounts[route])

    def _name_connection(self, peer: str, frame: zmq.Frame, account: Account) -> None:
        with suppress(zmq.ZMQError, ValueError):  # the address was not to be had: the connection has ended
            self._door.authenticated(frame.get(zmq.SRCFD), source_of(cast(str, frame.get("Peer-Address"))), peer, account)

    def _book(self, account: Account | None, dialled: str | None, frames: Sequence[zmq.Frame]) -> None:
        """Count what was delivered of a connection."""
        if account is not None:
            account.delivered_bytes += sum(len(frame) + WRAPPING_BYTES for frame in frames)
        if self._door.has_remains:
            self._look_for_rest(dialled)

    def _look_for_rest(self, dialled: str | None) -> None:
        """Tell the door where nothing is left to read of connections that are over."""
        link = self._router if dialled is None else self._dealers[dialled]
        if not link.closed and not cast(int, link.get(zmq.EVENTS)) & zmq.POLLIN:
            self._door.drained(dialled)

    def _shut(self, reason: str, detail: str) -> None:
        """The door has shut a connection."""
        self._refuse(reason, detail)
        if self._door.has_remains:  # what is left of a message that was never complete is gone without being read
            for dialled in (*self._dealers, *([None] if len(self._dealers) < len(self.neighbours) else [])):
                self._look_for_rest(dialled)

    def _sender(self, frame: zmq.Frame) -> str | None:
        """The neighbour whose key authenticated the connection that the frame came over."""
        try:
            return self._names.get(cast(str, frame.get("User-Id")).encode())
        except zmq.ZMQError:  # libzmq has no such property: the frame came over no authenticated connection
            return None

    async def _read_dialled(self, dealer: zmq.asyncio.Socket, peer: str) -> None:
        while True:
            frames = await self._next_message(dealer)
            if self._is_excluded(peer):
                continue
            self._hear(peer, frames)
            self._book(self._door.accounts.get(peer), peer, frames)
            await self._deliver(peer, frames)

    def _hear(self, peer: str, frames: Sequence[zmq.Frame]) -> None:
        """Whatever comes is a sign of life; a late word of a connection that is over is none."""
        if self._links.state(peer).is_up:
            self._links.heard(peer)
            if len(frames) == 1 and len(frames[0]) == 0:
                self._beating.add(peer)

    async def _deliver(self, peer: str, frames: Sequence[zmq.Frame]) -> None:
        self._came.set()
        if len(frames) > MAX_FRAMES:
            self._refuse("frame_count", f"{len(frames)} frames in a message of {peer}")
            self._links.counters[peer]["frame_count"] += 1
        elif len(frames) > 1 or len(frames[0]) > 0:  # a single empty frame only shows the way back
            await self._inbox.put(Received(peer, tuple(frame.buffer.toreadonly() for frame in frames)))

    def _refuse(self, reason: str, detail: str) -> None:
        self.counters[reason] += 1
        times = self.counters[reason]
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th, ...: who keeps trying does not fill the disk
            log.warning("%s: refused (%s, %d so far): %s", self.me.name, reason, times, detail)

    async def _close(self, linger_s: float) -> None:
        try:
            for reader in self._readers:
                reader.cancel()
            for name in self.neighbours:
                self._links.note(name, LinkCondition.CLOSED)
            for link in self._sockets:
                link.close(linger=round(1000 * linger_s))
            # a socket's last event comes when nothing of it is left to send: waiting for it keeps term(), which would stop the loop, short
            if self._monitors and self._door.is_watching:
                await asyncio.wait(self._monitors, timeout=linger_s + 1)
        finally:
            for monitor in self._monitors:
                monitor.cancel()
            self._door.stop()
            for own in self._own_sockets:
                own.close(linger=0)
            self._context.term()


def _place(name: str, address: str) -> _Place:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"address of {name} = {address!r}: not an address such as tcp://node.hospital.example:7700")
    return _Place(address, match[1] or match[2], int(match[3]))


def _families(listen: str) -> tuple[int, ...]:
    """Values of libzmq's option IPV6 that are tried in turn: on all interfaces both families, where the machine has both."""
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host == "*":
        return 1, 0
    return (1,) if "[" in host else (0, 1)


async def _until_over(news: asyncio.Queue[tuple[int, int]], patience_s: float) -> AsyncIterator[tuple[int, int]]:
    """What libzmq says of one attempt to connect, until that has failed or the connection is over."""
    kind = 0
    while kind not in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
        try:
            # libzmq says nothing of a socket that the system did not give it; a connection that was made it always ends itself
            async with asyncio.timeout(None if kind else patience_s + PROBE_S):
                kind, value = await news.get()
        except TimeoutError:
            return
        yield kind, value


async def _why_not(host: str, port: int, said: str, patience_s: float, took_s: float) -> tuple[LinkCondition, str]:
    """Why libzmq could not connect, which it does not say: the same is tried once more by hand."""
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


def _refused(what: str, error: zmq.ZMQError) -> ConfigError | TransportError:
    """The error for an address that cannot be used: written wrongly, or not to be had now."""
    if error.errno in (errno.EINVAL, zmq.EPROTONOSUPPORT, zmq.ENOCOMPATPROTO):
        return ConfigError(f"{what}: not an address such as tcp://0.0.0.0:7700 ({error.strerror})")
    return TransportError(f"{what}: {error.strerror}")
