"""Time of a node that one member can cost, whatever it says or sends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from members_by_hand import HOUR_S, LARGE, TICK_S, Member, node_terms
from nodes_by_hand import FLOOR_S, FORMAT, alive, hello, meeting_in_pairs

from p2pfl.protocol.deadlines import LATER, SOON
from p2pfl.protocol.edges import Flow
from p2pfl.protocol.pairwise_exchanges import PairwiseExchanges
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import NO_STOP
from p2pfl.wire.update import UpdateFormat


def endless_update(node: Member):
    """Begins an update, sends a second chunk, begins again, for ever."""
    node.protocol.neighbours["d"].session = LinkSession(peer="d", member="a", terms=node_terms(node), incarnation=1, formats=(LARGE,))
    node.hear("d", hello(member="d"))
    step = [0]

    def lie() -> None:
        exchange = node.protocol.edges.exchange
        step[0] += 1
        frames = [*LARGE.pack(exchange, {"x": np.zeros(300_000)}).messages(alive(exchange).report, NO_STOP)]
        if step[0] % 10 == 1:
            node.protocol.hear("d", tuple(map(memoryview, frames[0])), node.now_s)
        elif step[0] % 10 == 5:
            node.protocol.hear("d", tuple(map(memoryview, frames[1])), node.now_s)

    return lie


def only_alive(node: Member):
    return lambda: node.hear("d", alive(node.protocol.edges.exchange))


def says_that_it_waits(node: Member):
    return lambda: node.hear("d", alive(max(node.protocol.edges.exchange - 1, 0)))


def restarts(node: Member):
    step = [1000]

    def lie() -> None:
        step[0] += 1
        node.hear("d", replace(hello(member="d", exchange=node.protocol.edges.exchange), incarnation=step[0]))

    return lie


def two_updates_and_a_miss(node: Member):
    """Makes up for each miss as cheaply as it can."""

    def lie() -> None:
        exchange = node.protocol.edges.exchange
        node.hear("d", alive(exchange))
        if exchange % 3:
            node.update_of("d", exchange)

    return lie


PROGRAMS = [endless_update, only_alive, says_that_it_waits, restarts, two_updates_and_a_miss]


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_member_costs_more_than_three_deadlines_in_forty_rounds(program):
    a = Member("a", "b", "c", "d")
    lie = program(a)
    lost_s = sum(a.one_round("bc", lie, train_s=TICK_S) for _ in range(40))

    assert a.protocol.edges.exchange == 40
    assert lost_s <= 3 * FLOOR_S


def test_the_first_round_waits_for_a_member_that_only_speaks_no_longer_than_news_need():
    a = Member("a", "b", "c", "d", starting_exchanges=4)
    a.protocol.deadlines.wait_at_start(0.0, 2.5 + FLOOR_S, 2.5 + FLOOR_S)
    lie = only_alive(a)
    lost_s = sum(a.one_round("bc", lie, train_s=TICK_S) for _ in range(40))

    assert lost_s <= 3 * FLOOR_S


def test_a_member_that_speaks_and_does_not_come_is_said_to_hold_the_node():
    a = Member("a", "b", "c", "d")
    lie = only_alive(a)
    for _ in range(10):
        a.one_round("bc", lie, train_s=TICK_S)

    assert a.kinds().count("held") == 1
    assert next(detail for kind, detail in a.events if kind == "held").startswith("d spoke and did not come to 3 exchanges")


def test_an_honest_member_that_stood_still_is_waited_for_again_within_two_rounds():
    a = Member("a", "b", "c", "d")
    for _ in range(10):
        a.one_round("bcd")
    end_s = a.now_s + 60.0
    while a.now_s < end_s:
        a.one_round("bc")
    assert a.protocol.neighbours["d"].missed
    at = a.protocol.edges.exchange
    waited_s = [a.one_round("bcd" if number else "bc", lambda: a.hear("d", alive(at)), after_s=2.0) for number in range(2)]

    assert a.protocol.edges.exchange == at + 2
    assert a.protocol.admitted() == {}
    assert waited_s[1] >= 2.0
    assert [kind for kind in a.kinds() if kind == "skipped"] == ["skipped"] * 2


def test_patience_halves_at_each_miss_and_doubles_after_two_complete_updates():
    a = Member("a", "b", "d")
    lie = only_alive(a)
    d = a.protocol.deadlines.patience["d"]
    lost_s = a.one_round("b", lie, train_s=TICK_S)
    assert d.fraction == 0.5
    assert lost_s == pytest.approx(FLOOR_S, abs=2 * TICK_S)

    for _ in range(SOON):
        assert d.fraction == 0.5
        a.one_round("bd", train_s=TICK_S)
    assert d.fraction == 1.0
    a.one_round("b", lie, train_s=TICK_S)
    for _ in range(LATER):
        assert d.fraction == 0.5
        a.one_round("bd", train_s=TICK_S)
    assert d.fraction == 1.0


def test_a_member_that_missed_often_still_gets_the_time_to_catch_up():
    """It is a round behind, trains as long as the others, and so comes a round's time after them: half of that would never do."""
    train_s = 2.0
    a = Member("a", "b", "d")
    d = a.protocol.deadlines.patience["d"]
    for _ in range(20):
        a.one_round("bd", train_s=train_s)
    d.fraction, d.misses, d.missed_s = 1 / 16, 4, a.now_s  # its site had a bad hour
    lost_s, last = [], [-1]

    def late() -> None:
        exchange = a.protocol.edges.exchange
        a.hear("d", alive(exchange))
        if (
            exchange in a.protocol.transfers.sent
            and exchange != last[0]
            and a.now_s - a.protocol.deadlines.deadline_s + FLOOR_S >= train_s - 0.2
        ):
            last[0] = exchange
            a.update_of("d", exchange)

    while last[0] < 0 and len(lost_s) < 10:
        lost_s.append(a.one_round("b", late, train_s=train_s))

    assert last[0] >= 0


