"""Members add numbers over any graph and in any order of messages: the total is the plain one, bit for bit."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_members import Network, drawn_values, terms_of

from p2pfl.protocol.secure_session import SecureSession
from p2pfl.wire.secure_messages import Opening

GRAPHS = {
    "path": nx.path_graph(5),
    "star": nx.star_graph(4),
    "ring": nx.cycle_graph(6),
    "complete": nx.complete_graph(4),
    "tree": nx.balanced_tree(2, 2),
}


def network(graph, participants=None, *, seed=0, **more):
    terms = terms_of(len(graph), participants, **more)
    return Network(graph, terms, drawn_values(terms, seed), seed=seed)


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_total_is_the_plain_sum_bit_for_bit(graph, check):
    found = network(graph, check=check)
    found.open(len(graph) - 1)
    found.run()

    found.assert_exact()
    assert (found.refused, [each.ended for each in found.members]) == ([], [None] * len(graph))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_graph_any_set_any_order(data):
    num = data.draw(st.integers(3, 8))
    edges = [(data.draw(st.integers(0, child - 1)), child) for child in range(1, num)]
    more = st.tuples(st.integers(0, num - 1), st.integers(0, num - 1)).filter(lambda edge: edge[0] != edge[1])
    graph = nx.Graph(edges + data.draw(st.lists(more, max_size=4)))
    participants = sorted(data.draw(st.sets(st.integers(0, num - 1), min_size=3)))
    found = network(graph, participants, seed=data.draw(st.integers(0, 2**32)), check=data.draw(st.booleans()))
    found.open(participants[0])
    found.run()

    found.assert_exact()
    assert found.refused == []


def test_a_statement_that_comes_by_two_ways_is_verified_once(monkeypatch):
    verified, check_signed = [], SecureSession.check_signed

    def counted(session, message):
        if not isinstance(message, Opening):
            verified.append((id(session), message))
        check_signed(session, message)

    monkeypatch.setattr(SecureSession, "check_signed", counted)
    found = network(GRAPHS["complete"], check=True)
    found.open(0)
    found.run()

    found.assert_exact()
    assert len(verified) == 4 * 3 * (1 + 2 * 3)  # held totals, and of two sums digests, totals and values
    assert len(set(verified)) == len(verified)
