"""The relay that a member offers to others: it joins two streams that come to it, within its rate, and keeps nothing of them.

Links share the rate fairly: one that floods does not hold up what little others have to say.

Two members that cannot dial each other both dial the relay. Each proves who it is and names the other; when both are there, bytes pass.
They are the two members' own CURVE connection, handshake included. What passes is in the kernel's buffers and in one piece for each
direction; a receiver that does not read stops its sender, through the relay.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from p2pfl.errors import TransportError
from p2pfl.runs.open_files import NO_MORE_FILES, when_out_of_files
from p2pfl.transports.admission import Account, Admission, source_of
from p2pfl.transports.base import Endpoint
from p2pfl.transports.direct import split
from p2pfl.transports.fair_rate import FairRate
from p2pfl.transports.relay_words import GO, REQUEST_BYTES, WAIT, Answer, Request, is_members, new_challenge, relay_proof
from p2pfl.transports.sockets import MISSED_HEARTBEATS
from p2pfl.transports.streams import SocketStream, accepted, hold_little, keep_alive, splice

log = logging.getLogger(__name__)

RELAYED = "relayed"
"""Counter of the links that were ever relayed."""
RELAYING = "relaying"
"""Counter of the links that are relayed now; it falls, too."""
REQUEST_S = 10.0
MOST_PIECE_BYTES, LEAST_PIECE_BYTES = 2**16, 2**10
PIECE_S = 0.02
"""A piece of one link takes at most so long at the relay's rate, and no other link waits longer for it."""
RETRY_ACCEPT_S = 0.2
_BITS_PER_MBIT = 1_000_000


