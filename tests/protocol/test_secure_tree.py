"""All members derive one tree, which has the participants and only those others that connect them."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.errors import TopologyError
from p2pfl.protocol.secure_tree import sum_tree


def neighbours_of(graph):
    return [set(graph[member]) for member in range(len(graph))]


@st.composite
def graphs_with_sets(draw):
    """A connected graph and a set of some of its members."""
    num_members = draw(st.integers(2, 12))
    edges = [(draw(st.integers(0, child - 1)), child) for child in range(1, num_members)]
    more = st.tuples(st.integers(0, num_members - 1), st.integers(0, num_members - 1)).filter(lambda edge: edge[0] != edge[1])
    graph = nx.Graph(edges + draw(st.lists(more, max_size=8)))
    return neighbours_of(graph), draw(st.sets(st.integers(0, num_members - 1), min_size=1))


@given(graphs_with_sets())
def test_the_tree_spans_the_set_on_edges_of_the_graph_and_ends_at_participants(drawn):
    neighbours, participants = drawn
    tree = sum_tree(neighbours, participants)
    found = nx.Graph([(child, parent) for child, parent in tree.parents.items()])
    found.add_node(tree.root)

    assert nx.is_tree(found)
    assert participants <= set(tree.members)
    assert all(parent in neighbours[child] for child, parent in tree.parents.items())
    assert all(tree.children(member) or member in participants for member in tree.members)
    assert {member: set(tree.neighbours(member)) for member in tree.members} == {each: set(found[each]) for each in found}


def test_it_is_breadth_first_in_the_rosters_order():
    ring = sum_tree(neighbours_of(nx.cycle_graph(5)), range(5))
    star = sum_tree(neighbours_of(nx.star_graph(4)), range(5))

    assert ring.parents == {1: 0, 4: 0, 2: 1, 3: 4}
    assert (star.root, star.children(0)) == (0, (1, 2, 3, 4))


def test_others_are_in_it_only_where_they_are_needed():
    path, ring = neighbours_of(nx.path_graph(5)), neighbours_of(nx.cycle_graph(5))

    assert sum_tree(path, {1, 3, 4}).members == (1, 2, 3, 4)
    assert sum_tree(ring, {0, 1, 2, 3}).members == (0, 1, 2, 3)  # member 4 would be a shorter way from 0 to 3


def test_a_set_that_the_graph_does_not_connect_is_refused_by_name():
    with pytest.raises(TopologyError, match="from a to c: they cannot add"):
        sum_tree([{1}, {0}, {3}, {2}], {0, 1, 2}, "abcd")


def test_an_edge_that_goes_one_way_makes_no_tree():
    with pytest.raises(ValueError, match="both ways"):
        sum_tree([{1}, set()], {0, 1})
