"""Byte streams that carry a connection which libzmq does not make itself, and the splicing of two of them."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

PIECE_BYTES = 2**18
BUFFER_BYTES = 2**18
"""Enough for 20 Mbit/s at 100 ms; the kernel takes twice as much."""
DRAIN_S = 5.0
"""After one direction has ended, the other ends when nothing has moved in it for so long."""

Turn = Callable[[int], Awaitable[None]]
"""Waits until so many bytes may pass."""


class Stream(Protocol):
    """Two directions of bytes, each of which ends by itself."""

    async def receive(self) -> bytes | memoryview:
        """Wait for bytes, which are valid until the next call; none at the end. OSError where the stream broke."""
        ...

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of some bytes, and wait while there is no room; OSError where the stream broke."""
        ...

    def end(self) -> None:
        """Tell the other end that no more will be sent."""
        ...

    def close(self) -> None:
        """Give up both directions."""
        ...


class SocketStream:
    """A connected TCP socket as a stream; takes the socket over."""

    def __init__(self, connection: socket.socket, piece_bytes: int = PIECE_BYTES) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._piece = memoryview(bytearray(piece_bytes))
        self._num_waiting = 0
        self._is_closed = False

    async def receive(self) -> memoryview:
        """Wait for bytes; see Stream.receive."""
        with self._waits():
            size = await asyncio.get_running_loop().sock_recv_into(self.socket, self._piece)
        return self._piece[:size]

    async def exactly(self, size_bytes: int) -> bytes:
        """Wait for so many bytes and take no more; EOFError where the stream ends before."""
        found = bytearray()
        while len(found) < size_bytes:
            with self._waits():
                more = await asyncio.get_running_loop().sock_recv(self.socket, size_bytes - len(found))
            if not more:
                raise EOFError
            found += more
        return bytes(found)

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of some bytes; see Stream.send."""
        with self._waits():
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    def end(self) -> None:
        """Send no more; see Stream.end."""
        with suppress(OSError):  # it has broken
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket, once whoever waits at it has been woken; see Stream.close.

        The loop would keep a descriptor that is closed while somebody waits at it: he would wait for good, and the next one to be given its
        number could not wait at all.
        """
        self._is_closed = True
        if not self._num_waiting:
            self.socket.close()
            return
        with suppress(OSError):  # it has broken, which wakes them, too
            self.socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close the socket at once; whoever waits at it must be cancelled, for nothing else ends his waiting."""
        self._is_closed = True
        if self.socket.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.socket)
            loop.remove_writer(self.socket)
            self.socket.close()

    @contextmanager
    def _waits(self) -> Iterator[None]:
        is_closed = self._is_closed  # it may change meanwhile
        if is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._is_closed and not self._num_waiting:
                self.socket.close()


def keep_alive(connection: socket.socket, heartbeat_s: int, missed: int) -> None:
    """Have the kernel try a silent connection so often, and end it when so many in a row get no answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, setting in (
        ("TCP_KEEPIDLE", heartbeat_s),
        ("TCP_KEEPINTVL", heartbeat_s),
        ("TCP_KEEPCNT", missed - 1),
        ("TCP_USER_TIMEOUT", 1000 * missed * heartbeat_s),
    ):
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), setting)


def hold_little(connection: socket.socket) -> None:
    """Bound a connection's buffers in the kernel: a link's queues are at its ends. Those that are accepted have the listener's."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


async def accepted(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Wait for the next connection to a listener that does not block, and take it with its address; OSError where there is none.

    A connection is taken only by whoever still waits: asyncio's own sock_accept loses one that comes as it is cancelled.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(0)  # many who come at once must not hold the loop
        with suppress(BlockingIOError):
            return listener.accept()
        came = asyncio.Event()
        loop.add_reader(listener, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_reader(listener)


async def splice(near: Stream, far: Stream, turn: Turn | None = None) -> None:
    """Pass on what comes from either stream to the other, until both directions have ended; closes both.

    A direction that ends is ended at the other side, too, so that what was sent last arrives. One that cannot be written to any more is
    read on: closing it with bytes unread would reset it, and what goes the other way would be lost.

    Args:
        near: one stream.
        far: the other.
        turn: waited for before so many bytes are passed on; None: they never wait.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.TaskGroup() as group:
            ways = [_Way(near, far, turn), _Way(far, near, turn)]
            passing = {group.create_task(way.pass_on(), name="passes on"): way for way in ways}
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            ended_s = loop.time()
            while pending := [task for task in passing if not task.done()]:
                left_s = max(ended_s, *(passing[task].moved_s for task in pending)) + DRAIN_S - loop.time()
                if left_s <= 0:
                    break
                await asyncio.wait(pending, timeout=min(left_s, DRAIN_S))
            for task in pending:
                task.cancel()
    finally:
        near.close()
        far.close()


class _Way:
    """One direction of two spliced streams."""

    def __init__(self, source: Stream, sink: Stream, turn: Turn | None) -> None:
        self._source, self._sink, self._turn = source, sink, turn
        self.moved_s = 0.0
        """When bytes were passed on last; inf: they wait for their turn, which is nobody's silence."""

    async def pass_on(self) -> None:
        """Pass on what comes, until it ends."""
        loop, is_taken = asyncio.get_running_loop(), True
        with suppress(OSError):
            while data := await self._source.receive():
                if not is_taken:
                    continue
                if self._turn is not None:
                    self.moved_s = math.inf
                    await self._turn(len(data))
                self.moved_s = loop.time()
                try:
                    await self._sink.send(data)
                except OSError:
                    is_taken = False
                else:
                    self.moved_s = loop.time()
        self._sink.end()
