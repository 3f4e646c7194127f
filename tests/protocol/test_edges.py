"""Flows that are matched or rolled back, and neighbours that are refused."""

from __future__ import annotations

import pytest
from nodes_by_hand import TERMS, Node, alive, carry, greeted, hello, in_step, pair

from p2pfl.protocol.edges import Flow
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.protocol.snapshot import snapshot
from p2pfl.wire.link import Terms
from p2pfl.wire.messages import NOTHING_CLOSED, Goodbye, Report


def test_a_flow_that_the_neighbour_did_not_match_is_taken_back_once():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.hear("b", alive(1))
    a.hear("b", alive(1))

    assert [(neighbour.name, flow.exchange) for neighbour, flow in a.protocol.edges.compensations] == [("b", 0)]
    assert a.protocol.edges.flows == {}
    assert a.kinds()[-1] == "took_back"


def test_a_flow_that_the_neighbour_matched_is_forgotten():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    assert list(a.protocol.edges.flows) == [("b", 0)]
    a.hear("b", alive(1, merged=(0,)))

    assert (a.protocol.edges.compensations, a.protocol.edges.flows) == ([], {})


def test_an_update_without_a_report_on_the_exchange_before_is_not_merged():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    unheard = a.protocol.neighbours["b"].ledger
    a.hear_update("b", 1, report=Report(closed_through=-1, merged=(), confirmed=-1, settled=-1))

    assert a.protocol.edges.refused == {"wrong_report": 1}
    assert not unheard.admits(1)
    assert a.protocol.admitted() == {}


def test_nothing_is_told_before_it_is_on_disk():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close(keep=False)
    a.post()
    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    a.protocol.edges.checkpointed(a.protocol.edges.ledgers())

    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"member": "c"}, "wrong_name"),
        ({"terms": Terms(study="dd" * 32, layout=TERMS.layout, start=TERMS.start)}, "wrong_study"),
        ({"terms": Terms(study=TERMS.study, layout="dd" * 32, start=TERMS.start)}, "wrong_layout"),
        ({"terms": Terms(study=TERMS.study, layout=TERMS.layout, start="dd" * 32)}, "wrong_start"),
    ],
)
def test_who_has_something_else_in_mind_is_told_by_name(wrong, reason):
    a = Node("a", "b")
    a.hear("b", hello(**wrong))

    assert a.protocol.edges.refused == {reason: 1}
    assert a.said_to("b") == [Goodbye(reason=reason)]
    assert a.kinds() == ["refused"]
    assert not a.protocol.neighbours["b"].session.is_open
    assert a.protocol.neighbours["b"].last_seen_s is None


def test_being_refused_is_an_event():
    a, _ = pair()
    a.hear("b", Goodbye(reason="wrong_study"))

    assert a.protocol.edges.refused == {"refused_by_neighbour_wrong_study": 1}
    assert a.events[-1] == ("refused", "b does not talk to this node: wrong_study")


def test_who_sends_nonsense_is_disconnected_and_not_waited_for():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    greeted(a, b)
    greeted(a, c)
    a.post()
    a.hear_update("c", 0)
    assert not a.protocol.pace.is_over(a.now_s)
    for _ in range(33):
        a.protocol.hear("b", (memoryview(b"\xc1"),), a.now_s)

    assert a.protocol.edges.exclusion("c", a.now_s) is None
    assert a.protocol.edges.exclusion("b", a.now_s) == (10.0, "messages that no member sends (bad_message)")
    assert a.events[-1] == ("excluded", "b is disconnected for 10 s: it sends messages that no member sends (bad_message)")
    assert a.protocol.pace.is_over(a.now_s)


def test_messages_above_what_a_round_needs_are_not_even_decoded():
    a, _ = pair()
    for _ in range(3000):
        a.protocol.hear("b", (memoryview(bytes(100)),), a.now_s)

    decoded = a.protocol.edges.refused["bad_message"]
    assert decoded <= 2000
    assert a.protocol.neighbours["b"].allowance.num_dropped == 3000 - decoded


def test_the_ledgers_of_a_story_are_those_that_come_back():
    a, _ = pair()
    in_step(a, 4, 1.0)
    metadata, _ = snapshot(a.protocol)

    assert (metadata["exchange"], metadata["closing"], metadata["stop_round"]) == (4, None, None)
    assert list(metadata["sent"]) == ["3"]
    assert EdgeLedger.from_dict(metadata["ledgers"]["b"]).report() == a.protocol.neighbours["b"].ledger.report()


def test_a_neighbour_that_begins_without_its_state_during_a_merge_ends_nobody():
    a, b = pair()
    for _ in range(3):
        for node in (a, b):
            node.post()
        carry(a, b)
        assert (a.close(), b.close()) == ([], [])
    for node in (a, b):
        node.post()
    carry(a, b)
    due = a.protocol.due(a.now_s, {"x"})
    anew = Node("b", "a", incarnation=3, anew=5)
    greeted(a, anew)

    assert "started_anew" in a.kinds()
    assert a.protocol.neighbours["b"].ledger.heard == NOTHING_CLOSED
    merged = {name: Flow(exchange=held.number, amounts=held.update.arrays) for name, held in due.admitted.items()}
    assert list(merged) == ["b"]
    assert a.protocol.close(merged, a.now_s) == []
    assert a.protocol.neighbours["b"].ledger.open_flow == 3
    a.hear("b", alive(9))
    assert [flow.exchange for _, flow in a.protocol.edges.take_compensations()] == [3], "it never merged that, so it is rolled back"
