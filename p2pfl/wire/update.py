"""A node's outgoing channels as one payload, cut into chunks on one side and put together, checked, on the other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import BadMessage
from p2pfl.wire.codec import CHUNK_BYTES, Frame, encode, padded
from p2pfl.wire.messages import MAX_CHANNELS, NOTHING_SAID, ChannelEntry, Chunk, Report, StateDigests, StopNews, Update

MakeRoom = Callable[[int], NDArray[np.uint8]]
"""Makes room for so many bytes of an update, to be written to."""
Arrays = Mapping[str, NDArray[Any]]
Unpacked = tuple[Arrays, Mapping[str, float]]
"""Read-only arrays by channel, and the norms of those of them whose squares do not overflow; none of integers and of half precision."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "int16": np.dtype("<i2"),
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    "uint32": np.dtype("<u4"),
}
"""Types of numbers that may travel, always little-endian; another name is no dtype of this protocol."""

_WIDTHS = (2**7 - 1, 2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1)  # the largest numbers of 1, 2, 3, 5 and 9 bytes in msgpack
_FURTHER = 12  # exchanges that a sender may be ahead of an update that it still sends: as many as it keeps, and some

_CHECKED_AT_ONCE = 2**18  # numbers looked at together for finiteness, so that a large model needs no large mask
_SINGLE_BYTES = 4
_ALIGNED_BYTES = 64


