"""Topics and packets of a link over an MQTT broker, as bytes, without input or output.

Every topic lies under the study's digest and ends in a keyed hash, which the two ends of an edge can make and nobody else. Every packet
begins with such a hash of itself and of its topic: what a third party publishes is told apart and dropped. The key is the one that X25519
makes of the two ends' CURVE keys. It lets packets in and seals none: CURVE itself runs between the two ends, in the bytes that packets
carry.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b, sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from zmq.utils import z85

HASH_BYTES = 16
NONCE_BYTES = 8
STREAM_BYTES = 2 * NONCE_BYTES
_HEAD = struct.Struct(f">B{STREAM_BYTES}sQ")
HEAD_BYTES = HASH_BYTES + _HEAD.size
"""Size of a packet before its data."""
AROUND_BYTES = HEAD_BYTES + 160
"""Room that a packet's head, its topic and what MQTT puts around them take."""
_DOMAIN = b"p2pfl mqtt 1"


class Kind(IntEnum):
    """Kind of a packet, with what its stream and its number stand for."""

    HELLO = 1
    """This end has come to the broker."""
    OPEN = 2
    """The end that dials wants a stream: its session with the broker, and a number that it never uses again."""
    ACCEPT = 3
    """The other end has heard it: the stream, which ends in a number of its own, and its session."""
    DATA = 4
    """Bytes of the stream, and how many came before them; none where the stream begins."""
    ACK = 5
    """How many bytes of the stream have come; after the head, 8 bytes say up to how many may be sent."""
    END = 6
    """No more bytes are sent than so many."""
    RESET = 7
    """The sender has no such stream, or gives it up."""
    GONE = 8
    """Last will: the broker says that a client has died. The number is its session's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """A packet of one end of an edge."""

    kind: Kind
    stream: bytes = bytes(STREAM_BYTES)
    number: int = 0
    data: bytes | memoryview = b""


class Words:
    """Topics and packets of one end of an edge at a broker.

    Args:
        secret_key: CURVE, z85, of this end.
        public_key: CURVE, z85, belonging to it.
        peer: CURVE key of the other end, z85.
        study: the study's digest, hex.
    """

    def __init__(self, secret_key: bytes, public_key: bytes, peer: bytes, study: str) -> None:
        own = X25519PrivateKey.from_private_bytes(z85.decode(secret_key))
        shared = own.exchange(X25519PublicKey.from_public_bytes(z85.decode(peer)))
        self._key = hmac.digest(shared, _DOMAIN + b"\0" + study.encode(), sha256)
        self.inbox = self._topic(study, public_key)
        """Topic that this end listens to."""
        self.outbox = self._topic(study, peer)
        """Topic that the other end listens to."""

    def write(self, packet: Packet) -> bytes:
        """Make the payload of a packet for the other end."""
        rest = _HEAD.pack(packet.kind, packet.stream, packet.number) + packet.data
        return self._hash(self.outbox, rest) + rest

    def read(self, payload: bytes) -> Packet | None:
        """Read the payload of a message to this end; None where the other end has not made it."""
        rest = memoryview(payload)[HASH_BYTES:]
        if len(rest) < _HEAD.size or not hmac.compare_digest(self._hash(self.inbox, rest), payload[:HASH_BYTES]):
            return None
        kind, stream, number = _HEAD.unpack(rest[: _HEAD.size])
        try:
            return Packet(kind=Kind(kind), stream=stream, number=number, data=rest[_HEAD.size :])
        except ValueError:  # of a later version
            return None

    def _topic(self, study: str, receiver: bytes) -> str:
        found = blake2b(b"topic\0" + receiver, key=self._key, digest_size=HASH_BYTES)
        return f"p2pfl/{study}/{found.hexdigest()}"

    def _hash(self, topic: str, rest: bytes | memoryview) -> bytes:
        found = blake2b(topic.encode() + b"\0", key=self._key, digest_size=HASH_BYTES)
        found.update(rest)
        return found.digest()
