"""Messages of secure sums, and what they are signed as.

Arrays go along the tree, over links whose other end is known. All other messages are flooded over the study's graph, and each is signed by
the member that it speaks of. Members are given by their places in the roster.

Shapes: L limbs of a number, 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Protocol, TypeVar

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, Strict

from p2pfl.errors import BadMessage, on_one_line
from p2pfl.governance.encoding import canonical

MOST_MEMBERS: Final = 65_536
"""Members of a study in which sums are made."""

MOST_PARTICIPANTS: Final = 256
"""Up to here each participant of a sum shares a key with every other one."""

MOST_SUMS: Final = 512
"""Sums in one plan: their ids with a digest each fit into one header."""

MOST_REASON: Final = 500
"""Code points of the sentence that says why a session has ended."""

RESIDUE_BYTES: Final = 16
"""Bytes of a number modulo 2^128, the lowest first."""


def _residue(raw: Any) -> int:
    if not isinstance(raw, bytes) or len(raw) != RESIDUE_BYTES:
        raise ValueError(f"expected {RESIDUE_BYTES} bytes")
    return int.from_bytes(raw, "little")


def _on_one_line(text: str) -> str:
    if on_one_line(text) != text:
        raise ValueError("expected one line without control characters")
    return text


def sentence(text: str) -> str:
    """Make a text one that travels: on one line, and cut where it is too long."""
    return on_one_line(text)[:MOST_REASON]


Limbs = NDArray[np.uint64]
"""(..., L), little-endian: limb 0 counts ones, limb 1 counts 2^64."""

Place = Annotated[int, Strict(), Field(ge=0, lt=MOST_MEMBERS)]
Places = Annotated[tuple[Place, ...], Strict(), Field(max_length=MOST_PARTICIPANTS)]
HexDigest = Annotated[str, Strict(), Field(pattern=r"\A[0-9a-f]{64}\z")]
Digest = Annotated[bytes, Strict(), Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Strict(), Field(min_length=64, max_length=64)]
SessionNumber = Annotated[int, Strict(), Field(ge=1, lt=2**53)]
Position = Annotated[int, Strict(), Field(ge=0, lt=MOST_SUMS)]
Residue = Annotated[int, BeforeValidator(_residue)]
Sentence = Annotated[str, Strict(), Field(min_length=1, max_length=MOST_REASON), AfterValidator(_on_one_line)]


class Signed(Protocol):
    """A message that is flooded, under the signature of one member."""

    @property
    def member(self) -> int:
        """Place of the member that has signed it."""
        ...

    @property
    def signature(self) -> bytes:
        """Ed25519 signature over `signed_content`; empty until it is signed."""
        ...

    def signed_content(self) -> bytes:
        """Canonical bytes that the signature covers, another for every kind of message."""
        ...


S = TypeVar("S", bound=Signed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """A participant's readiness for a session, and its fresh public key in it."""

    member: Place
    study: HexDigest
    """Digest of the study, 64 hex digits."""
    plan: HexDigest
    """Digest of the sums that are planned, 64 hex digits."""
    participants: Places
    session: SessionNumber
    public: Digest
    """X25519 public key of this session only, 32 bytes."""
    nonce: Digest
    """32 random bytes, from which the group key is made."""
    signature: Signature = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        own = [self.member, self.public.hex(), self.nonce.hex()]
        return canonical(["p2pfl sum opening 1", self.study, self.plan, list(self.participants), self.session, *own])


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldTotals:
    """All totals that a member holds when a session opens: they are final and are not computed again."""

    member: Place
    transcript: Digest
    macs: Annotated[tuple[tuple[HexDigest, Digest], ...], Strict(), Field(max_length=MOST_SUMS)]
    """Sum ids with the HMAC of each total under the group key of this session, sorted."""
    signature: Signature = b""

    def has(self, sum_id: str) -> bool:
        """Whether the member holds the total of a sum."""
        return any(each == sum_id for each, _ in self.macs)

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        macs = [[sum_id, mac.hex()] for sum_id, mac in self.macs]
        return canonical(["p2pfl sum held 1", self.member, self.transcript.hex(), macs])


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDigest:
    """A participant's commitment to its masked array in a checked sum, before the first array is added."""

    member: Place
    transcript: Digest
    sum_id: HexDigest
    position: Position
    digest: Digest
    """SHA-256 of the masked array, little-endian."""
    signature: Signature = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        return canonical(["p2pfl sum digest 1", self.member, self.transcript.hex(), self.sum_id, self.position, self.digest.hex()])


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedTotal:
    """A member's statement of the total that it holds, without the total."""

    member: Place
    transcript: Digest
    sum_id: HexDigest
    position: Position
    participants: Places
    mac: Digest
    """HMAC-SHA256 of the total under the group key: a small count is not guessed from it."""
    signature: Signature = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        head = [self.member, self.transcript.hex(), self.sum_id, self.position]
        return canonical(["p2pfl sum total 1", *head, list(self.participants), self.mac.hex()])


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckValue:
    """Random combinations, modulo 2^128, of the arrays that a member of the tree has sent and received in a checked sum."""

    member: Place
    transcript: Digest
    sum_id: HexDigest
    position: Position
    own: Residue
    """The combination for its masked array; 0 where it has none."""
    received: Annotated[tuple[tuple[Place, Residue], ...], Strict(), Field(max_length=MOST_PARTICIPANTS)]
    """The one for the subtotal that each child has sent, by the child, sorted."""
    sent: Residue
    """The one for the subtotal that it has sent to its parent; at the root, for the total."""
    signature: Signature = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature; numbers of 128 bits as text."""
        head = [self.member, self.transcript.hex(), self.sum_id, self.position]
        received = [[child, str(value)] for child, value in self.received]
        return canonical(["p2pfl sum check 1", *head, str(self.own), received, str(self.sent)])


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionEnd:
    """A member's word that a session is over before its plan is, and why."""

    member: Place
    study: HexDigest
    session: SessionNumber
    reason: Sentence
    """One sentence."""
    names: Places
    """Members that are away, or between which something went wrong."""
    signature: Signature = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        return canonical(["p2pfl sum end 1", self.member, self.study, self.session, self.reason, list(self.names)])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskedSubtotal:
    """Masked arrays of one branch of the tree, added up: from a child to its parent."""

    transcript: Digest
    sum_id: HexDigest
    position: int
    limbs: Limbs
    """(..., L)"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Total:
    """The total of all participants: from a parent to its child, or from a member that held it before the session."""

    transcript: Digest
    sum_id: HexDigest
    position: int
    """-1 where it was held before the session."""
    limbs: Limbs
    """(..., L)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSignedRequest:
    """Question of a node that starts: what is the newest that it has signed itself? A neighbour answers with its opening and total."""

    member: Place


