"""Links between the nodes of one process: no socket, no encryption, losses only as scripted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from p2pfl.errors import QueueFull, TransportError
from p2pfl.transports.base import MAX_FRAME_BYTES, MAX_QUEUED, Endpoint, LinkCondition, LinkState, LinkStates, Received, check_frames

Lost = Callable[[str, str, tuple[memoryview, ...]], bool]
"""(sender, receiver, frames) -> whether the network loses this message without a word."""


class MemoryNetwork:
    """The members that are open now, by name; *lost* is asked for each message, *max_queued* is for each receiver."""

    def __init__(self, lost: Lost | None = None, max_queued: int = MAX_QUEUED) -> None:
        self.lost = lost
        self.max_queued = max_queued
        self.members: dict[str, MemoryTransport] = {}

    def transport(self, name: str, neighbours: Iterable[str]) -> MemoryTransport:
        """A member's end of its links, closed at first."""
        return MemoryTransport(self, name, frozenset(neighbours), self.max_queued)


class MemoryTransport:
    """One member of a MemoryNetwork; can be opened again after it was closed, with an empty queue."""

    def __init__(self, network: MemoryNetwork, name: str, neighbours: frozenset[str], max_queued: int) -> None:
        self.name = name
        self.neighbours = neighbours
        self.counters: Counter[str] = Counter()
        self._network = network
        self._links = LinkStates(sorted(neighbours))
        self._excluded_until_s: dict[str, float] = {}
        self._max_queued = max_queued
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(max_queued)

    async def __aenter__(self) -> Self:
        if self.name in self._network.members:
            raise ValueError(f"{self.name!r} is open already")
        self._inbox = asyncio.Queue(self._max_queued)
        self._network.members[self.name] = self
        for peer in sorted(self.neighbours):
            other = self._network.members.get(peer)
            if other is None:
                self._links.note(peer, LinkCondition.AWAITED)
            elif self.name not in other.neighbours:
                self._links.note(peer, LinkCondition.WRONG_KEY, f"{peer} does not have {self.name} among its neighbours")
            else:
                for ours, theirs in ((self._links, peer), (other._links, self.name)):  # noqa: SLF001 - two ends of one link
                    ours.note(theirs, LinkCondition.UP)
                    ours.counters[theirs]["connected"] += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        del self._network.members[self.name]
        for peer in sorted(self.neighbours):
            if self._links.state(peer).is_up:
                other = self._network.members[peer]._links  # noqa: SLF001 - two ends of one link
                other.note(self.name, LinkCondition.DOWN, f"{self.name} has closed the connection")
                other.counters[self.name]["disconnected"] += 1
            self._links.note(peer, LinkCondition.CLOSED)

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Send a message; see Transport.send."""
        if peer not in self.neighbours:
            raise ValueError(f"{peer!r} is no neighbour of {self.name!r}")
        check_frames(frames, MAX_FRAME_BYTES)
        self._check_open()
        receiver = self._network.members.get(peer)
        if receiver is not None and self.name not in receiver.neighbours:
            receiver.counters["unauthorized"] += 1
        if receiver is None or self.name not in receiver.neighbours or self._are_apart(receiver):
            raise TransportError(f"no link from {self.name} to {peer}")
        copies = tuple(memoryview(bytes(frame)) for frame in frames)
        if self._network.lost is not None and self._network.lost(self.name, peer, copies):
            return
        try:
            async with asyncio.timeout(timeout_s):
                await receiver._inbox.put(Received(self.name, copies))  # noqa: SLF001 - two ends of one link
        except TimeoutError:
            raise QueueFull(f"queue from {self.name} to {peer} full for {timeout_s} s") from None

    async def receive(self) -> Received:
        """Wait for a message; see Transport.receive."""
        self._check_open()
        received = await self._inbox.get()
        while received.peer in self._excluded_until_s:
            received = await self._inbox.get()
        if self._links.state(received.peer).is_up:
            self._links.note_received(received.peer)
        return received

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """Count events by link; see Transport.link_counters."""
        return self._links.counters

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """End a link for a while; see Transport.disconnect."""
        self._excluded_until_s[peer] = time.monotonic() + for_s
        self._links.note(peer, LinkCondition.DOWN, f"this node has ended the connection for {for_s:g} s: {why}")
        self._links.counters[peer]["disconnected"] += 1
        other = self._network.members.get(peer)
        if other is not None and self.name in other.neighbours:
            other._links.note(self.name, LinkCondition.DOWN, f"{self.name} has ended the connection")  # noqa: SLF001 - two ends of one link
            other._links.counters[self.name]["disconnected"] += 1  # noqa: SLF001 - two ends of one link

    def _are_apart(self, other: MemoryTransport) -> bool:
        """Whether one of two members has ended their link, and the time is not over; else the link is up again."""
        ends = ((self, other.name), (other, self.name))
        if any(time.monotonic() < end._excluded_until_s.get(name, 0.0) for end, name in ends):  # noqa: SLF001 - two ends of one link
            return True
        if any(end._excluded_until_s.pop(name, None) is not None for end, name in ends):  # noqa: SLF001 - two ends of one link
            for end, name in ends:
                end._links.note(name, LinkCondition.UP)  # noqa: SLF001 - two ends of one link
                end._links.counters[name]["connected"] += 1  # noqa: SLF001 - two ends of one link
        return False

    def link(self, peer: str) -> LinkState:
        """State of a link; see Transport.link."""
        return self._links.state(peer)

    def _check_open(self) -> None:
        if self._network.members.get(self.name) is not self:
            raise TransportError(f"{self.name} is closed")


_PROCESS = MemoryNetwork()


def join_process(
    me: Endpoint, _secret_key: bytes, neighbours: Iterable[Endpoint], *, max_queued: int = MAX_QUEUED, **_: object
) -> MemoryTransport:
    """Make a member of the one network that all members of this process share, as a registered transport is made."""
    return MemoryTransport(_PROCESS, me.name, frozenset(peer.name for peer in neighbours), max_queued)
