"""One contract for every algorithm: pure, free in its leading axes, the same for one row as for N, exact about the mean.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from p2pfl.algorithms import ALGORITHMS, Channel, Context, SlotInbox, flow
from p2pfl.checkpoints import read_checkpoint, write_checkpoint
from p2pfl.params import Layout
from p2pfl.topology import make, weighted

P = 6
LAYOUT = Layout.of(nn.Linear(5, 1).double())
REQUIREMENTS = {"symmetric", "doubly stochastic", "static", "reliable", "single messages", "complete"}


@pytest.fixture(params=sorted(ALGORITHMS))
def algorithm(request):
    return ALGORITHMS[request.param]()


def graph_for(algorithm, num_nodes=7, seed=0):
    name = "complete" if "complete" in algorithm.requires else "erdos-renyi"
    return weighted(make(name, num_nodes, seed=seed), "metropolis")


def context(num_rows, round=3, local_steps=2, first=0):
    nodes = torch.arange(first, first + num_rows)
    return Context(round=round, local_steps=local_steps, lr=0.1, seed=5, nodes_N=nodes, layout=LAYOUT)


def random_rows(num_rows, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, P)))


def inbox_of(algorithm, graph, sent: Mapping[str, Tensor], rows=None, present_NK=None):
    """The messages of all rows, as the given rows (None: all) find them."""
    index_NK, weights_NK, linked_NK = graph.padded()
    chosen = np.arange(graph.num_nodes) if rows is None else np.array(rows)
    present = linked_NK if present_NK is None else present_NK & linked_NK
    index = torch.from_numpy(index_NK[chosen])

    def slot(channel, k, inner):
        return sent[channel][index[:, k] if inner is None else index[inner, k]]

    return SlotInbox(
        channels=algorithm.channels,
        sent={name: message[torch.from_numpy(chosen)] for name, message in sent.items()},
        weights_NK=torch.from_numpy(weights_NK[chosen]),
        present_NK=torch.from_numpy(present[chosen]),
        slot=slot,
    )


def one_round(algorithm, graph, state, number, present_NK=None):
    """What the runtime does, with gradients that differ by row and by step."""
    num_rows = graph.num_nodes
    ctx = context(num_rows, number)
    x_NP = state["x"]
    for k in range(ctx.local_steps):
        moving = {**state, "x": x_NP}
        gradient_NP = torch.sin(algorithm.estimate(moving) * (k + 1) + torch.arange(num_rows)[:, None])
        x_NP = x_NP - ctx.lr * algorithm.correct(moving, gradient_NP, ctx)
    state = algorithm.adapt(state, x_NP, ctx)
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, ctx)
        state = algorithm.merge(state, phase, inbox_of(algorithm, graph, sent, present_NK=present_NK), ctx)
    return state


def rows_of(state, rows):
    return {name: tensor[rows] for name, tensor in state.items()}


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- what every algorithm promises


def test_it_is_an_immutable_object_that_says_what_it_sends_and_needs(algorithm):
    assert algorithm.phases >= 1
    assert algorithm.channels
    assert all(isinstance(channel, Channel) for channel in algorithm.channels.values())
    assert algorithm.requires <= REQUIREMENTS
    assert is_dataclass(algorithm)
    assert type(algorithm)(**{f.name: getattr(algorithm, f.name) for f in fields(algorithm)}) == algorithm
    with pytest.raises(FrozenInstanceError):
        algorithm.phases = 2


def test_no_step_changes_what_it_is_given(algorithm):
    graph = graph_for(algorithm)
    ctx, x_NP = context(7), random_rows(7)
    before = x_NP.clone()
    state = algorithm.init(x_NP, ctx)
    kept = copied(state)
    gradient_NP = random_rows(7, 1)
    kept_gradient = gradient_NP.clone()
    algorithm.correct(state, gradient_NP, ctx)
    algorithm.adapt(state, random_rows(7, 2), ctx)
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, ctx)
        kept_sent = copied(sent)
        assert sent.keys() <= algorithm.channels.keys()
        algorithm.merge(state, phase, inbox_of(algorithm, graph, sent), ctx)
        assert_same(kept_sent, sent)
    algorithm.estimate(state)

    assert_same(kept, state)
    assert torch.equal(x_NP, before)
    assert torch.equal(gradient_NP, kept_gradient)


def test_the_same_call_gives_the_same_bits(algorithm):
    graph = graph_for(algorithm)
    state = algorithm.init(random_rows(7), context(7))
    torch.manual_seed(1)
    first = one_round(algorithm, graph, state, 0)
    torch.manual_seed(2)
    second = one_round(algorithm, graph, state, 0)

    assert_same(first, second)


def test_every_tensor_has_its_rows_along_the_first_axis_and_keeps_shape_and_dtype(algorithm):
    graph = graph_for(algorithm)
    state = algorithm.init(random_rows(7), context(7))
    after = one_round(algorithm, graph, state, 0)

    assert "x" in state
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {name: (tuple(t.shape), t.dtype) for name, t in after.items()}
    assert all(tensor.shape[0] == 7 for tensor in state.values())
    assert algorithm.estimate(state).shape == (7, P)
    sent = algorithm.outgoing(state, 0, context(7))
    assert all(message.shape[0] == 7 for message in sent.values())


def test_one_row_alone_computes_what_it_computes_among_many(algorithm):
    """Bit for bit: it is why a daemon's weights are the simulator's."""
    graph = graph_for(algorithm, seed=2)
    together = algorithm.init(random_rows(7), context(7))
    alone = [rows_of(together, [i]) for i in range(7)]
    for i in range(7):
        assert_same(algorithm.init(random_rows(7)[i : i + 1], context(1, first=i)), alone[i])
    for number in range(3):
        ctx = context(7, number)
        gradient_NP = random_rows(7, 10 + number)
        trained_NP = together["x"] - ctx.lr * algorithm.correct(together, gradient_NP, ctx)
        together = algorithm.adapt(together, trained_NP, ctx)
        for i in range(7):
            mine = context(1, number, first=i)
            trained = alone[i]["x"] - mine.lr * algorithm.correct(alone[i], gradient_NP[i : i + 1], mine)
            alone[i] = algorithm.adapt(alone[i], trained, mine)
        for phase in range(algorithm.phases):
            sent = algorithm.outgoing(together, phase, ctx)
            together = algorithm.merge(together, phase, inbox_of(algorithm, graph, sent), ctx)
            said = [algorithm.outgoing(alone[i], phase, context(1, number, first=i)) for i in range(7)]
            heard = {name: torch.cat([message[name] for message in said]) for name in said[0]}
            for i in range(7):
                inbox = inbox_of(algorithm, graph, heard, rows=[i])
                alone[i] = algorithm.merge(alone[i], phase, inbox, context(1, number, first=i))
        for i in range(7):
            assert_same(rows_of(together, [i]), alone[i])
            assert torch.equal(algorithm.estimate(together)[i : i + 1], algorithm.estimate(alone[i]))


def test_its_state_goes_through_a_checkpoint(algorithm, tmp_path):
    graph = graph_for(algorithm)
    state = algorithm.init(random_rows(7), context(7))
    for number in range(4):
        if number == 2:
            write_checkpoint(tmp_path / "state", state, {})
        state = one_round(algorithm, graph, state, number)
    resumed, _ = read_checkpoint(tmp_path / "state")
    for number in (2, 3):
        resumed = one_round(algorithm, graph, resumed, number)

    assert_same(state, resumed)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), rounds=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_mean_stands_still_whatever_messages_are_missing_on_both_sides(name, seed, share, rounds):
    algorithm = ALGORITHMS[name]()
    graph = graph_for(algorithm, seed=seed % 5)
    index_NK, _, linked_NK = graph.padded()
    rng = np.random.default_rng(seed)
    state = algorithm.init(random_rows(7, seed), context(7))
    mean_P = algorithm.estimate(state).mean(dim=0)
    for number in range(rounds):
        up = np.triu(rng.random((7, 7)) < share, 1)
        up = up | up.T
        present_NK = up[np.arange(7)[:, None], index_NK] & linked_NK
        for phase in range(algorithm.phases):
            ctx = context(7, number, local_steps=0)
            sent = algorithm.outgoing(state, phase, ctx)
            state = algorithm.merge(state, phase, inbox_of(algorithm, graph, sent, present_NK=present_NK), ctx)

    assert float((algorithm.estimate(state).mean(dim=0) - mean_P).abs().max()) < 1e-12


# ---- what the models say of themselves


def test_an_exchange_is_the_mixing_matrix(algorithm):
    graph = graph_for(algorithm)
    state = algorithm.init(random_rows(7), context(7))
    sent = algorithm.outgoing(state, 0, context(7))
    merged = algorithm.merge(state, 0, inbox_of(algorithm, graph, sent), context(7))
    expected = graph.mixing_matrix().toarray() @ state["x"].numpy()

    np.testing.assert_allclose(merged["x"].numpy(), expected, rtol=0, atol=1e-15 * 7)


def test_allreduce_holds_the_mean_after_one_exchange():
    algorithm = ALGORITHMS["allreduce"]()
    graph = graph_for(algorithm)
    state = algorithm.init(random_rows(7), context(7))
    sent = algorithm.outgoing(state, 0, context(7))
    merged = algorithm.merge(state, 0, inbox_of(algorithm, graph, sent), context(7))

    assert float((merged["x"] - state["x"].mean(dim=0)).abs().max()) < 1e-15 * 7


# ---- the inbox


def small_inbox(channels, present, returns=None, weights=((0.25, 0.5), (0.25, 0.0), (0.5, 0.0))):
    """A path 1 - 0 - 2 with unequal weights, messages 1, 10, 100."""
    sent = {"m": torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)}
    index = torch.tensor([[1, 2], [0, 1], [0, 2]])

    def slot(channel, k, rows):
        return sent[channel][index[:, k] if rows is None else index[rows, k]]

    return SlotInbox(
        channels=channels,
        sent=sent,
        weights_NK=torch.tensor(weights, dtype=torch.float64),
        present_NK=torch.tensor(present),
        slot=slot,
        returns=returns or {},
    )


EVERYTHING = [[True, True], [True, False], [True, False]]
FIRST_MISSES_SECOND = [[False, True], [True, False], [True, False]]


def test_own_keeps_a_missing_neighbours_weight_at_home():
    full = small_inbox({"m": Channel(missing="own")}, EVERYTHING).mix("m").flatten().tolist()
    less = small_inbox({"m": Channel(missing="own")}, FIRST_MISSES_SECOND).mix("m").flatten().tolist()

    assert full == [0.25 * 1 + 0.25 * 10 + 0.5 * 100, 0.75 * 10 + 0.25 * 1, 0.5 * 100 + 0.5 * 1]
    assert less == [0.5 * 1 + 0.5 * 100, 7.75, 50.5]


def test_zero_counts_a_missing_neighbour_as_nothing():
    full = small_inbox({"m": Channel(missing="zero")}, EVERYTHING).mix("m").flatten().tolist()
    less = small_inbox({"m": Channel(missing="zero")}, FIRST_MISSES_SECOND).mix("m").flatten().tolist()

    assert full == [52.75, 7.75, 50.5]
    assert less == [0.25 * 1 + 0.5 * 100, 7.75, 50.5]


def test_single_messages_are_zero_where_none_came():
    stacked, weights, present = small_inbox({"m": Channel()}, FIRST_MISSES_SECOND).stack("m")

    assert stacked.squeeze(-1).tolist() == [[0.0, 100.0], [1.0, 0.0], [1.0, 0.0]]
    assert weights.tolist() == [[0.25, 0.5], [0.25, 0.0], [0.5, 0.0]]
    assert present.tolist() == FIRST_MISSES_SECOND
    whole = small_inbox({"m": Channel()}, [[True, True], [True, True], [True, True]])
    assert whole.stack("m")[0].squeeze(-1).tolist() == [[10.0, 100.0], [1.0, 10.0], [1.0, 100.0]]


def test_distances_are_to_those_that_are_there():
    assert small_inbox({"m": Channel()}, EVERYTHING).squared_distances("m").tolist() == [81.0 + 99**2, 81.0, 99.0**2]
    assert small_inbox({"m": Channel()}, FIRST_MISSES_SECOND).squared_distances("m").tolist() == [99.0**2, 81.0, 99.0**2]


def test_what_is_taken_back_is_added():
    returns = {"m": torch.tensor([[-2.25], [0.0], [0.0]], dtype=torch.float64)}

    assert small_inbox({"m": Channel()}, FIRST_MISSES_SECOND, returns).mix("m").flatten().tolist() == [50.5 - 2.25, 7.75, 50.5]


def test_what_a_node_sent_is_its_own():
    assert small_inbox({"m": Channel()}, EVERYTHING).own("m").flatten().tolist() == [1.0, 10.0, 100.0]


@given(weight=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), single=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_flow_and_its_counterpart_cancel_bit_for_bit(weight, seed, single):
    rows = random_rows(2, seed).to(torch.float32 if single else torch.float64)

    assert torch.equal(flow(weight, rows[1], rows[0]), -flow(weight, rows[0], rows[1]))
