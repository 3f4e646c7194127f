"""Outbox of a node in secure sums: what it says to each neighbour, in its order; a slow neighbour keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final

from p2pfl.errors import QueueFull, TransportError
from p2pfl.transports.base import Transport
from p2pfl.wire.secure_messages import MaskedSubtotal, Message, Total
from p2pfl.wire.sum_codec import encode_sum
from p2pfl.wire.sum_link import SumLink

SEND_TIMEOUT_S: Final = 5.0
FLUSH_S: Final = 5.0
"""A node that leaves waits so long for what it has to say to be handed to its links."""
MOST_WAITING: Final = 8192
"""More messages than an honest session has for one neighbour; what is more is dropped, and counted so that it is asked for again."""
_MOST_PRESENCES = 2


class SumOutbox:
    """Messages that wait for each neighbour.

    Args:
        transport: the links.
        links: counts of each link, by the neighbour's place.
        names: of the neighbours, by their places.
        done: gives the bits of members that need nothing more.
        repeat_after_s: a neighbour is sent all again after so long at the earliest, whatever it says to have lost.
    """

    def __init__(
        self,
        transport: Transport,
        links: Mapping[int, SumLink],
        names: Mapping[int, str],
        *,
        done: Callable[[], bytes],
        repeat_after_s: float,
    ) -> None:
        self._transport, self._links, self._names, self._done, self._repeat_after_s = transport, links, names, done, repeat_after_s
        self.counters: Counter[str] = Counter()
        """Numbers of bytes and messages that were handed to links."""
        self._waiting: dict[int, asyncio.Queue[Message | None]] = {place: asyncio.Queue() for place in links}
        """Messages in their order; None stands for a presence."""
        self._queued: dict[int, set[Hashable]] = {place: set() for place in links}
        """Keys of messages that wait for each neighbour, without presences."""
        self._presences: Counter[int] = Counter()
        """Presences that wait to be sent, by neighbour."""
        self._to_repeat: set[int] = set()
        self._repeated_s: dict[int, float] = {}

    def post(self, place: int, message: Message) -> None:
        """Put a message behind all others for a neighbour; one that waits already is not put there twice."""
        if (key := _key(message)) in self._queued[place]:
            return
        if len(self._queued[place]) >= MOST_WAITING:
            self._links[place].note_sent()  # so that the neighbour says that it is lost
            self.counters["messages_dropped"] += 1
            return
        self._queued[place].add(key)
        self._waiting[place].put_nowait(message)

    def say_presence(self, place: int) -> None:
        """Let a neighbour hear a presence, behind all that waits for it; made when it is sent, and at most two wait."""
        if self._presences[place] < _MOST_PRESENCES:
            self._presences[place] += 1
            self._waiting[place].put_nowait(None)

    def want_repeat(self, place: int) -> None:
        """Note that a neighbour may lack something."""
        self._to_repeat.add(place)

    def repeat(self, outstanding: Callable[[int], Sequence[Message]], now_s: float) -> None:
        """Send again all that neighbours may lack: to each now and then, and not before it has taken what waits for it."""
        for place in sorted(self._to_repeat):
            is_early = now_s - self._repeated_s.get(place, -math.inf) < self._repeat_after_s
            if is_early or self._waiting[place].qsize() > _MOST_PRESENCES + 1:
                continue
            self._to_repeat.discard(place)
            self._repeated_s[place] = now_s
            for message in outstanding(place):
                self.post(place, message)

    async def flush(self) -> None:
        """Wait until all has been handed to the links, but not for long."""
        try:
            async with asyncio.timeout(FLUSH_S):
                for queue in self._waiting.values():
                    await queue.join()
        except TimeoutError:
            pass

    async def send_to(self, place: int) -> None:
        """Send what waits for one neighbour, for ever."""
        queue, link = self._waiting[place], self._links[place]
        while True:
            message = await queue.get()
            if message is None:
                self._presences[place] -= 1
                await self._hand_over(place, next(encode_sum(link.presence(self._done()))))
            else:
                self._queued[place].discard(_key(message))
                for frames in encode_sum(message):
                    link.note_sent()  # also where there is no link now: the neighbour then says that it is lost
                    await self._hand_over(place, frames)
            queue.task_done()

    async def _hand_over(self, place: int, frames: Sequence[bytes | memoryview]) -> None:
        while True:
            try:
                await self._transport.send(self._names[place], frames, SEND_TIMEOUT_S)
            except QueueFull:
                continue
            except TransportError:
                return
            self.counters["bytes_sent"] += sum(memoryview(frame).nbytes for frame in frames)
            self.counters["messages_sent"] += 1
            return


def _key(message: Message) -> Hashable:
    """Return the key that two copies of a message have in common, and no other one; an array is known by its object, which waits too."""
    if isinstance(message, MaskedSubtotal | Total):
        return type(message), message.transcript, message.sum_id, message.position, id(message.limbs)
    return message
