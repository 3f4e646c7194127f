"""The record of one round of a node for the whole network: a few numbers under its signature, passed on by its neighbours.

A sealed record is 64 bytes of Ed25519 signature and a msgpack array of the fields of `RoundRecord` in their order. The signature is over
`p2pfl round record v1` 00, the study's digest (32 bytes) and the array, so that no record counts in another study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Final

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, Strict, TypeAdapter

from p2pfl.wire.messages import LARGEST_AMOUNT, MAX_RECORD_BYTES, Amount, Exchange, Flag
from p2pfl.wire.sealing import SIGNATURE_BYTES, check_signature, unseal_as

MAX_NAMED: Final = 16
"""Most neighbours that a record names of those whom a node went on without."""

MAX_METRICS: Final = 8
PARTS: Final = ("train", "wait", "mix", "evaluate")
"""Parts of a round that its milliseconds were spent on."""

DIGEST_BYTES: Final = 20

_DOMAIN = b"p2pfl round record v1\0"

Figure = Annotated[float, Strict(), Field(ge=-LARGEST_AMOUNT, le=LARGEST_AMOUNT)]
Place = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]
"""In the roster's order."""

Level = Annotated[int, Strict(), Field(ge=0, le=32)]

Sign = Callable[[bytes], bytes]
"""Ed25519, 64 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """One node's round. What a site withholds is None."""

    member: Place
    began: Exchange
    """When the node's run began, in milliseconds since 1970 by its own clock: what it said in an earlier run is past."""
    round: Exchange
    level: Level
    """The node speaks of rounds that 2**level divides."""
    settles: Flag
    """The round had no local steps."""
    closing: Flag
    """The node has stopped: this was its last round."""
    disagreement: Amount | None
    """Half the sum of ||x_i - x_j||**2 over the neighbours that came, of the models exchanged in the round; None: not measured, or no
    number."""
    norm: Amount | None
    """||x_i|| of the same."""
    loss: Figure | None
    skipped: Exchange
    """How many neighbours did not come in time."""
    without: Annotated[tuple[Place, ...], Strict(), Field(max_length=MAX_NAMED)]
    """The first of them."""
    agreed_for: Exchange
    sent: Exchange
    """Bytes of updates in this round."""
    milliseconds: Annotated[tuple[Exchange, Exchange, Exchange, Exchange], Strict()]
    """Spent on PARTS."""
    measured: Exchange | None
    """The round whose model the metrics are of."""
    metrics: Annotated[tuple[Figure | None, ...], Strict(), Field(max_length=MAX_METRICS)]
    """In the order of their names."""
    rows: tuple[Exchange, Exchange] | None
    """Training and test rows of the site, as exactly as it says."""
    update: Annotated[bytes, Strict(), Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)] | None = None
    """Digest of the update that the node sent to all its neighbours in this round; None: it says nothing of that."""


_FIELDS = tuple(field.name for field in fields(RoundRecord))
_ADAPTER = TypeAdapter(RoundRecord)
_WITH_UPDATE: bytes = msgpack.Packer().pack_array_header(len(_FIELDS))


def seal(record: RoundRecord, sign: Sign, study: bytes) -> bytes:
    """The record as it travels; the disagreement keeps every bit, as it bounds something, all other numbers are shortened to 32."""
    exact, short = msgpack.Packer(), msgpack.Packer(use_single_float=True)
    names = _FIELDS[:-1] if record.update is None else _FIELDS
    packed = [(exact if name == "disagreement" else short).pack(getattr(record, name)) for name in names]
    body: bytes = exact.pack_array_header(len(names)) + b"".join(packed)
    return sign(_DOMAIN + study + body) + body


def unseal(sealed: bytes) -> RoundRecord:
    """Read a sealed record without a look at its signature; BadMessage "bad_record" where it is none."""
    names = _FIELDS if sealed[SIGNATURE_BYTES:].startswith(_WITH_UPDATE) else _FIELDS[:-1]
    return unseal_as(_ADAPTER, names, sealed, most_bytes=MAX_RECORD_BYTES, kind="record")


def verify(sealed: bytes, key: Ed25519PublicKey, study: bytes) -> None:
    """Pass where the signature is the key's; BadMessage "wrong_signature" where it is not."""
    check_signature(sealed, key, _DOMAIN + study, kind="record")
