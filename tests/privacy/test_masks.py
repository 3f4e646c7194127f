"""Masks cancel in the total, hide each term, and are made once."""

from __future__ import annotations

import hashlib
from functools import reduce

import numpy as np
import pytest
from scipy import stats

from p2pfl.errors import BadMessage
from p2pfl.privacy.fixed_point import FixedPoint, added
from p2pfl.privacy.masks import SessionMasks, SessionSecret

STATISTICS = FixedPoint(bits=128, fraction_bits=60)
SHAPE = (5, 2)


def session(num_participants):
    """The masks of all participants of a session."""
    secrets = [SessionSecret() for _ in range(num_participants)]
    transcript = hashlib.sha256(b"".join(each.public for each in secrets)).digest()

    def keys(me):
        others = [other for other in range(num_participants) if other != me]
        pairs = {other: b"%d %d" % (min(me, other), max(me, other)) for other in others}
        return {other: secrets[me].pair_key(secrets[other].public, transcript=transcript, context=pairs[other]) for other in others}

    return [SessionMasks(me, keys(me)) for me in range(num_participants)]


@pytest.mark.parametrize("num_participants", [2, 3, 13])
@pytest.mark.parametrize("shape", [(1, 2), (4, 3, 1), (0, 2)])
def test_masks_of_all_participants_sum_to_zero(num_participants, shape):
    masks = [each.mask(0, shape, b"sum 0") for each in session(num_participants)]
    assert not reduce(added, masks).any()


def test_the_masked_sum_is_the_plain_sum_bit_for_bit_in_any_order():
    values = np.random.default_rng(0).normal(scale=1e5, size=(7, 5))
    masks = [each.mask(0, SHAPE, b"sum 0") for each in session(7)]
    plain = [STATISTICS.encode(row) for row in values]
    sent = [added(term, mask) for term, mask in zip(plain, masks, strict=True)]

    chain, tree = reduce(added, sent), added(reduce(added, sent[4:]), reduce(added, sent[:4]))

    assert chain.tolist() == tree.tolist() == reduce(added, plain).tolist()


def test_a_sum_without_one_share_is_uniform_in_both_limbs():
    draws = 100_000  # words of either limb
    masks = [each.mask(0, (draws, 2), b"sum 0") for each in session(3)]
    partial = added(masks[0], masks[1])

    for limb in (0, 1):
        for shift in (0, 56):  # the lowest and the highest byte
            counts = np.bincount((partial[:, limb] >> np.uint64(shift)).astype(np.int64) & 255, minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-9


def test_sessions_and_sums_have_different_masks():
    first, second = session(3)[0], session(3)[0]
    found = [first.mask(0, SHAPE, b"sum 0"), first.mask(1, SHAPE, b"sum 1"), second.mask(0, SHAPE, b"sum 0")]
    assert len({each.tobytes() for each in found}) == 3


@pytest.mark.parametrize(("position", "context"), [(4, b"another"), (3, b"another"), (5, b"sum 4")])
def test_no_mask_is_made_twice(position, context):
    masks = session(3)[0]
    masks.mask(4, SHAPE, b"sum 4")
    with pytest.raises(ValueError, match="each is made once"):
        masks.mask(position, SHAPE, context)


def test_nothing_is_left_of_a_session_that_is_over():
    masks, secret, other = session(3)[0], SessionSecret(), SessionSecret()
    masks.erase()
    secret.erase()
    with pytest.raises(ValueError, match="the session is over"):
        masks.mask(0, SHAPE, b"sum 0")
    with pytest.raises(ValueError, match="the session is over"):
        secret.pair_key(other.public, transcript=bytes(32), context=b"0 1")


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"too short"], ids=["zero", "small order", "short"])
def test_a_key_that_makes_no_secret_is_the_senders_fault(public):
    with pytest.raises(BadMessage, match="makes no secret"):
        SessionSecret().pair_key(public, transcript=bytes(32), context=b"0 1")


def test_both_ends_have_one_key_and_another_transcript_or_pair_another():
    a, b = SessionSecret(), SessionSecret()

    def key(mine, theirs, transcript, context):
        return mine.pair_key(theirs.public, transcript=transcript, context=context)

    one, other = bytes(32), b"\x01" * 32
    assert key(a, b, one, b"0 1") == key(b, a, one, b"0 1")
    assert len({key(a, b, one, b"0 1"), key(a, b, other, b"0 1"), key(a, b, one, b"0 2")}) == 3


def test_nobody_masks_against_itself():
    with pytest.raises(ValueError, match="no key with itself"):
        SessionMasks(1, {1: bytes(32)})
