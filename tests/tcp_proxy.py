"""A cable between two daemons that can be cut, stalled, healed and bent."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self


class TcpProxy:
    """Forwards TCP connections from a port of 127.0.0.1, chosen by the system, to *target* (tcp://host:port), which may be named later.

    Inside `async with`, `address` is what the dialling side is given instead of *target*.
    """

    def __init__(self, target: str | None = None) -> None:
        self._target = ("", 0)
        if target is not None:
            self.lead_to(target)
        self._whole = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._ends: set[asyncio.StreamWriter] = set()
        self._flip = False
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        cancelled = isinstance(error, asyncio.CancelledError)
        await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)
        await self._server.wait_closed()

    def lead_to(self, target: str) -> None:
        """Forward new connections there."""
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))

    def cut(self) -> None:
        """Reset every connection, and every new one, until healed."""
        self._whole = False
        _abort(self._ends)

    def stall(self) -> None:
        """Forward nothing and close nothing until healed, as when packets are lost."""
        self._flowing.clear()

    def heal(self) -> None:
        """Undo both. What was under way when stalled arrives; what was cut is gone."""
        self._whole = True
        self._flowing.set()

    def flip(self) -> None:
        """Change the last bit of the next chunk that comes along, in either direction."""
        self._flip = True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        self.accepted += 1
        task = self._group.create_task(self._connect(reader, writer), name=f"proxied connection {self.accepted}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._ends.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            ends.add(far_writer)
            self._ends.add(far_writer)
            if not self._whole:  # cut while connecting
                return
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pump(reader, far_writer, ends), name="there")
                both_ways.create_task(self._pump(far_reader, writer, ends), name="back")
        except OSError:
            pass
        finally:
            self._ends -= ends
            _abort(ends)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: set[asyncio.StreamWriter]) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(65536):
                await self._flowing.wait()
                if self._flip:
                    chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
                    self._flip = False
                writer.write(chunk)
                await writer.drain()
        await self._flowing.wait()
        for end in ends:  # one direction ended: so does the connection
            end.close()


def _abort(ends: set[asyncio.StreamWriter]) -> None:
    for end in ends:
        if not end.transport.is_closing():
            end.transport.abort()
