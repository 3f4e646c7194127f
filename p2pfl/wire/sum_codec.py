"""Messages of secure sums as frames: one msgpack header, and a raw payload behind an array and its further parts.

A header is a map of "v" (schema version), "t" (type code) and the message's fields by name, as those of all messages. An array of more
than one chunk travels in several messages, and is taken when it is whole and has the digest that its header announced. Whatever bytes come
in, a `SumAssembly` gives a valid message or raises BadMessage; it holds one array of one neighbour at most.

Shapes: L limbs of a number, 1 or 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Final

import msgpack
import numpy as np
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, with_config

from p2pfl.errors import BadMessage
from p2pfl.wire.codec import CHUNK_BYTES, Frame, first_fault, unpacked
from p2pfl.wire.secure_messages import (
    HELD_BEFORE,
    MOST_MEMBERS,
    MOST_SUMS,
    RESIDUE_BYTES,
    CheckValue,
    Digest,
    HeldTotals,
    HexDigest,
    LastSignedRequest,
    MaskedDigest,
    MaskedSubtotal,
    Message,
    Opening,
    Position,
    SessionEnd,
    SignedTotal,
    Total,
)

SUM_SCHEMA: Final = 6
"""The schema that the messages of secure sums are of."""

MOST_AXES: Final = 8
MOST_COUNTED: Final = 2**63 - 1
"""The largest count of a presence."""
_WORD_BYTES = 8
_BITS = 8

Count = Annotated[int, Strict(), Field(ge=0, le=MOST_COUNTED)]
Positive = Annotated[int, Strict(), Field(ge=1, le=MOST_COUNTED)]
Shape = Annotated[tuple[Annotated[int, Strict(), Field(ge=1, lt=2**40)], ...], Strict(), Field(min_length=1, max_length=MOST_AXES)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SubtotalHead:
    """The beginning of a MaskedSubtotal; its first chunk follows in the second frame."""

    code: ClassVar[int] = 23
    transcript: Digest
    sum_id: HexDigest
    position: Position
    shape: Shape
    """Shape of the array with its limbs, (..., L)."""
    digest: Digest
    """SHA-256 of the whole array, little-endian."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TotalHead:
    """The beginning of a Total; its first chunk follows in the second frame."""

    code: ClassVar[int] = 24
    transcript: Digest
    sum_id: HexDigest
    position: Annotated[int, Strict(), Field(ge=HELD_BEFORE, lt=MOST_SUMS)]
    shape: Shape
    digest: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayPart:
    """A further chunk of the array that has begun last."""

    code: ClassVar[int] = 25
    offset: Positive
    """In bytes from the start of the array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SumPresence:
    """A sign of life of a node that makes sums: how much it has sent, how much of yours is lost, and who needs nothing any more."""

    code: ClassVar[int] = 26
    incarnation: Positive
    """Drawn at random when the process started."""
    echo: Count
    """Your incarnation as far as I know it, else 0; *sent* counts for it alone."""
    sent: Count
    """Messages that I have sent you since I know your incarnation, presences left out."""
    lost: Count
    """Messages of your incarnation that I know to be lost."""
    done: Annotated[bytes, Strict(), Field(max_length=MOST_MEMBERS // _BITS)]
    """Members that need nothing more, as far as I know: one bit for each, the lowest first."""


SumMessageOnLink = Message | SumPresence

_KINDS: Final[dict[int, type[Any]]] = {
    16: Opening,
    17: HeldTotals,
    18: MaskedDigest,
    19: SignedTotal,
    20: CheckValue,
    21: SessionEnd,
    22: LastSignedRequest,
    23: SubtotalHead,
    24: TotalHead,
    25: ArrayPart,
    26: SumPresence,
}
"""By type code; a code is never used for anything else again."""

SUM_CODES: Final = {kind: code for code, kind in _KINDS.items()}
_NAMES = {kind: tuple(each.name for each in fields(kind)) for kind in SUM_CODES}
_ADAPTERS = {code: TypeAdapter[Any](with_config(ConfigDict(extra="forbid"))(kind)) for code, kind in _KINDS.items()}
_WITH_PAYLOAD = (SubtotalHead, TotalHead, ArrayPart)


def encode_sum(message: SumMessageOnLink) -> Iterator[list[Frame]]:
    """Make the frames of a message: one list of frames, or several for an array of more than one chunk, which is not copied."""
    if not isinstance(message, MaskedSubtotal | Total):
        yield [_header(message)]
        return
    array = np.ascontiguousarray(message.limbs, dtype="<u8")
    payload = array.reshape(-1).data.cast("B")
    head: dict[str, Any] = {"transcript": message.transcript, "sum_id": message.sum_id, "position": message.position}
    kind = SubtotalHead if isinstance(message, MaskedSubtotal) else TotalHead
    yield [_header(kind(**head, shape=array.shape, digest=hashlib.sha256(payload).digest())), payload[:CHUNK_BYTES]]
    for offset in range(CHUNK_BYTES, payload.nbytes, CHUNK_BYTES):
        yield [_header(ArrayPart(offset=offset)), payload[offset : offset + CHUNK_BYTES]]


def _header(message: Any) -> bytes:
    kind = type(message)
    found = {name: getattr(message, name) for name in _NAMES[kind]}
    if isinstance(message, CheckValue):
        received = [(child, _residue_bytes(value)) for child, value in message.received]
        found |= {"own": _residue_bytes(message.own), "sent": _residue_bytes(message.sent), "received": received}
    packed: bytes = msgpack.packb({"v": SUM_SCHEMA, "t": SUM_CODES[kind], **found})
    return packed


def _residue_bytes(number: int) -> bytes:
    return number.to_bytes(RESIDUE_BYTES, "little")


class SumAssembly:
    """Reader of what one neighbour sends: frames in, messages out.

    Args:
        most_bytes: size of the largest array that is planned.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._head: SubtotalHead | TotalHead | None = None
        self._array = bytearray()
        self._size_bytes = 0

    def receive(self, frames: Sequence[Frame]) -> SumMessageOnLink | None:
        """Take one message as it came; None where it is a part of an array that is not whole.

        Raises:
            BadMessage: it is not a message of this schema, or a part that does not continue what is here; reason "wrong_schema" where only
                the version is another, "stray_part" where an array's beginning was lost, "wrong_digest" where a part of it is another's,
                else "bad_message". An array that was coming in is dropped where it cannot become whole.
        """
        message, payload = _decode(frames)
        if isinstance(message, SubtotalHead | TotalHead):
            return self._begin(message, payload)
        if isinstance(message, ArrayPart):
            return self._extend(message, payload)
        return message  # type: ignore[no-any-return]

    def _begin(self, head: SubtotalHead | TotalHead, payload: memoryview) -> Message | None:
        self._drop()
        size_bytes = _WORD_BYTES * math.prod(head.shape)
        if size_bytes > self._most_bytes:
            raise BadMessage(f"an array of {size_bytes} bytes: the largest one planned has {self._most_bytes}", reason="wrong_shape")
        self._head, self._size_bytes, self._array = head, size_bytes, bytearray()
        return self._append(payload)

    def _extend(self, part: ArrayPart, payload: memoryview) -> Message | None:
        if self._head is None or part.offset != len(self._array):
            raise BadMessage("a part of an array whose beginning is not here", reason="stray_part")
        return self._append(payload)

    def _append(self, payload: memoryview) -> Message | None:
        head, wanted = self._head, min(CHUNK_BYTES, self._size_bytes - len(self._array))
        assert head is not None
        if payload.nbytes != wanted:
            self._drop()
            raise BadMessage(f"{payload.nbytes} bytes of an array: expected {wanted}")
        self._array += payload
        if len(self._array) < self._size_bytes:
            return None
        array = self._array
        self._drop()
        if hashlib.sha256(array).digest() != head.digest:
            raise BadMessage("an array with another digest than its header announced", reason="wrong_digest")
        limbs = np.frombuffer(array, dtype="<u8").astype(np.uint64, copy=False).reshape(head.shape)
        kind = MaskedSubtotal if isinstance(head, SubtotalHead) else Total
        return kind(transcript=head.transcript, sum_id=head.sum_id, position=head.position, limbs=limbs)

    def _drop(self) -> None:
        self._head, self._size_bytes, self._array = None, 0, bytearray()


