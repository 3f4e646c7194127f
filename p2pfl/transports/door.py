"""The door of a node: watches the TCP connections that libzmq holds, and shuts those that `Admission` wants shut.

libzmq accepts every connection and counts whole messages only. It tells which file descriptor a connection has, though, and the kernel
tells what came over it. The door keeps a second descriptor of each connection, so that it never mistakes one for another, and shuts a
connection under libzmq's hands: libzmq then sees its end and clears up by itself. What flows over a link that is up passes by here
untouched, so the door costs nothing per byte.

The door has a thread of its own, for it must also act while the event loop is held up: at 500 MiB/s a pause of a second is half a gigabyte.
It owns all that it knows; the loop hands it what it has learned through a queue, and is told in turn through the loop's own.

Only Linux tells the bytes of a connection; elsewhere places are kept, and bytes are not watched.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import zmq

from p2pfl.runs.open_files import NO_MORE_FILES, when_out_of_files
from p2pfl.transports.admission import Account, Admission, source_of

log = logging.getLogger(__name__)

TURN_S = 0.02
"""How often connections are looked at while there are any."""

QUIET_TURN_S = 0.09
"""Seconds between two looks while all are neighbours', with at most BUSY_BYTES not delivered: 1 GiB/s brings 92 MiB in this time."""

BUSY_BYTES = 2**20
IDLE_TURN_S = 0.2
LEAVE_S = 5.0
EARLY_S = 5.0
MOST_EARLY = 64
EVENTS_A_TURN = 1000

WRAPPING_BYTES = 42
"""Bytes around one frame on the wire: libzmq's header of up to 9, and CURVE's command name, nonce, authenticator and flags."""

ENCRYPTED_BYTES = 260
"""A listener that has sent more has said READY: greeting 64, WELCOME 170, then ERROR 12 or READY 67."""

_TCP_INFO_BYTES = 136  # up to tcpi_bytes_received
_TCP_INFO_COUNTS = struct.Struct("=QQ")  # tcpi_bytes_acked, tcpi_bytes_received
_COUNTS_AT = 120
_AT_ONCE = struct.pack("ii", 1, 0)
_EVENT = struct.Struct("=Hi")

THROWN_AWAY_BYTES = 64 * 2**20
"""More than a connection's buffer in the kernel holds."""

WASTE_BYTES = 2**16

Events = list[tuple[int, int]]
"""Kinds and values of events of one socket, in order."""

BROKEN = -1
"""An event of the door's own: it has failed, and nobody watches any more."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One TCP connection."""

    fd: int
    """libzmq's descriptor, whose number is given to something else soon after the end."""
    inode: int
    """The kernel's number of the connection, by which that is noticed."""
    twin: socket.socket
    """The door's own descriptor."""
    source: str
    """The party that it is counted with: an address, or the member that a relay has let in."""
    host: str
    """Its address; see `source_of`."""
    events: zmq.Socket[bytes]
    """Where libzmq tells what happens to the connection's socket."""
    peer: str | None
    """The neighbour that this socket dials; None: it listens."""

    def is_open(self) -> bool:
        """Whether libzmq still has it."""
        try:
            return os.fstat(self.fd).st_ino == self.inode
        except OSError:
            return False


