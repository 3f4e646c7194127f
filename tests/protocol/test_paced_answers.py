"""Answers of a member in secure sums: signed questions only, each neighbour the same thing once in a second, and none is left out."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from secure_members import Network, drawn_values, terms_of

from p2pfl.errors import BadMessage
from p2pfl.protocol.paced_answers import PACE_S, PacedAnswers
from p2pfl.wire.secure_messages import LastSignedRequest, Opening


def with_a_stale_opening():
    """A network in its second session, and an opening of the first one."""
    terms = terms_of(3)
    found = Network(nx.path_graph(3), terms, drawn_values(terms))
    found.contribute = lambda _: None
    found.open()
    found.run()
    stale = found.members[1].session.openings[2]
    found.open()
    found.run()
    assert found.members[1].session.number > stale.session
    return found.members[1], stale


def test_a_stale_opening_that_nobody_has_signed_is_refused():
    member, stale = with_a_stale_opening()
    with pytest.raises(BadMessage) as refused:
        member.receive(0, replace(stale, signature=bytes(64)), 0.0)
    assert refused.value.reason == "wrong_signature"

    assert member.look(2 * PACE_S) == []


def test_a_stale_opening_is_answered_once_in_a_second():
    member, stale = with_a_stale_opening()
    answer = member.receive(2, stale, 10.0)
    assert [(receiver, type(each)) for receiver, each in answer] == [(2, Opening)] * 4
    for _ in range(100):
        assert member.receive(2, stale, 10.0) == []
    assert len(member.receive(0, stale, 10.1)) == 4
    assert member.look(10.5) == []

    assert member.look(10.0 + PACE_S) == answer
    assert member.look(30.0) == []


def test_a_request_for_what_was_signed_is_answered_once_in_a_second():
    member, _ = with_a_stale_opening()
    answer = member.receive(2, LastSignedRequest(member=2), 10.0)
    assert len(answer) == 1
    for _ in range(100):
        assert member.receive(2, LastSignedRequest(member=2), 10.0) == []
        assert member.receive(2, LastSignedRequest(member=60_000), 10.0) == []

    assert member.look(10.0 + PACE_S) == answer


def test_what_is_owed_is_given_in_its_order_and_another_thing_at_once():
    member, stale = with_a_stale_opening()
    newest, openings = member.history.answer(2), [*member.session.openings.values()]
    answers = PacedAnswers(member.history)
    answers.ask(1, 2)
    assert answers.take_due(0.0, openings) == [(1, each) for each in newest]
    answers.ask(1, 2)
    answers.ask(1, None)
    answers.ask(2, 2)

    assert answers.take_due(0.5, [stale]) == [(1, stale), *((2, each) for each in newest)]
    assert answers.take_due(PACE_S, openings) == [(1, each) for each in newest]
    assert answers.take_due(9.0, openings) == []
