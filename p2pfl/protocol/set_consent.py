"""Signed consent of a member that a sum over few, itself among them, may become known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import canonical


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConsent:
    """One member's consent to one question over one set of members, whatever sets it has been asked over before."""

    identity: str
    """Public Ed25519 key of the member that consents, hex."""
    question_id: str
    """Digest of the statistic whatever its parameters are."""
    participants: frozenset[str]
    """Identities of the set over which it may be asked."""
    signature: bytes = b""

    def signed_content(self) -> bytes:
        """Canonical bytes of all fields but the signature."""
        return canonical(["p2pfl set consent 1", self.identity, self.question_id, sorted(self.participants)])


def sign_consent(consent: SetConsent, key: Ed25519PrivateKey) -> SetConsent:
    """Sign a consent with the identity of its member."""
    return replace(consent, signature=key.sign(consent.signed_content()))


def consenting_members(consents: Collection[SetConsent], question_id: str, participants: frozenset[str]) -> frozenset[str]:
    """Identities of the members that consent to a question over a set.

    Raises:
        ConfigError: a consent is not signed by the member that it names.
    """
    for consent in consents:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(consent.identity)).verify(consent.signature, consent.signed_content())
        except (InvalidSignature, ValueError):
            raise ConfigError(f"a consent of {consent.identity[:16]} that this member has not signed; leave it out") from None
    return frozenset(each.identity for each in consents if (each.question_id, each.participants) == (question_id, participants))
