"""Graphs that change: the exact mean after the published number of rounds, and random ones that contract as computed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import SCHEDULES, make_schedule
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

SIZES = (3, 5, 6, 7, 8, 9, 10, 12, 15, 16, 20, 24, 25, 32, 33, 48, 64, 100)
ROUNDS = {
    "simple-base-2": (3, 5, 5, 5, 3, 7, 7, 7, 7, 4, 9, 9, 9, 5, 11, 11, 6, 13),
    "base-2": (3, 5, 4, 5, 3, 7, 6, 5, 7, 4, 7, 6, 9, 5, 11, 7, 6, 11),
    "base-3": (1, 3, 2, 4, 3, 2, 4, 3, 4, 4, 5, 4, 6, 5, 6, 5, 6, 8),
    "base-4": (1, 3, 2, 3, 2, 2, 4, 2, 4, 2, 4, 3, 5, 3, 5, 3, 3, 6),
    "base-5": (1, 1, 2, 3, 2, 2, 2, 2, 2, 2, 2, 3, 2, 3, 5, 3, 3, 3),
}
"""Takezawa et al. 2023, by number of nodes."""


def product(schedule, rounds):
    """W of these rounds one after the other."""
    whole = np.eye(schedule.num_nodes)
    for number in range(rounds):
        whole = schedule.at(number).mixing_matrix().toarray() @ whole
    return whole


def error(schedule, rounds):
    return np.abs(product(schedule, rounds) - 1 / schedule.num_nodes).max()


@pytest.mark.parametrize("name", ROUNDS)
def test_the_number_of_rounds_is_the_published_one(name):
    assert tuple(make_schedule(name, n).period for n in SIZES) == ROUNDS[name]


@pytest.mark.parametrize("prefix", ["base", "simple-base"])
@pytest.mark.parametrize("degree", first_fast([1, 2, 3, 4]))
def test_everybody_has_the_exact_mean_for_any_number_of_nodes(prefix, degree):
    for num_nodes in range(2, 129):
        schedule = make_schedule(f"{prefix}-{degree + 1}", num_nodes)
        matrices = [schedule.at(number).mixing_matrix().toarray() for number in range(schedule.period)]

        assert schedule.exact_after == schedule.period
        assert error(schedule, schedule.period) < 1e-12
        for number, matrix in enumerate(matrices):
            assert np.array_equal(matrix, matrix.T)
            assert matrix.min() >= -1e-15
            assert schedule.at(number).degrees.max() <= degree
        assert schedule.period <= 2 * np.log(num_nodes) / np.log(degree + 1) + 2


@pytest.mark.parametrize("power", range(1, 7))
def test_one_peer_graphs_are_exact_where_the_number_of_nodes_is_a_power_of_two(power):
    for name in ("one-peer-exponential", "one-peer-hypercube"):
        schedule = make_schedule(name, 2**power)

        assert schedule.exact_after == power
        assert error(schedule, power) < 1e-15


@pytest.mark.parametrize(("nodes", "rounds", "expected"), [(5, 3, 0.075), (6, 3, 1 / 12), (12, 4, 1 / 24), (25, 5, 0.0225)])
def test_the_one_peer_exponential_graph_is_not_exact_otherwise(nodes, rounds, expected):
    schedule = make_schedule("one-peer-exponential", nodes)

    assert schedule.exact_after is None
    assert error(schedule, rounds) == pytest.approx(expected, abs=1e-14)


def test_a_hyper_hypercube_takes_as_many_rounds_as_the_fewest_factors():
    assert [make_schedule("hyper-hypercube", 24, degree=k).period for k in (2, 3, 5)] == [4, 3, 2]
    assert error(make_schedule("hyper-hypercube", 24, degree=3), 3) < 1e-15


def test_the_weighted_mean_is_exact_too():
    """On (m x, m), divided at the end."""
    m, x = np.arange(1.0, 9), np.random.default_rng(0).standard_normal(8)
    whole = product(make_schedule("one-peer-exponential", 8), 3)

    np.testing.assert_allclose(whole @ (m * x) / (whole @ m), (m * x).sum() / m.sum(), rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "degree", "expected"),
    [
        ("el-oracle", 8, 2, 0.238095),
        ("el-local", 8, 2, 0.323263),
        ("el-oracle", 16, 1, 0.466667),
        ("el-oracle", 16, 4, 0.146667),
        ("el-local", 16, 1, 0.601753),
        ("el-local", 16, 4, 0.181584),
    ],
)
def test_random_graphs_contract_as_computed(name, nodes, degree, expected):
    """E||X+ - mean||**2 / ||X - mean||**2 about the old mean, within three standard errors."""
    schedule = make_schedule(name, nodes, seed=1, degree=degree)
    x = np.random.default_rng(2).standard_normal(nodes)
    x -= x.mean()
    found = [np.square(schedule.at(number).mixing_matrix() @ x).sum() / np.square(x).sum() for number in range(4000)]
    p = degree / (nodes - 1)
    exact = (1 - p) / (degree + 1) if name == "el-oracle" else (1 - (1 - p) ** nodes) / degree - 1 / (nodes - 1)

    assert exact == pytest.approx(expected, abs=5e-7)
    assert abs(np.mean(found) - exact) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.mark.slow
def test_random_pairs_contract_as_computed():
    """In a perfect matching of 16 every node meets another, uniformly: the factor of a random vector is 1 - 8 * 2 / (2 * 15) = 7 / 15."""
    schedule = make_schedule("random-matching", 16, seed=3)
    x = np.random.default_rng(2).standard_normal(16)
    x -= x.mean()
    found = [np.square(schedule.at(number).mixing_matrix() @ x).sum() / np.square(x).sum() for number in range(4000)]

    assert abs(np.mean(found) - 7 / 15) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.mark.parametrize("name", ["el-oracle", "el-local", "random-matching"])
def test_every_process_derives_the_same_rounds(name):
    program = f"""
