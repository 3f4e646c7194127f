"""Connections by TCP that are made here and not by libzmq."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from p2pfl.errors import TransportError
from p2pfl.transports.base import Endpoint, LinkCondition
from p2pfl.transports.resolver import Lookup, Resolver
from p2pfl.transports.sockets import MISSED_HEARTBEATS
from p2pfl.transports.streams import SocketStream, keep_alive
from p2pfl.transports.tunnels import UnreachableError


class DirectWay:
    """Opens streams by TCP to an address itself; see WayOut."""

    def __init__(self, *, heartbeat_s: int = 5, lookup: Lookup | None = None) -> None:
        self.through = "directly"
        self._heartbeat_s = heartbeat_s
        self._resolver = Resolver(lookup)

    async def open(self, _peer: Endpoint, address: str, patience_s: float) -> SocketStream:
        """Make a stream to an address; see WayOut.open."""
        host, port = split(address)
        try:
            connection = await connect(self._resolver, host, port, patience_s)
            try:
                keep_alive(connection, self._heartbeat_s, MISSED_HEARTBEATS)
                return SocketStream(connection)
            except OSError:  # it has ended already
                connection.close()
                raise
        except TimeoutError as error:
            raise UnreachableError(LinkCondition.NO_ANSWER, f"no answer at {address} (a firewall, or the machine is off)") from error
        except TransportError as error:
            raise UnreachableError(LinkCondition.UNKNOWN_NAME, str(error)) from error
        except OSError as error:
            state = LinkCondition.REFUSED if error.errno == errno.ECONNREFUSED else LinkCondition.NO_ROUTE
            raise UnreachableError(state, f"{why(error)} at {address}") from error


async def connect(resolver: Resolver, host: str, port: int, patience_s: float) -> socket.socket:
    """Make a TCP connection to the first address of a host that takes one; OSError, or TransportError for a name that is not known."""
    fault: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
    found = await resolver.resolve(host, patience_s)
    for numeric in found:
        connection = socket.socket(socket.AF_INET6 if ":" in numeric else socket.AF_INET, socket.SOCK_STREAM)
        place: Any = (numeric, port)
        try:
            connection.setblocking(False)
            async with asyncio.timeout(patience_s / len(found)):  # one that is silent leaves time for the others
                await asyncio.get_running_loop().sock_connect(connection, place)
        except OSError as error:
            connection.close()
            fault = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise fault


def split(address: str) -> tuple[str, int]:
    """Split tcp://host:port into the host without brackets and the port."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def why(error: OSError) -> str:
    """Words for an error of a connection, which asyncio tells in its own way."""
    return {errno.ECONNREFUSED: "connection refused", errno.ECONNRESET: "connection reset"}.get(
        error.errno or 0, error.strerror or str(error)
    )
