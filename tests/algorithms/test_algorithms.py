"""One contract for every algorithm: pure, free in its leading axes, the same for one row as for N, exact about the mean.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from functools import lru_cache
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from p2pfl.algorithms import ALGORITHMS, DPSGD, Channel, Inbox, InboxFactory, flow
from p2pfl.algorithms.base import Requirement
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.topology import Topology, make, weighted
from rows import P, context, inbox_of, one_round

REQUIREMENTS = set(get_args(Requirement))
KEEP_THE_MEAN = sorted(ALGORITHMS.keys() - {"push-sum", "relaysgd"})
"""In every exchange, whatever is missing. Push-sum keeps what is under way as well; relaysgd's models come over d edges d rounds late."""


@pytest.fixture(params=sorted(ALGORITHMS))
def algorithm(request):
    return ALGORITHMS[request.param]()


@lru_cache
def graph_for(algorithm, seed=0):
    """Of 7 nodes."""
    if "tree" in algorithm.requires:
        return weighted(Topology.from_edges("tree", 7, [0, 0, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6]), "metropolis")
    name = "complete" if "complete" in algorithm.requires else "erdos-renyi"
    return weighted(make(name, 7, seed=seed), "metropolis")


def random_rows(num_rows, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, P)))


def pull(x_NP, round, step):
    """Gradients that differ by row and by step."""
    return torch.sin(x_NP * (step + 1) + torch.arange(len(x_NP))[:, None])


def a_round(algorithm, graph, state, number, present_NK=None):
    return one_round(algorithm, graph, state, context(graph, number), pull, present_NK)


def started(algorithm, graph, seed=0):
    return algorithm.init(random_rows(7, seed), context(graph, 0))


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


def test_options_have_ranges_that_a_file_is_checked_against(algorithm):
    options = {f.name for f in fields(algorithm)}
    adapter = TypeAdapter(type(algorithm))

    assert adapter.validate_python({name: getattr(algorithm, name) for name in options}) == algorithm
    for name in options:
        for value in (-1e9, 1e9, float("nan"), "much"):
            with pytest.raises(ValidationError):
                adapter.validate_python({name: value})


def test_no_step_changes_what_it_is_given(algorithm):
    graph = graph_for(algorithm)
    ctx, x_NP = context(graph), random_rows(7)
    before = x_NP.clone()
    state = a_round(algorithm, graph, algorithm.init(x_NP, ctx), 0)
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


def test_it_does_what_it_declares(algorithm):
    graph = graph_for(algorithm)
    ctx, state = context(graph), a_round(algorithm, graph, started(algorithm, graph), 0)
    gradient_NP, trained_NP = random_rows(7, 1), random_rows(7, 2)
    changes = set()
    if not torch.equal(algorithm.correct(state, gradient_NP, ctx), gradient_NP):
        changes.add("gradient")
    adapted = algorithm.adapt(state, trained_NP, ctx)
    if adapted["x"] is not trained_NP or any(adapted[name] is not state[name] for name in state.keys() - {"x"}):
        changes.add("state")
    if algorithm.estimate(state) is not state["x"]:
        changes.add("estimate")
    sent = algorithm.outgoing(state, 0, ctx)
    is_plain = algorithm.phases == 1 and state.keys() == sent.keys() == {"x"}
    if is_plain:
        mixed_NP = inbox_of(algorithm, graph, sent).mix("x")
        is_plain = torch.equal(algorithm.merge(state, 0, inbox_of(algorithm, graph, sent), ctx)["x"], mixed_NP)

    assert algorithm.local_changes == changes
    assert algorithm.plain_gossip == is_plain


def test_the_same_call_gives_the_same_bits(algorithm):
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    torch.manual_seed(1)
    first = a_round(algorithm, graph, state, 0)
    torch.manual_seed(2)
    second = a_round(algorithm, graph, state, 0)

    assert_same(first, second)


def test_every_tensor_has_its_rows_along_the_first_axis_and_keeps_shape_and_dtype(algorithm):
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    after = a_round(algorithm, graph, state, 0)

    assert "x" in state
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {name: (tuple(t.shape), t.dtype) for name, t in after.items()}
    assert all(tensor.shape[0] == 7 for tensor in state.values())
    assert algorithm.estimate(state).shape == (7, P)


