"""libzmq's sockets of links: options, events, ways back to who dialled, and sending and reading that never wait inside libzmq."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import zmq
import zmq.asyncio

from p2pfl.errors import ConfigError, TransportError
from p2pfl.transports.admission import Account
from p2pfl.transports.base import MAX_RECEIVED, MAX_SENDING

log = logging.getLogger(__name__)

CURVE_OVERHEAD_BYTES = 33  # command name, nonce, authenticator, flags: MAXMSGSIZE is compared with the encrypted frame
HANDSHAKE_S = 10.0
NEVER_S = 1_000_000.0  # libzmq dials again by itself after at least so long: Dialler does
MISSED_HEARTBEATS = 4
ROUTE_BYTES = 5  # routing ids that the ROUTER makes itself, from a random start: a zero and a counter
ROUTES_KEPT = 4

_NOW, _NOW_AND_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)  # as numbers: to combine flags takes as long as to send
_SHARED_FROM_BYTES = 2**16  # a shorter frame is copied, which takes less than to share it

EVENTS: dict[int, str] = {
    zmq.Event.HANDSHAKE_SUCCEEDED: "connected",
    zmq.Event.DISCONNECTED: "disconnected",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "handshake_failed",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "handshake_failed",
}
"""HANDSHAKE_FAILED_PROTOCOL must not be among them: while libzmq 4.3.5 reports that a frame cannot be decrypted, it forgets that this is
an error (errno is overwritten), and leaves a connection that is neither read nor closed. Without the report it closes the connection."""


class LinkSocket:
    """A ROUTER or DEALER that has every option that must be set before it binds or connects, with its public and its secret key."""

    def __init__(
        self, context: zmq.asyncio.Context, kind: int, keys: tuple[bytes, bytes], *, max_frame_bytes: int, max_queued: int, heartbeat_s: int
    ) -> None:
        self.socket: zmq.asyncio.Socket = context.socket(kind)
        self._plain: zmq.Socket[bytes] = zmq.Socket.shadow(self.socket)  # the same socket, without futures
        options: dict[Any, int | bytes] = {
            zmq.MAXMSGSIZE: max_frame_bytes + CURVE_OVERHEAD_BYTES,
            zmq.SNDHWM: min(max_queued, MAX_SENDING),  # libzmq tells of room only when half of them have gone
            zmq.RCVHWM: min(max_queued, MAX_RECEIVED),
            # The kernel's heartbeats, not libzmq's: libzmq 4.3.5 aborts the process when its heartbeat is due on a connection that ended
            # while its messages waited for us to read (!_io_error), and takes a slow reader for a dead one.
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: heartbeat_s,
            zmq.TCP_KEEPALIVE_INTVL: heartbeat_s,
            zmq.TCP_KEEPALIVE_CNT: MISSED_HEARTBEATS - 1,
            zmq.TCP_MAXRT: 1000 * MISSED_HEARTBEATS * heartbeat_s,  # the same patience with data that nobody acknowledges
            zmq.HANDSHAKE_IVL: round(1000 * HANDSHAKE_S),
            zmq.RECONNECT_IVL: round(1000 * NEVER_S),
            zmq.LINGER: 0,  # until closing says otherwise
            zmq.CURVE_PUBLICKEY: keys[0],
            zmq.CURVE_SECRETKEY: keys[1],
        }
        try:
            self.set(options)
            self.events = cast("zmq.Socket[bytes]", context.socket(zmq.PAIR, socket_class=cast(Any, zmq.Socket)))
            # unbounded: libzmq's I/O thread would block on a full queue of events, and closing would wait for that thread for ever
            self.events.setsockopt(zmq.RCVHWM, 0)
            address = f"inproc://events-{self.socket.underlying}"
            reported = sum(EVENTS) | zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_MONITOR_STOPPED
            self.socket.monitor(address, reported)
            self.events.connect(address)
        except BaseException:
            self.socket.close()
            raise

    def set(self, options: Mapping[Any, int | bytes]) -> None:
        """Set options of libzmq, in this order."""
        for option, setting in options.items():
            self.socket.setsockopt(option, setting)

    def bind(self, address: str) -> str:
        """Listen at an address; returns the one that the system gave.

        Raises:
            ConfigError: it is no address.
            TransportError: it is not to be had now.
        """
        families = _families(address)
        for ipv6 in families:
            self.socket.setsockopt(zmq.IPV6, ipv6)
            try:
                self.socket.bind(address)
                break
            except zmq.ZMQError as error:
                if ipv6 == families[-1] or error.errno == errno.EADDRINUSE:
                    raise _refused(f"listen = {address!r}", error) from error
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Hand a message to libzmq, or raise zmq.Again where there is no room.

        Not by the asyncio socket's own method: an error that it puts into a Future holds the frames until Python looks for circles of
        garbage, and the frames may hold a model.
        """
        *others, last = frames
        try:
            for frame in others:
                self._plain.send(frame, _NOW_AND_MORE, copy=memoryview(frame).nbytes < _SHARED_FROM_BYTES)
            self._plain.send(last, _NOW, copy=memoryview(last).nbytes < _SHARED_FROM_BYTES)
        finally:
            self.socket.get(zmq.EVENTS)  # sending may have taken the notice that something has come

    def send_sign_of_life(self, peer: str, *route: bytes) -> bool:
        """Whether there is a connection to a peer, by sending an empty frame; one whose queue is full is one."""
        try:
            self.send([*route, b""])
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EFAULT):
                raise
            log.debug("no sign of life to %s: %s", peer, error.strerror)
            return False
        return True

    async def receive(self) -> list[zmq.Frame]:
        """Wait for the next message of any connection."""
        # a message that is there already is returned without a pause: a peer that keeps sending would hold the loop for itself
        await asyncio.sleep(0)
        try:
            frames = [self._plain.recv(_NOW, copy=False)]
        except zmq.Again:  # only to wait takes a future and a watch on the socket
            return await self.socket.recv_multipart(copy=False)
        while frames[-1].more:  # all of a message is there as soon as its first frame is
            frames.append(self._plain.recv(_NOW, copy=False))
        return frames

    @property
    def has_unread(self) -> bool:
        """Whether a message waits in libzmq; a closed socket counts as one that is not known to be empty."""
        return self.socket.closed or bool(cast(int, self.socket.get(zmq.EVENTS)) & zmq.POLLIN)


