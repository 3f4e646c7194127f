"""A cable between daemons that can be cut, stalled, healed and bent."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PIECE_BYTES = 65536
RESENT_S = 0.2
"""A packet that is lost is sent again after so long, then after twice as long, and so on, as TCP does."""
RESENT_AT_MOST_S = 1.6
SLICES_PER_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Disturbance:
    """How bad the connections of one dialling side are."""

    bytes_per_s: float = math.inf
    """At most so many pass in each direction."""

    loss: tuple[float, float] = (0.0, 0.0)
    """How likely a piece is lost and sent again, from the dialling side to the target and back; 1: nothing passes."""

    corrupts: bool = False
    """Whether a bit of every other piece is changed, in both directions."""


UNDISTURBED = Disturbance()


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
        self._disturbances: Mapping[str, Disturbance] = {}
        self._chance = random.Random(0)  # noqa: S311  # nothing is secret here
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

    def disturb(self, disturbances: Mapping[str, Disturbance]) -> None:
        """From now on, the connections of these dialling sides are so bad, and those of all others as they should be."""
        self._disturbances = dict(disturbances)

    def reset(self) -> None:
        """End every connection; new ones are let in."""
        _abort(self._ends)

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
        task = self._group.create_task(self._connect(reader, writer, dialler), name=f"proxied connection {self.accepted}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dialler: str | None) -> None:
        ends = {writer}
        self._ends.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=PIECE_BYTES)
            ends.add(far_writer)
            self._ends.add(far_writer)
            if not self._whole:  # cut while connecting
                return
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pump(reader, far_writer, ends, 0, dialler), name="there")
                both_ways.create_task(self._pump(far_reader, writer, ends, 1, dialler), name="back")
        except OSError:
            pass
        finally:
            self._ends -= ends
            _abort(ends)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: set[asyncio.StreamWriter], way: int, dialler: str | None
    ) -> None:
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
                    if dialler is not None and dialler in self._disturbances:
                        chunk = await self._disturbed(chunk, way, dialler)
                    await line.put((loop.time() + self._latency_s, chunk))
                    if far_end.done():
                        break
            if not far_end.done():
                await line.put((0.0, b""))
        await self._flowing.wait()
        for end in ends:  # one direction ended: so does the connection
            end.close()

    async def _disturbed(self, chunk: bytes, way: int, dialler: str) -> bytes:
        """Hold a piece for as long as its connection needs for it now, and change it where bits change."""
        left, lost = len(chunk), 0
        while left > 0 and (now := self._disturbances.get(dialler, UNDISTURBED)).bytes_per_s < math.inf:
            slice_s = 1 / SLICES_PER_S  # in slices, so that the end of the fault is noticed
            await asyncio.sleep(min(slice_s, left / now.bytes_per_s))
            left -= max(1, int(now.bytes_per_s * slice_s))
        while self._chance.random() < self._disturbances.get(dialler, UNDISTURBED).loss[way]:
            await asyncio.sleep(min(RESENT_S * 2**lost, RESENT_AT_MOST_S))
            lost += 1
        if self._disturbances.get(dialler, UNDISTURBED).corrupts and self._chance.random() < 1 / 2:
            place = int(self._chance.random() * len(chunk))
            chunk = chunk[:place] + bytes([chunk[place] ^ 1 << int(self._chance.random() * 8)]) + chunk[place + 1 :]
        return chunk

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