class Door:
    """Watches the sockets of one transport from `start` to `stop`, and tells *refuse* in the loop which connections it shut, and why.

    Where all that comes is relayed, *relayed* has the member by the address and port that its connection comes from, before it comes: each
    is then a party of its own, and any other connection is shut.
    """

    def __init__(
        self,
        admission: Admission,
        loop: asyncio.AbstractEventLoop,
        refuse: Callable[[str, str], None],
        relayed: Mapping[tuple[str, int], str] | None = None,
    ) -> None:
        self.accounts: dict[str, Account] = {}
        """Delivered bytes of the connection that each neighbour has now which this node dials."""
        self._port = 0
        self.has_remains = False
        """Whether unread messages of ended connections may exist."""
        self._admission = admission
        self._relayed = relayed
        self._loop = loop
        self._refuse = refuse
        # by the socket that tells of it, whom a watched socket dials, and who is told
        self._watched: dict[zmq.Socket[bytes], tuple[str | None, Callable[[Events], None]]] = {}
        self._lines: dict[int, _Line] = {}
        self._numbers: dict[int, int] = {}  # of connections, by file descriptor
        self._count = 0
        self._is_busy = False
        self._full_look_s = 0.0  # when members' connections are looked at for their end
        self._learned: deque[Callable[[], None]] = deque()
        # first messages whose connection is not known yet, and until when that is waited for
        self._early: deque[tuple[float, tuple[int, str, str, Account]]] = deque(maxlen=MOST_EARLY)
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    # what the loop calls

    def watch(self, events: zmq.Socket[bytes], tell: Callable[[Events], None], peer: str | None = None) -> None:
        """Before `start`: watch a socket, which the door closes.

        Args:
            events: PAIR, connected to the socket's monitor, which reports connected, accepted, handshake and disconnected.
            tell: called in the loop with what happened, in order.
            peer: whom the socket dials; None: it listens.
        """
        self._watched[events] = (peer, tell)

    def listens_at(self, port: int) -> None:
        """Before `start`: set the port at which the transport listens."""
        self._port = port

    def start(self) -> None:
        """Begin to watch the connections."""
        when_out_of_files.append(self._make_room)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; returns when the door's sockets are closed."""
        with suppress(ValueError):
            when_out_of_files.remove(self._make_room)
        self._is_stopping.set()
        if self._thread.ident is None:
            self._close()
        else:
            self._thread.join(LEAVE_S)

    @property
    def is_watching(self) -> bool:
        """Whether events are told."""
        return self._thread.is_alive()

    def authenticated(self, fd: int, source: str, peer: str, account: Account) -> None:
        """The first message of a neighbour came over an accepted connection from a source, see `source_of`."""
        self._learned.append(partial(self._promote, fd, source, peer, account))

    def disconnect(self, peer: str) -> None:
        """End all connections of a neighbour that there are now, and throw away what came over them and was not read."""
        self._learned.append(partial(self._disconnect, peer))

    def drained(self, peer: str | None) -> None:
        """All messages were read that had come from a neighbour that this node dials, or, where it is None, to the listener."""
        dialled = [each for each, _ in tuple(self._watched.values()) if each is not None]  # copied at once: the thread may take one out
        self._learned.append(partial(self._admission.drained, dialled, peer))

    # what the thread does

    def _make_room(self) -> None:
        self._learned.append(self._give_one_up)

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            for events in self._watched:
                poller.register(events, zmq.POLLIN)
            looked_s = 0.0
            while not self._is_stopping.is_set() and self._watched:
                due_s = looked_s + (TURN_S if self._is_busy or self._admission.unknown_peers else QUIET_TURN_S)
                until_due_s = max(0.0, due_s - time.monotonic())
                ready = dict(poller.poll(math.ceil(1000 * (until_due_s if self._lines else IDLE_TURN_S))))
                taken_bytes = {}
                if time.monotonic() >= due_s:
                    looked_s = time.monotonic()
                    taken_bytes = self._look()
                    held_bytes = [self._admission.held_bytes(number, taken) for number, (taken, _) in taken_bytes.items()]
                    self._is_busy = max(held_bytes, default=0) > BUSY_BYTES
                self._learn()
                may_be_news = taken_bytes and self._admission.unknown_peers
                for events in tuple(self._watched):
                    if (may_be_news or events in ready) and not self._read(events):
                        poller.unregister(events)
                        for number in [number for number, line in self._lines.items() if line.events is events]:
                            self._forget(number)
                        del self._watched[events]
                        events.close(linger=0)
                self._learn()
                self._promote_early()
                # weighed after the events were read: what came since a handshake was over is not an unknown peer's
                if self._admission.weigh(taken_bytes):
                    self._shut(self._admission.weigh(self._looked_closer(taken_bytes)))
                self.has_remains = self._admission.has_remains
        except BaseException:
            for _, tell in self._watched.values():
                self._tell(partial(tell, [(BROKEN, 0)]))
            raise
        finally:
            self._close()

    def _close(self) -> None:
        for number in tuple(self._lines):
            self._forget(number)
        for events in self._watched:
            events.close(linger=0)

    def _learn(self) -> None:
        while self._learned:
            self._learned.popleft()()

    def _read(self, events: zmq.Socket[bytes]) -> bool:
        """Take in what happened to a socket; False when it is gone."""
        peer, tell = self._watched[events]
        happened: Events = []
        for _ in range(EVENTS_A_TURN):
            try:
                description, _endpoint = events.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            kind, number = _EVENT.unpack(description)
            if kind == zmq.EVENT_ACCEPTED:
                self._accept(number, events, peer)
                continue
            if kind == zmq.EVENT_CONNECTED:
                self._accept(number, events, peer)
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED and peer is not None:
                self._dialled(peer)
            elif kind == zmq.EVENT_DISCONNECTED and number in self._numbers and self._lines[self._numbers[number]].events is events:
                self._forget(self._numbers[number])
            happened.append((kind, number))
        if happened:
            self._tell(partial(tell, happened))
        return all(kind != zmq.EVENT_MONITOR_STOPPED for kind, _ in happened)

    def _tell(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(call)

    def _accept(self, fd: int, events: zmq.Socket[bytes], peer: str | None) -> None:
        try:
            # no family given: a listener for both has IPv4 addresses in those of IPv6
            twin = socket.socket(fileno=os.dup(fd))
        except OSError as error:  # it has ended already, and its number may be a file's by now
            if error.errno in NO_MORE_FILES:
                self._turn_away(fd, peer)
            return
        try:
            inode, host, port = os.fstat(twin.fileno()).st_ino, source_of(twin.getpeername()[0]), twin.getsockname()[1]
            # the port alone is not enough: this machine has other addresses, where another program can have the same one
            relayed = self._relayed.get((host, twin.getpeername()[1])) if self._relayed is not None else None
        except (OSError, IndexError, TypeError, ValueError):  # or another socket's
            inode, host, port, relayed = 0, "", -1, None
        before = self._numbers.get(fd)
        is_known = before is not None and self._lines[before].inode == inode
        if port < 0 or is_known or (peer is None and port != self._port):
            twin.close()
            return
        if before is not None:
            self._forget(before)
        self._count += 1
        number = self._count
        source = host if relayed is None else f"relayed {relayed}"
        self._lines[number] = _Line(fd, inode, twin, source, host, events, peer)
        self._numbers[fd] = number
        if peer is None and self._relayed is not None and relayed is None:
            self._shut({number: "evicted"})
        elif peer is None:
            self._learn()
            self._shut(self._admission.arrive(number, source, time.monotonic()))
        else:
            self._admission.dial(number, source)

    def _turn_away(self, fd: int, peer: str | None) -> None:
        """Shut a connection that there is no descriptor left to watch with."""
        with suppress(OSError):
            line = socket.socket(fileno=fd)
            try:
                if peer is not None or line.getsockname()[1] == self._port:
                    line.shutdown(socket.SHUT_RDWR)
            finally:
                line.detach()
        self._tell(partial(self._refuse, "evicted", "a connection, for want of open files"))

    def _dialled(self, peer: str) -> None:
        for number, line in reversed(self._lines.items()):
            if line.peer == peer:
                self.accounts[peer] = Account()
                self._shut(self._admission.authenticate(number, peer, self.accounts[peer]))
                return

    def _promote(self, fd: int, source: str, peer: str, account: Account) -> None:
        if not self._is_promoted(fd, source, peer, account):
            self._early.append((time.monotonic() + EARLY_S, (fd, source, peer, account)))

    def _promote_early(self) -> None:
        """Try again with messages that the loop read before this thread read that their connection was there."""
        now_s, early = time.monotonic(), list(self._early)
        self._early.clear()
        self._early.extend((until_s, known) for until_s, known in early if until_s > now_s and not self._is_promoted(*known))

    def _is_promoted(self, fd: int, source: str, peer: str, account: Account) -> bool:
        number = self._numbers.get(fd)
        # the number may be another connection's by now: only one whose handshake is over, from the same address, can be the one
        if number is None or self._lines[number].host != source:
            return False
        counts = self._bytes_of(self._lines[number])
        if counts is not None and not counts[1]:
            return False
        self._shut(self._admission.authenticate(number, peer, account))
        return True

    def _look(self) -> dict[int, tuple[int, bool]]:
        """Find the bytes that libzmq has taken of each connection, and whether its handshake is over; forget those that are gone.

        For a member's connection count the bytes that came, which are no fewer and cost less to know: calls that let other threads run
        wait for them.
        """
        found: dict[int, tuple[int, bool]] = {}
        now_s = time.monotonic()
        is_full_look = now_s >= self._full_look_s
        if is_full_look:
            self._full_look_s = now_s + IDLE_TURN_S
        for number, line in tuple(self._lines.items()):
            is_members = self._admission.member(number) is not None
            if (is_full_look or not is_members) and not line.is_open():  # libzmq does not tell of every end
                self._forget(number)
            elif (counts := self._bytes_of(line, with_unread=is_members)) is not None:
                found[number] = counts
        if self._admission.unknown_peers and not _can_open():
            self._give_one_up()
        return found

    def _looked_closer(self, found: dict[int, tuple[int, bool]]) -> dict[int, tuple[int, bool]]:
        """Find the bytes that libzmq has taken of members' connections, too."""
        members = {number: self._lines[number] for number in found if number in self._lines and self._admission.member(number) is not None}
        return found | {number: counts for number, line in members.items() if (counts := self._bytes_of(line)) is not None}

    def _bytes_of(self, line: _Line, *, with_unread: bool = False) -> tuple[int, bool] | None:
        """Bytes that libzmq took, or that came, and whether its handshake as a listener is over; None where the system does not say."""
        try:
            known = line.twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            # asked second, so that what comes in between makes the count smaller and not larger
            held = 0 if with_unread else int.from_bytes(fcntl.ioctl(line.twin.fileno(), termios.FIONREAD, bytes(4)), "little")
        except (OSError, AttributeError):
            return None
        if len(known) < _TCP_INFO_BYTES:
            return None
        acknowledged, received = _TCP_INFO_COUNTS.unpack_from(known, _COUNTS_AT)
        return max(0, received - held), line.peer is None and acknowledged > ENCRYPTED_BYTES

    def _give_one_up(self) -> None:
        number = self._admission.newest_unknown_peer()
        if number is not None:
            self._shut({number: "evicted"})

    def _disconnect(self, peer: str) -> None:
        for number, line in tuple(self._lines.items()):
            if line.peer == peer or self._admission.member(number) == peer:
                before = self._bytes_of(line)
                with suppress(OSError):  # it has ended by itself
                    line.twin.shutdown(socket.SHUT_RDWR)
                    _throw_away(line.twin)  # else libzmq would first read all of it, tens of thousands of short messages
                self._forget(number, before)

    def _forget(self, number: int, taken_bytes: tuple[int, bool] | None = None) -> None:
        line = self._lines.pop(number)
        self._admission.leave(number, taken_bytes or self._bytes_of(line) or (0, False))
        line.twin.close()
        if self._numbers.get(line.fd) == number:
            del self._numbers[line.fd]

    def _shut(self, reasons: dict[int, str]) -> None:
        told = [(reason, f"a connection with {self._lines[number].source}") for number, reason in reasons.items()]
        for number in reasons:
            twin = self._lines[number].twin
            with suppress(OSError):  # it has ended by itself
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)  # nothing of it stays in the kernel
                twin.shutdown(socket.SHUT_RDWR)
            self._forget(number)
        for reason, detail in told:
            self._tell(partial(self._refuse, reason, detail))


def _throw_away(connection: socket.socket) -> None:
    """Read what is left of a connection, and forget it."""
    waste = bytearray(WASTE_BYTES)
    for _ in range(THROWN_AWAY_BYTES // WASTE_BYTES):
        if not connection.recv_into(waste, 0, socket.MSG_DONTWAIT):
            return


def _can_open() -> bool:
    """Whether the process could open another file."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in NO_MORE_FILES
    return True
