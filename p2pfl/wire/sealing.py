"""How records that travel under a signature are read: 64 bytes of Ed25519 signature, then a msgpack array of a record's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from p2pfl.errors import BadMessage

SIGNATURE_BYTES: Final = 64

R = TypeVar("R")


def unseal_as(adapter: TypeAdapter[R], names: Sequence[str], sealed: bytes, *, most_bytes: int, kind: str) -> R:
    """Read a sealed record of fields with these names, checked by type, range and size; its signature is not looked at.

    Raises:
        BadMessage: it is no record of that kind; reason "bad_record".
    """
    try:
        if not SIGNATURE_BYTES < len(sealed) <= most_bytes:
            raise BadMessage(f"{len(sealed)} bytes: expected at most {most_bytes}", reason="bad_record")
        body = msgpack.unpackb(sealed[SIGNATURE_BYTES:], use_list=False, max_array_len=len(names), max_map_len=0)
        if not isinstance(body, tuple):
            raise TypeError("not an array")
        return adapter.validate_python(dict(zip(names, body, strict=True)))
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        raise BadMessage(f"a {kind} with a wrong {place[:64]!r}", reason="bad_record") from None
    except (ValueError, TypeError, msgpack.UnpackException):
        raise BadMessage(f"a {kind} that is not one of this version", reason="bad_record") from None


def check_signature(sealed: bytes, key: Ed25519PublicKey, signed_before: bytes, *, kind: str) -> None:
    """Pass where the signature over *signed_before*, the record's domain and the study's digest, and the record is the key's.

    Raises:
        BadMessage: it is not; reason "wrong_signature".
    """
    try:
        key.verify(sealed[:SIGNATURE_BYTES], signed_before + sealed[SIGNATURE_BYTES:])
    except InvalidSignature:
        raise BadMessage(f"a {kind} that its node has not signed", reason="wrong_signature") from None
