"""The card of an institution: its name, its address and its public keys, signed by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from p2pfl.errors import ConfigError
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.encoding import canonical, z85_decode
from p2pfl.governance.names import Name, split_address
from p2pfl.statistics.moments import Moments
from p2pfl.yaml_files import check, dump_yaml, load_yaml

_CARD_DOMAIN = b"p2pfl card v1\0"
_KEYS_DOMAIN = b"p2pfl keys v1\0"
_KEY_BYTES = 32
MAX_CARD_BYTES = 2**20
"""The largest card that is read: room for the moments of 20,000 inputs."""
MAX_ADDRESSES = 8
"""The most addresses that a card may name."""


def _checked_address(value: str | list[str]) -> str | list[str]:
    """Refuse an address, or a list of them, that nobody can dial."""
    if isinstance(value, str):
        split_address(value)
        return value
    if not 1 <= len(value) <= MAX_ADDRESSES:
        raise ValueError(f"{len(value)} addresses: expected 1 to {MAX_ADDRESSES}, the first that works is used")
    for text in value:
        try:
            split_address(text)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
    if len(set(value)) < len(value):
        raise ValueError("an address stands in it twice")
    return value


def _checked_hex(num_bytes: int) -> AfterValidator:
    def checked(text: str) -> str:
        if not re.fullmatch(rf"[0-9a-f]{{{2 * num_bytes}}}", text):
            raise ValueError(f"expected {2 * num_bytes} small hex digits")
        return text

    return AfterValidator(checked)


def _checked_curve(text: str) -> str:
    try:
        raw = z85_decode(text)
    except ValueError:
        raw = b""
    if len(raw) != _KEY_BYTES:
        raise ValueError("expected a public CURVE key, 40 Z85 characters")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The public card of a member, signed by itself."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: Literal[1] = 1
    """Number of this file's format."""
    name: Name
    """Name of the member, unique in a study."""
    address: Annotated[str | list[str], AfterValidator(_checked_address)] | None = None
    """tcp://host:port where the others reach it, or a list of such, of which they use the first that works; None: it only dials out."""
    relay: Annotated[str | list[str], AfterValidator(_checked_address)] | None = None
    """Where this member relays links of others, tcp://host:port or a list of such; None: it does not offer that."""
    identity: Annotated[str, _checked_hex(_KEY_BYTES)]
    """Public Ed25519 key, hex."""
    curve: Annotated[str, AfterValidator(_checked_curve)]
    """Public CURVE key, Z85: what authenticates its links."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Training rows, if the site says; weighting by samples needs it."""
    moments: Moments | None = None
    """Moments of the training rows' inputs, if the site says; a study with `standardise: pooled` needs them."""
    cohort: CohortCommitment | None = None
    """Commitment to the rows that the site has frozen; None: it has said nothing of them."""
    signature: Annotated[str, _checked_hex(2 * _KEY_BYTES)]
    """Ed25519 over everything above, hex."""

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], place: str) -> Card:
        """Check a card's content, signature included; ConfigError where it is wrong."""
        card = check(cls, content, place)
        if fault := card.fault():
            raise ConfigError(fault, place)
        return card

    @classmethod
    def load(cls, path: Path | str) -> Card:
        """Load a card from its file and check it, signature included; ConfigError names the file."""
        return cls.from_mapping(load_yaml(path, most_bytes=MAX_CARD_BYTES), str(path))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address, in the order in which the others try them; empty for a site that only dials out."""
        if self.address is None:
            return ()
        return (self.address,) if isinstance(self.address, str) else tuple(self.address)

    @property
    def relay_addresses(self) -> tuple[str, ...]:
        """Every address of the relay that this member offers; empty where it offers none."""
        if self.relay is None:
            return ()
        return (self.relay,) if isinstance(self.relay, str) else tuple(self.relay)

    def as_dict(self) -> dict[str, Any]:
        """The content of the card's file."""
        content = asdict(self)
        if self.relay is None:  # so that cards of before there were relays keep their signature and studies their digest
            del content["relay"]
        if self.moments is None:  # so that cards of before there were moments keep their signature and studies their digest
            del content["moments"]
        else:
            content["moments"] = self.moments.as_dict()
        if self.cohort is None:  # the same for cards of before there were cohorts
            del content["cohort"]
        else:
            content["cohort"] = self.cohort.as_dict()
        return content

    def save(self, path: Path) -> None:
        """Write the card to a new file; FileExistsError if there is one."""
        with path.open("x", encoding="utf-8") as file:
            file.write(self.text)

    @property
    def text(self) -> str:
        """The text of the card's file."""
        return "# Public: give this file to the other members. What is private stays in private.pem.\n" + dump_yaml(self.as_dict())

    def fault(self) -> str | None:
        """The fault that the signature does not fit the rest, as a sentence; None where it fits."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.identity)).verify(
                bytes.fromhex(self.signature), card_message(self.as_dict())
            )
        except (InvalidSignature, ValueError):
            return (
                f"signature = '{self.signature[:16]}…': does not fit the rest of the card of {self.name!r}; "
                "somebody has changed the card, ask its site for the original"
            )
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both public keys, 64 hex digits."""
        return sha256(_KEYS_DOMAIN + bytes.fromhex(self.identity) + z85_decode(self.curve)).hexdigest()


def card_message(content: Mapping[str, Any]) -> bytes:
    """The bytes that a card's signature is over: all its fields but the signature."""
    return _CARD_DOMAIN + canonical({key: value for key, value in content.items() if key != "signature"})
