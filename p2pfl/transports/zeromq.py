"""Links over ZeroMQ: one TCP connection an edge, always encrypted and authenticated by CURVE.

A member listens on one ROUTER, if any neighbour dials it, and has one DEALER for each neighbour that it dials. Who sent a frame is
decided by the key that opened the connection: at the ROUTER libzmq stamps it on every frame (User-Id), at a DEALER only the holder of the
expected key can be at the other end. A dialler's first message on a connection is one empty frame (PROBE_ROUTER), by which the listener
learns the way back. Either end sends such a frame now and then as a sign of life, and looks in this way whether a connection still exists.

libzmq accepts every connection, and its queues count whole messages. `Door` bounds both: how many connections nobody has authenticated,
and how many bytes a connection may send before its handshake and ahead of what was read.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, cast

import zmq
import zmq.asyncio
from zmq.utils import z85

from p2pfl.errors import QueueFull, TransportError
from p2pfl.transports.admission import Account, Admission, source_of
from p2pfl.transports.arrivals import Arrivals
from p2pfl.transports.base import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_QUEUED,
    MAX_RECEIVED,
    Endpoint,
    LinkCondition,
    LinkState,
    LinkStates,
    Received,
    check_frames,
    dials,
)
from p2pfl.transports.dialler import LOOK_AFTER_S, Dialler
from p2pfl.transports.door import BROKEN, WRAPPING_BYTES, Door, Events
from p2pfl.transports.resolver import Lookup, Resolver
from p2pfl.transports.sockets import EVENTS, MISSED_HEARTBEATS, ROUTE_BYTES, LinkSocket, ReturnRoutes, is_sign_of_life
from p2pfl.transports.tunnels import Tunnels, WayOut
from p2pfl.transports.zap import ZAP_ADDRESS, answer_for_keys

log = logging.getLogger(__name__)

SILENT_AT_LEAST_S = 10.0
MESSAGES_HELD = 2
"""Beside those that wait in libzmq's queue for a link: one on its way out of it, one that is still incomplete."""
RETRY_S, RETRY_MAX_S = 0.001, 0.02
RETRY_FRACTION = 0.25
NEWS_S = 0.05