from p2pfl.topology import make_schedule
graph = make_schedule({name!r}, 9, seed=4{"" if name == "random-matching" else ", degree=2"}).at(1_000_003)
print(graph.senders.tolist(), graph.receivers.tolist())
"""
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    graph = make_schedule(name, 9, seed=4, **({} if name == "random-matching" else {"degree": 2})).at(1_000_003)

    assert other.strip() == f"{graph.senders.tolist()} {graph.receivers.tolist()}"


def test_random_rounds_never_change():
    """Studies of before would fall apart."""
    assert make_schedule("random-matching", 6, seed=7).at(2).senders.tolist() == PINNED["random-matching"]
    assert make_schedule("el-oracle", 6, seed=7, degree=2).at(2).senders.tolist() == PINNED["el-oracle"]
    assert make_schedule("el-local", 6, seed=7, degree=2).at(2).senders.tolist() == PINNED["el-local"]


PINNED = {
    "random-matching": [4, 5, 3, 2, 0, 1],
    "el-oracle": [1, 4, 0, 5, 3, 4, 2, 5, 0, 2, 1, 3],
    "el-local": [4, 0, 5, 1, 4, 1, 2, 3, 5, 0, 2, 3],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_mixing_matrix_in_every_round(name):
    schedule = make_schedule(name, 8)
    union = {*zip(schedule.union().senders.tolist(), schedule.union().receivers.tolist(), strict=True)}
    for number in range(12):
        graph = schedule.at(number)

        assert graph.self_weights.min() >= schedule.least_weight() - 1e-15
        assert (graph.weights > 0).all()
        assert {*zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)} <= union


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_matcha_weighs_anything_below_nothing(name):
    """Its step is the best one, as best-constant's is: a node that meets many may count its own model negatively."""
    least = make_schedule(name, 8).least_weight()

    assert least >= -1e-15 or name == "matcha"
    assert make_schedule("matcha", 8, budget=0.5).least_weight() == pytest.approx(1 - 2 * 0.607369)


def test_what_cannot_be_is_refused():
    with pytest.raises(TopologyError, match="one-peer-hypercube of 12 nodes: expected a power of 2; base-2 takes any number"):
        make_schedule("one-peer-hypercube", 12)
    with pytest.raises(TopologyError, match="hyper-hypercube of 10 nodes with degree = 2: expected a number whose prime factors"):
        make_schedule("hyper-hypercube", 10, degree=2)
    with pytest.raises(TopologyError, match="el-oracle of 5 nodes with degree = 3: one of both must be even"):
        make_schedule("el-oracle", 5, degree=3)
    with pytest.raises(TopologyError, match="el-local of 4 nodes with degree = 4: expected at most 3"):
        make_schedule("el-local", 4, degree=4)
