"""Messages as frames: one msgpack header, and a raw payload behind Update and Chunk.

A header is a map of "v" (schema version), "t" (type code) and the message's fields by name. Whatever bytes come in, `decode` returns a
valid message or raises BadMessage, and never allocates more than a small multiple of the header's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Final

import msgpack
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from p2pfl.errors import BadMessage
from p2pfl.wire.messages import MESSAGES, SCHEMA, SCHEMA_OF, Chunk, Message, Remembered, Report, StopNews, Update

Frame = bytes | memoryview

MAX_HEADER_BYTES: Final = 64 * 1024
CHUNK_BYTES: Final = 1024 * 1024
"""Size of the payload of one message; only the last chunk of an update is shorter."""

_MAX_ITEMS = 32  # of any list or map; the longest legal one has 16
_MAX_MAPS = 8  # in one header; the longest legal one has five, and each costs a call of ours
_NAMES = {kind: tuple(each.name for each in fields(kind)) for kind in (*MESSAGES.values(), Report, StopNews, Remembered)}
_SCHEMAS = frozenset(SCHEMA_OF.values())
_NO_PADDING: bytes = msgpack.packb(b"")
_ADAPTERS = {code: TypeAdapter[Message](with_config(ConfigDict(extra="forbid"))(kind)) for code, kind in MESSAGES.items()}


def encode(message: Message, payload: memoryview | None = None) -> list[Frame]:
    """The one or two frames of a message; the payload is not copied, and a ValueError says that it is missing, too long or too much."""
    header = msgpack.packb({"v": SCHEMA_OF[message.code], "t": message.code, **_fields_of(message)}, default=_fields_of)
    if not isinstance(message, Update | Chunk):
        if payload is not None:
            raise ValueError(f"{type(message).__name__} has no payload")
        return [header]
    if payload is None or not 1 <= payload.nbytes <= CHUNK_BYTES:
        raise ValueError(f"{type(message).__name__} needs a payload of 1 to {CHUNK_BYTES} bytes")
    return [header, payload]


def padded(header: bytes, missing_bytes: int) -> bytes:
    """Fill the padding of an Update's header, which is its last field and empty, with zeros."""
    filled: bytes = msgpack.packb(bytes(missing_bytes))
    return header.removesuffix(_NO_PADDING) + filled


def _fields_of(part: Any) -> dict[str, Any]:
    """Fields by name of a message, or of what lies in one; not copied, as dataclasses.asdict does, which takes longer than all the rest."""
    return {name: getattr(part, name) for name in _NAMES[type(part)]}


def decode(frames: Sequence[Frame]) -> tuple[Message, memoryview]:
    """The message in the frames, checked by type, range and length, and its payload (empty where there is none), not copied.

    Raises:
        BadMessage: it is not a message of this schema; reason "wrong_schema" where only the version is another, else "bad_message".
    """
    if not 1 <= len(frames) <= 2:  # noqa: PLR2004
        raise BadMessage(f"{len(frames)} frames: expected 1 or 2")
    fields = unpacked(frames[0])
    version, code = fields.pop("v", None), fields.pop("t", None)
    if type(version) is not int:
        raise BadMessage("a header without a schema version")
    of_code = SCHEMA_OF.get(code, SCHEMA) if type(code) is int else version  # not isinstance: True is not a code
    if version != of_code or version not in _SCHEMAS:
        raise BadMessage(f"schema version {version}: expected {of_code if of_code in _SCHEMAS else SCHEMA}", reason="wrong_schema")
    if type(code) is not int or code not in _ADAPTERS:
        raise BadMessage(f"an unknown type code: expected one of {sorted(_ADAPTERS)}")
    kind = MESSAGES[code].__name__
    try:
        message = _ADAPTERS[code].validate_python(fields)
    except ValidationError as error:
        raise BadMessage(f"{kind}: {first_fault(error)}") from None  # the cause would carry what the peer sent into our logs
    payload = memoryview(frames[1]) if len(frames) > 1 else memoryview(b"")
    wanted = (1, CHUNK_BYTES) if isinstance(message, Update | Chunk) else (0, 0)
    if not wanted[0] <= payload.nbytes <= wanted[1] or (len(frames) > 1) != (wanted[1] > 0):
        raise BadMessage(f"{kind} with {payload.nbytes} bytes of payload in {len(frames)} frames: expected {wanted[0]} to {wanted[1]}")
    return message, payload


def unpacked(header: Frame, *, most_items: int = _MAX_ITEMS) -> dict[str, Any]:
    """Fields of a header by name, as msgpack has them; BadMessage where it is no map, or larger than any legal one."""
    size_bytes = memoryview(header).nbytes
    if size_bytes > MAX_HEADER_BYTES:
        raise BadMessage(f"a header of {size_bytes} bytes: expected at most {MAX_HEADER_BYTES}")
    num_maps = 0

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_maps
        num_maps += 1
        if num_maps > _MAX_MAPS:
            raise ValueError("too many maps")
        return _unique(pairs)

    try:
        fields = msgpack.unpackb(header, use_list=False, object_pairs_hook=unique, max_array_len=most_items, max_map_len=_MAX_ITEMS)
    except (ValueError, msgpack.UnpackException) as error:  # the library's own errors are of both kinds
        raise BadMessage(f"a header that is not msgpack: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise BadMessage(f"a header that is a {type(fields).__name__}: expected a map")
    return fields


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A map's pairs as a dict; the same key twice could mean one thing here and another there."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields or not isinstance(key, str):
            raise ValueError("a key twice, or not text")
        fields[key] = value
    return fields


def first_fault(error: ValidationError) -> str:
    """The first thing wrong, without what the peer sent: that may be long, or made to be seen in a log."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place[:64]!r}: {fault['msg'][:200]}"
