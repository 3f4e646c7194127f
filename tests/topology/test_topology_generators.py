import networkx as nx
import numpy as np
import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import SMALL_GRAPHS, TOPOLOGIES, check_connected, make, options_of

GENERATED = [name for name in TOPOLOGIES if name not in SMALL_GRAPHS]


def pairs(graph):
    return {(i, j) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True) if graph.directed or i < j}


def adjacency_of(graph):
    return nx.to_numpy_array(graph, nodelist=sorted(graph), weight=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ring", {(0, 1), (1, 2), (2, 3), (0, 3)}),
        ("path", {(0, 1), (1, 2), (2, 3)}),
        ("star", {(0, 1), (0, 2), (0, 3)}),
        ("complete", {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}),
        ("grid", {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ("torus", {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ("hypercube", {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ("exponential", {(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3), (2, 0), (3, 1)}),
        ("barbell", {(0, 1), (1, 2), (2, 3)}),
    ],
)
def test_edges_of_four_nodes(name, expected):
    assert pairs(make(name, 4)) == expected


@pytest.mark.parametrize(
    ("name", "n", "reference"),
    [
        ("ring", 9, nx.cycle_graph(9)),
        ("torus", 12, nx.grid_2d_graph(3, 4, periodic=True)),
        ("grid", 12, nx.grid_2d_graph(3, 4)),
        ("hypercube", 16, nx.hypercube_graph(4)),
        ("barbell", 10, nx.barbell_graph(5, 0)),
        ("barbell", 11, nx.barbell_graph(5, 1)),
    ],
)
def test_the_same_graph_as_networkx_draws(name, n, reference):
    assert np.array_equal(make(name, n).adjacency().toarray(), adjacency_of(reference))


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("n", [8, 16])
def test_every_generator_gives_a_connected_graph_without_names(name, n):
    graph = make(name, n)
    check_connected(graph)

    assert graph.num_nodes == n
    assert graph.names is None
    assert graph.directed == (name == "exponential")


@pytest.mark.parametrize("name", [name for name in GENERATED if name not in ("random-regular", "small-world")])
def test_two_nodes_are_enough(name):
    if name == "barbell":
        with pytest.raises(TopologyError, match="two equal groups"):
            make(name, 2)
    else:
        assert pairs(make(name, 2)) >= {(0, 1)}


@pytest.mark.parametrize("name", SMALL_GRAPHS)
def test_small_graphs_are_networkx_s(name):
    reference = getattr(nx, name.replace("-", "_") + "_graph")()
    graph = make(name)
    check_connected(graph)

    assert np.array_equal(graph.adjacency().toarray(), adjacency_of(reference))
    assert graph.names == (tuple(sorted(reference)) if isinstance(next(iter(reference)), str) else None)


def test_every_small_graph_of_networkx_has_its_name_here():
    modules = (nx.generators.small, nx.generators.social)
    theirs = {name.removesuffix("_graph").replace("_", "-") for module in modules for name in module.__all__}

    assert theirs - {"LCF", "generalized-petersen"} == set(SMALL_GRAPHS)  # these two need arguments


@pytest.mark.parametrize(("n", "shape"), [(64, (8, 8)), (32, (4, 8)), (12, (3, 4)), (7, (1, 7)), (2, (1, 2))])
def test_grid_and_torus_are_as_square_as_they_can_be(n, shape):
    assert make("torus", n).periods == shape


@pytest.mark.parametrize(("options", "shape"), [({"rows": 2}, (2, 6)), ({"columns": 2}, (6, 2)), ({"rows": 4, "columns": 3}, (4, 3))])
def test_rows_and_columns_of_one_s_own(options, shape):
    assert make("torus", 12, **options).periods == shape


@pytest.mark.parametrize(("n", "degree"), [(8, 3), (16, 4), (64, 6)])
def test_random_regular_has_one_degree(n, degree):
    assert set(make("random-regular", n, seed=1, degree=degree).degrees.tolist()) == {degree}


@pytest.mark.parametrize("name", ["random-regular", "erdos-renyi", "small-world"])
def test_random_graphs_depend_on_the_seed_and_on_nothing_else(name):
    again = [pairs(make(name, 40, seed=seed)) for seed in (7, 7, 8)]

    assert again[0] == again[1]
    assert again[0] != again[2]


def test_the_first_draw_is_networkx_s_with_the_same_seed():
    assert np.array_equal(make("random-regular", 16, degree=6).adjacency().toarray(), adjacency_of(nx.random_regular_graph(6, 16, seed=0)))


def test_a_draw_that_is_not_connected_is_drawn_again():
    first_draw = nx.fast_gnp_random_graph(30, 0.08, seed=3)
    graph = make("erdos-renyi", 30, seed=3, p=0.08)
    check_connected(graph)

    assert not nx.is_connected(first_draw)


def test_the_undirected_exponential_graph_links_both_ways():
    assert pairs(make("exponential", 8, directed=False)) == {
        (i, j) for i in range(8) for j in range(i + 1, 8) if (j - i) in (1, 2, 4, 6, 7)
    }


@pytest.mark.parametrize(
    ("name", "n", "options", "message"),
    [
        ("hypercube", 6, {}, r"hypercube of 6 nodes: expected a power of two, such as 4 or 8"),
        ("torus", 12, {"rows": 5}, r"torus of 12 nodes with rows = 5, columns = None: rows x columns must be 12"),
        ("grid", 12, {"rows": 0}, r"grid with rows = 0, columns = None: expected numbers >= 1"),
        ("random-regular", 7, {"degree": 3}, r"degree = 3 with 7 nodes: the product must be even; take degree 4"),
        ("random-regular", 4, {}, r"degree = 4: expected 1 to 3 with 4 nodes"),
        ("erdos-renyi", 16, {"p": 1.5}, r"p = 1.5: expected 0 < p <= 1"),
        ("erdos-renyi", 16, {"p": 0.01}, r"with p = 0.01: none of 100 draws is connected; take p >= 0.347"),
        ("small-world", 16, {"degree": 3}, r"degree = 3: expected an even number from 2 to 15"),
        ("small-world", 16, {"p": -1}, r"p = -1: expected 0 <= p <= 1"),
        ("barbell", 9, {"bridge": 0}, r"bridge = 0: what the bridge leaves must be two equal groups"),
        ("petersen", 12, {}, r"petersen has 10 nodes, not 12: set the number of nodes to 10"),
        ("complete", 10**6, {}, r"complete of 1000000 nodes has 499999500000 edges"),
        ("ring", 1, {}, r"ring of 1 nodes: a network needs at least 2"),
        ("ring", None, {}, r"ring: needs a number of nodes"),
        ("rign", 8, {}, r"topology = 'rign': did you mean ring\? one of ring, path, star"),
        ("petersen", 10, {"degree": 3}, r"petersen has no option degree = 3: expected none"),
        ("random-regular", 8, {"degree": "3"}, r"degree = '3': expected a whole number"),
        ("erdos-renyi", 8, {"p": True}, r"p = true: expected a number"),
        ("exponential", 8, {"directed": 1}, r"directed = 1: expected true or false"),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_remedy(name, n, options, message):
    with pytest.raises(TopologyError, match=message):
        make(name, n, **options)


def test_all_wrong_options_are_found_at_once():
    with pytest.raises(TopologyError) as caught:
        make("torus", 16, rows=2.5, depth=3)

    assert caught.value.findings == (
        "topology torus with rows = 2.5: expected a whole number",
        "topology torus has no option depth = 3: expected rows, columns",
    )


def test_known_names_and_options():
    assert list(options_of("small-world")) == ["degree", "p"]
    assert list(options_of("karate-club")) == []


@pytest.mark.parametrize(("degree", "seed"), [(3, 0), (4, 1)])
def test_a_random_regular_graph_of_very_many_nodes(degree, seed):
    graph = make("random-regular", 30_000, seed, degree=degree)
    again, other = make("random-regular", 30_000, seed, degree=degree), make("random-regular", 30_000, seed + 1, degree=degree)

    assert (graph.degrees == degree).all()
    assert (graph.senders != graph.receivers).all()
    assert graph.num_edges == 30_000 * degree // 2
    assert np.array_equal(graph.senders, again.senders)
    assert not np.array_equal(graph.senders, other.senders)
    check_connected(graph)


def test_a_small_one_drawn_in_the_same_way_mends_every_pair():
    from p2pfl.topology.generators import _many_regular

    for seed in range(20):
        graph = _many_regular(12, 4, seed)  # most draws of so few have loops and double links

        assert (graph.degrees == 4).all()
        assert graph.num_edges == 24
