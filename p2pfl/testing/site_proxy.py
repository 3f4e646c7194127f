"""A site's proxy for tests: HTTP with CONNECT, or SOCKS5, with names of its own, passwords and refusals."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from p2pfl.transports.streams import splice

_SOCKS, _NAME = 5, 3
_READ_BYTES = 65536


class WriterStream:
    """A connection of asyncio as a stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        writer.transport.set_write_buffer_limits(high=_READ_BYTES)

    async def receive(self) -> bytes:
        """Wait for bytes; see Stream.receive."""
        return await self._reader.read(_READ_BYTES)

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of some bytes; see Stream.send."""
        self._writer.write(bytes(data))
        await self._writer.drain()

    def end(self) -> None:
        """Send no more; see Stream.end."""
        with suppress(OSError, RuntimeError):  # it has broken
            self._writer.write_eof()

    def close(self) -> None:
        """Close the connection; see Stream.close."""
        self._writer.close()


class SiteProxy:
    """A proxy at a port of 127.0.0.1, chosen by the system, inside `async with`.

    Args:
        kind: "http" (CONNECT) or "socks5".
        login: user and password that it wants; None: nobody has to log in.
        names: hosts that only the proxy knows, with the numeric address of each.
        refuses: status or reply with which it refuses every connection; None: it connects.
    """

    def __init__(
        self, kind: str, *, login: tuple[str, str] | None = None, names: Mapping[str, str] | None = None, refuses: int | None = None
    ) -> None:
        self.kind, self.login, self.names, self.refuses = kind, login, dict(names or {}), refuses
        self.port = 0
        """Where it listens; a proxy that is opened again listens there again."""
        self.targets: list[tuple[str, int]] = []
        """Hosts and ports that it was asked for, as they were written."""

    @property
    def address(self) -> str:
        """Where it is, as site.yaml has it."""
        return f"{self.kind}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.close()
        self.cut()
        cancelled = isinstance(error, asyncio.CancelledError)
        await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)
        await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._group.create_task(self._serve(reader, writer), name="proxied connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                place = await (self._socks5 if self.kind == "socks5" else self._http)(reader, writer)
                if place is not None:
                    await self._join(place, reader, writer)
        finally:
            writer.close()

    async def _join(self, place: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.targets.append(place)
        host, port = place
        try:
            far_reader, far_writer = await asyncio.open_connection(self.names.get(host, host), port)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n" if self.kind == "http" else b"\x05\x05\x00\x01" + bytes(6))
            return
        # in one piece with what the target says first, as a proxy on a slow link does
        said = b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n" if self.kind == "http" else b"\x05\x00\x00\x01" + bytes(6)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                said += await far_reader.read(1024)
        writer.write(said)
        await splice(WriterStream(reader, writer), WriterStream(far_reader, far_writer))

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, target, _ = head.split(" ", 2)
        if self.refuses is not None:
            writer.write(f"HTTP/1.1 {self.refuses} Refused\r\nContent-Length: 0\r\n\r\n".encode())
            return None
        if self.login is not None:
            wanted = base64.b64encode(":".join(self.login).encode()).decode()
            if f"Proxy-Authorization: Basic {wanted}\r\n" not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n")
                return None
        if method != "CONNECT":
            writer.write(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
            return None
        host, _, port = target.rpartition(":")
        return host.strip("[]"), int(port)

    async def _socks5(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
        version, num_methods = await reader.readexactly(2)
        methods = await reader.readexactly(num_methods)
        method = 0 if self.login is None else 2
        if version != _SOCKS or method not in methods:
            writer.write(b"\x05\xff")
            return None
        writer.write(bytes([_SOCKS, method]))
        if self.login is not None:
            given = []
            await reader.readexactly(1)
            for _ in range(2):
                given.append(await reader.readexactly((await reader.readexactly(1))[0]))
            is_right = tuple(each.decode() for each in given) == self.login
            writer.write(b"\x01\x00" if is_right else b"\x01\x01")
            if not is_right:
                return None
        _, _, _, kind = await reader.readexactly(4)
        if kind != _NAME:
            host = str(ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        else:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        port = int.from_bytes(await reader.readexactly(2), "big")
        if self.refuses is not None:
            writer.write(bytes([_SOCKS, self.refuses, 0, 1]) + bytes(6))
            return None
        return host, port
