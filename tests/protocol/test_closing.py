"""Nodes that have stopped, or leave, and the stop round that all of them take."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from nodes_by_hand import EARLIEST_STOP, FLOOR_S, Node, alive, carry, hello, in_step, pair

from p2pfl.protocol.neighbour import OUTBOX_LIMIT, SendUpdate
from p2pfl.protocol.transfers import RESEND_AFTER_S
from p2pfl.wire.messages import Closing, Goodbye, Heartbeat, Report, StopNews


def stopped(a: Node, reason: str = "converged") -> None:
    """As the daemon does when it has left its last round."""
    a.protocol.stop(reason, a.protocol.edges.exchange)
    a.protocol.edges.checkpointed(a.protocol.edges.ledgers())


def test_a_stopped_node_answers_whoever_is_still_running():
    a, _ = pair()
    in_step(a, 3, 1.0)
    stopped(a)
    a.frames_for("b")
    a.hear("b", alive(3, merged=(2,), confirmed=1, settled=1))

    assert [(type(message), message.exchange, message.reason) for message in a.said_to("b")] == [(Closing, 3, "converged")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_stopped_node_survives_updates_of_later_exchanges(ahead):
    a, _ = pair()
    in_step(a, 3, 1.0)
    a.protocol.edges.enter(5)  # the daemon leaves its last exchange behind
    stopped(a)
    a.hear_update("b", 5 + ahead)

    assert a.protocol.edges.closing == "converged"
    assert a.protocol.neighbours["b"].heard_exchange == 5 + ahead


def test_settled_means_that_both_sides_know_of_each_other():
    a, b = pair()
    for node in (a, b):
        node.post()
    carry(a, b)
    a.close()
    b.close()
    for node in (a, b):
        stopped(node)
    assert a.protocol.unacknowledged() != []
    for _ in range(3):
        for node in (a, b):
            node.protocol.edges.checkpointed(node.protocol.edges.ledgers())
            (neighbour,) = node.protocol.neighbours.values()
            neighbour.queue(node.protocol.stopping.where_it_is(neighbour))
        carry(a, b)
    for node in (a, b):
        node.protocol.edges.checkpointed(node.protocol.edges.ledgers())

    assert a.protocol.unacknowledged() == []
    assert b.protocol.unacknowledged() == []


def test_an_exchange_that_is_given_up_at_the_end_is_closed_so_that_who_merged_its_update_rolls_back():
    """The network has stopped while this node waits: its own update is out, and the neighbour has merged that."""
    a, b = pair()
    for node in (a, b):
        node.post()
    for frames in a.frames_for("b"):
        b.protocol.hear("a", tuple(map(memoryview, frames)), b.now_s)
    b.frames_for("a")  # what b sent is lost
    b.close()
    for node in (a, b):
        stopped(node)
    for _ in range(3):
        for node in (a, b):
            (neighbour,) = node.protocol.neighbours.values()
            neighbour.queue(node.protocol.stopping.where_it_is(neighbour))
        carry(a, b)
        for node in (a, b):
            node.protocol.edges.checkpointed(node.protocol.edges.ledgers())

    assert b.kinds()[-1] == "took_back"
    assert [a.protocol.unacknowledged(), b.protocol.unacknowledged()] == [[], []]


def test_a_neighbour_that_has_finished_is_not_waited_for():
    a, _ = pair()
    a.hear("b", Goodbye(reason="finished"))

    assert a.protocol.neighbours["b"].missed
    assert a.protocol.unacknowledged() == []


@pytest.mark.parametrize("reason", ["finished", "pausing"])
def test_a_last_word_is_the_last(reason):
    """A greeting behind it would take it back: the neighbour would wait in vain for a node that has gone."""
    a, b = pair()
    goodbye = Goodbye(reason=reason)
    neighbour = a.protocol.neighbours["b"]
    neighbour.outbox.extend([SendUpdate(exchange=e, again=True) for e in range(OUTBOX_LIMIT)])
    neighbour.queue(goodbye)
    neighbour.outbox = deque([neighbour.outbox[-1]])
    a.now_s += 2 * RESEND_AFTER_S
    a.hear("b", b.protocol.stopping.hello(b.protocol.neighbours["a"]))
    a.protocol.tick(a.now_s + 60.0)
    said = a.said_to("b")
    b.hear("a", *said)

    assert said == [goodbye]
    assert b.protocol.neighbours["a"].left == (reason == "finished")


def test_a_neighbour_that_pauses_has_the_time_that_everybody_has():
    a, _ = pair()
    a.hear("b", Goodbye(reason="pausing"))
    a.post()

    assert a.kinds()[-1] == "left"
    assert not a.protocol.pace.is_over(FLOOR_S - 0.001)
    a.hear("b", hello(exchange=0))
    a.hear_update("b", 0)
    assert a.protocol.pace.is_over(a.now_s)
    assert a.close() == []
    assert a.protocol.unacknowledged() != []


def test_the_return_of_a_neighbour_that_paused_is_an_event_however_often_it_comes_and_goes():
    a, _ = pair()
    for number in range(40):
        a.hear("b", Goodbye(reason="pausing"))
        assert a.protocol.neighbours["b"].is_paused
        a.hear("b", replace(hello(exchange=0), incarnation=100 + number))
        assert not a.protocol.neighbours["b"].is_paused
        assert a.kinds()[-2:] == ["left", "greeted"]


def test_the_smallest_stop_round_heard_is_taken():
    a, _ = pair()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    for stop_round in (20, 12, 15):
        a.hear("b", Heartbeat(exchange=0, report=report, stop=StopNews(agreed_for=0, stop_round=stop_round)))

    assert a.protocol.stopping.stop_round == 12


def test_a_stop_before_its_time_is_refused():
    a, _ = pair()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    a.hear("b", Heartbeat(exchange=0, report=report, stop=StopNews(agreed_for=0, stop_round=EARLIEST_STOP - 1)))

    assert a.protocol.stopping.stop_round is None
    assert a.protocol.edges.refused["implausible_stop"] == 1
