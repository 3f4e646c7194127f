"""A session of secure sums: who takes part under which fresh keys, agreed by everybody before the first sum.

Each participant floods one opening. When those of all are there and equal but for their keys, their digest is the transcript that every
message of the session carries. Keys live in memory and are erased at the end, so that a node that restarts cannot continue a session.
A member that takes no part runs a session as well, without keys of masks: it passes on what belongs to it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pfl.errors import BadMessage
from p2pfl.governance.encoding import canonical
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.privacy.masks import KEY_BYTES, SessionMasks, SessionSecret
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import Opening, Signed, check_signed, sign

NONCE_BYTES = 32


class SecureSession:
    """One node's part of one session.

    Args:
        terms: the plan and who takes part.
        number: of the session; a node never uses one twice.
        me: place of this node in the roster.
        signing: this node's identity.
    """

    def __init__(self, terms: SumTerms, number: int, me: int, signing: Ed25519PrivateKey) -> None:
        self.terms, self.number, self._me = terms, number, me
        self.transcript: bytes | None = None
        """SHA-256 of all openings; None until all are there."""
        self.openings: dict[int, Opening] = {}
        """Openings that are there, by their members."""
        self.is_over = False
        self._keys = {each: Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)) for each, text in enumerate(terms.identities)}
        self._secret: SessionSecret | None = None
        self._masks: SessionMasks | None = None
        self._group_key = b""
        if me in terms.participants:
            self._secret = SessionSecret()
            opening = Opening(
                member=me,
                study=terms.study,
                plan=terms.plan,
                participants=terms.participants,
                session=number,
                public=self._secret.public,
                nonce=os.urandom(NONCE_BYTES),
            )
            self.openings[me] = sign(opening, signing)

    @property
    def missing(self) -> Sequence[int]:
        """Participants whose opening has not come."""
        return [each for each in self.terms.participants if each not in self.openings]

    def check_signed(self, message: Signed) -> None:
        """Pass where a member of the study has signed a message.

        Raises:
            BadMessage: the member is none of the study or has not signed; reason "unknown_member" or "wrong_signature".
        """
        if message.member not in self._keys:
            raise BadMessage(f"member {message.member} is not in the roster", reason="unknown_member")
        check_signed(message, self._keys[message.member])

    def take(self, opening: Opening) -> bool:
        """Take an opening of this session; whether it is new and is to be passed on.

        Raises:
            BadMessage: not signed, differs in its terms from those of this node, or is the member's second one; the reason says which
        """
        self.check_signed(opening)
        terms, name = self.terms, self._name(opening.member)
        agreed = {"study": terms.study, "plan": terms.plan, "participants": terms.participants, "session": self.number}
        for field, value in agreed.items():
            if getattr(opening, field) != value:
                raise BadMessage(f"{name} opens a session with another {field}", reason=f"wrong_{field}")
        if opening.member not in terms.participants:
            raise BadMessage(f"{name} opens a session in which it takes no part", reason="unknown_member")
        if len(opening.nonce) != NONCE_BYTES or len(opening.public) != KEY_BYTES:
            raise BadMessage(f"{name} opens a session with a key or nonce of another length", reason="bad_key")
        known = self.openings.get(opening.member)
        if known is not None:
            if known.signed_content() != opening.signed_content():
                raise BadMessage(f"{name} opens session {self.number} twice, with different keys", reason="second_opening")
            return False
        if self.is_over:
            return False
        self.openings[opening.member] = opening
        if not self.missing:
            self._begin()
        return True

    def mask(self, sum_id: str, position: int, shape: tuple[int, ...]) -> Limbs:
        """Make this node's mask of one sum, (..., L); ValueError where it has been made, or where this node takes no part."""
        if self._masks is None:
            raise ValueError("the session is over or not open, or this node takes no part in it: it has no mask")
        return self._masks.mask(position, shape, canonical([sum_id, position, list(shape)]))

    def mac(self, sum_id: str, total: Limbs) -> bytes:
        """HMAC-SHA256 of a total under the key of the group, which others than members of the study never see."""
        if not self._group_key:
            raise ValueError("the session is over or not open: it has no group key")
        head = canonical(["p2pfl sum mac 1", sum_id, list(total.shape)])
        return hmac.digest(self._group_key, head + total.astype("<u8").tobytes(), "sha256")

    def erase(self) -> None:
        """End the session and forget all its keys."""
        self.is_over = True
        self._group_key = b""
        if self._secret is not None:
            self._secret.erase()
        if self._masks is not None:
            self._masks.erase()
        self._secret = self._masks = None

    def _begin(self) -> None:
        ordered = [self.openings[each] for each in self.terms.participants]
        transcript = hashlib.sha256(canonical([each.signed_content().decode("ascii") for each in ordered])).digest()
        if self._secret is not None:
            keys = {}
            for other in (each for each in ordered if each.member != self._me):
                context = canonical(["p2pfl mask 1", *sorted((self._me, other.member))])
                try:
                    keys[other.member] = self._secret.pair_key(other.public, transcript=transcript, context=context)
                except BadMessage as error:
                    del self.openings[other.member]  # it is missing, and is named where the session ends
                    raise BadMessage(f"{self._name(other.member)}: its key makes no secret", reason="bad_key") from error
            self._masks = SessionMasks(self._me, keys)
            self._secret.erase()  # the keys of all pairs are made
        nonces = b"".join(each.nonce for each in ordered)
        self._group_key = HKDF(SHA256(), KEY_BYTES, salt=transcript, info=canonical(["p2pfl group 1"])).derive(nonces)
        self.transcript = transcript

    def _name(self, member: int) -> str:
        return self.terms.names[member]