@dataclass(frozen=True)
class UpdateFormat:
    """Format of an update of our study: the same at every node, and the only thing that buffers are sized by."""

    channels: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Name, dtype (one of DTYPES) and shape of each, in the order in which they lie in the payload, without gaps."""
    full: UpdateFormat | None = None
    """Format of a full update, where this one continues another; None: there is only this one."""

    def __post_init__(self) -> None:
        names = [name for name, _, _ in self.channels]
        if not 1 <= len(set(names)) == len(names) <= MAX_CHANNELS:
            raise ValueError(f"channels {names}: expected 1 to {MAX_CHANNELS} different names")
        for name, dtype, shape in self.channels:
            if dtype not in DTYPES:
                raise ValueError(f"channel {name} of dtype {dtype}: one of {', '.join(DTYPES)}")
            if math.prod(shape) < 1:
                raise ValueError(f"channel {name} of shape {shape}: expected at least one number")

    @classmethod
    def of(cls, message: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> UpdateFormat:
        """Format of messages: by channel anything that has dtype and shape; *full* is for one that cannot continue, with other channels."""
        channels = tuple((name, str(array.dtype).removeprefix("torch."), tuple(array.shape)) for name, array in message.items())
        return cls(channels, cls.of(full) if full is not None and full.keys() != message.keys() else None)

    def encoded_bytes(self, exchange: int, *, full: bool = False) -> int:
        """Size in bytes of one update on the wire, headers and payload; *full*: of a full update."""
        travels = self.full if full and self.full is not None else self
        offsets = range(CHUNK_BYTES, travels.size_bytes, CHUNK_BYTES)
        chunk_headers = sum(len(encode(Chunk(exchange=exchange, offset=offset), memoryview(b"\0"))[0]) for offset in offsets)
        state_digests = None if self.full is None else (None if full else NOTHING_SAID, NOTHING_SAID)
        first = _longest_header(exchange, travels.entries, travels.size_bytes, state_digests)
        return first + chunk_headers + travels.size_bytes

    @cached_property
    def size_bytes(self) -> int:
        """Size in bytes of the payload."""
        return sum(size * DTYPES[dtype].itemsize for _, dtype, size in self.entries)

    @cached_property
    def entries(self) -> tuple[ChannelEntry, ...]:
        """The channels as an Update announces them."""
        return tuple((name, dtype, math.prod(shape)) for name, dtype, shape in self.channels)

    @cached_property
    def lead_bytes(self) -> int:
        """Bytes of room to leave before a payload, so that its largest channel begins where its numbers are read without a copy."""
        sizes = [size * DTYPES[dtype].itemsize for _, dtype, size in self.entries]
        return -sum(sizes[: sizes.index(max(sizes))]) % _ALIGNED_BYTES

    def pack(self, exchange: int, arrays: Arrays, state_digests: StateDigests | None = None) -> EncodedUpdate:
        """Encode the update of one exchange; *state_digests* are of the values that it continues and leads to.

        A single contiguous channel is not copied: its array must not change as long as the update may be sent.

        Raises:
            ValueError: an array is missing, unknown, or of another dtype or shape.
        """
        names = [name for name, _, _ in self.channels]
        if arrays.keys() != set(names):
            raise ValueError(f"channels {sorted(arrays)}: expected {names}")
        for name, dtype, shape in self.channels:
            array = arrays[name]
            if array.dtype != DTYPES[dtype] or array.shape != shape:
                raise ValueError(f"channel {name} is {array.dtype}{array.shape}: expected {dtype}{shape}")
        parts = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in names]
        payload = (parts[0] if len(parts) == 1 else np.concatenate(parts)).data.toreadonly()
        digest = hashlib.sha256(payload).digest()
        return EncodedUpdate(exchange=exchange, channels=self.entries, payload=payload, digest=digest, state_digests=state_digests)

    def unpack(self, payload: NDArray[np.uint8]) -> Unpacked:
        """Views into a payload of the right size; BadMessage "not_finite" where a channel holds NaN or an infinity."""
        arrays, norms, start = {}, {}, 0
        for name, dtype, shape in self.channels:
            end = start + math.prod(shape) * DTYPES[dtype].itemsize
            flat = payload[start:end].view(DTYPES[dtype])
            if flat.dtype.kind == "f":
                norm = _norm(flat)
                if norm is not None:
                    norms[name] = norm
                elif not _is_finite(flat):
                    raise BadMessage(f"channel {name} holds NaN or an infinity", reason="not_finite")
            array = np.require(flat, requirements=["ALIGNED"]).reshape(shape)  # copied only where an odd channel lies before it
            array.flags.writeable = False
            arrays[name] = array
            start = end
        return arrays, norms


def largest_update_bytes(formats: Iterable[UpdateFormat]) -> int:
    """Size in bytes of the largest update of a study, full ones included."""
    return max((full or travels).size_bytes for travels in formats for full in (None, travels.full))


def _norm(numbers: NDArray[Any]) -> float | None:
    """The Euclidean norm, which a single look at finite numbers gives; None where a square, or a number, is not finite."""
    if numbers.itemsize < _SINGLE_BYTES:
        return None
    squared = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, numbers.size, _CHECKED_AT_ONCE):
            part = numbers[first : first + _CHECKED_AT_ONCE]
            squared += float(part.dot(part))
    return math.sqrt(squared) if math.isfinite(squared) else None


def _is_finite(numbers: NDArray[Any]) -> bool:
    return all(np.isfinite(numbers[first : first + _CHECKED_AT_ONCE]).all() for first in range(0, numbers.size, _CHECKED_AT_ONCE))


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUpdate:
    """An update ready to be sent, to any neighbour and as often as wanted; only the news beside it differ.

    On one link it is sent to its end before another one, or the same one again, is begun.
    """

    exchange: int
    channels: tuple[ChannelEntry, ...]
    payload: memoryview
    digest: bytes
    state_digests: StateDigests | None = None

    def messages(self, report: Report, stop: StopNews, offset: int = 0) -> Iterator[list[Frame]]:
        """The frames of each message in turn: the Update with the first chunk, then the others. The payload is not copied.

        Args:
            offset: where to go on, for a receiver that has what is before it: chunks alone.
            report: of the edge to the neighbour it goes to, as durable now; it must have closed the exchange before this one.
            stop: with the agreed_for of the round before this exchange's, also when it is sent again later.
        """
        if offset:
            yield from self._chunks(offset)
            return
        update = Update(
            exchange=self.exchange,
            channels=self.channels,
            size_bytes=self.payload.nbytes,
            digest=self.digest,
            marks=self.state_digests,
            report=report,
            stop=stop,
            pad=b"",
        )
        header, first = encode(update, self.payload[:CHUNK_BYTES])
        missing_bytes = _longest_header(self.exchange, self.channels, self.payload.nbytes, self.state_digests) - len(header)
        yield [padded(bytes(header), max(missing_bytes, 0)), first]
        yield from self._chunks(CHUNK_BYTES)

    def can_go_on(self, offset: int, digest: bytes | None) -> bool:
        """Whether a receiver that holds the first *offset* bytes of a payload with this digest lacks only the rest of this one."""
        return digest == self.digest and offset % CHUNK_BYTES == 0 and 0 < offset < self.payload.nbytes

    def _chunks(self, first: int) -> Iterator[list[Frame]]:
        for offset in range(first, self.payload.nbytes, CHUNK_BYTES):
            yield encode(Chunk(exchange=self.exchange, offset=offset), self.payload[offset : offset + CHUNK_BYTES])


@dataclass(frozen=True)
class FullUpdate:
    """Full update, for a neighbour that cannot continue from where it is; packed when one asks."""

    update_format: UpdateFormat
    exchange: int
    arrays: Arrays
    state_digest: bytes

    @cached_property
    def encoded(self) -> EncodedUpdate:
        """Ready to be sent."""
        return self.update_format.pack(self.exchange, self.arrays, (None, self.state_digest))


def next_state_digest(after: bytes, updates: Iterable[EncodedUpdate]) -> bytes:
    """Digest of the values that some updates which continue *after* lead to: equal only if all that led to them was equal."""
    return hashlib.sha256(b"".join([after, *(encoded.digest for encoded in updates)])).digest()[: len(after)]


def _longest_header(exchange: int, channels: tuple[ChannelEntry, ...], size_bytes: int, state_digests: StateDigests | None) -> int:
    """Longest header of an Update without padding: nobody reports more than three exchanges or is more than some further."""
    width = next(largest for largest in _WIDTHS if exchange + _FURTHER <= largest)
    return _header_bytes(width, channels, size_bytes, state_digests and (state_digests[0] and NOTHING_SAID, NOTHING_SAID))


@lru_cache(maxsize=64)
def _header_bytes(largest: int, channels: tuple[ChannelEntry, ...], size_bytes: int, state_digests: StateDigests | None) -> int:
    update = Update(
        exchange=largest,
        channels=channels,
        size_bytes=size_bytes,
        digest=bytes(32),
        marks=state_digests,
        report=Report(closed_through=largest, merged=(largest - 2, largest - 1, largest), confirmed=largest - 3, settled=largest),
        stop=StopNews(agreed_for=largest, stop_round=2**32 - 1),
        pad=b"",
    )
    return len(encode(update, memoryview(b"\0"))[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedUpdate:
    """A neighbour's update, complete and checked."""

    exchange: int
    arrays: Arrays
    """By channel, read-only."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """Euclidean norms of its arrays, as far as they are known; see `Unpacked`."""
    state_digests: StateDigests | None = None
    """State digests of what it continues and of what it leads to, as it says."""
    report: Report
    stop: StopNews
    """As they came with it."""
    digest: bytes = b""
    """SHA-256 of its payload; empty where it comes from a checkpoint."""


def in_memory(size_bytes: int) -> NDArray[np.uint8]:
    """Make room for so many bytes in memory."""
    return np.empty(size_bytes, dtype=np.uint8)


class Assembly:
    """One neighbour's update while it is coming in: one buffer, sized from our own format, filled from front to back.

    An update counts when all of it is there and its digest and every number have been checked. Until then nothing leaves this object.
    There is one format for each phase of a round. Room is made when the second chunk is there: with the first one comes a report, which may
    set free the room of the update before.

    Args:
        formats: of the updates.
        make_room: where an update lies.
        make_early_room: where one lies that comes before its exchange, while the neighbour's last one may still be here.
    """

    __slots__ = (
        "_buffer",
        "_first",
        "_format",
        "_formats",
        "_hash",
        "_is_early",
        "_make_early_room",
        "_make_room",
        "received_bytes",
        "update",
    )

    def __init__(self, *formats: UpdateFormat, make_room: MakeRoom = in_memory, make_early_room: MakeRoom | None = None) -> None:
        self._formats, self._make_room, self._make_early_room = formats, make_room, make_early_room or make_room
        self._format = formats[0]
        self._buffer: NDArray[np.uint8] | None = None
        self._is_early = False
        self._first: memoryview | None = None  # the first chunk, as long as there is no room
        self._hash = hashlib.sha256()
        self.update: Update | None = None
        self.received_bytes = 0

    def begin(self, update: Update, payload: memoryview, *, is_early: bool = False) -> Unpacked | None:
        """Take an announcement and its first chunk, giving up what was there before; arrays and norms if the update is complete now.

        Args:
            update: the announcement.
            payload: the first chunk.
            is_early: the update is of an exchange that this node has not begun.

        Raises:
            BadMessage: "wrong_size", "wrong_format", "wrong_digest", "not_finite" or "bad_message"; the update is given up.
        """
        self.drop()
        self._format = self._format_of(update)
        if update.size_bytes != self._format.size_bytes:
            raise BadMessage(f"an update of {update.size_bytes} bytes: expected {self._format.size_bytes}", reason="wrong_size")
        if update.channels != self._format.entries:
            raise BadMessage(f"an update of other channels: expected {self._format.entries}", reason="wrong_format")
        if self._buffer is not None and (self._buffer.size != self._format.size_bytes or (is_early and not self._is_early)):
            self._buffer = None
        if self._buffer is None:
            self._is_early = is_early
        self.update = update
        return self._take(payload)

    def extend(self, chunk: Chunk, payload: memoryview) -> Unpacked | None:
        """Take the next chunk; as `begin`.

        Raises:
            BadMessage: also "out_of_order", a chunk that is not the next one of the update that is coming in; that one can still go on.
        """
        if self.update is None or (chunk.exchange, chunk.offset) != (self.update.exchange, self.received_bytes):
            raise BadMessage(f"a chunk at {chunk.offset} of exchange {chunk.exchange} that continues nothing", reason="out_of_order")
        return self._take(payload)

    def drop(self) -> None:
        """Give up the update that is coming in; the buffer stays for the next one."""
        self.update = self._first = None
        self.received_bytes = 0
        self._hash = hashlib.sha256()

    def _format_of(self, update: Update) -> UpdateFormat:
        """Which of ours it must have."""
        ours = self._formats[update.exchange % len(self._formats)]
        if (update.marks is None) != (ours.full is None):
            raise BadMessage(f"an update {'without' if update.marks is None else 'with'} marks", reason="wrong_format")
        return ours.full if ours.full is not None and update.marks is not None and update.marks[0] is None else ours

    def _take(self, payload: memoryview) -> Unpacked | None:
        assert self.update is not None
        start, expected_bytes = self.received_bytes, min(CHUNK_BYTES, self._format.size_bytes - self.received_bytes)
        if payload.nbytes != expected_bytes:
            self.drop()
            raise BadMessage(f"{payload.nbytes} bytes of payload at {start}: expected {expected_bytes}")
        self.received_bytes += expected_bytes
        is_complete = self.received_bytes == self._format.size_bytes
        self._put(payload, start, is_complete=is_complete)
        self._hash.update(payload)
        if not is_complete:
            return None
        is_intact = self._hash.digest() == self.update.digest
        self.drop()
        if not is_intact:
            raise BadMessage("a payload that is not what its header announced", reason="wrong_digest")
        # given away: the views that leave must not be written over by the next update
        buffer, self._buffer = self._buffer, None
        assert buffer is not None
        return self._format.unpack(buffer)

    def _put(self, payload: memoryview, start: int, *, is_complete: bool) -> None:
        """Put a chunk into its place; the first one stays where it is until there is room."""
        if self._buffer is None and start == 0 and not is_complete:
            self._first = payload
            return
        if self._buffer is None:
            make_room, lead_bytes = self._make_early_room if self._is_early else self._make_room, self._format.lead_bytes
            self._buffer = make_room(self._format.size_bytes + lead_bytes)[lead_bytes:]
        if self._first is not None:
            self._buffer[: self._first.nbytes] = self._first
            self._first = None
        self._buffer[start : start + payload.nbytes] = payload