class ZeroMQTransport:
    """A member's links to its neighbours.

    Counters: "connected" (encrypted link up), "disconnected" (any connection that ended, refused ones included), "handshake_failed" (those
    of them that went away or were refused before they were up), "unauthorized" (a key that is no neighbour's), "frame_count" (messages of
    too many frames), "routing_id" (messages over a connection with an id that its dialler chose). What libzmq refuses by itself shows as
    "disconnected": bytes that are not its protocol, no CURVE, a frame that was tampered with or is above the limit (before it is
    allocated). The dialler dials again. The door shuts connections, which then end as any other: "evicted" (an unknown peer, when too
    many are there), "replaced" (a neighbour has newer ones), "oversent" (more bytes than a connection may send).

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
        way_out: how neighbours are dialled; None: libzmq connects to their addresses itself.
        relayed: where all that comes is relayed, the member by the address and port that its connection comes from; see `Door`.

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
        way_out: WayOut | None = None,
        relayed: Mapping[tuple[str, int], str] | None = None,
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
        self._lookup, self._way_out, self._relayed = lookup, way_out, relayed
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
        self._sockets: list[LinkSocket] = []  # in the order in which they were opened
        self._own_sockets: list[zmq.asyncio.Socket] = []  # inside the process: ZAP
        self._diallers: dict[str, Dialler] = {}
        self._arrivals = Arrivals()  # over all links
        self._taken_s: dict[str, float] = {}  # when a link's queue last took a message
        self._up: set[str] = set()  # dialled neighbours with a link
        self._ended = asyncio.Event()  # a connection that somebody made to this node is over
        self._resolver = Resolver(self._lookup)
        messages = min(self._max_queued, MAX_RECEIVED) + MESSAGES_HELD
        admission = Admission(member_bytes=messages * MAX_FRAMES * (self._max_frame_bytes + WRAPPING_BYTES))
        self._door = Door(admission, asyncio.get_running_loop(), self._shut, self._relayed)
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tunnels = Tunnels(self._group)
        self._readers: list[asyncio.Task[None]] = []
        self._monitors: list[asyncio.Task[None]] = []
        try:
            if self._is_listening:
                self._start_listening()
            for name in self._dialled:
                self._start_dialling(self.neighbours[name])
            self._keep_running(self._beat(), "gives signs of life")
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
        """Send a message; see Transport.send."""
        if peer not in self.neighbours:
            raise ValueError(f"{peer!r} is no neighbour of {self.me.name!r}")
        check_frames(frames, self._max_frame_bytes)
        self._check_open()
        started_s = (loop := asyncio.get_running_loop()).time()
        # tried again instead of awaited: a ROUTER always says that it can be written to, and would be asked in a busy loop
        while not self._send_now(peer, frames):
            left_s = started_s + timeout_s - loop.time()
            # a DEALER says the same without a link and with a full queue, and the event that tells them apart may be under way
            is_down = peer in self._diallers and peer not in self._up
            if is_down and loop.time() >= started_s + min(timeout_s, NEWS_S):
                raise self._no_link(peer)
            if left_s <= 0:
                raise QueueFull(f"queue from {self.me.name} to {peer} full for {timeout_s} s")
            # as long as the queue has been full, or some of it: what empties fast must not stand empty, nor a slow one be asked often.
            # Who is busy both ways is awake when something comes, and looks then
            full_s = loop.time() - self._taken_s.get(peer, started_s)
            await self._arrivals.wait(min(left_s, NEWS_S / 2 if is_down else max(RETRY_S, min(RETRY_FRACTION * full_s, RETRY_MAX_S))))
            self._check_open()
        self._taken_s[peer] = loop.time()

    async def receive(self) -> Received:
        """Wait for a message; see Transport.receive."""
        self._check_open()
        return await self._inbox.get()

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """Count events by link; see Transport.link_counters.

        Of a neighbour that this node dials also "unresolved", "not_connected" and "handshake_failed".
        """
        return self._links.counters

    def link(self, peer: str) -> LinkState:
        """State of a link; see Transport.link."""
        return self._links.state(peer)

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """End a link for a while; see Transport.disconnect."""
        if peer not in self._diallers and self._links.state(peer).is_up:  # of a dialled one libzmq tells
            self._links.counters[peer]["disconnected"] += 1
        self._links.exclude(peer, for_s, why)
        self._door.disconnect(peer)

    @property
    def _is_listening(self) -> bool:
        """Whether a neighbour dials this node."""
        return len(self._dialled) < len(self.neighbours)

    def _check_open(self) -> None:
        if not self._open:
            raise TransportError(f"{self.me.name} is closed")

    def _no_link(self, peer: str) -> TransportError:
        return TransportError(f"no link from {self.me.name} to {peer}")

    def _send_now(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        """Whether a link's queue took a message; raises where there is no link."""
        if self._links.is_excluded(peer):  # libzmq may not have noticed yet that the connection was shut, and would take it
            raise self._no_link(peer)
        try:
            if peer not in self._diallers:
                if not self._routes.send(peer, frames):
                    raise self._no_link(peer)
                return True
            self._diallers[peer].dealer.send(frames)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EFAULT or peer not in self._diallers:  # the link went down between the first frame and the second
                raise
            raise self._no_link(peer) from None
        self._up |= {peer} if self._diallers[peer].may_be_up else set()  # the event that says so may be under way
        return True

    def _start_listening(self) -> None:
        # before the ROUTER binds: without a ZAP handler libzmq would let every key in, and ZAP_ENFORCE_DOMAIN is there for the same reason
        zap = self._context.socket(zmq.REP)
        self._own_sockets.append(zap)
        zap.bind(ZAP_ADDRESS)
        answers = answer_for_keys(zap, frozenset(self._names), self._refuse, lambda key: self._links.is_excluded(self._names[key]))
        self._keep_running(answers, "answers for keys")
        self._router = self._link_socket(zmq.ROUTER)
        self._routes = ReturnRoutes(self._router, self.neighbours)
        self._router.set({zmq.ROUTER_MANDATORY: 1, zmq.CURVE_SERVER: 1, zmq.ZAP_DOMAIN: b"p2pfl", zmq.ZAP_ENFORCE_DOMAIN: 1})
        self.bound_address = self._router.bind(cast(str, self._listen))  # dials() has seen to it unless nobody dials us
        for name in sorted(self.neighbours.keys() - set(self._dialled)):
            self._links.note(name, LinkCondition.AWAITED)
        self._door.listens_at(int(self.bound_address.rpartition(":")[2]))
        self._keep_running(self._read_listener(), "reads")

    def _start_dialling(self, peer: Endpoint) -> None:
        name = peer.name
        dealer = self._link_socket(zmq.DEALER, name)
        way_out = None if self._way_out is None else (self._way_out, self._tunnels)
        self._diallers[name] = dialler = Dialler(self.me.name, peer, dealer, self._links, self._resolver, way_out)
        # IMMEDIATE: nothing queues for a link that is not up
        dealer.set({zmq.CURVE_SERVERKEY: peer.public_key, zmq.IMMEDIATE: 1, zmq.PROBE_ROUTER: 1})
        self._links.note(name, LinkCondition.CONNECTING)
        self._keep_running(dialler.run(), f"dials {name}")
        self._keep_running(self._read_dialled(dealer, name), f"reads {name}")

    def _keep_running(self, reader: Coroutine[None, None, None], does: str) -> None:
        self._readers.append(self._group.create_task(reader, name=f"{self.me.name} {does}"))

    def _link_socket(self, kind: int, dialled: str | None = None) -> LinkSocket:
        keys = self.me.public_key, self._secret_key
        link = LinkSocket(
            self._context, kind, keys, max_frame_bytes=self._max_frame_bytes, max_queued=self._max_queued, heartbeat_s=self._heartbeat_s
        )
        self._sockets.append(link)
        happened: asyncio.Queue[Events] = asyncio.Queue()
        self._door.watch(link.events, happened.put_nowait, dialled)
        name = f"{self.me.name} watches {dialled or 'its listener'}"
        self._monitors.append(self._group.create_task(self._watch(happened, dialled), name=name))
        return link

    async def _watch(self, happened: asyncio.Queue[Events], dialled: str | None) -> None:
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
                    self._diallers[dialled].hear(kind, value)
                elif kind == zmq.EVENT_DISCONNECTED:
                    self._ended.set()

    def _note(self, kind: int, dialled: str) -> None:
        """Put down what happened to the connection with a neighbour that this node dials."""
        if kind in EVENTS and (kind != zmq.EVENT_DISCONNECTED or dialled in self._up):
            self._links.counters[dialled][EVENTS[kind]] += 1
        if kind == zmq.EVENT_CONNECTED and self._links.is_excluded(dialled):
            self._door.disconnect(dialled)
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._up.add(dialled)
            self._links.note(dialled, LinkCondition.UP)
        else:
            self._up.discard(dialled)
            if kind == zmq.EVENT_DISCONNECTED and self._links.state(dialled).is_up:
                self._lost(dialled)

    def _lost(self, peer: str) -> None:
        if not self._links.is_excluded(peer):  # else it has been said why
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
                    self._diallers[name].dealer.send_sign_of_life(name)
                self._look_at_routes()
                if late_s < self._heartbeat_s:  # else this node itself was held up, and what came meanwhile is still to be read
                    self._links.note_silence(max(SILENT_AT_LEAST_S, MISSED_HEARTBEATS * self._heartbeat_s))
            else:
                await asyncio.sleep(LOOK_AFTER_S)
                self._ended.clear()
                self._look_at_routes()

    def _look_at_routes(self) -> None:
        """Forget the ways back that are gone; a neighbour that dials this node and has none is not connected."""
        for name in self.neighbours if self._is_listening else ():
            if not self._routes.is_connected(name) and name not in self._diallers and self._links.state(name).is_up:
                self._links.counters[name]["disconnected"] += 1
                self._lost(name)

    async def _read_listener(self) -> None:
        while True:
            route, *frames = await self._router.receive()
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
            if self._links.is_excluded(peer):  # it was let in before
                self._name_connection(peer, frames[0], Account())
                self._door.disconnect(peer)
                continue
            account = self._routes.add(peer, route.bytes)
            if account is not None:
                self._name_connection(peer, frames[0], account)
                self._links.counters[peer]["connected"] += 1
                self._links.note_received(peer)
            else:
                self._links.note_received_if_up(peer, is_sign_of_life=is_sign_of_life(frames))
            self._book(self._routes.account(route.bytes), None, frames)
            await self._deliver(peer, frames)

    def _name_connection(self, peer: str, frame: zmq.Frame, account: Account) -> None:
        """Tell the door whose connection it is that a first message came over."""
        with suppress(zmq.ZMQError, ValueError):  # the address was not to be had: the connection has ended
            self._door.authenticated(frame.get(zmq.SRCFD), source_of(cast(str, frame.get("Peer-Address"))), peer, account)

    def _book(self, account: Account | None, dialled: str | None, frames: Sequence[zmq.Frame]) -> None:
        """Count what was delivered of a connection."""
        if account is not None:
            account.deliver(sum(map(len, frames)) + WRAPPING_BYTES * len(frames))
        if self._door.has_remains:
            self._look_for_rest(dialled)

    def _look_for_rest(self, dialled: str | None) -> None:
        """Tell the door where nothing is left to read of connections that are over."""
        link = self._router if dialled is None else self._diallers[dialled].dealer
        if not link.has_unread:
            self._door.drained(dialled)

    def _shut(self, reason: str, detail: str) -> None:
        """The door has shut a connection."""
        self._refuse(reason, detail)
        if self._door.has_remains:  # what is left of a message that was never complete is gone without being read
            for dialled in (*self._diallers, *([None] if self._is_listening else [])):
                self._look_for_rest(dialled)

    def _sender(self, frame: zmq.Frame) -> str | None:
        """The neighbour whose key authenticated the connection that the frame came over."""
        try:
            return self._names.get(cast(str, frame.get("User-Id")).encode())
        except zmq.ZMQError:  # libzmq has no such property: the frame came over no authenticated connection
            return None

    async def _read_dialled(self, dealer: LinkSocket, peer: str) -> None:
        while True:
            frames = await dealer.receive()
            if self._links.is_excluded(peer):
                continue
            self._links.note_received_if_up(peer, is_sign_of_life=is_sign_of_life(frames))
            self._book(self._door.accounts.get(peer), peer, frames)
            await self._deliver(peer, frames)

    async def _deliver(self, peer: str, frames: Sequence[zmq.Frame]) -> None:
        self._arrivals.tell()
        if len(frames) > MAX_FRAMES:
            self._refuse("frame_count", f"{len(frames)} frames in a message of {peer}")
            self._links.counters[peer]["frame_count"] += 1
        elif not is_sign_of_life(frames):
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
                link.socket.close(linger=round(1000 * linger_s))
            # a socket's last event comes when nothing of it is left to send: waiting for it keeps term(), which would stop the loop, short
            if self._monitors and self._door.is_watching:
                await asyncio.wait(self._monitors, timeout=linger_s + 1)
            await self._tunnels.close(linger_s)
        finally:
            for monitor in self._monitors:
                monitor.cancel()
            self._door.stop()
            for own in self._own_sockets:
                own.close(linger=0)
            self._context.term()
