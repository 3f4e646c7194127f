"""Agreeing to stop: a certificate for any models, and one stop round for everybody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithms.stopping import NEVER, StopRule
from p2pfl.topology import diameter, laplacian_extremes, make, weighted

GRAPHS = [
    ("ring", 16, 8),
    ("hypercube", 16, 4),
    ("path", 7, 6),
    ("star", 9, 2),
    ("complete", 5, 1),
    ("torus", 16, 4),
    ("erdos-renyi", 12, None),
]

MOST_ROUNDS = 200


def graph_of(name, num_nodes):
    return weighted(make(name, num_nodes, seed=3), "metropolis")


def rule_of(graph, *, tolerance=1e-3, patience=3):
    return StopRule(tolerance=tolerance, patience=patience, diameter=diameter(graph), lambda_2=float(laplacian_extremes(graph)[0]))


def squared_distances(graph, x_NP):
    """sum over a node's neighbours of ||x_i - x_j||**2."""
    differences = ((x_NP[graph.senders] - x_NP[graph.receivers]) ** 2).sum(axis=1)
    return np.bincount(graph.receivers, weights=differences, minlength=graph.num_nodes)


def heard(graph, values_N):
    index_NK, _, present_NK = graph.padded()
    return np.where(present_NK, values_N[index_NK], NEVER)


class Network:
    """All nodes' agreement, one round after the other."""

    def __init__(self, graph, rule):
        self.graph, self.rule, self.round = graph, rule, 0
        self.agreed_N = np.zeros(graph.num_nodes, dtype=np.int64)
        self.stop_N = np.full(graph.num_nodes, NEVER)

    def step(self, passed_N):
        assert self.round < MOST_ROUNDS
        agreed = self.rule.consensus_counter(passed_N, self.agreed_N, heard(self.graph, self.agreed_N))
        self.stop_N = self.rule.stop_round(self.round, agreed, self.stop_N, heard(self.graph, self.stop_N))
        self.agreed_N = agreed
        self.round += 1


