"""Nodes that fell behind jump, and believe how far the others are only where that can be."""

from __future__ import annotations

import pytest
from nodes_by_hand import NUM_EXCHANGES, Node, alive, greeted, hello, in_step, pair, want

from p2pfl.wire.messages import NOTHING_CLOSED, Goodbye, Heartbeat, Report, ResendRequest, StopNews


def test_a_node_that_fell_behind_jumps_and_says_that_it_merged_nothing():
    a, _ = pair()
    a.hear("b", alive(5))
    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() == 5
    a.protocol.jump(5, a.now_s)
    a.protocol.begin(5, a.now_s)
    a.protocol.edges.checkpointed(a.protocol.edges.ledgers())

    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=4, merged=(), confirmed=-1, settled=4)
    assert a.kinds()[-1] == "jumped"


def test_a_node_that_jumped_asks_at_once_for_what_it_could_not_keep():
    a, _ = pair()
    a.frames_for("b")
    a.hear_update("b", 5)
    assert a.protocol.edges.refused["far_round"] == 1
    a.protocol.jump(5, a.now_s)

    assert a.said_to("b") == [want(5)]


def test_one_exchange_behind_is_made_up_for():
    a, _ = pair()
    a.hear("b", alive(1))

    assert not a.protocol.claims.is_behind()


def test_what_came_early_counts_in_the_next_exchange():
    a, _ = pair()
    a.hear_update("b", 0)
    a.hear_update("b", 1, report=Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1))
    a.post()
    a.close()
    a.post()

    assert a.protocol.pace.is_over(a.now_s)
    assert list(a.protocol.admitted()) == ["b"]


def test_a_neighbour_cannot_be_far_ahead_in_no_time():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.hear("b", alive(10 + 8 + 3))
    assert a.protocol.edges.refused == {"implausible_exchange": 1}
    assert not a.protocol.claims.is_behind()

    a.hear("b", alive(10 + 2))
    assert a.protocol.edges.refused == {"implausible_exchange": 2}
    a.now_s += 1.0
    a.hear("b", alive(10 + 8))
    assert a.protocol.claims.is_behind()


def test_a_jump_gives_no_time_back():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.now_s += 1.0
    a.hear("b", alive(10 + 8))
    a.protocol.jump(a.protocol.claims.furthest(), a.now_s)
    a.protocol.begin(18, a.now_s)
    for exchange in range(20, 300):
        a.hear("b", alive(exchange))

    assert not a.protocol.claims.is_behind()


@pytest.mark.parametrize("exchange", [NUM_EXCHANGES + 1, 2**50])
def test_nobody_is_further_than_the_run_can_be(exchange):
    a, _ = pair()
    a.hear("b", alive(exchange))

    assert a.protocol.edges.refused == {"implausible_exchange": 1}
    assert a.protocol.neighbours["b"].heard_exchange == 0


def test_a_node_that_was_cut_off_for_an_hour_believes_how_far_the_others_are():
    a, _ = pair()
    in_step(a, 10, 1.0)
    while a.now_s < 3600:  # nobody comes, so every round lasts until its deadline
        a.alone_until_the_deadline()
    a.hear("b", alive(3600))  # a second a round, as before

    assert not a.protocol.edges.refused
    assert a.protocol.claims.is_behind()


def test_a_node_that_stood_still_for_an_hour_believes_how_far_the_others_are():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.now_s += 3600
    a.hear("b", alive(3600))

    assert a.protocol.claims.is_behind()


def test_the_exchange_number_of_a_neighbour_that_is_too_far_is_left_out_and_the_rest_believed():
    a, _ = pair()
    in_step(a, 10, 1.0)
    report = Report(closed_through=2000, merged=(), confirmed=-1, settled=-1)
    a.hear("b", Heartbeat(exchange=2001, report=report, stop=StopNews(agreed_for=0, stop_round=2000)))

    assert not a.protocol.claims.is_behind()
    assert a.protocol.stopping.stop_round == 2000


def test_an_exchange_that_nobody_believes_brings_nobody_back():
    a, _ = pair()
    a.alone_until_the_deadline()
    assert a.protocol.neighbours["b"].missed
    for _ in range(10):
        a.hear("b", Goodbye(reason="finished"), hello(exchange=10**9, report=NOTHING_CLOSED))

    assert "returned" not in a.kinds()
    assert a.protocol.neighbours["b"].missed


def test_who_has_fallen_silent_is_not_waited_for_after_a_jump():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    for peer in (b, c):
        greeted(a, peer)
    a.post()
    for peer in ("b", "c"):
        a.hear_update(peer, 0)
    assert a.close() == []
    a.post()
    a.hear("b", alive(3))  # c has died; b has waited for a in vain and has gone on
    assert a.protocol.claims.is_behind()
    a.protocol.jump(3, a.now_s)
    a.protocol.begin(3, a.now_s)
    a.post()
    a.hear_update("b", 3)

    assert a.protocol.pace.is_over(a.now_s)
    assert a.close() == ["c"]


def test_what_came_too_early_is_asked_for_when_its_exchange_begins():
    a, b = Node("a", "b"), Node("b", "a", incarnation=2)
    greeted(a, b)
    a.post()
    a.hear_update("b", 0)
    a.hear_update("b", 2)  # b has not waited for a in exchange 1
    assert a.close() == []
    a.protocol.begin(2, a.now_s)

    assert [item for item in a.protocol.neighbours["b"].outbox if isinstance(item, ResendRequest)] == [want(2)]
