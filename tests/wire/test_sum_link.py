"""Links of secure sums: both ends know of what was lost, after a restart of either as well."""

from __future__ import annotations

import pytest

from p2pfl.errors import BadMessage
from p2pfl.wire.sum_codec import SumPresence, encode_sum
from p2pfl.wire.sum_link import SumLink, as_bits, from_bits
from sum_samples import LAST, OPENING


def frames_of(message):
    return next(encode_sum(message))


def send(sender, receiver, message, *, arrives=True):
    sender.note_sent()
    return receiver.receive(frames_of(message)) if arrives else None


def say(sender, receiver, done=b""):
    return receiver.receive(frames_of(sender.presence(done)))


def greeted():
    a, b = SumLink(11, 64), SumLink(22, 64)
    assert say(a, b).is_new
    assert say(b, a).is_new
    say(a, b)
    return a, b


def test_what_arrives_is_a_message_and_nothing_is_lost():
    a, b = greeted()
    assert send(a, b, OPENING).message == OPENING
    found = say(a, b, b"\x05")

    assert (found.done, found.is_new, found.has_lost) == (b"\x05", False, False)
    assert not say(b, a).has_lost


def test_what_was_lost_is_said_until_it_is_heard():
    a, b = greeted()
    send(a, b, OPENING, arrives=False)
    say(a, b)
    b.presence(b"")  # lost as well

    assert say(b, a).has_lost
    assert not say(b, a).has_lost


def test_a_message_on_its_way_is_not_taken_for_lost():
    a, b = greeted()
    late = frames_of(a.presence(b""))
    a.note_sent()
    b.receive(late)
    b.receive(frames_of(OPENING))
    say(a, b)

    assert not say(b, a).has_lost


def test_what_could_not_be_used_yet_is_asked_for_again():
    a, b = greeted()
    send(a, b, OPENING)
    b.note_lost()

    assert say(b, a).has_lost


def test_what_is_refused_has_come():
    a, b = greeted()
    a.note_sent()
    with pytest.raises(BadMessage):
        b.receive([b"\xc1"])
    say(a, b)

    assert not say(b, a).has_lost


def test_a_restarted_neighbour_is_new_and_counts_from_nothing():
    a, b = greeted()
    send(a, b, OPENING)
    b = SumLink(33, 64)
    assert say(a, b).is_new
    assert say(b, a).is_new
    say(a, b)
    send(a, b, LAST)
    say(a, b)
    assert not say(b, a).has_lost
    send(a, b, LAST, arrives=False)
    say(a, b)

    assert say(b, a).has_lost


def test_what_was_sent_before_a_link_was_known_at_both_ends_counts_as_lost():
    a, b = SumLink(11, 64), SumLink(22, 64)
    say(b, a)
    send(a, b, OPENING, arrives=False)
    say(a, b)

    assert say(b, a).has_lost


def counts(link, sent):
    return link.receive(frames_of(SumPresence(incarnation=5, echo=7, sent=sent, lost=0, done=b"")))


def test_a_neighbour_that_counts_to_and_fro_is_refused_and_what_is_said_stays_a_number():
    link = SumLink(7, 64)
    counts(link, 0)
    for _ in range(3):
        counts(link, 2**63 - 1)
        with pytest.raises(BadMessage, match="0 messages sent: 9223372036854775807 were sent before") as refused:
            counts(link, 0)
        assert refused.value.reason == "wrong_count"
    link.note_lost()

    assert link.presence(b"").lost == 2**63 - 1
    frames_of(link.presence(b""))


def test_after_a_refused_count_it_is_counted_on_from_there():
    link = SumLink(7, 64)
    counts(link, 4)
    lost = link.presence(b"").lost
    with pytest.raises(BadMessage):
        counts(link, 1)
    link.receive(frames_of(OPENING))
    counts(link, 2)
    assert link.presence(b"").lost == lost
    counts(link, 3)

    assert link.presence(b"").lost == lost + 1


@pytest.mark.parametrize("members", [set(), {0}, {7, 8}, {0, 9, 16}])
def test_members_come_back_from_their_bits(members):
    assert from_bits(as_bits(members, 17), 17) == members
    assert from_bits(b"\xff" * 99, 17) == set(range(17))