class _Waiting:
    """A member that waits at the relay for its neighbour."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self.wanted, self.ready, self.done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.joining: asyncio.Task[Any] | None = None
        """Runs as long as the member and its neighbour are joined."""


class RelayService:
    """Relays links between pairs of members, inside `async with`.

    Counters: "relaying" (links that are joined now), "relayed" (all that were), "relayed_bytes",
    "relay_refused" (requests that were no member's, or for no link that is relayed
    here), "evicted" and "replaced" as at any listener.

    Args:
        me: this member, by whose name and key the others know the relay.
        secret_key: CURVE, z85, belonging to me.public_key.
        pairs: the links to relay.
        listen: where to bind, such as tcp://*:7701; port 0: see `port`.
        mbit_s: at most so many megabits a second pass in all, both directions together; links that want more share it evenly.
        heartbeat_s: how often a member that waits is told so.
    """

    def __init__(
        self,
        me: Endpoint,
        secret_key: bytes,
        pairs: Iterable[tuple[Endpoint, Endpoint]],
        *,
        listen: str,
        mbit_s: float,
        heartbeat_s: int = 2,
    ) -> None:
        self.me = me
        self.counters: Counter[str] = Counter()
        self.port = 0
        self._secret_key, self._listen, self._heartbeat_s = secret_key, listen, heartbeat_s
        self._bytes_per_s = mbit_s * _BITS_PER_MBIT / 8
        self._piece_bytes = min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, int(self._bytes_per_s * PIECE_S)))
        self._pairs: dict[tuple[bytes, bytes], tuple[str, str]] = {}
        for a, b in pairs:
            self._pairs[a.public_key, b.public_key] = (a.name, b.name)
            self._pairs[b.public_key, a.public_key] = (b.name, a.name)

    async def __aenter__(self) -> Self:
        self._admission = Admission(member_bytes=0)
        self._rate = FairRate(self._bytes_per_s)
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, SocketStream] = {}
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._listener = self._bound()
        self.port = self._listener.getsockname()[1]
        self._group = await asyncio.TaskGroup().__aenter__()
        self._accepting = self._group.create_task(self._accept(), name=f"{self.me.name} relays")
        self._handing_out = self._group.create_task(self._rate.run(), name=f"{self.me.name} keeps its rate")
        when_out_of_files.append(self._make_room)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        when_out_of_files.remove(self._make_room)
        self._accepting.cancel()
        self._handing_out.cancel()
        for task in tuple(self._tasks.values()):
            task.cancel()
        cancelled = isinstance(error, asyncio.CancelledError)
        try:
            await self._group.__aexit__(kind if cancelled else None, error if cancelled else None, traceback)
        finally:
            self._listener.close()

    def _bound(self) -> socket.socket:
        host, port = split(self._listen)
        place: Any = ("" if host == "*" else host, port)
        families = [socket.AF_INET6, socket.AF_INET] if host == "*" and socket.has_dualstack_ipv6() else [socket.AF_INET]
        for family in [socket.AF_INET6] if ":" in host else families:
            try:
                listener = socket.create_server(place, family=family, dualstack_ipv6=len(families) > 1 and family == socket.AF_INET6)
                break
            except OSError as error:
                # a machine may know IPv6 and have no address of it
                if family == socket.AF_INET6 and len(families) > 1 and error.errno != errno.EADDRINUSE:
                    continue
                raise TransportError(f"relay.listen = {self._listen!r}: {error.strerror}") from error
        listener.setblocking(False)
        hold_little(listener)
        return listener

    async def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection, place = await accepted(self._listener)
            except OSError as error:
                if error.errno in NO_MORE_FILES:
                    self._give_one_up()
                await asyncio.sleep(RETRY_ACCEPT_S)
                continue
            number += 1
            try:
                keep_alive(connection, self._heartbeat_s, MISSED_HEARTBEATS)
                stream = SocketStream(connection, self._piece_bytes)
            except OSError:  # it has ended already
                connection.close()
                continue
            task = self._group.create_task(self._serve(number, stream), name=f"relay's connection {number}")
            self._tasks[number], self._streams[number] = task, stream
            task.add_done_callback(lambda _, number=number, stream=stream: self._forget(number, stream))  # type: ignore[misc]
            self._shut(self._admission.arrive(number, source_of(place[0]), time.monotonic()))

    def _forget(self, number: int, stream: SocketStream) -> None:
        stream.close()
        self._tasks.pop(number, None)
        self._streams.pop(number, None)
        self._admission.leave(number)

    def _shut(self, reasons: dict[int, str]) -> None:
        for number, reason in reasons.items():
            self.counters[reason] += 1
            if number in self._tasks:
                self._tasks[number].cancel()

    def _make_room(self) -> None:
        """Give up a stranger's newest connection; called in any thread.

        In the loop's own, which may be held up until there is room, it is closed at once.
        """
        if self._loop_thread == threading.get_ident():
            self._give_one_up()
        else:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._give_one_up)

    def _give_one_up(self) -> None:
        number = self._admission.newest_unknown_peer()
        if number is not None and number in self._streams:
            self._shut({number: "evicted"})
            self._admission.leave(number)
            self._streams[number].abandon()

    async def _serve(self, number: int, stream: SocketStream) -> None:
        with suppress(OSError, EOFError):
            async with asyncio.timeout(REQUEST_S):
                pair = await self._let_in(stream)
            if pair is None:
                return
            self._shut(self._admission.authenticate(number, ">".join(pair), Account()))
            other = self._waiting.pop((pair[1], pair[0]), None)
            if other is None:
                await self._wait(pair, stream)
            else:
                await self._join(pair, stream, other)

    async def _let_in(self, stream: SocketStream) -> tuple[str, str] | None:
        """Names of the member at a connection and of the neighbour that it wants to meet; None: it is not let in."""
        challenge = new_challenge()
        await stream.send(challenge)
        asked = Request.read(await stream.exactly(REQUEST_BYTES))
        pair = self._pairs.get((asked.member, asked.neighbour))
        if pair is None or not is_members(asked, challenge, self._secret_key):
            self.counters["relay_refused"] += 1
            await stream.send(bytes([Answer.REFUSED]))
            return None
        await stream.send(bytes([Answer.TAKEN]) + relay_proof(asked, challenge, self._secret_key, asked.member))
        return pair

    async def _wait(self, pair: tuple[str, str], stream: SocketStream) -> None:
        """Keep a member's connection until its neighbour comes, or the member goes away."""
        waiting = self._waiting[pair] = _Waiting(stream)
        try:
            async with asyncio.TaskGroup() as group:
                gone = group.create_task(stream.exactly(1), name="goes away")  # it has nothing to say before its neighbour is there
                wanted = group.create_task(waiting.wanted.wait(), name="is wanted")
                while not wanted.done() and not gone.done():
                    await asyncio.wait((gone, wanted), timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                    if not wanted.done() and not gone.done():
                        await stream.send(WAIT)
                for task in (gone, wanted):
                    task.cancel()
            if waiting.wanted.is_set():  # else it has spoken out of turn
                await stream.send(GO)
                waiting.ready.set()
                await waiting.done.wait()
        except* (OSError, EOFError):
            pass
        finally:
            waiting.ready.set()
            if waiting.joining is not None and not waiting.done.is_set():  # its neighbour must notice, so that it comes again
                waiting.joining.cancel()
            if self._waiting.get(pair) is waiting:
                del self._waiting[pair]

    async def _join(self, pair: tuple[str, str], stream: SocketStream, other: _Waiting) -> None:
        """Join two members, until one of them goes away."""
        other.joining = asyncio.current_task()
        try:
            other.wanted.set()
            await other.ready.wait()
            await stream.send(GO)
            self.counters.update((RELAYED, RELAYING))
            log.info("%s relays between %s and %s", self.me.name, *sorted(pair))
            try:
                await splice(stream, other.stream, partial(self._turn, tuple(sorted(pair))))
            finally:
                self.counters[RELAYING] -= 1
        finally:
            other.done.set()

    async def _turn(self, tunnel: tuple[str, ...], size_bytes: int) -> None:
        await self._rate.take(tunnel, size_bytes)
        self.counters["relayed_bytes"] += size_bytes