def test_a_member_that_never_catches_up_is_given_the_time_more_and_more_rarely():
    a = Member("a", "b", "d")
    d = a.protocol.deadlines.patience["d"]
    for _ in range(20):
        a.one_round("bd", train_s=2.0)
    d.fraction, d.misses, d.missed_s = 1 / 16, 4, a.now_s
    lie = only_alive(a)
    lost_s = [a.one_round("b", lie, train_s=2.0) for _ in range(90)]

    waited = [number for number, seconds in enumerate(lost_s) if seconds > 1.0]
    assert [after - before for before, after in pairwise(waited)] == [5, 17, 65]


def test_late_updates_of_a_member_that_is_not_waited_for_do_not_shorten_the_deadline():
    a = Member("a", "b", "d")
    for _ in range(20):
        a.one_round("bd", train_s=4.0)
    d, before_s = a.protocol.neighbours["d"], a.protocol.deadlines.allowance_s()
    d.note_fault()
    for _ in range(20):
        a.update_of("d", a.protocol.edges.exchange - 1)

    assert before_s > FLOOR_S
    assert a.protocol.deadlines.allowance_s() == before_s


def test_a_miss_is_forgotten_after_an_hour():
    a = Member("a", "b", "d")
    a.one_round("b", only_alive(a), train_s=TICK_S)
    assert a.protocol.deadlines.patience["d"].fraction == 0.5
    a.now_s += HOUR_S
    a.post()

    assert a.protocol.deadlines.patience["d"].fraction == 1.0


def test_a_node_that_stood_still_itself_blames_nobody():
    a = Member("a", "b", "c")
    a.one_round("bc")
    a.post()
    a.now_s += 60.0
    assert a.protocol.pace.is_over(a.now_s)
    a.close()

    assert [each.fraction for each in a.protocol.deadlines.patience.values()] == [1.0, 1.0]


def test_after_a_miss_the_word_that_a_member_waits_counts_where_a_third_one_confirms_it():
    confirmed = set()
    a = Member("a", "b", "d", waits_for_others=lambda name, number: (name, number) in confirmed)
    a.one_round("b", only_alive(a), train_s=TICK_S)
    lie = says_that_it_waits(a)
    a.hear("d", alive(1))
    unconfirmed_s = a.one_round("b", lie, train_s=TICK_S)
    confirmed.add(("d", a.protocol.edges.exchange - 1))
    its_time_s = a.protocol.deadlines.patience_with("d")
    confirmed_s = a.one_round("b", lie, train_s=TICK_S)

    assert unconfirmed_s == pytest.approx(FLOOR_S / 2, abs=2 * TICK_S)
    assert confirmed_s == pytest.approx(2 * its_time_s, abs=2 * TICK_S)


@pytest.mark.parametrize(("was_held_up", "patience"), [(False, 0.25), (True, 0.5)])
def test_a_first_miss_costs_less_patience_where_another_member_held_it_up(was_held_up, patience):
    """It said that it waits, and was waited for longer; so it can wait for that one less than it is waited for itself."""
    rounds = {"waits_for_others": lambda _name, number: number == 1, "was_held_up": lambda _name, number: was_held_up and number <= 1}
    a = Member("a", "b", "d", **rounds)
    a.one_round("bd", train_s=TICK_S)
    a.one_round("b", says_that_it_waits(a), train_s=TICK_S)
    d = a.protocol.deadlines.patience["d"]
    assert d.fraction == patience

    a.one_round("b", says_that_it_waits(a), train_s=TICK_S)
    assert d.fraction == patience / 4  # a second time it makes no difference


def test_an_update_that_drips_in_is_waited_for_no_longer_than_the_slowest_link_needs():
    a = Member("a", "b", "d")
    format_ = UpdateFormat(channels=(("x", "float64", (1_200_000,)),))  # ten chunks
    a.protocol.neighbours["d"].session = LinkSession(peer="d", member="a", terms=node_terms(a), incarnation=1, formats=(format_,))
    a.hear("d", hello(member="d"))
    frames = [*format_.pack(0, {"x": np.zeros(1_200_000)}).messages(alive(0).report, NO_STOP)]

    def drip() -> None:
        if int(a.now_s * 10) % 190 == 0 and frames:  # just before patience ends
            a.protocol.hear("d", tuple(map(memoryview, frames.pop(0))), a.now_s)

    assert a.one_round("b", drip, train_s=TICK_S) <= FLOOR_S + format_.size_bytes / 2**16 + 1.0


def test_a_member_that_did_not_answer_has_half_the_time_in_the_next_meeting():
    node = meeting_in_pairs(ahead=1000)
    protocol = node.protocol
    exchanges = PairwiseExchanges(protocol.edges, protocol.pace, protocol.deadlines, protocol.transfers)
    exchanges.ask(FORMAT.pack(protocol.pace.ask("a"), {"x": np.zeros(2)}), 0.0)
    exchanges.give_up("a", 0, missed=True)
    assert protocol.deadlines.patience_with("a") == FLOOR_S / 2

    for number in range(1, 1 + SOON):
        node.hear("a", alive(number))
        exchanges.ask(FORMAT.pack(protocol.pace.ask("a"), {"x": np.zeros(2)}), 1.0)
        exchanges.merged("a", Flow(exchange=number, amounts={}), 1.1)

    assert protocol.deadlines.patience_with("a") == FLOOR_S