class ReturnRoutes:
    """Reaches each neighbour that dials this node over its newest connection to the listening socket that still exists."""

    def __init__(self, router: LinkSocket, peers: Iterable[str]) -> None:
        self._router = router
        self._routes: dict[str, deque[bytes]] = {peer: deque(maxlen=ROUTES_KEPT) for peer in peers}  # newest last
        self._accounts: dict[bytes, Account] = {}

    def send(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        """Send a message; raises zmq.Again where there is no room, and returns False where there is no connection."""
        routes = self._routes[peer]
        while routes:
            try:
                self._router.send([routes[-1], *frames])
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                routes.pop()
            else:
                return True
        return False

    def add(self, peer: str, route: bytes) -> Account | None:
        """Take in the connection of a message: an account for it, or None where it is known already."""
        # a late message of an old connection must not change the way back: only a route not yet known is the newest
        if route in self._routes[peer]:
            return None
        self._routes[peer].append(route)
        kept = {route for routes in self._routes.values() for route in routes}
        self._accounts = {known: account for known, account in self._accounts.items() if known in kept}
        return self._accounts.setdefault(route, Account())

    def account(self, route: bytes) -> Account | None:
        """Bytes that were delivered over a connection; None: it is kept no longer."""
        return self._accounts.get(route)

    def is_connected(self, peer: str) -> bool:
        """Whether the neighbour has a connection: a sign of life tells, and those that are gone are forgotten."""
        routes = self._routes[peer]
        while routes and not self._router.send_sign_of_life(peer, routes[-1]):
            routes.pop()
        return bool(routes)


def is_sign_of_life(frames: Sequence[zmq.Frame]) -> bool:
    """Whether a message is a single empty frame, which only shows the way back."""
    return len(frames) == 1 and len(frames[0]) == 0


def _families(listen: str) -> tuple[int, ...]:
    """Values of libzmq's option IPV6 that are tried in turn: on all interfaces both families, where the machine has both."""
    host = listen.removeprefix("tcp://").rpartition(":")[0]
    if host == "*":
        return 1, 0
    return (1,) if "[" in host else (0, 1)


def _refused(what: str, error: zmq.ZMQError) -> ConfigError | TransportError:
    """Make the error for an address that cannot be used: written wrongly, or not to be had now."""
    if error.errno in (errno.EINVAL, zmq.EPROTONOSUPPORT, zmq.ENOCOMPATPROTO):
        return ConfigError(f"{what}: not an address such as tcp://0.0.0.0:7700 ({error.strerror})")
    return TransportError(f"{what}: {error.strerror}")
