"""How long neighbours are waited for, without sockets: time is an argument."""

from __future__ import annotations

import numpy as np
from nodes_by_hand import FLOOR_S, TERMS, Node, alive, carry, greeted, hello, pair

from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import NO_STOP, Heartbeat, Hello, Report
from p2pfl.wire.update import UpdateFormat


def test_two_nodes_greet_each_other_and_exchange():
    a, b = pair()

    assert [(kind, detail) for kind, detail in a.events] == [("greeted", "b at exchange 0")]
    for node in (a, b):
        node.post()
    carry(a, b)
    assert a.protocol.pace.is_over(0.0)
    assert b.protocol.pace.is_over(0.0)
    assert (a.close(), b.close()) == ([], [])
    assert a.protocol.edges.exchange == 1


def test_a_chunk_that_only_makes_an_update_grow_gives_nothing_to_decide():
    large = UpdateFormat(channels=(("x", "float64", (300_000,)),))
    a, _ = pair(large)
    a.post()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    first, second, last = (tuple(map(memoryview, f)) for f in large.pack(0, {"x": np.ones(300_000)}).messages(report, NO_STOP))
    news = [a.protocol.hear("b", frames, 0.0) for frames in (first, second, second, last)]

    assert news == [True, False, True, True]  # the news in the first one, one chunk twice, and the last one, which completes it
    assert a.protocol.pace.is_over(0.0)


def test_a_node_that_is_not_greeted_gets_nothing_but_greetings():
    a = Node("a", "b")
    a.post()
    a.protocol.tick(0.0)

    assert [type(message) for message in a.said_to("b")] == [Hello]


def waiting_for_one_that_waits() -> Node:
    """A node in exchange 1 whose neighbour b says until short of the deadline that it still waits in exchange 0 for somebody else."""
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    assert a.protocol.pace.is_over(a.now_s)
    a.close()
    a.post()
    while a.now_s < FLOOR_S - 0.5:
        a.now_s += 0.5
        a.hear("b", alive(0))
    return a


def test_a_neighbour_that_itself_waits_until_its_deadline_has_its_time_after_that():
    a = waiting_for_one_that_waits()
    a.hear("b", alive(1))  # it has gone on without whom it waited for, and trains

    assert not a.protocol.pace.is_over(FLOOR_S + 0.1)
    assert not a.protocol.pace.is_over(2 * FLOOR_S - 0.6)
    a.now_s = FLOOR_S + 3.0
    a.hear_update("b", 1)
    assert a.protocol.pace.is_over(a.now_s)
    assert a.close() == []


def test_the_more_time_of_a_neighbour_that_waits_ends_once_it_says_so_no_more():
    a = waiting_for_one_that_waits()

    assert not a.protocol.pace.is_over(2 * FLOOR_S - 0.6)
    assert a.protocol.pace.is_over(2 * FLOOR_S - 0.5)


def test_a_neighbour_that_waits_without_end_has_one_allowance_more_and_no_second():
    a = waiting_for_one_that_waits()
    while a.now_s < 2 * FLOOR_S - 0.5:
        a.now_s += 0.5
        a.hear("b", alive(0))

    assert not a.protocol.pace.is_over(2 * FLOOR_S - 0.1)
    assert a.protocol.pace.is_over(2 * FLOOR_S)


def test_a_neighbour_that_trains_slowly_in_this_exchange_has_no_more_time():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.post()
    a.now_s = 5.0
    a.hear("b", alive(1))

    assert a.protocol.pace.is_over(FLOOR_S)


def test_the_first_exchanges_wait_for_a_neighbour_that_is_alive_and_has_not_gone_further():
    a, _ = pair(starting_exchanges=5)
    a.protocol.deadlines.wait_at_start(0.0, 86_400.0, 86_400.0)
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.post()
    while a.now_s < 10 * FLOOR_S:
        a.now_s += 0.5
        a.hear("b", alive(0))

    assert not a.protocol.pace.is_over(a.now_s)
    assert a.protocol.pace.is_over(a.now_s + FLOOR_S + 0.1)  # it has fallen silent


