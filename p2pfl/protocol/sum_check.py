"""Checked sums: random linear combinations that show who altered or dropped a part of a sum.

Every participant commits to its masked array before the first one is added. After the total, coefficients follow from the commitments and
the total, so that nobody knows them before. The combinations of what each member added, received and sent must then fit along the tree.
They reveal nothing about values: masked arrays could be public.

An alteration passes with probability 2^-(128 - v), where 2^v is the largest power of two that divides it.

Shapes: E numbers of an array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2pfl.privacy.fixed_point import Limbs
from p2pfl.privacy.masks import uniform_words
from p2pfl.protocol.secure_tree import SumTree
from p2pfl.wire.secure_messages import CheckValue

MODULUS: Final = 1 << 128
_NUM_LIMBS = 2
_HALF_BITS = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alteration:
    """Members between which a part of a sum was altered or dropped; one, where it can only be this one."""

    members: tuple[int, ...]


def array_digest(masked: Limbs) -> bytes:
    """SHA-256 of an array as it travels, little-endian."""
    return hashlib.sha256(masked.astype("<u8").tobytes()).digest()


def coefficients(transcript: bytes, digests: Mapping[int, bytes], total: Limbs) -> Limbs:
    """Random coefficients of a check, (E, 2), that nobody knows before the total is there.

    Args:
        transcript: of the session, 32 bytes.
        digests: of the masked arrays, 32 bytes each, by participant.
        total: (..., 2) of E numbers.
    """
    ordered = b"".join(digests[member] for member in sorted(digests))
    seed = hashlib.sha256(transcript + ordered + total.astype("<u8").tobytes()).digest()  # every part has one length
    return uniform_words(seed, (total.size // _NUM_LIMBS, _NUM_LIMBS))


def combination(coefficients: Limbs, array: Limbs) -> int:
    """Inner product modulo 2^128 of coefficients (E, 2) and an array of E numbers, (..., 2)."""
    numbers = array.reshape(-1, _NUM_LIMBS)
    low, high = coefficients[:, 0], coefficients[:, 1]
    crossed = _exact_sum(low * numbers[:, 1]) + _exact_sum(high * numbers[:, 0])  # each product modulo 2^64, as only that counts
    return (_exact_products(low, numbers[:, 0]) + (crossed << 64)) % MODULUS


def alterations(tree: SumTree, values: Mapping[int, CheckValue], total: int) -> list[Alteration]:
    """Find where a sum was altered.

    Args:
        tree: along which it was added.
        values: of all members of the tree.
        total: the combination of the total.

    Returns:
        A member whose own numbers do not add up, and else two members of which one says that it sent what the other did not receive.
    """
    found = []
    for member in tree.members:
        value = values[member]
        received = dict(value.received)
        fits = set(received) == set(tree.children(member)) and len(received) == len(value.received)
        fits = fits and (member in tree.participants or value.own == 0)
        if not fits or (value.own + sum(received.values()) - value.sent) % MODULUS:
            found.append(Alteration(members=(member,)))
    if values[tree.root].sent != total:
        found.append(Alteration(members=(tree.root,)))
    if found:
        return found
    sent_and_received = [
        (child, parent, values[child].sent, dict(values[parent].received)[child]) for child, parent in tree.parents.items()
    ]
    return [Alteration(members=(parent, child)) for child, parent, sent, received in sent_and_received if sent != received]


def _exact_sum(words: NDArray[np.uint64]) -> int:
    """Sum of up to 2^32 words of 64 bits, without wrapping around."""
    return int((words & _LOW_HALF).sum()) + (int((words >> _HALF_BITS).sum()) << 32)


def _exact_products(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> int:
    """Sum of the full products of words of 64 bits."""
    a_low, a_high, b_low, b_high = a & _LOW_HALF, a >> _HALF_BITS, b & _LOW_HALF, b >> _HALF_BITS
    middle = _exact_sum(a_low * b_high) + _exact_sum(a_high * b_low)
    return _exact_sum(a_low * b_low) + (middle << 32) + (_exact_sum(a_high * b_high) << 64)
