"""Claims of one member move no other one: lies told by hand to one node's edges, with the time as an argument."""

from __future__ import annotations

import pytest
from members_by_hand import HOUR_S, ROUND_S, Member, signed
from nodes_by_hand import FLOOR_S, alive

from p2pfl.wire.messages import ProofRequest, Records
from p2pfl.wire.round_record import unseal


def ladder(node: Member, liar: str = "d", top: int = 300):
    """At each tick one more exchange number, each a little further."""
    at = [0]

    def lie() -> None:
        at[0] = min(max(at[0] + 2, node.protocol.edges.exchange + 2, int(at[0] * 1.15)), top)
        node.hear(liar, alive(at[0]))

    return lie


@pytest.mark.no_cover
def test_lies_cost_no_round_where_honest_neighbours_are_in_step():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    lie = ladder(a, top=90_000)
    while a.now_s < HOUR_S / 20:
        a.one_round("bc", lie)
        assert not a.protocol.claims.is_behind()

    assert a.kinds().count("jumped") == 0
    assert a.protocol.edges.exchange > 170


@pytest.mark.no_cover
def test_lies_of_the_only_neighbour_cost_no_round():
    """It sends no update any more, so that the node is alone; and it passes on no record of others."""
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    lie = ladder(a, top=90_000)
    while a.now_s < HOUR_S / 4:
        a.one_round("", lie)
        assert not a.protocol.claims.is_behind()

    assert "hurried" in a.kinds()


def test_a_liar_that_signs_what_it_says_is_one_member_all_the_same():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("d", 299),)), alive(300))

    assert not a.protocol.claims.is_behind()


def test_a_record_that_another_member_has_not_signed_confirms_nothing():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("c", 299, key="d"),)), alive(300))

    assert a.protocol.edges.refused["wrong_signature"] == 1
    assert not a.protocol.claims.is_behind()


def test_a_true_record_of_another_member_takes_a_node_no_further_than_that_one_is():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("c", 5),)), alive(300))
    assert not a.protocol.claims.is_behind()
    a.hear("d", Records(sealed=(signed("c", 19),)), alive(300))

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() == 20


def test_a_member_that_is_as_far_ahead_as_the_links_to_it_explain_confirms_no_claim():
    """It is two links away: it goes on when its neighbour is one exchange ahead of this node, and both are in step all the same."""
    a = Member("a", "b", "d")
    for _ in range(5):
        a.one_round("bd")
    a.hear("b", alive(6), Records(sealed=(signed("c", 6),)))
    a.hear("d", alive(90_000))
    assert not a.protocol.claims.is_behind()
    a.hear("b", Records(sealed=(signed("c", 7),)))

    assert a.protocol.claims.furthest() == 8


def test_a_first_round_that_takes_longer_than_a_deadline_makes_no_claim_plausible():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.wait(FLOOR_S)
        a.hear("d", alive(90_000))

    assert not a.protocol.claims.is_behind()


def test_two_neighbours_that_say_the_same_are_believed_at_once():
    a = Member("a", "b", "c", "d")
    a.one_round("bcd")
    a.hear("d", alive(90_000))
    assert not a.protocol.claims.is_behind()
    a.hear("b", alive(1000))

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() == 1000


def test_a_node_that_was_cut_off_asks_for_proof_and_jumps_to_where_the_network_is():
    a, b = Member("a", "b"), Member("b", "a", "c")
    for _ in range(3):
        a.one_round("b")
    while a.now_s < HOUR_S / 10:  # the cable is cut
        a.one_round("")
    b.now_s, b.ended = a.now_s, 3598
    b.protocol.begin(3600, b.now_s)
    a.frames_for("b")
    b.frames_for("a")
    a.hear("b", alive(3600))
    a.protocol.tick(a.now_s)
    assert not a.protocol.claims.is_behind()
    asked = [message for message in a.said_to("b") if isinstance(message, ProofRequest)]
    assert asked == [ProofRequest(relayed=False)]

    b.hear("a", *asked)
    assert [message for message in b.said_to("c") if isinstance(message, ProofRequest)] == [ProofRequest(relayed=True)]
    b.frames_for("a")
    b.hear("c", Records(sealed=(signed("c", 3599),)))
    answers = [message for message in b.said_to("a") if isinstance(message, Records)]
    assert [(unseal(each).member, unseal(each).round) for each in answers[-1].sealed] == [(1, 3598), (2, 3599)]
    a.hear("b", *answers)

    assert a.protocol.claims.is_behind()
    assert a.jump() == 3600


def test_who_is_asked_for_somebody_else_answers_with_its_own_record_and_asks_nobody():
    c = Member("c", "b", "d")
    c.ended = 41
    for peer in "bd":
        c.frames_for(peer)
    for _ in range(10):
        c.hear("b", ProofRequest(relayed=True))

    answers = [message for message in c.said_to("b") if isinstance(message, Records)]
    assert [[unseal(each).round for each in answer.sealed] for answer in answers] == [[41]]
    assert not any(isinstance(message, ProofRequest) for message in c.said_to("d"))


def test_members_that_all_want_proof_do_not_answer_each_other_without_end():
    a = Member("a", "b", "c", "d")
    a.hear("b", ProofRequest(relayed=False))
    a.hear("c", ProofRequest(relayed=False))
    for name in "bc":
        a.frames_for(name)
    known = Records(sealed=(signed("d", 5),))
    a.hear("d", known)
    assert [Records in map(type, a.said_to(name)) for name in "bc"] == [True, True]
    for name in "bcd":
        a.hear(name, known)

    assert [Records in map(type, a.said_to(name)) for name in "bc"] == [False, False]


def test_two_members_believe_each_other_as_far_as_one_that_is_alone_can_be():
    a = Member("a", "b", members="ab")
    for _ in range(3):
        a.one_round("b")
    a.wait(FLOOR_S)
    for exchange in range(5, 300):
        a.hear("b", alive(exchange))
    assert not a.protocol.claims.is_behind()
    for _ in range(5):
        a.wait(FLOOR_S)

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() <= 3 + 6


def test_a_node_that_has_stood_still_knows_how_far_the_others_can_be():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    a.now_s += 60.0
    a.hear("b", alive(60))
    assert a.protocol.claims.is_behind()
    a.hear("d", alive(90_000))

    assert a.protocol.claims.furthest() <= 5 + 60 / ROUND_S + 1


def test_a_jump_uses_up_what_standing_still_has_earned():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    a.now_s += 60.0
    a.hear("d", alive(90_000))
    target = a.jump()
    for _ in range(10):
        a.hear("d", alive(90_000))

    assert target <= 66
    assert not a.protocol.claims.is_behind()
