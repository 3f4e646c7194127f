"""A cable between daemons that can be cut, stalled, healed and bent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

PIECE_BYTES = 65536


class TcpProxy:
    """Forwards TCP connections from a port of 127.0.0.1, chosen by the system, to *target* (tcp://host:port), which may be named later.

    Args:
        target: may be named later.
        bytes_per_s: at most so many pass in each direction of each connection; None: as many as come.
        latency_s: each piece of data takes so long, in each direction.
        dialler_at: names who dials from a port of this machine, for `cut_off`; None where it is nobody it knows.

    Inside `async with`, `address` is what the dialling side is given instead of *target*.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        dialler_at: Callable[[int], str | None] | None = None,
    ) -> None:
        self._bytes_per_s, self._latency_s, self._dialler_at = bytes_per_s, latency_s, dialler_at
        self._cut_off: set[str] = set()
        self._ends_of: dict[str, set[asyncio.StreamWriter]] = {}
        self.passed_bytes = [0, 0]
        """Bytes forwarded from the dialling side to the target, and back."""
        self.received_bytes = [0, 0]
        """Bytes that came in here, by direction, also those that were lost in a cut."""
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
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE_BYTES)
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

    def cut_off(self, dialler: str) -> None:
        """Reset the connections of one dialling side, and every new one, until it is let in again."""
        self._cut_off.add(dialler)
        _abort(self._ends_of.pop(dialler, set()))

    def let_in(self, dialler: str) -> None:
        """Let a dialling side in again that was cut off."""
        self._cut_off.discard(dialler)

    async def cut_for(self, seconds: float) -> None:
        """Close every connection and refuse new ones for some seconds."""
        self.cut()
        await asyncio.sleep(seconds)
        self.heal()

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
        dialler = None if self._dialler_at is None else self._dialler_at(writer.get_extra_info("peername")[1])
        if not self._whole or dialler in self._cut_off or (dialler is None and self._cut_off):
            writer.transport.abort()
            return
        if dialler is not None:
            self._ends_of.setdefault(dialler, set()).add(writer)
        self.accepted += 1
        task = self._group.create_task(self._connect(reader, writer), name=f"proxied connection {self.accepted}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._ends.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=PIECE_BYTES)
            ends.add(far_writer)
            self._ends.add(far_writer)
            if not self._whole:  # cut while connecting
                return
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pump(reader, far_writer, ends, 0), name="there")
                both_ways.create_task(self._pump(far_reader, writer, ends, 1), name="back")
        except OSError:
            pass
        finally:
            self._ends -= ends
            _abort(ends)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: set[asyncio.StreamWriter], way: int) -> None:
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=0 if self._latency_s else 1)
        writer.transport.set_write_buffer_limits(high=PIECE_BYTES)
        async with asyncio.TaskGroup() as both:
            far_end = both.create_task(self._come_out(line, writer, way), name="comes out")
            free_s = loop.time()
            with suppress(ConnectionError):
                while chunk := await reader.read(PIECE_BYTES):
                    self.received_bytes[way] += len(chunk)
                    await self._flowing.wait()
                    if self._flip:
                        chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
                        self._flip = False
                    if self._bytes_per_s is not None:
                        free_s = max(free_s, loop.time()) + len(chunk) / self._bytes_per_s
                        await asyncio.sleep(free_s - loop.time())
                    await line.put((loop.time() + self._latency_s, chunk))
                    if far_end.done():
                        break
            if not far_end.done():
                await line.put((0.0, b""))
        await self._flowing.wait()
        for end in ends:  # one direction ended: so does the connection
            end.close()

    async def _come_out(self, line: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: int) -> None:
        with suppress(ConnectionError):
            while True:
                due_s, chunk = await line.get()
                if not chunk:
                    return
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
                writer.write(chunk)
                await writer.drain()
                self.passed_bytes[way] += len(chunk)
        while (await line.get())[1]:  # nobody reads any more: let the other task come to its end
            pass


def _abort(ends: set[asyncio.StreamWriter]) -> None:
    for end in ends:
        if not end.transport.is_closing():
            end.transport.abort()
