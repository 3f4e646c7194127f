"""A neighbour's doctor gets its answer in any state of the link, and nothing else of the node changes."""

from __future__ import annotations

import copy
from dataclasses import asdict

from nodes_by_hand import Node

from p2pfl.node.doctor.interview import EdgeMeasurement
from p2pfl.protocol.probes import Forward, Probes
from p2pfl.transports import LinkCondition
from p2pfl.wire.link import LinkState
from p2pfl.wire.messages import MAX_LARGE_BYTES, DoctorAnswer, DoctorQuestion

DIGESTS = {"study": b"\xaa" * 32, "layout": b"\xbb" * 32, "start": b"\xcc" * 32}


def probes(taken: list | None = None) -> Probes:
    return Probes(
        version="0.1.0",
        torch="2.13",
        arithmetic=1,
        **DIGESTS,
        clock_ms=lambda: 1_790_000_000_000,
        forward=lambda: Forward(digest=b"\xdd" * 32, outputs=(0.5,)),
        take=lambda peer, answer: taken.append((peer, answer)) if taken is not None else None,
    )


def test_a_question_is_answered_in_a_message_as_large():
    node = Node("a", "b", probes=probes())
    node.hear("b", DoctorQuestion(number=7, pad=bytes(MAX_LARGE_BYTES)))
    (answer,) = node.said_to("b")

    assert isinstance(answer, DoctorAnswer)
    assert (answer.number, answer.clock, len(answer.pad)) == (7, 1_790_000_000_000, MAX_LARGE_BYTES)
    assert {name: getattr(answer, name) for name in DIGESTS} == DIGESTS


def test_questions_are_all_answered_and_not_the_newest_alone():
    node = Node("a", "b", probes=probes())
    node.hear("b", *(DoctorQuestion(number=number, pad=b"") for number in range(16)))

    assert [answer.number for answer in node.said_to("b")] == list(range(16))


def test_whoever_asks_is_not_taken_for_a_node_that_is_there():
    node = Node("a", "b", probes=probes())
    neighbour = node.protocol.neighbours["b"]
    before = copy.copy((neighbour.last_seen_s, neighbour.heard_exchange, neighbour.handshakes, neighbour.missed))
    node.hear("b", DoctorQuestion(number=1, pad=b""))

    assert before == (neighbour.last_seen_s, neighbour.heard_exchange, neighbour.handshakes, neighbour.missed)
    assert neighbour.session.state is LinkState.UNKNOWN
    assert node.kinds() == []
    assert not node.protocol.edges.refused


def test_an_answer_is_handed_to_whoever_asked():
    taken: list = []
    node = Node("a", "b", probes=probes(taken))
    answer = probes().answer(DoctorQuestion(number=3, pad=b""))
    node.hear("b", answer)

    assert taken == [("b", answer)]


def test_a_node_without_facts_says_nothing():
    node = Node("a", "b")
    node.hear("b", DoctorQuestion(number=1, pad=b""))

    assert node.said_to("b") == []


def test_too_many_questions_are_dropped_before_they_are_read():
    node = Node("a", "b", probes=probes())
    for _ in range(400):
        node.hear("b", DoctorQuestion(number=1, pad=bytes(MAX_LARGE_BYTES)))
        node.said_to("b")

    assert node.protocol.neighbours["b"].allowance.num_dropped > 0


def answered(node, count, size):
    """Ask so many questions, each after the answer to the one before it; how many are answered."""
    before = 0
    for number in range(count):
        node.hear("b", DoctorQuestion(number=number, pad=bytes(size)))
        before += len(node.said_to("b"))
    return before


def test_no_more_is_answered_than_a_doctor_asks():
    node = Node("a", "b", probes=probes())

    assert answered(node, 150, 0) == 100
    assert node.protocol.edges.refused["too_many_probes"] == 50
    node.now_s += 10
    assert answered(node, 150, MAX_LARGE_BYTES) == 4 * 10**6 // MAX_LARGE_BYTES
    assert node.protocol.neighbours["b"].allowance.exclusion(node.now_s) is None


def test_answers_that_cannot_be_sent_do_not_fill_the_outbox():
    node = Node("a", "b", probes=probes())
    node.hear("b", *(DoctorQuestion(number=number, pad=b"") for number in range(60)))

    assert [answer.number for answer in node.said_to("b")] == list(range(16))
    assert node.protocol.edges.refused["too_many_probes"] == 44


def test_a_measurement_comes_through_the_status_page_as_it_was():
    edge = EdgeMeasurement(
        peer="b", is_dialled=True, condition=LinkCondition.UP, schema=5, round_trip_s=0.25, mbit_s=7.5, clock_ahead_s=-1.0
    )
    edge.answer = probes().answer(DoctorQuestion(number=1, pad=b""))
    again = EdgeMeasurement(peer="b", is_dialled=True, condition=LinkCondition.UP)
    again.take_up(edge.as_dict())

    assert asdict(edge) == asdict(again)
