"""The way of a node's messages from the neighbours' outboxes into their links."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from p2pfl.errors import QueueFull, TransportError
from p2pfl.node.bandwidth_cap import BandwidthCap
from p2pfl.node.clock import LoopClock
from p2pfl.protocol.agreed_start import StartAgreement
from p2pfl.protocol.neighbour import Neighbour, SendNew, SendUpdate, is_large
from p2pfl.protocol.protocol import Protocol
from p2pfl.transports import LinkCondition, Transport
from p2pfl.wire.codec import encode
from p2pfl.wire.messages import Goodbye, Message, Records

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""How long a message waits for room in its link before it is asked whether it is still of use. A link that is down says so at once."""
FLUSH_S = 2.0
"""How long the last messages have to get into their links. A link that is down says so at once; a full one is not waited for any longer."""

_DIGITS = 6  # of a second: more say nothing


class Sending:
    """Sends what lies in the outboxes. What cannot be sent is dropped: whoever misses it asks for it.

    Short messages go between the chunks of an update. Updates and a doctor's large messages wait for the cap; none of them does
    once the node is leaving.
    """

    def __init__(
        self, protocol: Protocol, transport: Transport, agreement: StartAgreement, clock: LoopClock, *, send_mbit_s: float | None = None
    ) -> None:
        self._protocol, self._transport, self._agreement, self._clock = protocol, transport, agreement, clock
        self._cap = BandwidthCap(send_mbit_s)
        self._filled = {name: asyncio.Event() for name in protocol.neighbours}
        self._in_hand: set[str] = set()
        """Neighbours whose message has left the outbox and is not in its link yet."""
        self.bytes_sent = 0
        """Bytes of updates, by this process and earlier ones; repetitions are left out."""
        self._taken_bytes = 0
        self._began_s: float | None = None
        self._seconds = 0.0
        """Seconds of this round's exchanges before the one at hand."""
        self._last_s = 0.0
        """Seconds of the exchange at hand, until now."""
        self._is_leaving = False

    def begin(self) -> None:
        """Measure from now on how long the updates of an exchange take into their links."""
        self._seconds, self._last_s, self._began_s = self._seconds + self._last_s, 0.0, self._clock.now_s()

    def take_seconds(self) -> float | None:
        """Return the seconds that this round's updates took into their links, and count from nothing; None where there were none."""
        total, began_s = self._seconds + self._last_s, self._began_s
        self._seconds, self._last_s, self._began_s = 0.0, 0.0, None
        return None if began_s is None else round(total, _DIGITS)

    def restore(self, bytes_sent: int) -> None:
        """Go on counting where an earlier process was."""
        self.bytes_sent = self._taken_bytes = bytes_sent

    def take_bytes(self) -> int:
        """Return the number of bytes of updates sent since the last call."""
        before, self._taken_bytes = self._taken_bytes, self.bytes_sent
        return self.bytes_sent - before

    def wake(self) -> None:
        """Let the loops look into their outboxes."""
        for name, neighbour in self._protocol.neighbours.items():
            if neighbour.outbox:
                self._filled[name].set()

    async def run(self, neighbour: Neighbour) -> None:
        """Send to one neighbour until cancelled."""
        while True:
            self._in_hand.add(neighbour.name)
            while neighbour.outbox:
                item = neighbour.outbox.popleft()
                try:
                    if isinstance(item, SendUpdate):
                        await self._send_update(neighbour, item)
                    elif not isinstance(item, SendNew) and is_large(item):
                        await self._send_large(neighbour, item)
                    else:
                        await self._send_short(neighbour, item)
                except TransportError as error:
                    log.debug("to %s: %s", neighbour.name, error)
                self._protocol.transfers.note_sending(neighbour.name, None)
            self._in_hand.discard(neighbour.name)
            self._clock.wake()
            self._filled[neighbour.name].clear()
            if not neighbour.outbox:
                await self._filled[neighbour.name].wait()

    async def say_goodbye(self, reason: str) -> None:
        """Tell every neighbour why nothing more will come, and give the links a moment; updates that wait for the cap are given up.

        One that has left and is still connected waits for this word.
        """
        self._is_leaving = True
        for name, neighbour in self._protocol.neighbours.items():
            is_waiting = neighbour.left and self._transport.link(name).state == LinkCondition.UP
            if is_waiting or (neighbour.session.is_open and not neighbour.left):
                neighbour.queue(Goodbye(reason=reason))
        self.wake()
        deadline_s = self._clock.now_s() + FLUSH_S
        while self._is_busy() and self._clock.now_s() < deadline_s:
            await self._clock.wait(deadline_s)

    def _is_busy(self) -> bool:
        """Whether a message lies in an outbox or is on its way into a link."""
        return bool(self._in_hand) or any(neighbour.outbox for neighbour in self._protocol.neighbours.values())

    async def _send_update(self, neighbour: Neighbour, item: SendUpdate) -> None:
        self._protocol.transfers.note_sending(neighbour.name, item)
        if item.full:
            await asyncio.to_thread(self._protocol.transfers.prepare, neighbour.name, item)

        def is_wanted() -> bool:  # not if the exchange is past, or the neighbour has asked to begin elsewhere
            replaced = neighbour.waiting_update(item.exchange, full=item.full) is not None
            # the news in the first message are of use to a neighbour that has gone on without this update, too
            return not replaced and (not begun or self._protocol.transfers.is_of_use(item.exchange, neighbour))

        begun = False
        for number, frames in enumerate(self._protocol.transfers.frames_of(neighbour, item)):
            if number and (large := neighbour.next_large()) is not None:
                await self._send_large(neighbour, large)
            now_s, size_bytes = self._clock.now_s(), _size_of(frames)
            goes_s = self._cap.reserve(size_bytes, now_s)
            if number or goes_s > now_s:
                await self._send_shorts_until(neighbour, goes_s)
            if self._is_leaving and goes_s > self._clock.now_s():  # or the last word behind it would come too late
                return
            if not await self._send_patiently(neighbour, frames, is_wanted):
                return
            begun = True
            if not item.again:
                self.bytes_sent += size_bytes
        self._protocol.transfers.note_handed_over(neighbour.name, item)
        if self._began_s is not None and not item.again and item.exchange == self._protocol.edges.exchange:
            self._last_s = self._clock.now_s() - self._began_s

    async def _send_large(self, neighbour: Neighbour, message: Message) -> None:
        """Send a doctor's large message when the cap lets it go."""
        frames, now_s = encode(message), self._clock.now_s()
        goes_s = self._cap.reserve(_size_of(frames), now_s)
        if goes_s > now_s:
            await self._send_shorts_until(neighbour, goes_s)
        if not self._is_leaving:
            await self._send_patiently(neighbour, frames)

    async def _send_shorts_until(self, neighbour: Neighbour, until_s: float) -> None:
        """Send the short messages that are there, and those that come until the next chunk may go."""
        while True:
            while (short := neighbour.next_short()) is not None:
                await self._send_short(neighbour, short)
            left_s = until_s - self._clock.now_s()
            if left_s <= 0 or self._is_leaving:
                return
            filled = self._filled[neighbour.name]
            filled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, LOOK_AGAIN_S)):
                    await filled.wait()

    async def _send_short(self, neighbour: Neighbour, item: Message | SendNew) -> None:
        if item is SendNew.RECORDS:
            await self._send_records(neighbour)
        elif item is SendNew.READY:
            while (ready := self._agreement.take(neighbour.name, self._clock.now_s())) is not None:
                await self._send_patiently(neighbour, encode(ready))
        else:
            await self._send_patiently(neighbour, encode(item))

    async def _send_records(self, neighbour: Neighbour) -> None:
        """Send all that is new of the network. What is lost with a link is said again when the neighbour's process greets anew."""
        view = self._protocol.view
        while view is not None and (sealed := view.take(neighbour.name, self._clock.now_s())):
            await self._send_patiently(neighbour, encode(Records(sealed=tuple(sealed))))

    async def _send_patiently(
        self, neighbour: Neighbour, frames: Sequence[bytes | memoryview], is_wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Send one message however slow the link is; False: nobody wants it any more. A link that is down raises TransportError."""
        while is_wanted():
            try:
                await self._transport.send(neighbour.name, frames, LOOK_AGAIN_S)
            except QueueFull:
                continue
            return True
        return False


def _size_of(frames: Sequence[bytes | memoryview]) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
