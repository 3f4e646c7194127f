"""A wire that keeps a copy of all that passes, as whoever sits on it could."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Self

from p2pfl.transports.streams import SocketStream, splice


class _Copied:
    def __init__(self, stream: SocketStream, copy: bytearray) -> None:
        self.stream, self.copy = stream, copy
        self.receive, self.end, self.close = stream.receive, stream.end, stream.close

    async def send(self, data: bytes | memoryview) -> None:
        self.copy += data
        await self.stream.send(data)


class Recorder:
    """Forwards connections to a port of 127.0.0.1, inside `async with`; *heard* is what passed, both ways of a connection apart."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.heard: list[bytearray] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self.group = await asyncio.TaskGroup().__aenter__()
        self.tasks = [self.group.create_task(self.accept())]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self.tasks:
            task.cancel()
        await self.group.__aexit__(None, None, None)
        self.listener.close()

    async def accept(self) -> None:
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(self.listener)
            self.tasks.append(self.group.create_task(self.forward(near)))

    async def forward(self, near: socket.socket) -> None:
        with near, socket.socket() as far, suppress(OSError):
            far.setblocking(False)
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self.target))
            ways = [bytearray(), bytearray()]
            self.heard += ways
            await splice(_Copied(SocketStream(near), ways[0]), _Copied(SocketStream(far), ways[1]))
