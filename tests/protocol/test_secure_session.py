"""A session is open when all openings are there and equal but for their keys; at its end nothing of its keys is left."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from secure_members import signing_key, terms_of

from p2pfl.errors import BadMessage, ConfigError
from p2pfl.privacy.fixed_point import FixedPoint, added
from p2pfl.protocol.secure_session import SecureSession
from p2pfl.wire.secure_messages import sign


def sessions(num_members, participants=None, number=1):
    terms = terms_of(num_members, participants)
    return [SecureSession(terms, number, me, signing_key(me)) for me in range(num_members)]


def opened(found):
    """The same sessions, when each has taken all openings, in another order each."""
    openings = [each.openings[me] for me, each in enumerate(found) if me in each.openings]
    for turn, each in enumerate(found):
        for opening in openings[turn:] + openings[:turn]:
            each.take(opening)
    return found


def test_all_have_one_transcript_and_masks_that_cancel():
    found = opened(sessions(4))
    masks = [each.mask("sum", 0, (5, 2)) for each in found]

    assert len({each.transcript for each in found}) == 1
    assert not reduce(added, masks).any()
    assert len({each.mac("sum", masks[0]) for each in found}) == 1


def test_who_takes_no_part_knows_the_transcript_and_has_no_mask():
    found = opened(sessions(5, [0, 1, 3]))

    assert found[2].transcript == found[0].transcript
    with pytest.raises(ValueError, match="takes no part"):
        found[2].mask("sum", 0, (5, 2))


def test_nothing_is_hidden_before_all_are_there():
    first, second, _ = sessions(3)
    first.take(second.openings[1])

    assert (first.transcript, first.missing) == (None, [2])
    with pytest.raises(ValueError, match="not open"):
        first.mask("sum", 0, (5, 2))
    with pytest.raises(ValueError, match="no group key"):
        first.mac("sum", np.zeros((1, 2), dtype=np.uint64))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"study": "00" * 32}, "wrong_study"),
        ({"plan": "00" * 32}, "wrong_plan"),
        ({"participants": (0, 1)}, "wrong_participants"),
        ({"session": 2}, "wrong_session"),
        ({"public": b"short"}, "bad_key"),
        ({"nonce": b"short"}, "bad_key"),
    ],
)
def test_an_opening_with_other_terms_is_refused(changed, reason):
    mine, other, _ = sessions(3)
    with pytest.raises(BadMessage, match="clinic-1") as refused:
        mine.take(sign(replace(other.openings[1], **changed), signing_key(1)))

    assert refused.value.reason == reason
    assert 1 in mine.missing


def test_an_opening_counts_only_under_its_members_signature():
    mine, other, _ = sessions(3)
    with pytest.raises(BadMessage, match="wrong_signature"):
        mine.take(replace(other.openings[1], session=1, nonce=bytes(32)))
    with pytest.raises(BadMessage, match="wrong_signature"):
        mine.take(sign(other.openings[1], signing_key(2)))
    with pytest.raises(BadMessage, match="not in the roster"):
        mine.take(replace(other.openings[1], member=9))


def test_a_node_that_restarts_cannot_continue_a_session():
    first, second, _ = sessions(3)
    again = sessions(3)[1]
    assert first.take(second.openings[1])
    assert not first.take(second.openings[1])
    with pytest.raises(BadMessage, match="clinic-1 opens session 1 twice"):
        first.take(again.openings[1])


def test_a_key_that_makes_no_secret_is_named():
    mine, other, third = sessions(3)
    mine.take(third.openings[2])
    with pytest.raises(BadMessage, match="clinic-1: its key makes no secret"):
        mine.take(sign(replace(other.openings[1], public=bytes(32)), signing_key(1)))
    assert (mine.transcript, mine.missing) == (None, [1])


def test_nothing_is_left_of_a_session_that_is_over():
    mine = opened(sessions(3))[0]
    total = mine.mask("sum", 0, (1, 2))
    mine.erase()
    with pytest.raises(ValueError, match="over"):
        mine.mask("another", 1, (1, 2))
    with pytest.raises(ValueError, match="over"):
        mine.mac("sum", total)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"participants": [0, 1]}, "over 2 participants: expected at least 3"),
        ({"curious": 2}, "over 3 participants: expected at least 4"),
        ({"min_participants": 5}, "over 3 participants: expected at least 5"),
        ({"bound": 1e30}, "sum 0: numbers up to 1e.30 from 3 sites do not fit"),
        ({"check": True, "number_format": FixedPoint(bits=64, fraction_bits=20)}, "a checked sum needs numbers of 128 bits"),
    ],
)
def test_terms_under_which_a_sum_would_tell_or_not_fit_are_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        terms_of(3, **more)


def test_the_plans_digest_is_of_all_that_is_planned():
    plans = {terms_of(4, **more).plan for more in ({}, {"bound": 5.0}, {"shape": (4,)}, {"num_sums": 3}, {"check": True}, {"curious": 2})}
    plans.add(terms_of(4, agreement="ab" * 32).plan)

    assert len(plans) == 7


def test_more_participants_than_have_keys_of_pairs_are_refused():
    with pytest.raises(ConfigError, match="over 257 participants: at most 256"):
        replace(terms_of(3), names=("x",) * 257, identities=("00",) * 257, participants=tuple(range(257)))