def test_what_is_sent_looks_the_same_in_every_round(algorithm):
    """A daemon makes room for it before the first."""
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, context(graph, 0))
        later = algorithm.outgoing(a_round(algorithm, graph, state, 0), phase, context(graph, 1, local_steps=0))

        assert {name: (m.shape, m.dtype) for name, m in sent.items()} == {name: (m.shape, m.dtype) for name, m in later.items()}
        for name, message in sent.items():
            slots = context(graph).slots_NK.shape[1:] if algorithm.channels[name].per_edge else ()
            assert message.shape[: 1 + len(slots)] == (7, *slots)


def test_a_state_in_single_precision_stays_so(algorithm):
    graph = graph_for(algorithm)
    ctx = context(graph)
    state = algorithm.init(random_rows(7).float(), ctx)
    corrected = algorithm.correct(state, random_rows(7).float(), ctx)
    adapted = algorithm.adapt(state, random_rows(7, 1).float(), ctx)
    for number in (0, ctx.local_steps):
        for phase in range(algorithm.phases):
            sent = algorithm.outgoing(adapted, phase, context(graph, local_steps=number))
            inbox = inbox_of(algorithm, graph, sent)
            kept_N = inbox.self_weights_N.float() if inbox.self_weights_N is not None else None
            inbox = replace(inbox, weights_NK=inbox.weights_NK.float(), self_weights_N=kept_N)
            adapted = algorithm.merge(adapted, phase, inbox, context(graph, local_steps=number))

            floats = [m for m in (*sent.values(), *adapted.values(), corrected) if m.dtype.is_floating_point]
            assert all(m.dtype == torch.float32 for m in floats)


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_one_row_alone_computes_what_it_computes_among_many(algorithm, loss):
    """Bit for bit: it is why a daemon's weights are the simulator's."""
    graph = graph_for(algorithm, seed=2)
    together = started(algorithm, graph)
    alone = [rows_of(together, [i]) for i in range(7)]
    rng = np.random.default_rng(0)
    for i in range(7):
        assert_same(algorithm.init(random_rows(7)[i : i + 1], context(graph, 0, row=i)), alone[i])
    for number, local_steps in enumerate((2, 2, 2, 0, 0)):
        ctx = context(graph, number, local_steps=local_steps)
        mine = [context(graph, number, local_steps=local_steps, row=i) for i in range(7)]
        if local_steps:
            gradient_NP = random_rows(7, 10 + number)
            trained_NP = together["x"] - ctx.lr * algorithm.correct(together, gradient_NP, ctx)
            together = algorithm.adapt(together, trained_NP, ctx)
            for i in range(7):
                trained = alone[i]["x"] - ctx.lr * algorithm.correct(alone[i], gradient_NP[i : i + 1], mine[i])
                alone[i] = algorithm.adapt(alone[i], trained, mine[i])
        for phase in range(algorithm.phases):
            came_NK = torch.from_numpy(rng.random(ctx.slots_NK.shape) >= loss)
            sent = algorithm.outgoing(together, phase, ctx)
            together = algorithm.merge(together, phase, inbox_of(algorithm, graph, sent, present_NK=came_NK), ctx)
            said = [algorithm.outgoing(alone[i], phase, mine[i]) for i in range(7)]
            heard = {name: torch.cat([message[name] for message in said]) for name in said[0]}
            for i in range(7):
                inbox = inbox_of(algorithm, graph, heard, row=i, present_NK=came_NK)
                alone[i] = algorithm.merge(alone[i], phase, inbox, mine[i])
        for i in range(7):
            assert_same(rows_of(together, [i]), alone[i])
            assert torch.equal(algorithm.estimate(together)[i : i + 1], algorithm.estimate(alone[i]))


def test_its_state_goes_through_a_checkpoint(algorithm, tmp_path):
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    for number in range(4):
        if number == 2:
            write_checkpoint(tmp_path / "state", state, {})
        state = a_round(algorithm, graph, state, number)
    resumed, _ = read_checkpoint(tmp_path / "state")
    for number in (2, 3):
        resumed = a_round(algorithm, graph, resumed, number)

    assert_same(state, resumed)


def missing_on_both_sides(graph, rng, share):
    index_NK, _, _ = graph.padded()
    up = np.triu(rng.random((7, 7)) < share, 1)
    return torch.from_numpy((up | up.T)[np.arange(7)[:, None], index_NK])


