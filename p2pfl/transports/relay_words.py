"""The few words between a relay and the two members that meet at it, as bytes, without input or output.

The relay begins with a number that it never uses again, its challenge. A member answers with its key, its neighbour's key, a number of its
own, and a proof: a keyed hash of all of these, under the key that X25519 makes of the member's and the relay's CURVE keys. So only the
holder of the member's private key can answer, and an answer that was recorded is worth nothing. The relay proves itself in the same way.
This only lets members in: between the two ends runs CURVE itself, of which the relay has no key.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from zmq.utils import z85

OPENING = b"p2pfl relay 1\n"
NONCE_BYTES = KEY_BYTES = PROOF_BYTES = 32
CHALLENGE_BYTES = len(OPENING) + NONCE_BYTES
REQUEST_BYTES = 2 * KEY_BYTES + NONCE_BYTES + PROOF_BYTES
WAIT, GO = b".", b"!"
"""Bytes after the answer: the other end has not come yet; from here on it speaks."""


class Answer(IntEnum):
    """A relay's answer to a request, one byte."""

    REFUSED = 0
    """It relays no link between these two."""
    TAKEN = 1
    """It does; its proof follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A member's wish to meet a neighbour at a relay."""

    member: bytes
    """Its CURVE key, z85."""
    neighbour: bytes
    """The neighbour's CURVE key, z85."""
    nonce: bytes
    proof: bytes

    @classmethod
    def read(cls, raw: bytes) -> Request:
        """Take a request of REQUEST_BYTES apart."""
        keys, rest = raw[: 2 * KEY_BYTES], raw[2 * KEY_BYTES :]
        return cls(
            member=z85.encode(keys[:KEY_BYTES]), neighbour=z85.encode(keys[KEY_BYTES:]), nonce=rest[:NONCE_BYTES], proof=rest[NONCE_BYTES:]
        )

    @property
    def raw(self) -> bytes:
        """The bytes of the request."""
        return z85.decode(self.member) + z85.decode(self.neighbour) + self.nonce + self.proof


def new_challenge() -> bytes:
    """Make a relay's first words, which nobody has heard before."""
    return OPENING + secrets.token_bytes(NONCE_BYTES)


def request(challenge: bytes, keys: tuple[bytes, bytes], neighbour: bytes, relay: bytes) -> Request:
    """Make a member's request; *keys* are its public and private key, all keys z85."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = _proof(keys[1], relay, b"member", challenge, keys[0], neighbour, nonce)
    return Request(member=keys[0], neighbour=neighbour, nonce=nonce, proof=proof)


def is_members(asked: Request, challenge: bytes, secret_key: bytes) -> bool:
    """Whether the member whose key a request names has made it, as its relay finds out."""
    try:
        expected = _proof(secret_key, asked.member, b"member", challenge, asked.member, asked.neighbour, asked.nonce)
    except ValueError:  # a key of low order, which nobody has made honestly
        return False
    return hmac.compare_digest(expected, asked.proof)


def relay_proof(asked: Request, challenge: bytes, secret_key: bytes, other: bytes) -> bytes:
    """The proof with which a relay answers a request; the member computes the same with its own private key and the relay's public one."""
    return _proof(secret_key, other, b"relay", challenge, asked.member, asked.neighbour, asked.nonce)


def _proof(secret_key: bytes, other: bytes, *said: bytes) -> bytes:
    own = X25519PrivateKey.from_private_bytes(z85.decode(secret_key))
    shared = own.exchange(X25519PublicKey.from_public_bytes(z85.decode(other)))
    key = hmac.digest(shared, b"p2pfl relay 1", sha256)
    return hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in said), sha256)
