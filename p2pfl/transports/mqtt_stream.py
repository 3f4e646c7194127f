"""A byte stream in packets that may come twice or in another order: bytes come out once and in order, or the stream ends.

Each end says how many bytes have come and up to how many the other may send, which is a window beyond those that were read here: a
reader that stands still stops the sender. Packets that are lost are not sent again: a stream that gets no further ends, and libzmq
makes another connection.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable

from p2pfl.transports.mqtt_words import Kind, Packet
from p2pfl.transports.streams import PIECE_BYTES

WINDOW_BYTES = 2**20
WINDOW_PACKETS = 32
"""The most packets without an answer: a broker keeps only so many for a client."""
EARLY_PACKETS = 2 * WINDOW_PACKETS
"""The most packets that are kept until those before them come."""
ACK_PACKETS = 4
ACK_AFTER_S = 0.02
_NUMBER_BYTES = 8


class MqttStream:
    """One end of a stream; see `Stream`.

    Args:
        stream: its id.
        post: publishes a packet to the other end.
        data_bytes: the most bytes in one packet.
    """

    def __init__(self, stream: bytes, post: Callable[[Packet], None], data_bytes: int) -> None:
        self.stream = stream
        self.fault: str | None = None
        """Why the stream broke."""
        self.is_over = False
        """Whether nothing more comes or goes."""
        self._post, self._data_bytes = post, data_bytes
        self._changed = asyncio.Event()  # something of what send and receive wait for
        self._sent = 0
        self._allowed = WINDOW_BYTES
        self._unanswered: deque[int] = deque()  # ends of packets
        self._progress_s = 0.0
        self._has_ended = False
        self._buffer = bytearray()
        self._read = 0  # taken out by `receive`
        self._early: dict[int, bytes] = {}
        self._end: int | None = None
        self._told = (0, WINDOW_BYTES)  # in the last acknowledgement
        self._packets = 0  # since then
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_unanswered(self) -> bool:
        """Whether the other end has not said of all that was sent that it came."""
        return bool(self._unanswered)

    @property
    def _received(self) -> int:
        return self._read + len(self._buffer)

    def begin(self) -> None:
        """Have the other end know that the stream is there."""
        self._post(Packet(kind=Kind.DATA, stream=self.stream))

    async def receive(self) -> bytes:
        """Wait for bytes; see Stream.receive."""
        while not self._buffer and self._received != self._end:
            self._check()
            self._changed.clear()
            await self._changed.wait()
        found = bytes(self._buffer[:PIECE_BYTES])
        del self._buffer[: len(found)]
        self._read += len(found)
        if not self.is_over and self._read + WINDOW_BYTES - self._told[1] >= WINDOW_BYTES // 4:
            self._acknowledge()
        self._note_over()
        return found

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of some bytes; see Stream.send."""
        data = memoryview(data)
        while data:
            self._check()
            room = 0 if len(self._unanswered) >= WINDOW_PACKETS else min(self._data_bytes, self._allowed - self._sent, len(data))
            if room <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            if not self._unanswered:
                self._progress_s = asyncio.get_running_loop().time()
            self._post(Packet(kind=Kind.DATA, stream=self.stream, number=self._sent, data=data[:room]))
            self._sent += room
            self._unanswered.append(self._sent)
            data = data[room:]

    def end(self) -> None:
        """Send no more; see Stream.end."""
        if not self._has_ended and not self.is_over:
            self._has_ended = True
            self._post(Packet(kind=Kind.END, stream=self.stream, number=self._sent))
            self._note_over()

    def close(self) -> None:
        """Give up both directions; see Stream.close."""
        if not self.is_over:
            self._post(Packet(kind=Kind.RESET, stream=self.stream))
            self.break_off("closed here")

    def break_off(self, fault: str) -> None:
        """End the stream as it is; what has come in order can still be read."""
        if not self.is_over:
            self.fault, self.is_over = fault, True
            self._finish()

    def take(self, packet: Packet) -> None:
        """Take in a packet of the other end."""
        if self.is_over:
            return
        if packet.kind == Kind.DATA:
            self._take_data(packet.number, packet.data)
        elif packet.kind == Kind.ACK:
            self._take_answer(packet.number, int.from_bytes(packet.data[:_NUMBER_BYTES], "big"))
        elif packet.kind == Kind.END:
            self._take_end(packet.number)
        elif packet.kind == Kind.RESET:
            self.break_off("the other end has given it up")

    def end_if_stuck(self, patience_s: float) -> bool:
        """Give the stream up where what was sent has got no answer for so long, and tell whether it was."""
        if self.is_over or not self._unanswered or asyncio.get_running_loop().time() - self._progress_s <= patience_s:
            return False
        self.close()
        return True

    def _check(self) -> None:
        if self.is_over:
            raise ConnectionResetError(errno.ECONNRESET, self.fault or "ended")

    def _take_data(self, number: int, data: bytes | memoryview) -> None:
        end = number + len(data)
        if end > self._told[1] or (self._end is not None and end > self._end) or number < self._received < end:
            self.close()  # nobody sends that by mistake
            return
        if data and number >= self._received and len(self._early) < EARLY_PACKETS:
            self._early.setdefault(number, bytes(data))
            while (found := self._early.pop(self._received, None)) is not None:
                self._buffer += found
        if data:
            self._packets += 1
            if self._packets >= ACK_PACKETS:
                self._acknowledge()
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(ACK_AFTER_S, self._acknowledge)
        self._changed.set()
        self._note_over()

    def _take_answer(self, received: int, allowed: int) -> None:
        if received > self._sent:
            self.close()
            return
        while self._unanswered and self._unanswered[0] <= received:
            self._unanswered.popleft()
            self._progress_s = asyncio.get_running_loop().time()
        self._allowed = max(self._allowed, allowed)
        self._changed.set()
        self._note_over()

    def _take_end(self, number: int) -> None:
        if number < self._received or (self._end is not None and self._end != number):
            self.close()
            return
        self._end = number
        self._changed.set()
        self._note_over()

    def _acknowledge(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._packets = None, 0
        self._told = self._received, self._read + WINDOW_BYTES
        data = self._told[1].to_bytes(_NUMBER_BYTES, "big")
        self._post(Packet(kind=Kind.ACK, stream=self.stream, number=self._told[0], data=data))

    def _note_over(self) -> None:
        """Tell whether both directions have ended: all that was sent has come, and all that came was read."""
        if self._has_ended and not self._unanswered and self._read == self._end and not self.is_over:
            if self._told[0] != self._received:
                self._acknowledge()
            self.is_over = True
            self._finish()

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._early.clear()
        self._changed.set()
