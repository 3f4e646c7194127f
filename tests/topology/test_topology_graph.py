import numpy as np
import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import Topology, check_connected, make, weighted


def test_an_undirected_edge_is_two_entries_sorted_by_receiver_then_sender():
    graph = Topology.from_edges("v", 3, [2, 0], [1, 1])

    assert graph.receivers.tolist() == [0, 1, 1, 2]
    assert graph.senders.tolist() == [1, 0, 2, 1]
    assert graph.num_edges == 2
    assert graph.degrees.tolist() == [1, 2, 1]
    assert graph.neighbours(1).tolist() == [0, 2]


def test_a_directed_edge_is_one_entry_at_its_receiver():
    graph = Topology.from_edges("cycle", 3, [0, 1, 2], [1, 2, 0], directed=True)

    assert list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)) == [(2, 0), (0, 1), (1, 2)]
    assert graph.neighbours(0).tolist() == [2]
    assert graph.num_edges == 3


def test_repeated_edges_count_once_and_self_loops_not_at_all():
    graph = Topology.from_edges("loops", 3, [0, 1, 0, 2, 1], [1, 0, 1, 2, 2], weights=[0.1, 0.2, 0.3, 0.4, 0.5])

    assert graph.senders.tolist() == [1, 0, 2, 1]
    assert graph.weights is not None
    assert graph.weights.tolist() == [0.1, 0.1, 0.5, 0.5]


def test_rows_are_the_nodes_sorted_by_name():
    graph = Topology.from_edges("hospitals", 3, [0, 1], [1, 2], names=["va", "cleveland", "hungary"], latency_ms=[7.0, 9.0])

    assert graph.names == ("cleveland", "hungary", "va")
    assert graph.neighbours(0).tolist() == [1, 2]
    assert graph.latency_ms is not None
    assert dict(zip(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True), graph.latency_ms.tolist(), strict=True)) == {
        (1, 0): 9.0,
        (0, 1): 9.0,
        (2, 0): 7.0,
        (0, 2): 7.0,
    }


def test_renaming_in_sorted_order_keeps_every_row():
    ring = weighted(make("ring", 5))
    renamed = ring.renamed(["a", "b", "c", "d", "e"])

    assert renamed.names == ("a", "b", "c", "d", "e")
    assert renamed.senders is ring.senders
    assert renamed.periods == (5,)


@pytest.mark.parametrize("name", ["path", "exponential"])
def test_renaming_out_of_order_moves_rows_weights_and_all(name):
    graph = weighted(make(name, 5), "given" if name == "exponential" else "metropolis")
    names = ["c", "a", "e", "b", "d"]
    renamed = graph.renamed(names)
    order = np.argsort(names)

    assert renamed.names == ("a", "b", "c", "d", "e")
    assert renamed.directed == graph.directed
    assert np.array_equal(renamed.mixing_matrix().toarray(), graph.mixing_matrix().toarray()[np.ix_(order, order)])


def test_renaming_needs_as_many_different_names_as_nodes():
    with pytest.raises(ValueError, match="2 different names: topology ring has 3 nodes"):
        make("ring", 3).renamed(["a", "b", "b"])


@pytest.mark.parametrize("name", ["star", "exponential", "karate-club", "grid"])
def test_padded_tables_hold_the_mixing_matrix(name):
    graph = weighted(make(name, 34), "given" if name == "exponential" else "metropolis")
    index_NK, weights_NK, present_NK = graph.padded()
    rebuilt = np.diag(graph.self_weights)
    rows = np.arange(34)
    for k in range(index_NK.shape[1]):
        rebuilt[rows, index_NK[:, k]] += weights_NK[:, k]

    assert index_NK.dtype == np.int64
    assert np.array_equal(rebuilt, graph.mixing_matrix().toarray())
    assert np.array_equal(present_NK.sum(axis=1), graph.degrees)
    for i in range(34):
        assert index_NK[i][present_NK[i]].tolist() == graph.neighbours(i).tolist()
        assert set(index_NK[i][~present_NK[i]].tolist()) <= {i}
        assert not weights_NK[i][~present_NK[i]].any()


def test_padding_a_star_of_a_hundred_thousand_is_refused_before_memory_is_taken():
    star = weighted(make("star", 100_000))

    with pytest.raises(TopologyError, match="99999 neighbours of one of them is more than"):
        star.padded()


def test_the_laplacian_of_a_directed_graph_measures_its_messages_differences():
    graph = Topology.from_edges("digraph", 5, [0, 0, 1, 1, 2, 2, 3, 4], [1, 2, 2, 4, 3, 0, 4, 0], directed=True)
    x = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    half_sum = 0.5 * np.sum((x[graph.senders] - x[graph.receivers]) ** 2)

    assert x @ (graph.laplacian() @ x) == pytest.approx(half_sum, rel=1e-14)


def test_an_unweighted_graph_has_no_mixing_matrix():
    with pytest.raises(ValueError, match="has no weights yet: pass it through weighted"):
        make("ring", 4).mixing_matrix()


def test_edges_out_of_order_are_refused():
    with pytest.raises(ValueError, match="sorted by"):
        Topology(name="x", num_nodes=2, senders=np.array([0, 1]), receivers=np.array([1, 0]))


def test_unsorted_names_are_refused():
    with pytest.raises(ValueError, match="2 different ones, sorted"):
        Topology(name="x", num_nodes=2, senders=np.array([1, 0]), receivers=np.array([0, 1]), names=("b", "a"))


def test_two_nodes_without_a_path_are_named():
    graph = Topology.from_edges("split", 4, [0, 2], [1, 3], names=["bern", "lyon", "oslo", "rome"])

    with pytest.raises(TopologyError, match="nothing from bern can reach oslo"):
        check_connected(graph)


def test_in_a_directed_graph_both_ways_are_needed():
    no_way_back = Topology.from_edges("line", 3, [0, 1], [1, 2], directed=True)
    no_way_there = Topology.from_edges("line", 3, [1, 2], [0, 1], directed=True)

    with pytest.raises(TopologyError, match="nothing from 1 can reach 0"):
        check_connected(no_way_back)
    with pytest.raises(TopologyError, match="nothing from 0 can reach 1"):
        check_connected(no_way_there)