def _decode(frames: Sequence[Frame]) -> tuple[Any, memoryview]:
    if not 1 <= len(frames) <= 2:  # noqa: PLR2004
        raise BadMessage(f"{len(frames)} frames: expected 1 or 2")
    found = unpacked(frames[0], most_items=MOST_SUMS)
    version, code = found.pop("v", None), found.pop("t", None)
    if type(version) is not int:
        raise BadMessage("a header without a schema version")
    if version != SUM_SCHEMA:
        raise BadMessage(f"schema version {version}: expected {SUM_SCHEMA}", reason="wrong_schema")
    if type(code) is not int or code not in _KINDS:
        raise BadMessage(f"an unknown type code: expected one of {sorted(_KINDS)}")
    kind = _KINDS[code]
    if missing := set(_NAMES[kind]) - set(found):  # a signature would else be empty
        raise BadMessage(f"{kind.__name__} without {', '.join(sorted(missing))}")
    try:
        message = _ADAPTERS[code].validate_python(found)
    except ValidationError as error:
        raise BadMessage(f"{kind.__name__}: {first_fault(error)}") from None  # the cause would carry what the peer sent into our logs
    payload = memoryview(frames[1]) if len(frames) > 1 else memoryview(b"")
    if (len(frames) > 1) != isinstance(message, _WITH_PAYLOAD) or (len(frames) > 1 and not 1 <= payload.nbytes <= CHUNK_BYTES):
        raise BadMessage(f"{kind.__name__} with {payload.nbytes} bytes of payload in {len(frames)} frames")
    return message, payload