def test_waiting_ends_with_the_deadline_and_who_was_late_is_not_waited_for_again():
    a, b = Node("a", "b", "c"), Node("b", "a", incarnation=2)
    greeted(a, b)
    a.post()
    b.post()
    carry(a, b)

    assert not a.protocol.pace.is_over(FLOOR_S - 0.001)
    assert a.protocol.pace.is_over(FLOOR_S)
    a.now_s = FLOOR_S
    assert a.close() == ["c"]
    assert a.events[-1] == ("skipped", "c did not come to exchange 0")
    a.post()
    a.hear_update("b", 1, report=Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1))
    assert a.protocol.pace.is_over(a.now_s)


def test_a_node_that_is_alone_does_not_run_ahead():
    a, _ = pair()
    a.alone_until_the_deadline()
    a.post()

    assert a.protocol.neighbours["b"].missed
    assert not a.protocol.pace.is_over(a.now_s + FLOOR_S - 0.001)
    assert a.protocol.pace.is_over(a.now_s + FLOOR_S)


def test_a_neighbour_that_returns_is_waited_for():
    a, _ = pair()
    a.alone_until_the_deadline()
    a.hear("b", alive(1))

    assert a.events[-1] == ("returned", "b is back at exchange 1")
    assert not a.protocol.neighbours["b"].missed


def receiving(chunks: int, pause_s: float) -> Node:
    """A node past its deadline, to which the first chunks of an update have come, one after each pause; it is the moment of the last."""
    large = UpdateFormat(channels=(("x", "float64", (600_000,)),))
    a = Node("a", "b")
    neighbour = a.protocol.neighbours["b"]
    neighbour.session = LinkSession(peer="b", member="a", terms=TERMS, incarnation=1, formats=(large,))
    a.hear("b", hello(exchange=0))
    a.post()
    a.now_s = a.protocol.deadlines.deadline_s - (chunks - 1) * pause_s
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    for number, chunk in zip(range(chunks), large.pack(0, {"x": np.zeros(600_000)}).messages(report, NO_STOP), strict=False):
        a.now_s += pause_s if number else 0.0
        a.protocol.hear("b", tuple(map(memoryview, chunk)), a.now_s)
    return a


def test_an_update_that_is_coming_in_is_waited_for_past_the_deadline():
    a = receiving(1, 0.0)

    assert not a.protocol.pace.is_over(a.now_s + 2 * FLOOR_S)
    assert a.protocol.pace.is_over(a.now_s + 2 * FLOOR_S + 0.1)


def test_an_update_may_rest_as_long_as_it_has_come_in():
    """Half a large model is worth more than the time of a cut."""
    a = receiving(2, 2.5 * FLOOR_S)

    assert not a.protocol.pace.is_over(a.now_s + 2.5 * FLOOR_S)
    assert a.protocol.pace.is_over(a.now_s + 2.5 * FLOOR_S + 0.1)


def test_the_first_exchange_waits_for_a_neighbour_that_is_alive_and_still_waits_itself():
    a, _ = pair()
    a.protocol.deadlines.wait_at_start(0.0, 1000.0, 1000.0)
    a.post()
    a.now_s = 2 * FLOOR_S
    a.hear("b", alive(0))

    assert not a.protocol.pace.is_over(a.now_s)
    assert a.protocol.pace.is_over(a.now_s + 1.1 * FLOOR_S)


def test_a_neighbour_that_has_closed_an_exchange_unmerged_is_not_waited_for():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    greeted(a, b)
    a.protocol.tick(0)
    c.protocol.tick(0)
    carry(a, c)
    a.post()
    a.hear_update("c", 0)
    assert not a.protocol.pace.is_over(a.now_s)

    a.hear("b", Heartbeat(exchange=1, report=Report(closed_through=0, merged=(), confirmed=-1, settled=-1), stop=NO_STOP))

    assert a.protocol.pace.is_over(a.now_s)
    assert a.close() == ["b"]
    assert not a.protocol.neighbours["b"].missed  # it takes part in the next exchange


def test_a_neighbour_whose_update_cannot_be_merged_is_not_waited_for_until_one_can():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0, value=float("nan"))

    assert a.protocol.edges.refused["not_finite"] == 1
    assert a.protocol.neighbours["b"].missed
    a.hear("b", alive(0))
    assert a.protocol.neighbours["b"].missed
    a.hear_update("b", 0)
    assert not a.protocol.neighbours["b"].missed
