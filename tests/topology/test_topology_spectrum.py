import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from test_topology_weights import connected_graphs

from p2pfl.errors import TopologyError
from p2pfl.topology import (
    Topology,
    describe,
    diameter,
    diameter_bounds,
    laplacian_extremes,
    make,
    rounds_to,
    spectral_gap,
    spectrum,
    steps_from,
    weighted,
)
from thorough import first_fast

SIZES = (8, 16, 32, 64)


def gaps(name, rule="metropolis", **options):
    return [spectral_gap(weighted(make(name, n, **options), rule)) for n in SIZES]


def lambda_2(graph):
    """Second largest eigenvalue of W; of a directed graph the second largest modulus."""
    return 1 - spectrum._one_minus_w(graph)[0]


def lambda_min(graph):
    """Smallest eigenvalue of W; of a directed graph the smallest real part."""
    return 1 - spectrum._one_minus_w(graph)[1]


def forget_lattice(graph):
    """The same graph for which nothing is known of its symmetry."""
    assert graph.weights is not None
    return graph.with_weights(graph.weights)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ring", [0.195262146, 0.050746978, 0.012809813, 0.003210182]),
        ("path", [0.050746978, 0.012809813, 0.003210182, 0.000803029]),
        ("torus", [0.5, 0.4, 0.117157288, 0.117157288]),
        ("hypercube", [2 / 4, 2 / 5, 2 / 6, 2 / 7]),
        ("complete", [1, 1, 1, 1]),
        ("star", [1 / n for n in SIZES]),
    ],
)
def test_metropolis_gaps(name, expected):
    assert gaps(name) == pytest.approx(expected, abs=1e-9)


def test_gaps_of_the_exponential_graph():
    assert gaps("exponential", "given") == pytest.approx([2 / 4, 2 / 5, 2 / 6, 2 / 7], abs=1e-9)
    assert gaps("exponential", directed=False) == pytest.approx([2 / 3, 1 / 2, 2 / 5, 1 / 3], abs=1e-9)


@pytest.mark.parametrize("n", [5, 7, 9, 25, 33])
def test_an_odd_exponential_graph_mixes_faster_than_the_bound(n):
    assert spectral_gap(make("exponential", n)) > 2 / (1 + math.ceil(math.log2(n)))


def test_gaps_of_random_regular_graphs_from_seed_0():
    assert gaps("random-regular", degree=6) == pytest.approx([0.857143, 0.393610, 0.353054, 0.280512], abs=5e-7)


def gap_of(graph):
    """Metropolis gap of a networkx graph."""
    ends = np.array(graph.edges)
    return spectral_gap(weighted(Topology.from_edges("drawn", len(graph), ends[:, 0], ends[:, 1])))


def connected_regular(degree, n, seed):
    return next(graph for k in range(100) if nx.is_connected(graph := nx.random_regular_graph(degree, n, seed=seed + 1000 * k)))


@pytest.mark.parametrize(("degree", "expected"), [(3, [0.322, 0.142, 0.078, 0.059]), (4, [0.508, 0.255, 0.170, 0.138])])
def test_mean_gaps_of_fifty_random_regular_graphs(degree, expected):
    found = [np.mean([gap_of(connected_regular(degree, n, seed)) for seed in range(50)]) for n in SIZES]

    assert found == pytest.approx(expected, abs=5.001e-4)  # the table has three digits


def test_gaps_of_one_drawn_graph_of_each_size():
    drawn = [nx.gnp_random_graph(n, 2 * math.log(n) / n, seed=0) for n in SIZES]
    rewired = [nx.connected_watts_strogatz_graph(n, 4, 0.1, seed=0) for n in SIZES]

    assert [gap_of(graph) for graph in drawn] == pytest.approx([0.296, 0.188, 0.083, 0.154], abs=5.001e-4)
    assert [gap_of(graph) for graph in rewired] == pytest.approx([0.517, 0.148, 0.036, 0.037], abs=5.001e-4)
    assert gaps("small-world") == pytest.approx([0.517, 0.148, 0.036, 0.037], abs=5.001e-4)


