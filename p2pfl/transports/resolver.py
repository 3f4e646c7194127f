"""Host names to numeric addresses, without holding up anything else when a resolver hangs."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from p2pfl.errors import TransportError

Lookup = Callable[[str], Sequence[str]]
"""Takes a host name and gives its numeric addresses, IPv4 or IPv6, best first; OSError if there are none."""


def look_up(host: str) -> list[str]:
    """Ask the system's resolver; blocks as long as that takes."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_numeric(host: str) -> bool:
    """Whether a host is an address already, and needs no resolver."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Resolver:
    """Looks host names up, each in a thread of its own.

    The threads are daemons: one that hangs in the system's resolver holds up neither another name nor the end of the process. A name that
    is still being looked up is not asked for again, so there are never more threads than names.
    """

    def __init__(self, lookup: Lookup | None = None) -> None:
        self._lookup = lookup or (lambda host: look_up(host))  # noqa: PLW0108  # looked up when called: a test may replace it
        self._pending: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def resolve(self, host: str, timeout_s: float) -> Sequence[str]:
        """Find the numeric addresses of a host, best first; a numeric host is its own.

        Raises:
            TransportError: there is no such name, or the resolver did not answer in time. The message says which.
        """
        if is_numeric(host):
            return [host]
        if host not in self._pending:
            self._pending[host] = self._start(host)
        try:
            # shielded: the answer may come after the deadline and serves whoever asks next
            async with asyncio.timeout(timeout_s):
                found = await asyncio.shield(self._pending[host])
        except TimeoutError:
            raise TransportError(f"name not known: {host} (the resolver has not answered for {timeout_s:g} s)") from None
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no host can be called so"
            raise TransportError(f"name not known: {host} ({why})") from error
        if not found:
            raise TransportError(f"name not known: {host} (it has no address)")
        return found

    def _start(self, host: str) -> asyncio.Future[Sequence[str]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[str]] = loop.create_future()

        def finish(found: Sequence[str], error: OSError | UnicodeError | None) -> None:
            self._pending.pop(host, None)
            if error is None:
                future.set_result(found)
            else:
                future.set_exception(error)
                future.exception()  # nobody may be waiting any more

        def run() -> None:
            found: Sequence[str] = ()
            fault: OSError | UnicodeError | None = None
            try:
                found = self._lookup(host)
            except (OSError, UnicodeError) as error:
                fault = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(finish, found, fault)

        threading.Thread(target=run, name=f"looks up {host}", daemon=True).start()
        return future


async def connection_fault(host: str, port: int, timeout_s: float) -> OSError | None:
    """Try a TCP connection to a numeric address; why it failed, or None where it was made (and closed at once)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place: Any = (host, port)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can lose a cancellation
                await asyncio.get_running_loop().sock_connect(probe, place)
    except OSError as error:  # TimeoutError is one
        return error
    return None