@pytest.mark.no_cover
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), rounds=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", KEEP_THE_MEAN)
def test_the_mean_stands_still_whatever_messages_are_missing_on_both_sides(name, seed, share, rounds):
    """Also after training, when there is more in the state than the models."""
    algorithm = ALGORITHMS[name]()
    graph = graph_for(algorithm, seed=seed % 5)
    rng = np.random.default_rng(seed)
    state = started(algorithm, graph, seed)
    for number in range(seed % 3):
        state = a_round(algorithm, graph, state, number, missing_on_both_sides(graph, rng, share))
    mean_P = algorithm.estimate(state).mean(dim=0)
    for number in range(seed % 3, seed % 3 + rounds):
        ctx = context(graph, number, local_steps=0)
        state = one_round(algorithm, graph, state, ctx, present_NK=missing_on_both_sides(graph, rng, share))

    assert float((algorithm.estimate(state).mean(dim=0) - mean_P).abs().max()) < 1e-12


@pytest.mark.no_cover
def test_the_network_agrees_in_rounds_without_local_steps(algorithm):
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    for number in range(4):
        state = a_round(algorithm, graph, state, number)
    for number in range(4, 400):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0))
    agreed_NP = algorithm.estimate(state)

    assert float((agreed_NP - agreed_NP.mean(dim=0)).abs().max()) < 1e-12


def test_what_was_learnt_from_gradients_stays_in_rounds_without_local_steps(algorithm):
    graph = graph_for(algorithm)
    state = a_round(algorithm, graph, a_round(algorithm, graph, started(algorithm, graph), 0), 1)
    after = one_round(algorithm, graph, state, context(graph, 2, local_steps=0))

    learnt = state.keys() & {"correction", "momentum", "gradient", "trained"}
    assert_same({name: state[name] for name in learnt}, {name: after[name] for name in learnt})


def test_models_that_agree_and_do_not_train_stay_as_they_are(algorithm):
    graph = graph_for(algorithm)
    x_NP = random_rows(1).expand(7, P)
    state = algorithm.init(x_NP, context(graph, 0))
    for number, local_steps in enumerate((2, 2, 0, 0)):
        ctx = context(graph, number, local_steps=local_steps)
        state = one_round(algorithm, graph, state, ctx, (lambda x, r, k: torch.zeros_like(x)) if local_steps else None)

    torch.testing.assert_close(algorithm.estimate(state), x_NP, rtol=0, atol=1e-14)


# ---- what the models say of themselves


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"relaysgd"}))
def test_an_exchange_without_local_steps_is_the_mixing_matrix(name):
    algorithm = ALGORITHMS[name]()
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    merged = one_round(algorithm, graph, state, context(graph, 0, local_steps=0))
    expected = graph.mixing_matrix().toarray() @ state["x"].numpy()

    np.testing.assert_allclose(algorithm.estimate(merged).numpy(), expected, rtol=0, atol=1e-15 * 7)


def test_allreduce_holds_the_mean_after_one_exchange():
    algorithm = ALGORITHMS["allreduce"]()
    graph = graph_for(algorithm)
    state = started(algorithm, graph)
    merged = one_round(algorithm, graph, state, context(graph, 0, local_steps=0))

    assert float((merged["x"] - state["x"].mean(dim=0)).abs().max()) < 1e-15 * 7


# ---- the inbox