@pytest.mark.parametrize(("n", "expected"), [(10, 0.049740), (20, 0.015368)])
def test_gaps_of_the_dumbbell(n, expected):
    assert spectral_gap(weighted(make("barbell", n), "max-degree")) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("name", "n", "metropolis", "best_constant"),
    [
        ("path", 4, 0.804738, math.cos(math.pi / 4)),
        ("path", 5, 0.872678, math.cos(math.pi / 5)),
        ("path", 6, 0.910684, math.cos(math.pi / 6)),
        ("ring", 5, 0.539345, 1 / math.sqrt(5)),
        ("ring", 8, 0.804738, 0.744521),
        ("ring", 16, 0.949253, 0.926670),
        ("star", 5, 0.8, 2 / 3),
        ("star", 8, 0.875, 7 / 9),
        ("star", 16, 0.9375, 15 / 17),
        ("hypercube", 8, 1 / 2, 1 / 2),
        ("hypercube", 16, 3 / 5, 3 / 5),
        ("hypercube", 32, 2 / 3, 2 / 3),
        ("petersen", 10, 0.5, 3 / 7),
        ("house", 5, 0.654508, 0.539345),
        ("bull", 5, 0.825694, 0.721110),
        ("barbell", 6, 0.890388, 0.824621),
        ("grid", 9, 0.767423, 5 / 7),
        ("karate-club", 34, 0.968764, 0.949635),
    ],
)
def test_contraction_of_metropolis_and_best_constant(name, n, metropolis, best_constant):
    graph = make(name, n)

    assert 1 - spectral_gap(weighted(graph)) == pytest.approx(metropolis, abs=6e-7)
    assert 1 - spectral_gap(weighted(graph, "best-constant")) == pytest.approx(best_constant, abs=6e-7)


def test_a_complete_bipartite_graph_of_3_and_2():
    graph = Topology.from_edges("k-3-2", 5, [0, 0, 1, 1, 2, 2], [3, 4, 3, 4, 3, 4])

    assert 1 - spectral_gap(weighted(graph)) == pytest.approx(0.5, abs=1e-12)
    assert 1 - spectral_gap(weighted(graph, "best-constant")) == pytest.approx(3 / 7, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "n", "expected"), [("ring", 8, -1 / 3), ("ring", 16, -1 / 3), ("torus", 16, -0.6), ("hypercube", 64, -5 / 7)]
)
def test_lambda_min(name, n, expected):
    assert lambda_min(weighted(make(name, n))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "n", "expected"), [("ring", 8, 64), ("ring", 16, 266), ("ring", 64, 4297), ("torus", 64, 111), ("complete", 9, 1)]
)
def test_predicted_rounds(name, n, expected):
    assert rounds_to(weighted(make(name, n)), 1e-6) == expected


def test_gossip_keeps_the_prediction():
    """x = cos(2 pi i / 8) on a ring of 8 is an eigenvector: after 10 rounds 0.804737854**10 of it is left."""
    w = weighted(make("ring", 8)).mixing_matrix()
    start = np.cos(2 * np.pi * np.arange(8) / 8)
    x = start
    for _ in range(10):
        x = w @ x

    assert np.allclose(x, 0.11390540 * start, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "n", "expected"), [("ring", 16, 0.9952425), ("complete", 16, 14 / 15), ("hypercube", 16, 0.96875), ("star", 9, 1 - 1 / 16)]
)
def test_a_random_pair_takes_off_lambda_2_over_twice_the_edges(name, n, expected):
    """One edge drawn uniformly, both ends take their mean: of the slowest mode 1 - lambda_2(L) / (2 E) of the square is left on average."""
    graph = make(name, n)
    slowest = np.linalg.eigh(graph.laplacian().toarray())[1][:, 1]
    edges = [(i, j) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True) if i < j]
    left = [1 - (slowest[i] - slowest[j]) ** 2 / 2 for i, j in edges]  # ||W v||**2: the pair's squares less half of their difference's

    assert np.mean(left) == pytest.approx(1 - laplacian_extremes(graph)[0] / (2 * graph.num_edges), abs=1e-12)
    assert np.mean(left) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(
    ("name", "n", "factor", "iterations"),
    [("ring", 8, 0.504972, 20.2), ("ring", 16, 0.722133, 42.4), ("ring", 64, 0.922900, 172), ("torus", 64, 0.600709, 27.1)],
)
def test_what_chebyshev_would_gain(name, n, factor, iterations):
    rho = 1 - spectral_gap(weighted(make(name, n)))
    found = rho / (1 + math.sqrt(1 - rho**2))

    assert found == pytest.approx(factor, abs=6e-7)
    assert math.log(1e-6) / math.log(found) == pytest.approx(iterations, abs=0.5 if iterations == 172 else 0.05)


