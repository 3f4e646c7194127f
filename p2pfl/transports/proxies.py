"""Dialling through a site's proxy: HTTP with CONNECT, or SOCKS5, each with or without a password.

The proxy is told the neighbour's host by name, and looks it up itself. It sees where a connection goes and how many bytes it has; CURVE
is between the two members. Replies are read to their last byte and not further: what follows is the neighbour's first word.

Sources: RFC 9110 section 9.3.6 and RFC 7617 (CONNECT, Basic); RFC 1928 and RFC 1929 (SOCKS5 and its password).
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from p2pfl.errors import TransportError
from p2pfl.transports.base import Endpoint, LinkCondition
from p2pfl.transports.direct import connect, split, why
from p2pfl.transports.resolver import Lookup, Resolver, is_numeric
from p2pfl.transports.sockets import MISSED_HEARTBEATS
from p2pfl.transports.streams import SocketStream, keep_alive
from p2pfl.transports.tunnels import UnreachableError

MAX_REPLY_BYTES = 8192
MOST_SOCKS_BYTES = 255
"""The longest name, user and password in SOCKS5."""
_SHOWN = 80
_STATUS = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?: ([^\r\n]*))?\r?\n")
_OFFERED = re.compile(rb"^proxy-authenticate:[ \t]*([A-Za-z0-9-]{1,20})", re.IGNORECASE | re.MULTILINE)
_LOGIN_WANTED, _FORBIDDEN = 407, 403
_OK = range(200, 300)
_FAR_AWAY = (502, 503, 504)

_NO_LOGIN, _PASSWORD, _NO_WAY = 0, 2, 255
_IPV4, _NAME, _IPV6 = 1, 3, 4
_SIZES = {_IPV4: 4, _IPV6: 16}
_NOT_ALLOWED = 2
_SAID: Mapping[int, str] = {
    1: "it has failed (SOCKS reply 1)",
    3: "network unreachable (SOCKS reply 3)",
    4: "host unreachable (SOCKS reply 4)",
    5: "connection refused (SOCKS reply 5)",
    6: "no answer (SOCKS reply 6)",
    7: "it does not connect at all (SOCKS reply 7)",
    8: "it does not know this kind of address (SOCKS reply 8)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """A proxy by which a site dials out."""

    kind: Literal["http", "socks5"]
    """Protocol: CONNECT of HTTP, or SOCKS5."""
    host: str
    """Name or numeric address, an IPv6 one without brackets."""
    port: int
    user: str | None = None
    """Name to log in with; None: nobody has to."""
    password: str = field(default="", repr=False)
    """Said to the proxy and to nobody else, in the clear as these protocols do."""

    def __str__(self) -> str:
        return f"{self.kind}://{_bracketed(self.host)}:{self.port}"


class _RefusedError(Exception):
    """A proxy has not made a connection; the message says why and what helps."""


class ProxyWay:
    """Opens streams through a proxy; see WayOut."""

    def __init__(self, proxy: Proxy, *, heartbeat_s: int = 5, lookup: Lookup | None = None) -> None:
        self.through = f"through the proxy {proxy}"
        self._proxy, self._heartbeat_s = proxy, heartbeat_s
        self._resolver = Resolver(lookup)

    async def open(self, peer: Endpoint, address: str, patience_s: float) -> SocketStream:
        """Make a stream to an address; see WayOut.open."""
        host, port = split(address)
        at = f"the proxy {self._proxy} on the way to {peer.name}"
        try:
            async with asyncio.timeout(patience_s):
                connection = await connect(self._resolver, self._proxy.host, self._proxy.port, patience_s)
                try:
                    await _ASK[self._proxy.kind](connection, host, port, self._proxy)
                    keep_alive(connection, self._heartbeat_s, MISSED_HEARTBEATS)
                    return SocketStream(connection)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError:
            fault = f"no answer of {at}: is it that address, and does a firewall let this machine reach it?"
        except _RefusedError as error:
            fault = f"{at}: {error}"
        except TransportError as error:
            fault = f"{at}: {error}"
        except OSError as error:
            fault = f"{why(error)} at {at}: correct proxy.address in site.yaml, or ask for the proxy to be started"
        raise UnreachableError(LinkCondition.PROXY, fault)


async def ask_http(connection: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    """Have an HTTP proxy connect to a host and port."""
    target = f"{_bracketed(host)}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.user is not None:
        login = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode("ascii")
        lines.append(f"Proxy-Authorization: Basic {login}")
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
    head = await _head(connection)
    found = _STATUS.match(head)
    if found is None:
        raise _RefusedError("it does not answer as an HTTP proxy does; is proxy.address in site.yaml right?")
    status = int(found[1])
    said = f"{status} {_printable(found[2] or b'')}".strip()
    if status in _OK:
        return
    offered = sorted({scheme.decode() for scheme in _OFFERED.findall(head)})
    if status == _LOGIN_WANTED and offered and "basic" not in {scheme.lower() for scheme in offered}:
        raise _RefusedError(f"it takes no Basic login, only {', '.join(offered)} ({said}): ask its administrator for Basic")
    if status == _LOGIN_WANTED and proxy.user is None:
        raise _RefusedError(f"it wants a password ({said}): write proxy.user and proxy.password_file in site.yaml")
    if status == _LOGIN_WANTED:
        raise _RefusedError(f"it does not take the password of {proxy.user!r} ({said}): correct proxy.user or the password")
    if status == _FORBIDDEN:
        raise _RefusedError(f"it does not let this site connect to {target} ({said}): ask its administrator to allow CONNECT there")
    if status in _FAR_AWAY:
        raise _RefusedError(f"it does not reach {target} ({said}): is the neighbour running, and is its address right?")
    raise _RefusedError(f"it does not connect to {target} ({said}): ask its administrator")


async def _head(connection: socket.socket) -> bytes:
    head = bytearray()
    while not head.endswith((b"\r\n\r\n", b"\n\n")):
        if len(head) > MAX_REPLY_BYTES:
            raise _RefusedError("it answers with too much; is it an HTTP proxy?")
        byte = await asyncio.get_running_loop().sock_recv(connection, 1)  # one by one: what follows the head is not the proxy's
        if not byte:
            raise _RefusedError("it ended the connection without an answer; is it an HTTP proxy, and does it allow CONNECT?")
        head += byte
    return bytes(head)


async def ask_socks5(connection: socket.socket, host: str, port: int, proxy: Proxy) -> None:
    """Have a SOCKS5 proxy connect to a host and port."""
    loop = asyncio.get_running_loop()
    offered = bytes([_NO_LOGIN] if proxy.user is None else [_NO_LOGIN, _PASSWORD])
    await loop.sock_sendall(connection, bytes([5, len(offered)]) + offered)
    version, method = await _exactly(connection, 2)
    if version != 5:  # noqa: PLR2004 - the protocol's number
        raise _RefusedError("it does not answer as a SOCKS5 proxy does; is proxy.address in site.yaml right?")
    if method == _NO_WAY:
        remedy = "write proxy.user and proxy.password_file in site.yaml" if proxy.user is None else "ask its administrator how to log in"
        raise _RefusedError(f"it wants another way to log in than {'a password' if proxy.user else 'none'}: {remedy}")
    if method == _PASSWORD and proxy.user is not None:
        user, password = proxy.user.encode(), proxy.password.encode()
        await loop.sock_sendall(connection, bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        if (await _exactly(connection, 2))[1] != 0:
            raise _RefusedError(f"it does not take the password of {proxy.user!r}: correct proxy.user or the password")
    elif method != _NO_LOGIN:
        raise _RefusedError(f"it chooses a way to log in that was not offered ({method}); ask its administrator")
    await loop.sock_sendall(connection, b"\x05\x01\x00" + _socks_address(host) + port.to_bytes(2, "big"))
    _, reply, _, kind = await _exactly(connection, 4)
    target = f"{_bracketed(host)}:{port}"
    if reply == _NOT_ALLOWED:
        raise _RefusedError(f"its rules do not let this site connect to {target} (SOCKS reply 2): ask its administrator to allow it")
    if reply != 0:
        said = _SAID.get(reply, f"SOCKS reply {reply}")
        raise _RefusedError(f"it does not reach {target}: {said}; is the neighbour running, and is its address right?")
    # the address that the proxy uses itself, which ends the reply
    size = _SIZES.get(kind, 0) if kind != _NAME else (await _exactly(connection, 1))[0]
    await _exactly(connection, size + 2)


_ASK = {"http": ask_http, "socks5": ask_socks5}


def _socks_address(host: str) -> bytes:
    if is_numeric(host):
        packed = ipaddress.ip_address(host).packed
        return bytes([_IPV4 if len(packed) == 4 else _IPV6]) + packed  # noqa: PLR2004 - bytes of an IPv4 address
    name = host.encode("ascii")
    if len(name) > MOST_SOCKS_BYTES:
        raise _RefusedError(f"the host's name has {len(name)} letters; SOCKS5 takes at most {MOST_SOCKS_BYTES}")
    return bytes([_NAME, len(name)]) + name


async def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = await asyncio.get_running_loop().sock_recv(connection, size - len(found))
        if not more:
            raise _RefusedError("it ended the connection without an answer; is it a SOCKS5 proxy?")
        found += more
    return bytes(found)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _printable(said: bytes) -> str:
    """The words of a proxy as they may stand in a log."""
    return "".join(letter for letter in said.decode("latin-1") if letter.isascii() and letter.isprintable())[:_SHOWN]
