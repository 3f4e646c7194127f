"""Negotiation of the schema: each end announces its newest, and the lower of the two is used.

Members of before there was a choice refuse a Hello with a further field. So the announcement lies in the incarnation, a number of 63 bits
of which they look at nothing: 31 bits are drawn, 24 tell an announcement from a number that was drawn as a whole, and 8 are the schema.
TLS 1.3 announces itself to older ends in the same way (RFC 8446, section 4.1.3).
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from p2pfl.wire.messages import NEWEST_SCHEMA, SCHEMA

_DOMAIN: Final = b"p2pfl schema\0"
_DRAWN_BITS, _CHECK_BITS, _SCHEMA_BITS = 31, 24, 8


def announcing(drawn: int, schema: int = NEWEST_SCHEMA) -> int:
    """Make an incarnation, from 1 to 2**63 - 1, of a number of which 31 bits are drawn at random; it announces a schema."""
    number: int = drawn & (1 << _DRAWN_BITS) - 1
    newest: int = schema & (1 << _SCHEMA_BITS) - 1
    return number << _CHECK_BITS + _SCHEMA_BITS | _check(number, newest) << _SCHEMA_BITS | newest


def announced_schema(incarnation: int) -> int:
    """Read the newest schema that an incarnation announces; the oldest one where it announces none."""
    newest, rest = incarnation & (1 << _SCHEMA_BITS) - 1, incarnation >> _SCHEMA_BITS
    number, check = rest >> _CHECK_BITS, rest & (1 << _CHECK_BITS) - 1
    return newest if newest >= SCHEMA and check == _check(number, newest) else SCHEMA


def _check(number: int, schema: int) -> int:
    text = number.to_bytes(8, "big") + bytes([schema])
    return int.from_bytes(sha256(_DOMAIN + text).digest()[: _CHECK_BITS // 8], "big")