def test_gossip_that_never_agrees_has_no_predicted_rounds():
    swapping = make("ring", 4).with_weights(0.5)

    assert spectral_gap(swapping) == pytest.approx(0, abs=1e-15)
    assert rounds_to(swapping) is None
    assert describe(swapping)["rounds_to_1e-6"] is None


def test_gossip_that_drives_nodes_apart_has_a_negative_gap():
    repelling = make("path", 2).with_weights(-0.1)

    assert lambda_2(repelling) == pytest.approx(1.2, abs=1e-15)
    assert spectral_gap(repelling) == pytest.approx(-0.2, abs=1e-15)
    assert rounds_to(repelling) is None


@pytest.mark.parametrize(("name", "n"), [("ring", 7), ("torus", 12), ("torus", 8), ("hypercube", 16), ("complete", 6), ("exponential", 11)])
def test_the_fourier_transform_of_a_lattice_equals_dense_eigenvalues(name, n):
    graph = weighted(make(name, n), "given" if name == "exponential" else "metropolis")
    plain = forget_lattice(graph)

    assert graph.periods is not None
    assert plain.periods is None
    assert lambda_2(graph) == pytest.approx(lambda_2(plain), abs=1e-12)
    assert lambda_min(graph) == pytest.approx(lambda_min(plain), abs=1e-12)
    assert laplacian_extremes(graph) == pytest.approx(laplacian_extremes(plain), abs=1e-12)
    assert diameter(graph) == diameter(plain)


@pytest.mark.parametrize("name", ["path", "grid", "random-regular", "small-world", "star", "barbell", "torus"])
@pytest.mark.parametrize("rule", ["metropolis", "best-constant"])
def test_sparse_eigenvalues_equal_dense_ones(name, rule, monkeypatch):
    sparse = forget_lattice(weighted(make(name, 450), rule))
    found = (spectral_gap(sparse), lambda_2(sparse), lambda_min(sparse), *laplacian_extremes(sparse))
    monkeypatch.setattr(spectrum, "_MAX_DENSE", 450)
    dense = forget_lattice(sparse)

    assert found == pytest.approx(
        (spectral_gap(dense), lambda_2(dense), lambda_min(dense), *laplacian_extremes(dense)), rel=1e-8, abs=1e-11
    )


def test_sparse_eigenvalues_of_a_directed_graph(monkeypatch):
    graph = make("exponential", 300)
    monkeypatch.setattr(spectrum, "_MAX_DENSE_DIRECTED", 100)
    sparse = forget_lattice(graph)

    assert spectral_gap(sparse) == pytest.approx(spectral_gap(graph), abs=1e-9)
    assert lambda_min(sparse) == pytest.approx(lambda_min(graph), abs=1e-9)


def test_a_million_nodes():
    n = 10**6
    ring = weighted(make("ring", n))

    assert spectral_gap(ring) == pytest.approx((4 / 3) * math.sin(math.pi / n) ** 2, rel=1e-4)
    assert laplacian_extremes(ring)[0] == pytest.approx(4 * math.sin(math.pi / n) ** 2, rel=1e-4)
    assert diameter(ring) == n // 2


def test_laplacian_extremes_do_not_look_at_weights():
    graph = make("star", 10)

    assert laplacian_extremes(graph) == pytest.approx((1, 10), abs=1e-12)
    assert laplacian_extremes(weighted(graph, "lazy")) == laplacian_extremes(graph)


