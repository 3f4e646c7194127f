"""A site's proxy for tests: HTTP with CONNECT, or SOCKS5, with names of its own, passwords and refusals."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from p2pfl.transports.streams import SocketStream, splice

_SOCKS, _IPV4, _NAME = 5, 1, 3
_BUFFER_BYTES = 65536
_FIRST_WORD_S = 0.2


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
        self.schemes = ["Basic realm=x"]
        """Ways to log in that an HTTP proxy says it takes."""
        self.port = 0
        """Where it listens; a proxy that is opened again listens there again."""
        self.host = "127.0.0.1"
        """The numeric address where it listens."""
        self.targets: list[tuple[str, int]] = []
        """Hosts and ports that it was asked for, as they were written."""

    @property
    def address(self) -> str:
        """Where it is, as site.yaml has it."""
        return f"{self.kind}://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = _small(socket.create_server((self.host, self.port)))
        self.port = self._listener.getsockname()[1]
        self._keep(self._group.create_task(self._accept(), name="proxy"))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.cut()
        cancelled = isinstance(error, asyncio.CancelledError)
        await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)

    def cut(self) -> None:
        """End every connection and take no more until it is opened again."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()

    def cut_connections(self) -> None:
        """End every connection that there is now."""
        for task in self._tasks:
            if task.get_name() != "proxy":
                task.cancel()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            near.setblocking(False)
            task = self._group.create_task(self._serve(near), name="proxied connection")
            task.add_done_callback(lambda _, near=near: near.close())  # type: ignore[misc]  # mypy: a default in a lambda
            self._keep(task)

    async def _serve(self, near: socket.socket) -> None:
        with suppress(OSError, EOFError):
            place = await (self._socks5 if self.kind == "socks5" else self._http)(near)
            if place is not None:
                await self._join(place, near)

    async def _join(self, place: tuple[str, int], near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.targets.append(place)
        host = self.names.get(place[0], place[0])
        with _small(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as far:
            try:
                await loop.sock_connect(far, (host, place[1]))
            except OSError:
                await loop.sock_sendall(
                    near, b"HTTP/1.1 502 Bad Gateway\r\n\r\n" if self.kind == "http" else b"\x05\x05\x00\x01" + bytes(6)
                )
                return
            said = b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n" if self.kind == "http" else b"\x05\x00\x00\x01" + bytes(6)
            with suppress(TimeoutError):  # in one piece with what the target says first, as on a slow link
                async with asyncio.timeout(_FIRST_WORD_S):
                    said += await loop.sock_recv(far, 1024)
            await loop.sock_sendall(near, said)
            await splice(SocketStream(near), SocketStream(far))

    async def _http(self, near: socket.socket) -> tuple[str, int] | None:
        head = ""
        while not head.endswith("\r\n\r\n"):
            head += (await _exactly(near, 1)).decode("latin-1")
        method, target, _ = head.split(" ", 2)
        answer, more = None, ""
        if self.refuses is not None:
            answer = f"{self.refuses} Refused"
        elif self.login is not None:
            wanted = base64.b64encode(":".join(self.login).encode()).decode()
            if f"Proxy-Authorization: Basic {wanted}\r\n" not in head:
                answer = "407 Proxy Authentication Required"
                more = "".join(f"Proxy-Authenticate: {scheme}\r\n" for scheme in self.schemes)
        if method != "CONNECT":
            answer = "405 Method Not Allowed"
        if answer is not None:
            await asyncio.get_running_loop().sock_sendall(near, f"HTTP/1.1 {answer}\r\n{more}Content-Length: 0\r\n\r\n".encode())
            return None
        host, _, port = target.rpartition(":")
        return host.strip("[]"), int(port)

    async def _socks5(self, near: socket.socket) -> tuple[str, int] | None:
        loop = asyncio.get_running_loop()
        version, num_methods = await _exactly(near, 2)
        methods = await _exactly(near, num_methods)
        method = 0 if self.login is None else 2
        if version != _SOCKS or method not in methods:
            await loop.sock_sendall(near, b"\x05\xff")
            return None
        await loop.sock_sendall(near, bytes([_SOCKS, method]))
        if self.login is not None:
            await _exactly(near, 1)
            given = tuple([(await _exactly(near, (await _exactly(near, 1))[0])).decode() for _ in range(2)])
            await loop.sock_sendall(near, b"\x01\x00" if given == self.login else b"\x01\x01")
            if given != self.login:
                return None
        kind = (await _exactly(near, 4))[3]
        if kind == _NAME:
            host = (await _exactly(near, (await _exactly(near, 1))[0])).decode()
        else:
            host = str(ipaddress.ip_address(await _exactly(near, 4 if kind == _IPV4 else 16)))
        port = int.from_bytes(await _exactly(near, 2), "big")
        if self.refuses is not None:
            await loop.sock_sendall(near, bytes([_SOCKS, self.refuses, 0, 1]) + bytes(6))
            return None
        return host, port


async def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = await asyncio.get_running_loop().sock_recv(connection, size - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def _small(connection: socket.socket) -> socket.socket:
    """Give a socket small buffers: the queues of a link are not this proxy's. Those that are accepted have the listener's."""
    connection.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return connection
