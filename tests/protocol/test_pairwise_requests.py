"""Requests of neighbours at a pairwise pace: few are held, and none is answered without end."""

from __future__ import annotations

from nodes_by_hand import meeting_in_pairs

from p2pfl.protocol.transfers import RESEND_AFTER_S
from p2pfl.wire.messages import NO_STOP, NOTHING_CLOSED, Busy, Closing, Heartbeat


def test_of_a_neighbour_that_asks_again_and_again_only_the_newest_update_is_held():
    node = meeting_in_pairs(ahead=1000)
    for number in range(300):
        node.hear_update("a", number)

    assert [(name, number) for name, number, _ in node.protocol.pace.requests] == [("a", 299)]


def test_an_answer_that_is_waited_for_outlives_the_neighbours_next_question():
    node = meeting_in_pairs(ahead=1000)
    node.protocol.pace.restore_requests(("a", 3), {}, has_ended=False)
    for number in (2, 3, 4, 5):
        node.hear_update("a", number)

    assert [(name, number) for name, number, _ in node.protocol.pace.requests] == [("a", 3), ("a", 5)]


def test_a_refusal_is_held_once_and_only_of_what_was_asked():
    node = meeting_in_pairs(ahead=1000)
    unasked = Busy(exchange=5)
    for _ in range(1000):
        node.hear("a", unasked)

    assert not node.protocol.pace.requests

    node.protocol.pace.restore_requests(("a", 5), {}, has_ended=False)
    for _ in range(1000):
        node.hear("a", unasked)

    assert list(node.protocol.pace.requests) == [("a", 5, True)]

    node.protocol.pace.requests.clear()
    node.protocol.stop("rounds", 0)
    node.hear("a", unasked)

    assert not node.protocol.pace.requests


def test_closing_words_and_what_answers_them_do_not_answer_each_other_without_end():
    node = meeting_in_pairs(ahead=1000)
    closing = Closing(exchange=3, report=NOTHING_CLOSED, stop=NO_STOP, reason="rounds")
    said = []
    for _ in range(100):
        node.hear("a", closing)
        said += node.said_to("a")
    assert [type(message) for message in said] == [Heartbeat]

    node.now_s += RESEND_AFTER_S  # what answered them may have been lost
    node.hear("a", closing)
    assert [type(message) for message in node.said_to("a")] == [Heartbeat]