@given(
    graph=st.sampled_from(GRAPHS),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(1e-6, 10),
    tolerance=st.floats(1e-6, 10),
    dimension=st.integers(1, 6),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_where_all_pass_the_disagreement_is_certified(graph, seed, spread, tolerance, dimension):
    graph = graph_of(*graph[:2])
    rng = np.random.default_rng(seed)
    x_NP = rng.standard_normal(dimension) + spread * rng.standard_normal((graph.num_nodes, dimension))
    norms_N = (x_NP**2).sum(axis=1)
    rule = rule_of(graph, tolerance=tolerance)

    if rule.passes(squared_distances(graph, x_NP), norms_N).all():
        distance = np.sqrt(((x_NP - x_NP.mean(axis=0)) ** 2).sum(axis=1).mean())
        assert distance <= tolerance * np.sqrt(norms_N.mean()) * (1 + 1e-9)


@pytest.mark.parametrize(("name", "num_nodes"), [("ring", 16), ("hypercube", 16), ("star", 9)])
def test_the_certificate_is_tight_on_the_slowest_mode(name, num_nodes):
    """Along an eigenvector of lambda_2 the sum of the local tests is an equality: a tolerance a hair below refuses."""
    graph = graph_of(name, num_nodes)
    values, vectors = np.linalg.eigh(graph.laplacian().toarray())
    x_NP = 5 + vectors[:, 1:2]
    disagreement = squared_distances(graph, x_NP).sum() / 2

    assert disagreement == pytest.approx(values[1] * ((x_NP - x_NP.mean()) ** 2).sum(), rel=1e-12)
    exact = np.sqrt(((x_NP - x_NP.mean()) ** 2).mean()) / np.sqrt((x_NP**2).mean())
    below = rule_of(graph, tolerance=exact * (1 - 1e-9))
    assert not below.passes(squared_distances(graph, x_NP), (x_NP**2).sum(axis=1)).all()


def test_the_local_test_is_the_written_inequality():
    rule = StopRule(tolerance=0.1, patience=1, diameter=1, lambda_2=2.0)
    squared = np.array([0.04, 0.0400001, 0.0, np.nan, 0.0])  # 1/2 . 0.04 = 2 . 0.01 . 1
    norms = np.array([1.0, 1.0, 0.0, 1.0, np.nan])

    assert rule.passes(squared * (1 - 1e-12), norms).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(("name", "num_nodes", "expected"), GRAPHS[:6])
def test_news_of_one_failure_reaches_everybody_in_exactly_diameter_rounds(name, num_nodes, expected):
    graph = graph_of(name, num_nodes)
    network = Network(graph, rule_of(graph, patience=10**6))
    network.agreed_N[:] = 1000
    failed = np.ones(num_nodes, dtype=bool)
    failed[-1] = False  # an end of the path, a leaf of the star
    network.step(failed)
    rounds = 0
    while (network.agreed_N > 1000).any():
        network.step(np.ones(num_nodes, dtype=bool))
        rounds += 1

    assert expected == rounds
    # and each knows since when: as many rounds as have passed
    assert [rounds] * num_nodes == network.agreed_N.tolist()


@pytest.mark.parametrize(("name", "num_nodes"), [graph[:2] for graph in GRAPHS])
@pytest.mark.parametrize("patience", [1, 3])
def test_all_stop_in_the_same_round_two_diameters_after_the_first_announcement(name, num_nodes, patience):
    graph = graph_of(name, num_nodes)
    rule = rule_of(graph, patience=patience)
    network = Network(graph, rule)
    everybody = np.ones(num_nodes, dtype=bool)
    while (network.stop_N == NEVER).all():
        network.step(everybody)
    # h counts 1 in round 0, so that patience + diameter is reached in this round
    announced = patience + rule.diameter - 1
    assert announced == network.round - 1
    expected = announced + 2 * rule.diameter
    while network.round <= expected:
        network.step(everybody)

    assert [expected] * num_nodes == network.stop_N.tolist()


@given(graph=st.sampled_from(GRAPHS), seed=st.integers(0, 2**32 - 1), patience=st.integers(1, 4), share=st.floats(0.5, 1))
@settings(max_examples=150, deadline=None)
def test_one_stop_round_for_all_however_the_tests_come_out(graph, seed, patience, share):
    """Everybody passes with a given chance, later always: all know the same stop round before it comes, and passed `patience` rounds."""
    graph = graph_of(*graph[:2])
    rule, rng = rule_of(graph, patience=patience), np.random.default_rng(seed)
    network, history = Network(graph, rule), []
    while (network.stop_N >= network.round).any():
        passed = (rng.random(graph.num_nodes) < share) | (network.round > 12)
        history.append(passed)
        network.step(passed)

    assert len(set(network.stop_N.tolist())) == 1
    assert network.round == network.stop_N[0] + 1
    announced = network.stop_N[0] - 2 * rule.diameter
    assert np.array(history[announced - rule.diameter - patience + 1 : announced - rule.diameter + 1]).all()


@pytest.mark.parametrize(("name", "num_nodes"), [graph[:2] for graph in GRAPHS])
@pytest.mark.parametrize("rounds", [0, 10])
def test_no_stop_round_is_earlier_than_the_earliest(name, num_nodes, rounds):
    """It is reached where all pass from the first round without training on."""
    graph = graph_of(name, num_nodes)
    network = Network(graph, rule_of(graph))
    network.round = rounds
    while (network.stop_N == NEVER).any():
        network.step(np.ones(num_nodes, dtype=bool))

    assert network.stop_N.min() == network.rule.earliest(rounds)


def test_the_smallest_announcement_wins_and_padding_says_nothing():
    rule = StopRule(tolerance=1e-3, patience=2, diameter=3, lambda_2=1.0)
    agreed = np.array([4, 5, 5, 0])
    own = np.array([NEVER, NEVER, 11, 40])
    heard_NK = np.array([[NEVER, NEVER], [20, NEVER], [NEVER, 15], [30, 35]])

    assert rule.stop_round(10, agreed, own, heard_NK).tolist() == [NEVER, 16, 11, 30]
    assert rule.consensus_counter(np.array([True, False, True]), np.array([0, 9, 3]), np.array([[NEVER], [9], [NEVER]])).tolist() == [
        1,
        0,
        4,
    ]
    assert rule.consensus_counter(np.array([True]), np.array([3]), np.zeros((1, 0), dtype=np.int64)).tolist() == [4]
