"""Who needs nothing more: a neighbour's word counts of members to which it is nearer, and of nobody else."""

from __future__ import annotations

import networkx as nx
import pytest

from p2pfl.node.sum_done import DoneMembers


def done_at(me, graph, participants=None, *, down=()):
    neighbours = [sorted(graph[each]) for each in range(len(graph))]
    return DoneMembers(neighbours, range(len(graph)) if participants is None else participants, me, lambda place: place not in down)


def test_a_neighbour_at_the_end_of_a_path_is_believed_of_itself_alone():
    done = done_at(1, nx.path_graph(4))
    done.hear(0, range(4))
    assert [*done] == [0]
    done.hear(2, range(4))
    assert [*done] == [0, 2, 3]
    done.add_me()

    assert [*done] == [0, 1, 2, 3]
    assert len(done) == 4


def test_members_that_add_nothing_need_nothing():
    assert [*done_at(0, nx.path_graph(4), [0, 3])] == [1, 2]
    assert [*done_at(1, nx.path_graph(4), [0, 3])] == [2]


def test_all_nearer_neighbours_that_are_there_have_to_say_so():
    down = set()
    done = done_at(0, nx.cycle_graph(4), down=down)
    done.hear(3, range(4))
    assert [*done] == [3]
    down.add(1)
    assert [*done] == [2, 3]
    down.clear()
    done.hear(1, [1, 2])

    assert [*done] == [1, 2, 3]


def test_where_no_neighbour_is_there_nobody_is_done():
    assert [*done_at(0, nx.cycle_graph(4), down={1, 3})] == []


@pytest.mark.parametrize("graph", [nx.path_graph(7), nx.cycle_graph(6), nx.star_graph(5), nx.random_regular_graph(4, 13, seed=3)])
def test_what_all_say_reaches_all(graph):
    members = [done_at(each, graph) for each in range(len(graph))]
    for each in members:
        each.add_me()
    for _ in range(nx.diameter(graph)):
        said = [set(each) for each in members]
        for me, each in enumerate(members):
            for other in graph[me]:
                each.hear(other, said[other])

    assert all(len(each) == len(graph) for each in members)
