"""Stop rounds that a node believes, refuses, or judges later."""

from __future__ import annotations

from dataclasses import replace

from members_by_hand import RULE, Member, signed
from nodes_by_hand import alive

from p2pfl.wire.messages import Closing, Heartbeat, Records, StopNews


def stop(exchange: int, stop_round: int) -> Heartbeat:
    return replace(alive(exchange), stop=StopNews(agreed_for=50, stop_round=stop_round))


def mixing(counters: list[int]) -> Member:
    """A node after some rounds that only mix, with what its own consensus counter was."""
    a = Member("a", "b", "d", stop_rule=RULE, earliest_stop=RULE.earliest(0))
    for number, counter in enumerate(counters):
        a.protocol.stopping.agree(number, counter, None)
    return a


def test_a_stop_that_was_announced_by_nobody_is_refused():
    a = mixing([0] * 20)
    for stop_round in range(RULE.earliest(0), 26):
        a.hear("d", stop(20, stop_round))

    assert a.protocol.stopping.stop_round is None
    assert a.protocol.edges.refused["implausible_stop"] == 26 - RULE.earliest(0)


def test_a_true_stop_is_believed():
    """Announced after round 10 by a member two links away, which then has agreed for four rounds."""
    counters = [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    a = mixing(counters)
    a.hear("b", stop(13, 14))

    assert a.protocol.stopping.stop_round == 14


def test_a_stop_that_cannot_be_judged_yet_is_judged_when_it_can():
    a = mixing([0] * 5)
    a.hear("d", stop(5, 13))
    a.hear("b", stop(5, 14))
    assert a.protocol.stopping.stop_round is None
    for number, counter in [(5, 0), (6, 0), (7, 1), (8, 2)]:
        a.protocol.stopping.agree(number, counter, None)

    assert a.protocol.stopping.stop_round == 14
    assert a.protocol.edges.refused["implausible_stop"] == 1


def test_a_node_that_was_away_believes_two_members_that_have_stopped():
    a = mixing([0, 0, 0])
    closing = Closing(exchange=31, report=alive(31).report, stop=StopNews(agreed_for=9, stop_round=30), reason="converged")
    a.hear("d", closing)
    assert a.protocol.stopping.stop_round is None
    a.hear("d", Records(sealed=(signed("d", 2, closing=True),)), closing)
    assert a.protocol.stopping.stop_round is None
    a.hear("d", Records(sealed=(signed("c", 2, closing=True),)), closing)

    assert a.protocol.stopping.stop_round == 30


def test_a_node_that_was_away_ends_once_its_own_test_passes():
    a = mixing([0, 0, 0])
    a.protocol.stopping.agree(40, 0, None)
    a.hear("b", stop(41, 30))
    assert a.protocol.stopping.stop_round is None
    a.protocol.stopping.agree(41, 1, None)

    assert a.protocol.stopping.stop_round == 30
