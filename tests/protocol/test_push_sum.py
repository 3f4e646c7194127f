"""A sum over all nodes that each of them knows within bounds: they hold whatever is lost."""

from __future__ import annotations

from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest

from p2pfl.protocol.push_sum import MAX_OUTAGE, PushSumConversation
from p2pfl.wire.messages import PushSum


class Sums:
    """Nodes of a graph that end rounds together, each a little earlier or later; messages are lost as *lost* says."""

    def __init__(self, graph: nx.Graph, *, steps: int = 30, seed: int = 0) -> None:
        self.graph = nx.convert_node_labels_to_integers(graph)
        self.num_nodes, self.draws = self.graph.number_of_nodes(), np.random.default_rng(seed)
        diameter = nx.diameter(self.graph)
        self.nodes = [
            PushSumConversation(neighbours=[str(j) for j in self.graph[i]], num_nodes=self.num_nodes, diameter=diameter, steps=steps)
            for i in self.graph
        ]
        self.period = self.nodes[0].period
        self.known = {i: [] for i in self.graph}

    def round(self, number: int, values, lost=lambda i, j: False, away=frozenset()) -> None:
        """In a random order, so that some hear of a neighbour's round before they end their own."""
        for i in self.draws.permutation(self.num_nodes):
            if i in away:
                continue
            node = self.nodes[i]
            node.end_round(number, values[i])
            for j in self.graph[i]:
                if not lost(i, j) and j not in away:
                    self.nodes[j].hear(str(i), node.message_for(str(j)))
        for i, node in enumerate(self.nodes):
            if (known := node.known()) is not None:
                self.known[i].append(SimpleNamespace(**dict(zip(("round", "low", "high", "known_in"), known, strict=True))))


GRAPHS = [nx.cycle_graph(12), nx.star_graph(9), nx.random_regular_graph(4, 300, seed=2), nx.complete_graph(6), nx.path_graph(2)]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: str(graph.number_of_nodes()))
def test_every_node_comes_to_know_the_sum_within_bounds_that_narrow(graph):
    sums = Sums(graph)
    values = sums.draws.lognormal(0, 2, sums.num_nodes)
    for number in range(sums.period):
        sums.round(number, values + number)

    for known in sums.known.values():
        assert len(known) == 1
        assert known[0].low * (1 - 1e-12) <= values.sum() <= known[0].high * (1 + 1e-12)
        assert known[0].known_in <= sums.period
    assert max(k[0].high / k[0].low for k in sums.known.values()) < 1.5


def test_each_sum_is_of_its_own_round():
    sums = Sums(nx.cycle_graph(6))
    values = np.arange(1.0, 7.0)
    for number in range(3 * sums.period):
        sums.round(number, values + number)

    for known in sums.known.values():
        assert [k.round for k in known] == [0, sums.period, 2 * sums.period]
        for k in known:
            assert k.low * (1 - 1e-12) <= 21 + 6 * k.round <= k.high * (1 + 1e-12)


@pytest.mark.parametrize("said", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_hold_whatever_is_lost(said, seed):
    sums = Sums(nx.random_regular_graph(4, 40, seed=1), steps=12, seed=seed)
    certified = 0
    for number in range(6 * sums.period):
        values = sums.draws.lognormal(0, 3, 40) if number % sums.period == 0 else np.zeros(40)
        if number % sums.period == 0:
            truth = values.sum()
        sums.round(number, values, lost=lambda i, j: sums.draws.random() < said)
        for known in sums.known.values():
            for k in known:
                assert k.low * (1 - 1e-12) <= truth <= k.high * (1 + 1e-12)
            certified += len(known)
            known.clear()

    assert certified > 100 or said > 0.3


def test_a_link_that_is_dead_for_long_lets_nobody_certify_what_is_on_its_way():
    sums = Sums(nx.cycle_graph(5), steps=20)
    values = np.array([1000.0, 1, 1, 1, 1])
    for number in range(sums.period):
        sums.round(number, values, lost=lambda i, j, now=number: (i, j) == (0, 1) and now <= 20)

    assert not any(sums.known.values())


def test_a_short_outage_is_made_up_for():
    sums = Sums(nx.cycle_graph(5), steps=20)
    values = np.array([1000.0, 1, 1, 1, 1])
    for number in range(sums.period):
        sums.round(number, values, lost=lambda i, j, now=number: (i, j) == (0, 1) and 2 <= now <= 17)

    for known in sums.known.values():
        assert known[0].low <= 1004 <= known[0].high


@pytest.mark.parametrize("when", [range(3, 100), range(1), range(19, 22)])
def test_without_one_of_them_nothing_is_certified(when):
    sums = Sums(nx.cycle_graph(5), steps=20)
    for number in range(sums.period):
        sums.round(number, np.ones(5), away={2} if number in when else frozenset())

    assert not any(sums.known.values())


def test_one_that_has_no_number_makes_the_sum_void_and_not_the_next():
    sums = Sums(nx.cycle_graph(5))
    for number in range(2 * sums.period):
        sums.round(number, [1.0, 2.0, None if number == 0 else 3.0, 4.0, 5.0])

    assert all([k.round for k in known] == [sums.period] for known in sums.known.values())


def test_a_neighbour_that_takes_back_what_it_gave_makes_the_sum_void():
    sums = Sums(nx.cycle_graph(5))
    node = sums.nodes[0]
    node.end_round(0, 1.0)
    for step, given in enumerate((3.0, 2.0)):
        said = PushSum(round=0, step=step, sum=given, weight=1.0, low=None, high=None, outage=0, hops=0, void=False)
        node.hear("1", said)
        node.end_round(step + 1, 1.0)

    assert node.message_for("4").void


def test_what_a_neighbour_says_of_other_sums_is_left_alone():
    sums = Sums(nx.cycle_graph(5))
    node = sums.nodes[0]
    node.end_round(0, 1.0)
    for number in (7 * sums.period, 5, 2**50):
        node.hear("1", PushSum(round=number, step=0, sum=9.0, weight=9.0, low=None, high=None, outage=0, hops=0, void=True))
    node.end_round(1, 1.0)

    assert not node.message_for("4").void
    assert MAX_OUTAGE == 4


def test_what_is_still_on_its_way_at_the_last_step_is_in_the_bounds():
    sums = Sums(nx.path_graph(2), steps=3)
    for number in range(sums.period):
        sums.round(number, [1000.0, 0.0], lost=lambda i, j, now=number: (i, j) == (0, 1) and now < 3)

    for known in sums.known.values():
        assert known[0].low <= 1000 <= known[0].high
