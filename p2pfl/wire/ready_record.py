"""How far one node is with its start, for the whole network: a few bytes under its signature, passed on by its neighbours.

A sealed record is 64 bytes of Ed25519 signature and a msgpack array of the fields of `ReadyRecord` in their order. The signature is over
`p2pfl ready record v1` 00, the study's digest (32 bytes) and the array, so that no record counts in another study or as a round record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Final

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, Strict, TypeAdapter

from p2pfl.wire.messages import MAX_READY_BYTES, RECEIPT_BYTES, Exchange
from p2pfl.wire.round_record import Place, Sign
from p2pfl.wire.sealing import check_signature, unseal_as

_DOMAIN: Final = b"p2pfl ready record v1\0"

Places = Annotated[bytes, Strict(), Field(max_length=MAX_READY_BYTES)]
"""A set of small numbers: bit n % 8 of byte n // 8, from the lowest, stands for n; without zero bytes at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyRecord:
    """One node before, and at, its start."""

    member: Place
    began: Exchange
    """When the node's process began, in milliseconds since 1970 by its own clock; or later, where an earlier process had a later clock."""
    number: Exchange
    """How many records this process had made before."""
    links: Places
    """Neighbours whose link is up, by their place among this node's neighbours in the roster's order."""
    started: Places | None
    """Members that were ready when this node started, by their place in the roster; None: it has not started."""

    @property
    def age(self) -> tuple[int, int]:
        """Larger for a newer record of the same member."""
        return self.began, self.number


_FIELDS = tuple(field.name for field in fields(ReadyRecord))
_ADAPTER = TypeAdapter(ReadyRecord)


def packed(places: Iterable[int]) -> bytes:
    """A set of places as its bits."""
    bits = sum(1 << place for place in set(places))
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


@lru_cache(maxsize=64)
def unpacked(bits: bytes) -> frozenset[int]:
    """The set of places that bits stand for."""
    return frozenset(8 * number + bit for number, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)


def seal(record: ReadyRecord, sign: Sign, study: bytes) -> bytes:
    """The record as it travels, with the signature in front."""
    body: bytes = msgpack.packb([getattr(record, name) for name in _FIELDS])
    return sign(_DOMAIN + study + body) + body


def unseal(sealed: bytes) -> ReadyRecord:
    """Read a sealed record without a look at its signature; BadMessage "bad_record" where it is none."""
    return unseal_as(_ADAPTER, _FIELDS, sealed, most_bytes=MAX_READY_BYTES, kind="ready record")


def verify(sealed: bytes, key: Ed25519PublicKey, study: bytes) -> None:
    """Pass where the signature is the key's; BadMessage "wrong_signature" where it is not."""
    check_signature(sealed, key, _DOMAIN + study, kind="ready record")


def receipt(sealed: bytes) -> bytes:
    """Short name of a sealed record, which whoever has it says to whom it came from."""
    return sha256(sealed).digest()[:RECEIPT_BYTES]