def small_inbox(channels, present, returns=None, weights=((0.25, 0.5), (0.25, 0.0), (0.5, 0.0))):
    """A path 1 - 0 - 2 with unequal weights, messages 1, 10, 100."""
    sent = {"m": torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)}
    index = torch.tensor([[1, 2], [0, 1], [0, 2]])

    def slot(channel, k, rows):
        return sent[channel][index[:, k] if rows is None else index[rows, k]]

    return Inbox(
        channels=channels,
        sent=sent,
        weights_NK=torch.tensor(weights, dtype=torch.float64),
        present_NK=torch.tensor(present),
        slot=slot,
        compensation=returns or {},
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


def test_a_scale_leaves_the_rest_of_a_weight_at_home():
    inbox = small_inbox({"m": Channel(missing="own")}, EVERYTHING)
    scale_NK = torch.tensor([[0.5, 0.25], [0.5, 0.0], [0.25, 0.0]], dtype=torch.float64)

    assert inbox.mix("m", scale_NK=scale_NK).flatten().tolist() == [1 + 0.125 * 9 + 0.125 * 99, 10 - 0.125 * 9, 100 - 0.125 * 99]
    assert inbox.mix("m", scale_NK=0.5).flatten().tolist() == [1 + 0.125 * 9 + 0.25 * 99, 10 - 0.125 * 9, 100 - 0.25 * 99]


def test_what_came_in_over_each_edge_is_kept_where_a_ledger_asks():
    inbox = small_inbox({"m": Channel(missing="own")}, FIRST_MISSES_SECOND)
    assert inbox.flows is None
    inbox.flows = {}
    inbox.mix("m", scale_NK=0.5)

    assert {place: flow["m"].tolist() for place, flow in inbox.flows.items()} == {
        (0, 1): [0.25 * 99],
        (1, 0): [-0.125 * 9],
        (2, 0): [-0.25 * 99],
    }
    zero = small_inbox({"m": Channel(missing="zero")}, EVERYTHING)
    zero.flows = {}
    zero.mix("m")
    assert zero.flows == {}


def test_a_rule_s_own_flows_are_added_and_kept_and_what_is_taken_back_with_them():
    returns = {"m": torch.tensor([[-2.0], [0.0], [0.0]], dtype=torch.float64)}
    inbox = small_inbox({"m": Channel(missing="own")}, EVERYTHING, returns)
    inbox.flows = {}
    flows = [torch.tensor(flow, dtype=torch.float64)[:, None] for flow in ([4.0, -4.0, 0.0], [8.0, 0.0, -8.0])]
    into = torch.tensor([[0.0], [10.0], [20.0]], dtype=torch.float64)

    assert inbox.take_in("m", into, flows).flatten().tolist() == [10.0, 6.0, 12.0]
    assert into.flatten().tolist() == [0.0, 10.0, 20.0]
    assert [inbox.flows[i, k]["m"].item() for i in range(3) for k in range(2)] == [4.0, 8.0, -4.0, 0.0, 0.0, -8.0]


def test_a_channel_that_is_encoded_is_sent_in_one_phase_with_all_that_encodes_it(algorithm):
    graph = graph_for(algorithm)
    phases_of = {}
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(started(algorithm, graph), phase, context(graph))
        encoded = {algorithm.channels[name].encodes for name in sent} - {None}
        assert encoded <= sent.keys()
        for name in sent:
            phases_of.setdefault(algorithm.channels[name].encodes or name, set()).add(phase)

    assert all(len(phases_of[c.encodes]) == 1 for c in algorithm.channels.values() if c.encodes)


def test_what_is_encoded_grows_by_what_decoding_makes_of_it(algorithm):
    graph = graph_for(algorithm)
    values = {}
    state = started(algorithm, graph)
    for number in range(3):
        for phase in range(algorithm.phases):
            ctx = context(graph, number)
            sent = algorithm.outgoing(state, phase, ctx)
            for of in {algorithm.channels[name].encodes for name in sent} - {None}:
                encoded = {name: message for name, message in sent.items() if algorithm.channels[name].encodes == of}
                values[of] = algorithm.decode(of, values.get(of, torch.zeros_like(sent[of])), encoded, ctx)
                assert torch.equal(values[of], sent[of])
            state = algorithm.merge(state, phase, inbox_of(algorithm, graph, sent), ctx)


def test_what_a_node_sent_is_its_own():
    assert small_inbox({"m": Channel()}, EVERYTHING).own("m").flatten().tolist() == [1.0, 10.0, 100.0]


@given(weight=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), single=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_flow_and_its_counterpart_cancel_bit_for_bit(weight, seed, single):
    rows = random_rows(2, seed).to(torch.float32 if single else torch.float64)

    assert torch.equal(flow(weight, rows[1], rows[0]), -flow(weight, rows[0], rows[1]))


def test_an_inbox_that_has_mixed_is_no_circle_that_keeps_tensors():
    gc.collect()
    gc.disable()
    try:
        sent = {"x": torch.zeros(1, 3)}
        inbox = InboxFactory(channels=DPSGD().channels).for_node(
            sent, ["b"], {"b": {"x": torch.ones(3)}}, {"b": 0.5}, self_weight=0.5, dtype=torch.float32
        )
        inbox.mix("x")
        is_there = weakref.ref(inbox)
        del inbox

        assert is_there() is None
    finally:
        gc.enable()
