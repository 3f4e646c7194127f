"""Connections of libzmq that something else carries: each comes to a port of this machine, and is passed on over a stream.

libzmq connects to such a port, or listens at one, as to any neighbour's; CURVE stays between the two members. A port is there for one
connection only, and takes only the one that comes from the address and port that were said: no other program of this machine gets into a
tunnel.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Protocol

from p2pfl.errors import TransportError
from p2pfl.transports.base import Endpoint, LinkCondition
from p2pfl.transports.ports import reserve_port
from p2pfl.transports.streams import SocketStream, Stream, accepted, hold_little, splice

LOOPBACK = "127.0.0.1"


class UnreachableError(TransportError):
    """A neighbour was not reached; *state* and the message are for the state of its link."""

    def __init__(self, state: LinkCondition, detail: str) -> None:
        super().__init__(detail)
        self.state = state


class WayOut(Protocol):
    """How a connection to a neighbour's address is made where libzmq does not dial it itself."""

    through: str
    """Words for messages, such as "through the proxy proxy.example:3128"."""

    async def open(self, peer: Endpoint, address: str, patience_s: float) -> Stream:
        """Make a stream to a neighbour's address (tcp://host:port), within so many seconds.

        Raises:
            UnreachableError: it was not to be had; the message says why, and what helps.
        """
        ...


class SocketWay(Protocol):
    """A way out whose streams are TCP connections."""

    through: str

    async def open(self, peer: Endpoint, address: str, patience_s: float) -> SocketStream:
        """Make a stream to an address; see WayOut.open."""
        ...


class Offer:
    """A port that waits for one connection of libzmq, which is then passed on over a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._source = reserve_port(LOOPBACK)
        try:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            self._source.close()
            raise
        try:
            hold_little(self._listener)  # before it is connected: the window is agreed on then
            self._listener.bind((LOOPBACK, 0))
            self._listener.listen()
            self._listener.setblocking(False)
        except OSError:
            self._close()
            raise
        self.address = f"tcp://{LOOPBACK}:{self._source.port};{LOOPBACK}:{self._listener.getsockname()[1]}"
        """Address for libzmq, with the port that it must come from."""
        self._task: asyncio.Task[None] | None = None
        self._is_taken = False

    def start(self, group: asyncio.TaskGroup) -> asyncio.Task[None]:
        """Wait for the connection in a task of its own."""
        self._task = group.create_task(self._carry(), name=f"tunnel at {self.address}")
        self._task.add_done_callback(lambda _: self._close())  # also where it was cancelled before it began
        return self._task

    def withdraw(self) -> None:
        """Wait no longer; where the connection has come, it ends by itself."""
        if self._task is not None and not self._is_taken:
            self._task.cancel()

    async def _carry(self) -> None:
        with suppress(OSError):  # such as no more open files: libzmq notices that nobody took its connection
            near = await self._awaited()
            self._is_taken = True
            self._close_ports()
            await splice(SocketStream(near), self._stream)

    async def _awaited(self) -> socket.socket:
        while True:
            near, place = await accepted(self._listener)
            if place == (LOOPBACK, self._source.port):  # 127.0.0.2 has the same port once more
                return near
            near.close()

    def _close_ports(self) -> None:
        self._listener.close()
        self._source.close()

    def _close(self) -> None:
        self._close_ports()
        self._stream.close()


class Tunnels:
    """The tunnels of one transport, which run in its group of tasks."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, stream: Stream) -> Offer:
        """Offer a port to libzmq for one connection over a stream; UnreachableError where this machine has none."""
        try:
            offer = Offer(stream)
        except OSError as error:
            stream.close()
            raise UnreachableError(LinkCondition.NO_ROUTE, f"this machine gives no port for a tunnel: {error.strerror}") from error
        self._keep(offer.start(self._group))
        return offer

    def bring(self, stream: Stream, port: int, expected: MutableMapping[tuple[str, int], str], member: str) -> None:
        """Connect a stream with the port of this machine at which libzmq listens.

        As long as it lasts, *expected* has the member by the address and port that the connection comes from.
        """
        task = self._group.create_task(_bring(stream, port, expected, member), name=f"tunnel to {port}")
        task.add_done_callback(lambda _: stream.close())
        self._keep(task)

    async def close(self, linger_s: float) -> None:
        """Wait for so long until the tunnels have passed on what libzmq gave them, and end them."""
        if self._running:
            await asyncio.wait(self._running, timeout=linger_s)
        for task in tuple(self._running):
            task.cancel()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._running.add(task)
        task.add_done_callback(self._running.discard)


async def _bring(stream: Stream, port: int, expected: MutableMapping[tuple[str, int], str], member: str) -> None:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as near:  # no more files, or the listener is just closing
        near.setblocking(False)
        hold_little(near)
        near.bind((LOOPBACK, 0))
        own_place = near.getsockname()
        expected[own_place] = member
        try:
            await asyncio.get_running_loop().sock_connect(near, (LOOPBACK, port))
            await splice(SocketStream(near), stream)
        finally:
            del expected[own_place]