@given(graph=connected_graphs())
@settings(max_examples=60, deadline=None)
def test_diameter_is_the_longest_shortest_path(graph):
    reference = nx.Graph(list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)))

    assert diameter(graph) == nx.diameter(reference)


@pytest.mark.parametrize("name", first_fast(["small-world", "random-regular", "erdos-renyi"]))
def test_diameter_of_random_graphs_where_single_searches_do_not_settle_it(name, monkeypatch):
    monkeypatch.setattr(spectrum, "_NUM_SINGLE_SEARCHES", 2)
    graph = make(name, 1500)
    low, high = diameter_bounds(graph)
    expected = nx.diameter(nx.Graph(list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))), usebounds=True)

    assert low < high
    assert diameter(graph) == expected
    assert low <= expected <= high


def test_the_longest_way_may_start_in_any_batch_of_searches(monkeypatch):
    monkeypatch.setattr(spectrum, "_NUM_SINGLE_SEARCHES", 1)
    monkeypatch.setattr(spectrum, "_BATCH_WORDS", 1)
    two_tails = [(0, 1), *((i, i + 1) for i in range(1, 10)), (0, 11), *((i, i + 1) for i in range(11, 20))]
    leaves = [(0, leaf) for leaf in range(21, 200)]
    graph = Topology.from_edges("hub", 200, *zip(*two_tails, *leaves, strict=True))

    assert diameter(graph) == 20


@pytest.mark.parametrize("n", [3, 4, 5, 7, 8])
def test_a_directed_cycle_turns_its_eigenvalues(n):
    """W = (I + shift) / 2 has the eigenvalues (1 + exp(2 pi i k / n)) / 2, of modulus |cos(pi k / n)|."""
    graph = Topology.from_edges("cycle", n, np.arange(n), (np.arange(n) + 1) % n, directed=True).with_weights(0.5)

    assert lambda_2(graph) == pytest.approx(math.cos(math.pi / n), abs=1e-12)
    assert lambda_min(graph) == pytest.approx((1 + math.cos(2 * math.pi * (n // 2) / n)) / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_do_not_depend_on_the_numbering(seed):
    graph = make("exponential", 11)
    shuffled = graph.renamed([f"{i:02}" for i in np.random.default_rng(seed).permutation(11)])

    assert lambda_2(shuffled) == pytest.approx(lambda_2(graph), abs=1e-12)
    assert lambda_min(shuffled) == pytest.approx(lambda_min(graph), abs=1e-12)
    assert laplacian_extremes(shuffled) == pytest.approx(laplacian_extremes(graph), abs=1e-12)


def test_diameter_of_a_directed_graph():
    cycle_with_shortcut = Topology.from_edges("cycle", 6, [0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3], directed=True)

    assert diameter(cycle_with_shortcut) == 5


def test_a_disconnected_graph_has_no_diameter():
    with pytest.raises(TopologyError, match="not connected: it has no diameter"):
        diameter(Topology.from_edges("split", 4, [0, 2], [1, 3]))


def test_description():
    assert describe(weighted(make("star", 5))) == {
        "nodes": 5,
        "edges": 4,
        "degree": {"min": 1, "mean": 1.6, "max": 4},
        "diameter": 2,
        "lambda_2": pytest.approx(0.8),
        "lambda_min": pytest.approx(0),
        "spectral_gap": pytest.approx(0.2),
        "rounds_to_1e-6": 62,
    }


def test_description_of_a_large_random_graph_leaves_an_unsettled_diameter_open(monkeypatch):
    monkeypatch.setattr(spectrum, "_MAX_SEARCHED", 100)
    monkeypatch.setattr(spectrum, "_NUM_SINGLE_SEARCHES", 4)

    assert describe(weighted(make("random-regular", 200)))["diameter"] is None
    assert describe(weighted(make("path", 200)))["diameter"] == 199


def test_steps_from_a_node_are_those_of_the_shortest_way_whichever_way_links_go():
    assert steps_from(make("ring", 6), 2).tolist() == [2, 1, 0, 1, 2, 3]
    directed = Topology.from_edges("way", 4, [0, 1, 2, 3], [1, 2, 3, 0], directed=True)
    assert steps_from(directed, 0).tolist() == [0, 1, 2, 1]
