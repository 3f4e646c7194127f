import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.errors import TopologyError
from p2pfl.topology import WEIGHTS, Topology, make, weighted

UNDIRECTED_RULES = [
    rule for rule in WEIGHTS if rule not in ("given", "push-sum", "stationary", "fdla")
]  # the last two have tests of their own


@st.composite
def connected_graphs(draw):
    n = draw(st.integers(2, 24))
    tree = [(draw(st.integers(0, i - 1)), i) for i in range(1, n)]
    more = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))
    senders, receivers = zip(*tree, *more, strict=True)
    return Topology.from_edges("random", n, senders, receivers)


@pytest.mark.parametrize("rule", UNDIRECTED_RULES)
@given(graph=connected_graphs())
@settings(max_examples=40, deadline=None)
def test_every_rule_is_symmetric_doubly_stochastic_and_converges(rule, graph):
    w = weighted(graph, rule).mixing_matrix().toarray()
    eigenvalues = np.sort(np.linalg.eigvalsh(w))

    assert np.array_equal(w, w.T)
    assert np.abs(w.sum(axis=0) - 1).max() <= 1e-14 * len(w)
    assert np.abs(eigenvalues[:-1]).max(initial=0) < 1
    assert rule == "best-constant" or w.min() >= 0


@pytest.mark.parametrize("n", [3, 8, 9, 16, 33])
def test_the_directed_exponential_graph_is_doubly_stochastic_with_equal_weights(n):
    graph = make("exponential", n)
    w = graph.mixing_matrix().toarray()
    num_hops = math.ceil(math.log2(n))

    assert np.abs(w.sum(axis=0) - 1).max() <= 1e-14
    assert np.abs(w.sum(axis=1) - 1).max() <= 1e-14
    assert np.allclose(w[w > 0], 1 / (num_hops + 1), rtol=1e-14, atol=0)
    assert weighted(graph, "given") is graph


def test_metropolis_looks_at_the_larger_degree():
    w = weighted(Topology.from_edges("lollipop", 4, [0, 0, 1, 2], [1, 2, 2, 3])).mixing_matrix().toarray()

    assert w[0, 1] == w[1, 0] == 1 / 3
    assert w[0, 2] == w[1, 2] == w[2, 3] == 1 / 4
    assert np.array_equal(np.diag(w), [1 - (1 / 3 + 1 / 4), 1 - (1 / 3 + 1 / 4), 1 - 3 / 4, 1 - 1 / 4])


def test_lazy_is_half_of_metropolis():
    graph = make("karate-club")
    w = weighted(graph).mixing_matrix().toarray()

    assert np.allclose(weighted(graph, "lazy").mixing_matrix().toarray(), (np.eye(34) + w) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "n", "step"), [("ring", 5, 0.4), ("ring", 8, 0.436130), ("star", 8, 2 / 9), ("petersen", 10, 2 / 7), ("path", 2, 1 / 2)]
)
def test_best_constant_weights(name, n, step):
    assert weighted(make(name, n), "best-constant").weights == pytest.approx(step, abs=5e-7)


def triangle(weights, *, directed=False):
    return Topology.from_edges("triangle", 3, [0, 1, 2], [1, 2, 0], directed=directed, names=["lyon", "oslo", "rome"], weights=weights)


def test_given_weights_stay():
    graph = triangle([0.5, 0.25, 0.125])

    assert weighted(graph, "given") is graph
    assert graph.self_weights.tolist() == [0.375, 0.25, 0.625]


def test_given_weights_may_be_negative_where_gossip_still_agrees():
    assert weighted(triangle([0.5, 0.5, -0.05]), "given").self_weights.max() == 0.55


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (make("ring", 4), "topology ring comes without; write a weight on each edge or take metropolis"),
        (triangle([0.75, 0.5, 0.25]), "oslo gives its neighbours 1.25 in all, expected at most 1"),
        (make("ring", 4).with_weights(0.5), "gossip on ring would never agree"),
        (make("path", 2).with_weights(-0.1), r"gossip on path would never agree \(spectral gap -0.2\)"),
        (make("path", 3).with_weights([0.1, 0.2, 0.3, 0.3]), "0 - 1 weighs 0.2 one way and 0.1 the other, expected the same"),
        (triangle([0.5, 0.5, 0.25], directed=True), "lyon's message counts 1.25 in all, expected 1: the mean would drift"),
    ],
)
def test_given_weights_that_cannot_be(graph, message):
    with pytest.raises(TopologyError, match=message):
        weighted(graph, "given")


def test_of_many_faults_five_are_shown():
    with pytest.raises(TopologyError) as caught:
        weighted(make("complete", 9).with_weights(0.5), "given")

    assert len(caught.value.findings) == 6
    assert caught.value.findings[-1] == "... and 4 more"


@pytest.mark.parametrize("rule", UNDIRECTED_RULES)
def test_symmetric_rules_refuse_a_directed_graph(rule):
    with pytest.raises(TopologyError, match=f"weights = '{rule}': topology exponential is directed .* take weights: given"):
        weighted(make("exponential", 8), rule)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(TopologyError, match="weights = 'metro': expected one of metropolis, max-degree, lazy, best-constant, fdla, given"):
        weighted(make("ring", 4), "metro")


def test_a_disconnected_graph_gets_no_weights():
    with pytest.raises(TopologyError, match="nothing from 0 can reach 2"):
        weighted(Topology.from_edges("split", 4, [0, 2], [1, 3]))


def test_push_sum_splits_what_a_sender_has_evenly():
    topology = weighted(make("star", 4), "push-sum")
    matrix = topology.mixing_matrix().toarray()

    assert topology.directed
    assert matrix[1, 0] == 1 / 4  # the centre has three receivers and itself
    assert matrix[0, 1] == 1 / 2
    np.testing.assert_allclose(matrix.sum(axis=0) - np.diag(matrix) + 1 / (1 + np.array([3, 1, 1, 1])), 1)
