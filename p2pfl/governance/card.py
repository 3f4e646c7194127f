"""What an institution shows the others: its name, its address and its public keys, signed by itself; and how public things are written.

One value has one encoding (`canonical`) and a digest is read out in groups (`grouped`), so that people can compare what their machines
hold.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from p2pfl.errors import ConfigError
from p2pfl.governance.names import RULE, is_name
from p2pfl.statistics.moments import Moments
from p2pfl.yaml_files import check, dump_yaml, load_yaml

_CARD_DOMAIN = b"p2pfl card v1\0"
_KEYS_DOMAIN = b"p2pfl keys v1\0"
_Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_B85 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_KEY_BYTES = 32
_MAX_PORT = 65535
_DIGEST_DIGITS = 64
MAX_CARD_BYTES = 2**20
"""The largest card that is read: room for the moments of 20,000 inputs."""
MAX_ADDRESSES = 8
"""So many a card may name."""


def z85_encode(raw: bytes) -> str:
    """ZeroMQ's text form of a key: ZeroMQ RFC 32, base 85 as in the standard library but with other letters."""
    return base64.b85encode(raw).translate(bytes.maketrans(_B85, _Z85)).decode("ascii")


def z85_decode(text: str) -> bytes:
    """The bytes of a key in ZeroMQ's text form; ValueError for a text that is none."""
    letters = text.encode("ascii")  # raises UnicodeEncodeError, which is a ValueError
    if set(letters) - set(_Z85) or len(letters) % 5:
        raise ValueError("not Z85")
    return base64.b85decode(letters.translate(bytes.maketrans(_Z85, _B85)))


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, floats as repr: one value, one encoding."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def grouped(digest: str) -> str:
    """64 hex digits as 16 groups of 4, for reading out."""
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def plain_digest(text: str) -> str:
    """A digest as people write it (groups, dashes, capitals) as 64 hex digits; ValueError if it is none."""
    digits = re.sub(r"[\s\-]", "", text).lower()
    if not re.fullmatch(rf"[0-9a-f]{{{_DIGEST_DIGITS}}}", digits):
        raise ValueError(f"expected {_DIGEST_DIGITS} hex digits, in groups or not")
    return digits


def split_address(address: str) -> tuple[str, int]:
    """Host and port of tcp://host:port; ValueError for anything else. An IPv6 host stands in brackets and keeps them."""
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._\-]*):([0-9]{1,5})", address)
    if not match or not 1 <= int(match[2]) <= _MAX_PORT:
        raise ValueError("expected tcp://host:port, the host as the others reach it, the port from 1 to 65535")
    host = match[1]
    try:
        unspecified = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        unspecified = False  # a DNS name
    if unspecified:
        raise ValueError("nobody can dial this: expected the host as the others reach it")
    return host, int(match[2])


def is_loopback(address: str) -> bool:
    """Whether an address stands for the machine of whoever dials it."""
    host = split_address(address)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "ip6-localhost")


def _checked_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"expected {RULE}")
    return text


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


Name = Annotated[str, AfterValidator(_checked_name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What an institution shows the others: public, and signed by itself."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    schema: Literal[1] = 1
    """Of this file's format."""

    name: Name
    """Of the member, unique in a study."""

    address: Annotated[str | list[str], AfterValidator(_checked_address)] | None = None
    """tcp://host:port where the others reach it, or a list of such, of which they use the first that works; None: it only dials out."""

    identity: Annotated[str, _checked_hex(_KEY_BYTES)]
    """Public Ed25519 key, hex."""

    curve: Annotated[str, AfterValidator(_checked_curve)]
    """Public CURVE key, Z85: what authenticates its links."""

    samples: Annotated[int, Field(ge=1)] | None = None
    """Training rows, if the site says; weighting by samples needs it."""

    moments: Moments | None = None
    """Of the training rows' inputs, if the site says; a study with `standardise: pooled` needs them."""

    signature: Annotated[str, _checked_hex(2 * _KEY_BYTES)]
    """Ed25519 over everything above, hex."""

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], place: str) -> Card:
        """A card that has been checked, signature included; ConfigError otherwise."""
        card = check(cls, content, place)
        if fault := card.fault():
            raise ConfigError(fault, place)
        return card

    @classmethod
    def load(cls, path: Path | str) -> Card:
        """A card from its file, checked, signature included; ConfigError naming the file otherwise."""
        return cls.from_mapping(load_yaml(path, most_bytes=MAX_CARD_BYTES), str(path))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address, in the order in which the others try them; empty for a site that only dials out."""
        if self.address is None:
            return ()
        return (self.address,) if isinstance(self.address, str) else tuple(self.address)

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        content = asdict(self)
        if self.moments is None:  # so that cards of before there were moments keep their signature and studies their digest
            del content["moments"]
        else:
            content["moments"] = self.moments.as_dict()
        return content

    def save(self, path: Path) -> None:
        """Writes a new file; FileExistsError if there is one."""
        with path.open("x", encoding="utf-8") as file:
            file.write(self.text)

    @property
    def text(self) -> str:
        """The file."""
        return "# Public: give this file to the other members. What is private stays in private.pem.\n" + dump_yaml(self.as_dict())

    def fault(self) -> str | None:
        """A sentence if the signature does not fit the rest."""
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
    """What a card's signature is over: all its fields but the signature."""
    return _CARD_DOMAIN + canonical({key: value for key, value in content.items() if key != "signature"})