Flooded = Opening | HeldTotals | MaskedDigest | SignedTotal | CheckValue | SessionEnd
Message = Flooded | MaskedSubtotal | Total | LastSignedRequest
Statement = HeldTotals | MaskedDigest | SignedTotal | CheckValue
SumMessage = MaskedDigest | SignedTotal | CheckValue | MaskedSubtotal | Total
SessionMessage = HeldTotals | SumMessage

HELD_BEFORE: Final = -1
"""Position of a total that was held before the session."""


def message_key(sender: int, message: SessionMessage) -> tuple[str, int, int]:
    """Kind, member and position of a message; there is one of each in a session."""
    position = HELD_BEFORE if isinstance(message, HeldTotals) else message.position
    if isinstance(message, Total) and position == HELD_BEFORE:
        return f"Total {message.sum_id}", sender, position
    return type(message).__name__, sender if isinstance(message, (MaskedSubtotal, Total)) else message.member, position


def sign(message: S, key: Ed25519PrivateKey) -> S:
    """Sign a message with the identity of its member."""
    return replace(message, signature=key.sign(message.signed_content()))  # type: ignore[type-var]


def check_signed(message: Signed, key: Ed25519PublicKey) -> None:
    """Pass where a message is signed by the member that it names.

    Raises:
        BadMessage: it is not; reason "wrong_signature".
    """
    try:
        key.verify(message.signature, message.signed_content())
    except InvalidSignature:
        raise BadMessage(f"a {type(message).__name__} that member {message.member} has not signed", reason="wrong_signature") from None
