"""Links between the nodes of one process: no socket, no encryption, losses only as scripted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from p2pfl.errors import QueueFull, TransportError
from p2pfl.transports.base import MAX_FRAME_BYTES, MAX_QUEUED, Received, check_frames

Lost = Callable[[str, str, tuple[memoryview, ...]], bool]
"""(sender, receiver, frames) -> whether the network loses this message without a word."""


class MemoryNetwork:
    """The members that are open now, by name.

    Args:
        lost: asked for each message.
        max_queued: messages that a receiver has not fetched before senders wait.
    """

    def __init__(self, lost: Lost | None = None, max_queued: int = MAX_QUEUED) -> None:
        self.lost = lost
        self.max_queued = max_queued
        self.members: dict[str, MemoryTransport] = {}

    def transport(self, name: str, neighbours: Iterable[str]) -> MemoryTransport:
        """A member's end of its links, closed at first."""
        return MemoryTransport(self, name, frozenset(neighbours))


class MemoryTransport:
    """One member of a MemoryNetwork; can be opened again after it was closed, with an empty queue."""

    def __init__(self, network: MemoryNetwork, name: str, neighbours: frozenset[str]) -> None:
        self.name = name
        self.neighbours = neighbours
        self.counters: Counter[str] = Counter()
        self._network = network
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(network.max_queued)

    async def __aenter__(self) -> Self:
        if self.name in self._network.members:
            raise ValueError(f"{self.name!r} is open already")
        self._inbox = asyncio.Queue(self._network.max_queued)
        self._network.members[self.name] = self
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        del self._network.members[self.name]

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """See Transport.send."""
        if peer not in self.neighbours:
            raise ValueError(f"{peer!r} is no neighbour of {self.name!r}")
        check_frames(frames, MAX_FRAME_BYTES)
        self._check_open()
        receiver = self._network.members.get(peer)
        if receiver is None:
            raise TransportError(f"no link from {self.name} to {peer}")
        if self.name not in receiver.neighbours:
            receiver.counters["unauthorized"] += 1
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
        """See Transport.receive."""
        self._check_open()
        return await self._inbox.get()

    def _check_open(self) -> None:
        if self._network.members.get(self.name) is not self:
            raise TransportError(f"{self.name} is closed")
