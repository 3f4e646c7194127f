"""PowerGossip against its paper as a loop over edges.

Shapes: N nodes, K neighbour slots, P parameters.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from p2pfl.algorithms.compressed import PowerGossip
from p2pfl.algorithms.sparsifiers import gaussian_columns
from p2pfl.errors import ConfigError
from p2pfl.params import Layout, TensorSpec
from p2pfl.topology import make, weighted
from rows import context, inbox_of, one_round, size_bytes
from thorough import first_fast

RING = weighted(make("ring", 8), "metropolis")
STAR = weighted(make("star", 6), "metropolis")
LAYOUT = Layout(
    tensors=(
        TensorSpec("a.weight", (10, 8), "float64"),
        TensorSpec("a.bias", (10,), "float64"),
        TensorSpec("b.weight", (4, 2, 3), "float64"),
        TensorSpec("b.bias", (4,), "float64"),
    )
)
MATRICES = [(slice(0, 80), 10, 8), (slice(90, 114), 4, 6)]
VECTORS = [slice(80, 90), slice(114, 118)]


def start(num_nodes=8):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((num_nodes, LAYOUT.size)))


def context_of(graph, number, row=None, local_steps=0):
    return replace(context(graph, number, local_steps=local_steps, row=row), layout=LAYOUT)


def gossip(algorithm, graph, x_NP, rounds):
    state = algorithm.init(x_NP, context_of(graph, 0))
    for number in range(rounds):
        state = one_round(algorithm, graph, state, context_of(graph, number))
        yield state


def spread(x_NP):
    return float((x_NP - x_NP.mean(dim=0)).square().sum())


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("graph", [RING, STAR], ids=["ring", "star"])
def test_it_is_the_paper_s_loop(graph, rank):
    """C(X_i - X_j) = U U^T (X_i - X_j) for each edge, U from the V that both ends have warmed up."""
    num_nodes, matrix = graph.num_nodes, graph.mixing_matrix().toarray()
    x = start(num_nodes).numpy().copy()
    edges = [(i, j) for i in range(num_nodes) for j in range(num_nodes) if i < j and matrix[i, j] > 0]
    warm = {}
    for number, (_, _, n) in enumerate(MATRICES):
        columns = gaussian_columns(n * rank, number, context_of(graph, 0)).numpy().reshape(rank, n).T
        warm.update({(edge, number): columns for edge in edges})
    for state in gossip(PowerGossip(rank=rank), graph, start(num_nodes), 12):
        moved = x.copy()
        for place in VECTORS:
            moved[:, place] = matrix @ x[:, place]
        for i, j in edges:
            for number, (place, m, n) in enumerate(MATRICES):
                gap = (x[i, place] - x[j, place]).reshape(m, n)
                left = np.linalg.qr(gap @ warm[(i, j), number])[0]
                warm[(i, j), number] = gap.T @ left
                change = matrix[i, j] * (left @ left.T @ gap).ravel()
                moved[i, place] -= change
                moved[j, place] += change
        x = moved

        np.testing.assert_allclose(state["x"].numpy(), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", first_fast([2, 1, 5]))
def test_the_mean_stands_still_and_the_network_agrees_without_a_step_size(rank):
    x_NP = start()
    for state in gossip(PowerGossip(rank=rank), RING, x_NP, 400):
        assert float((state["x"].mean(dim=0) - x_NP.mean(dim=0)).abs().max()) < 1e-12

    assert spread(state["x"]) < 1e-10 * spread(x_NP)


def test_a_rank_that_holds_every_matrix_is_plain_gossip():
    expected_NP, matrix = start(), torch.from_numpy(RING.mixing_matrix().toarray())
    for state in gossip(PowerGossip(rank=8), RING, start(), 5):
        expected_NP = matrix @ expected_NP

        torch.testing.assert_close(state["x"], expected_NP, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_one_row_alone_computes_what_it_computes_among_many_and_both_ends_of_an_edge_hold_the_same(rank):
    algorithm, x_NP = PowerGossip(rank=rank), start(6)
    together = algorithm.init(x_NP, context_of(STAR, 0))
    mine = [context_of(STAR, 0, row=i) for i in range(6)]
    alone = [algorithm.init(x_NP[i : i + 1], mine[i]) for i in range(6)]
    for number in range(4):
        mine = [context_of(STAR, number, row=i) for i in range(6)]
        for phase in range(2):
            sent = algorithm.outgoing(together, phase, context_of(STAR, number))
            together = algorithm.merge(together, phase, inbox_of(algorithm, STAR, sent), context_of(STAR, number))
            said = [algorithm.outgoing(alone[i], phase, mine[i]) for i in range(6)]
            heard = {name: torch.cat([message[name] for message in said]) for name in sent}
            alone = [algorithm.merge(alone[i], phase, inbox_of(algorithm, STAR, heard, row=i), mine[i]) for i in range(6)]
    for i in range(6):
        for name, tensor in alone[i].items():
            assert torch.equal(tensor[0], together[name][i]), name
    for i in range(1, 6):  # 0 is the centre
        for name in ("left", "right"):
            assert torch.equal(together[name][0, i - 1], together[name][i, 0]), name


def test_what_travels_is_r_times_m_plus_n_for_each_matrix_and_the_vectors():
    algorithm = PowerGossip(rank=2)
    ctx = context_of(RING, 0)
    state = algorithm.init(start(), ctx)
    sent = [algorithm.outgoing(state, phase, ctx) for phase in range(2)]
    per_edge = [size_bytes({k: m for k, m in each.items() if k != "vectors"}, num_leading=2) for each in sent]

    assert per_edge == [8 * 2 * (10 + 4), 8 * 2 * (8 + 6) + 1]  # and whether the first came
    assert sent[0]["vectors"].shape == (8, 14)
    assert set(sent[1]) == {"right", "held"}


def test_models_that_agree_keep_their_columns_for_when_they_do_not():
    x_NP = start()[:1].expand(8, LAYOUT.size).clone()
    *_, state = gossip(PowerGossip(), RING, x_NP, 3)
    state = {**state, "x": start()}
    for number in range(3, 10):
        state = one_round(PowerGossip(), RING, state, context_of(RING, number))

    assert bool(state["x"].isfinite().all())
    assert spread(state["x"]) < 0.9 * spread(start())


def test_a_model_without_a_matrix_is_refused_by_name():
    ctx = replace(context(RING), layout=Layout(tensors=(TensorSpec("x", (5,), "float64"),)))

    with pytest.raises(ConfigError, match=r"powergossip.*no tensor of two axes"):
        PowerGossip().init(torch.zeros(8, 5), ctx)


# ---- messages that are lost

EDGE = weighted(make("path", 2), "metropolis")
BOTH, ONE = torch.tensor([[True], [True]]), torch.tensor([[True], [False]])


def exchange(algorithm, state, number, first_NK, second_NK):
    """One round with some messages of each phase; what came into each row in the second, too."""
    ctx = context_of(EDGE, number)
    for phase, present_NK in enumerate((first_NK, second_NK)):
        inbox = inbox_of(algorithm, EDGE, algorithm.outgoing(state, phase, ctx), present_NK=present_NK)
        inbox.flows = {}
        state = algorithm.merge(state, phase, inbox, ctx)
    return state, [inbox.flows[i, 0]["right"] for i in range(2)]


@pytest.mark.parametrize("lost", [ONE, ~ONE, ~BOTH])
def test_nothing_crosses_an_edge_whose_first_messages_did_not_both_come(lost):
    algorithm, x_NP = PowerGossip(rank=2), start(2)
    state, _ = exchange(algorithm, algorithm.init(x_NP, context_of(EDGE, 0)), 0, BOTH, BOTH)
    after, flows = exchange(algorithm, state, 1, lost, BOTH)

    assert [float(flow.abs().max()) for flow in flows] == [0.0, 0.0]
    for place, _, _ in MATRICES:
        assert torch.equal(after["x"][:, place], state["x"][:, place])
    assert torch.equal(after["right"], state["right"])


def test_what_one_end_alone_took_in_is_known_and_the_ends_agree_on_their_columns_a_round_later():
    algorithm, x_NP = PowerGossip(rank=2), start(2)
    state, _ = exchange(algorithm, algorithm.init(x_NP, context_of(EDGE, 0)), 0, BOTH, BOTH)
    mean_P = state["x"].mean(dim=0)
    state, flows = exchange(algorithm, state, 1, BOTH, ONE)
    matrices = torch.cat([torch.arange(place.start, place.stop) for place, _, _ in MATRICES])

    assert float((state["x"].sum(dim=0) - flows[0] - 2 * mean_P)[matrices].abs().max()) < 1e-14
    assert float(flows[1].abs().max()) == 0.0
    assert not torch.equal(state["right"][0], state["right"][1])
    state, flows = exchange(algorithm, state, 2, BOTH, BOTH)
    assert torch.equal(flows[0], -flows[1])
    assert float(flows[0].abs().max()) > 0.01
    assert torch.equal(state["right"][0], state["right"][1])
