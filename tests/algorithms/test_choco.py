"""CHOCO against its paper as a loop, and against exact figures on a ring of 8.

Rounds are counted as the reference counts them: the first is 0, and it has converged where ||x - mean||**2 is 1e-10 of what it was.

Shapes: N nodes, K neighbour slots, P parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import p2pfl
from p2pfl.algorithms import over_an_edge
from p2pfl.algorithms.compressed import Choco
from p2pfl.algorithms.quantizers import QSGD, BFloat16, Float16, Identity, Int8, Sign
from p2pfl.algorithms.sparsifiers import LowRank, RandomK, TopK
from p2pfl.params import Layout, TensorSpec
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.topology import make, weighted
from rows import PARTS, context, inbox_of, one_round
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

RING = weighted(make("ring", 8), "metropolis")
STAR = weighted(make("star", 6), "metropolis")
COMPRESSORS = [Identity(), Int8(), QSGD(levels=16), Sign(), TopK(share=0.1), TopK(share=0.01), RandomK(share=0.1), LowRank(rank=1)]


def start(size=100, num_nodes=8):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((num_nodes, size)))


def context_of(graph, x_NP, number, row=None, local_steps=0):
    size = x_NP.shape[-1]
    shape = (10, size // 10) if size % 10 == 0 else (size,)
    layout = Layout(tensors=(TensorSpec("x", shape, "float64"),))
    return replace(context(graph, number, local_steps=local_steps, row=row), layout=layout)


def gossip(algorithm, graph, x_NP, rounds):
    """The state after each of some rounds without training."""
    state = algorithm.init(x_NP, context_of(graph, x_NP, 0))
    for number in range(rounds):
        state = one_round(algorithm, graph, state, context_of(graph, x_NP, number))
        yield state


def spread(x_NP):
    return float((x_NP - x_NP.mean(dim=0)).square().sum())


def converged_at(algorithm, x_NP, at_most, graph=RING):
    """The number of the round, and the state then."""
    for number, state in enumerate(gossip(algorithm, graph, x_NP, at_most)):
        if spread(state["x"]) < 1e-10 * spread(x_NP):
            return number, state
    pytest.fail(f"not converged after {at_most} rounds: {spread(state['x']) / spread(x_NP)}")


# ---- oracle 15


@pytest.mark.parametrize(
    ("compressor", "gamma", "size", "number"),
    [
        (TopK(share=0.5), 1.0, 100, 48),
        (TopK(share=0.1), 0.2, 100, 249),
        pytest.param(TopK(share=0.01), 0.02, 100, 2505, marks=pytest.mark.slow),
        (Sign(), 1.0, 100, 98),
    ],
    ids=str,
)
def test_a_ring_of_8_agrees_in_the_round_it_is_known_to(compressor, gamma, size, number):
    x_NP = start(size)

    assert converged_at(Choco(compressor=compressor, gamma=gamma), x_NP, 3000)[0] == number


def test_int8_agrees_at_gamma_1_in_51_rounds():
    assert abs(converged_at(Choco(compressor=Int8(), gamma=1.0), start(200), 100)[0] - 51) <= 2  # other draws


def test_half_of_the_coordinates_agree_to_1e_10_within_60_rounds():
    assert converged_at(Choco(compressor=TopK(share=0.5), gamma=1.0), start(), 60)[0] < 60


@pytest.mark.parametrize(
    ("compressor", "gamma"),
    first_fast([(TopK(share=0.1), 0.5), (TopK(share=0.1), 1.0), (TopK(share=0.01), 0.1), (RandomK(share=0.1), 0.2)]),
)
def test_too_large_a_gamma_diverges(compressor, gamma):
    *_, state = gossip(Choco(compressor=compressor, gamma=gamma), RING, start(), 1500)

    assert spread(state["x"]) > 10 * spread(start())  # top-1 % grows slowly, the others by 1e12 and more


def test_without_xhat_top_k_stops_at_a_ninth():
    x_NP, compressor, matrix = start(), TopK(share=0.1), torch.from_numpy(RING.mixing_matrix().toarray())
    for number in range(500):
        ctx = context_of(RING, x_NP, number)
        sent = compressor.decompress(compressor.compress(x_NP, ctx), ctx, torch.float64)
        x_NP = x_NP + matrix @ sent - sent

    assert spread(x_NP) / spread(start()) == pytest.approx(0.110, abs=5e-4)


@pytest.mark.parametrize("gamma", first_fast(["auto", 0.01, 0.2, 0.5, 1.0]))
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_the_mean_stands_still_at_any_gamma(compressor, gamma):
    """Where the models run away their mean does so by no more than rounding."""
    x_NP, largest = start(), 1.0
    for state in gossip(Choco(compressor=compressor, gamma=gamma), RING, x_NP, 150):
        largest = max(largest, float(state["x"].abs().max()))

    assert float((state["x"].mean(dim=0) - x_NP.mean(dim=0)).abs().max()) < 1e-12 * largest


@pytest.mark.parametrize("gamma", [1.0, "auto"])
def test_without_compression_at_gamma_1_it_is_plain_gossip(gamma):
    expected_NP, matrix = start(), torch.from_numpy(RING.mixing_matrix().toarray())
    for state in gossip(Choco(compressor=Identity(), gamma=gamma), RING, start(), 30):
        expected_NP = matrix @ expected_NP

        torch.testing.assert_close(state["x"], expected_NP, rtol=0, atol=1e-14)


# ---- the definition


@pytest.mark.parametrize("gamma", [0.3, "auto"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize("graph", [RING, STAR], ids=["ring", "star"])
def test_it_is_the_paper_s_loop(graph, compressor, gamma):
    """Every node holds every neighbour's xhat, written out; trained for some rounds first."""
    num_nodes = graph.num_nodes
    x_NP = start(100, num_nodes)
    matrix = graph.mixing_matrix().toarray()
    algorithm = Choco(compressor=compressor, gamma=gamma)
    step = gamma if gamma != "auto" else min(1.0, 2 * compressor.omega(context_of(graph, x_NP, 0).layout))
    state = algorithm.init(x_NP, context_of(graph, x_NP, 0))
    x, xhat = x_NP.numpy().copy(), np.zeros((num_nodes, 100))
    for number in range(8):
        ctx = context_of(graph, x_NP, number, local_steps=1 if number < 4 else 0)
        training = number < 4
        state = one_round(algorithm, graph, state, ctx, (lambda v, r, k: torch.sin(v + r)) if training else None)
        x = x - ctx.lr * np.sin(x + number) if training else x
        difference = torch.from_numpy(x - xhat)
        xhat = xhat + compressor.decompress(compressor.compress(difference, ctx), ctx, torch.float64).numpy()
        moved = x.copy()
        for i in range(num_nodes):
            for j in range(num_nodes):
                moved[i] += step * matrix[i, j] * (xhat[j] - xhat[i])
        x = moved

        np.testing.assert_allclose(state["x"].numpy(), x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state["xhat"].numpy(), xhat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, "auto"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_one_row_alone_computes_what_it_computes_among_many(compressor, gamma):
    algorithm, x_NP = Choco(compressor=compressor, gamma=gamma), start(100, 6)
    together = algorithm.init(x_NP, context_of(STAR, x_NP, 0))
    alone = [algorithm.init(x_NP[i : i + 1], context_of(STAR, x_NP, 0, row=i)) for i in range(6)]
    for number in range(6):
        ctx = context_of(STAR, x_NP, number)
        mine = [context_of(STAR, x_NP, number, row=i) for i in range(6)]
        sent = algorithm.outgoing(together, 0, ctx)
        together = algorithm.merge(together, 0, inbox_of(algorithm, STAR, sent), ctx)
        said = [algorithm.outgoing(alone[i], 0, mine[i]) for i in range(6)]
        heard = {name: torch.cat([message[name] for message in said]) for name in sent}
        alone = [algorithm.merge(alone[i], 0, inbox_of(algorithm, STAR, heard, row=i), mine[i]) for i in range(6)]
    for i in range(6):
        assert alone[i].keys() == together.keys()
        for name, tensor in alone[i].items():
            assert torch.equal(tensor[0], together[name][i]), name


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_what_travels_is_what_the_compressor_says_and_one_byte_for_auto(compressor):
    x_NP = start()
    sent = {}
    for gamma in (0.5, "auto"):
        algorithm = Choco(compressor=compressor, gamma=gamma)
        ctx = context_of(RING, x_NP, 0)
        sent[gamma] = algorithm.outgoing(algorithm.init(x_NP, ctx), 0, ctx)

        assert sent[gamma].keys() <= algorithm.channels.keys()
    channels = algorithm.channels
    assert set(over_an_edge(channels, sent[0.5])) == set(PARTS[type(compressor).__name__])
    assert set(over_an_edge(channels, sent["auto"])) == {*PARTS[type(compressor).__name__], "halvings"}
    assert (sent["auto"]["halvings"].dtype, sent["auto"]["halvings"].shape) == (torch.uint8, (8, 1))
    whole = over_an_edge(channels, sent["auto"], whole=True, row=3)
    assert set(whole) == {"xhat", "halvings"}
    assert torch.equal(whole["xhat"], sent["auto"]["xhat"][3])


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_receiver_decodes_to_the_bits_that_the_sender_has(compressor):
    """From its own copies of what came, wherever they lie in memory."""
    algorithm, x_NP = Choco(compressor=compressor), start()
    held = [torch.zeros(1, 100, dtype=torch.float64) for _ in range(8)]
    for number, state in enumerate(gossip(algorithm, RING, x_NP, 6)):
        sent = algorithm.outgoing(state, 0, context_of(RING, x_NP, number + 1))
        if number == 0:
            held = [state["xhat"][i : i + 1] for i in range(8)]
        for i in range(8):
            parts = {name: torch.from_numpy(np.array(sent[name][i].numpy()))[None] for name in PARTS[type(compressor).__name__]}
            held[i] = algorithm.decode("xhat", held[i], parts, context_of(RING, x_NP, number + 1, row=(i + 1) % 8))

            assert torch.equal(held[i][0], sent["xhat"][i])


# ---- gamma that finds itself


@pytest.mark.parametrize(
    ("compressor", "number"), first_fast([(TopK(share=0.1), 249), (TopK(share=0.5), 48), (Sign(), 98), (TopK(share=0.01), 2505)]), ids=str
)
def test_auto_keeps_a_gamma_that_converges(compressor, number):
    rounds, state = converged_at(Choco(compressor=compressor), start(), 3000)

    assert rounds == number
    assert state["halvings"].tolist() == [0] * 8


def test_auto_halves_a_gamma_that_diverges_and_the_mean_stands_still():
    """Random 10 %: .2 = 2 omega diverges, .1 does not."""
    x_NP = start()
    _, state = converged_at(Choco(compressor=RandomK(share=0.1)), x_NP, 2000)

    assert 1 <= max(state["halvings"].tolist()) <= 3
    assert float((state["x"].mean(dim=0) - x_NP.mean(dim=0)).abs().max()) < 1e-12


def test_rows_that_have_halved_differently_still_keep_the_mean():
    algorithm, x_NP = Choco(compressor=TopK(share=0.1)), start()
    state = algorithm.init(x_NP, context_of(RING, x_NP, 0))
    state["halvings"] = torch.tensor([0, 1, 2, 3, 0, 5, 0, 1], dtype=torch.uint8)
    expected_NP, matrix = x_NP.clone(), RING.mixing_matrix().toarray()
    for number in range(100):
        halvings = state["halvings"].tolist()
        state = one_round(algorithm, RING, state, context_of(RING, x_NP, number))
        for i in range(8):
            for j in range(8):
                step = 0.2 * 0.5 ** max(halvings[i], halvings[j]) * matrix[i, j]
                expected_NP[i] += step * (state["xhat"][j] - state["xhat"][i])

    torch.testing.assert_close(state["x"], expected_NP, rtol=0, atol=1e-12)
    assert spread(state["x"]) < 0.5 * spread(x_NP)
    assert float((state["x"].mean(dim=0) - x_NP.mean(dim=0)).abs().max()) < 1e-12


def test_rows_that_have_halved_differently_keep_the_mean_without_messages_too():
    algorithm, x_NP = Choco(compressor=TopK(share=0.1)), start()
    state = algorithm.init(x_NP, context_of(RING, x_NP, 0))
    state["halvings"] = torch.arange(8, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    for number in range(20):
        up = np.triu(rng.random((8, 8)) < 0.5, 1)
        present_NK = torch.from_numpy((up | up.T)[np.arange(8)[:, None], RING.padded()[0]])
        state = one_round(algorithm, RING, state, context_of(RING, x_NP, number), present_NK=present_NK)

    assert float((state["x"].mean(dim=0) - x_NP.mean(dim=0)).abs().max()) < 1e-12


def test_auto_does_not_take_noisy_gradients_for_divergence():
    """1000 rounds about different minima: both sums often grow three times running, but not fourfold."""
    rng = np.random.default_rng(7)
    minima_NP, x_NP = torch.from_numpy(rng.standard_normal((8, 100)) * 0.3 + 10), start()
    algorithm = Choco(compressor=Sign())
    state = algorithm.init(x_NP, context_of(RING, x_NP, 0))
    for number in range(1000):
        noise_NP = torch.from_numpy(rng.standard_normal((8, 100)))
        ctx = replace(context_of(RING, x_NP, number, local_steps=1), lr=0.05)
        state = one_round(algorithm, RING, state, ctx, lambda v, r, k, noise_NP=noise_NP: v - minima_NP + noise_NP)

    assert max(state["halvings"].tolist()) == 0


COMPLETE = weighted(make("complete", 3), "metropolis")


def logistic(x_NP, *, unlike):
    """Gradients of logistic regressions whose minima lie far away: steps grow and shrink as the models do."""
    rng = np.random.default_rng(0)
    num_nodes, size = x_NP.shape
    inputs_NBP = torch.from_numpy(rng.standard_normal((num_nodes, 30, size)))
    rules_NP = torch.from_numpy(rng.standard_normal((num_nodes, size)) * unlike + rng.standard_normal((1, size)))
    targets_NB = (torch.einsum("nbp,np->nb", inputs_NBP, rules_NP) > 0).double()

    def gradient(v_NP, number, step):
        guess_NB = torch.sigmoid(torch.einsum("nbp,np->nb", inputs_NBP, v_NP))
        return torch.einsum("nbp,nb->np", inputs_NBP, guess_NB - targets_NB) / 30

    return gradient


def drift(x_NP):
    """All sites pull one way, more and more."""
    way_1P = torch.from_numpy(np.random.default_rng(0).standard_normal((1, x_NP.shape[1])))
    return lambda v_NP, number, step: way_1P.expand_as(v_NP) * (1 + 0.05 * number)


def slow_network(x_NP):
    """Small networks with one hidden layer of tanh on rows with noise: gradients grow before they shrink."""
    rng = np.random.default_rng(0)
    num_nodes, hidden = len(x_NP), (x_NP.shape[1] - 1) // 6
    inputs_NBF = torch.from_numpy(rng.standard_normal((num_nodes, 30, 4)))
    rules_NF = torch.from_numpy(rng.standard_normal((num_nodes, 4)) * 0.5 + 1)
    noise_NB = torch.from_numpy(rng.standard_normal((num_nodes, 30)))
    targets_NB = (torch.einsum("nbf,nf->nb", inputs_NBF, rules_NF) + 0.5 * noise_NB > 0).double()

    def gradient(v_NP, number, step):
        v_NP = v_NP.clone().requires_grad_(True)
        first_NFH, bias_NH, last_NH = (
            v_NP[:, : 4 * hidden].reshape(-1, 4, hidden),
            v_NP[:, 4 * hidden : 5 * hidden],
            v_NP[:, 5 * hidden : 6 * hidden],
        )
        outputs_NB = (torch.tanh(inputs_NBF @ first_NFH + bias_NH[:, None]) * last_NH[:, None]).sum(dim=-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs_NB, targets_NB, reduction="none").mean(dim=1).sum()
        return torch.autograd.grad(loss, v_NP)[0]

    return gradient


def trained(compressor, gradient_of, *, local_steps, lr, rounds, gamma="auto", **options):
    """The state after rounds of training of three nodes that know each other."""
    x_NP = start(100, 1).expand(3, 100).clone() * 0.3
    algorithm, gradient = Choco(compressor=compressor, gamma=gamma), gradient_of(x_NP, **options)
    state = algorithm.init(x_NP, context_of(COMPLETE, x_NP, 0))
    for number in range(rounds):
        ctx = replace(context_of(COMPLETE, x_NP, number, local_steps=local_steps), lr=lr)
        state = one_round(algorithm, COMPLETE, state, ctx, gradient)
    return state


@pytest.mark.parametrize(("local_steps", "lr"), first_fast([(1, 0.3), (5, 0.02), (2, 0.001)]))
@pytest.mark.parametrize(
    ("compressor", "gradient_of", "options"),
    first_fast(
        [
            (Int8(), drift, {}),
            (Sign(), slow_network, {}),
            (Float16(), slow_network, {}),
            (BFloat16(), logistic, {"unlike": 1.0}),
            (QSGD(levels=16), logistic, {"unlike": 0.0}),
            (TopK(share=0.1), drift, {}),
            (LowRank(rank=1), slow_network, {}),
        ]
    ),
    ids=lambda value: value.__name__ if callable(value) and hasattr(value, "__name__") else str(value),
)
def test_auto_does_not_take_training_for_divergence(compressor, gradient_of, options, local_steps, lr):
    """Where the gamma that it starts with converges: steps alone make all figures grow at times. Sign's error may add up to that once."""
    state = trained(compressor, gradient_of, local_steps=local_steps, lr=lr, rounds=250, **options)

    assert max(state["halvings"].tolist()) <= isinstance(compressor, Sign)


@pytest.mark.parametrize(("local_steps", "lr"), first_fast([(1, 0.3), (5, 0.02)]))
def test_auto_halves_a_gamma_that_diverges_while_it_trains(local_steps, lr):
    """Random 10 % at .2 drives three nodes apart until their distance is their size; at a quarter of that it mixes."""
    fixed = trained(RandomK(share=0.1), slow_network, local_steps=local_steps, lr=lr, rounds=250, gamma=0.2)
    state = trained(RandomK(share=0.1), slow_network, local_steps=local_steps, lr=lr, rounds=250)

    assert 1 <= max(state["halvings"].tolist()) <= 3
    assert spread(state["x"]) < 0.01 * spread(fixed["x"])


def test_each_halving_is_told_and_the_last_one_as_what_it_is():
    algorithm, x_NP = Choco(compressor=Sign()), start()
    before = algorithm.init(x_NP, context_of(RING, x_NP, 0))
    before["halvings"] = torch.tensor([0, 0, 2, 9, 0, 0, 0, 10], dtype=torch.uint8)
    after = {**before, "halvings": torch.tensor([0, 1, 3, 10, 0, 0, 0, 10], dtype=torch.uint8)}

    told = algorithm.notices(before, after)

    assert [(notice.row, notice.event) for notice in told] == [(1, "gamma_halved"), (2, "gamma_halved"), (3, "gamma_exhausted")]
    assert [notice.detail.rpartition("halved ")[2] for notice in told[:2]] == ["once", "3 times"]
    assert "hardly mixes" in told[2].detail


def test_a_gamma_that_was_set_and_drives_the_models_apart_is_told_of():
    algorithm = Choco(compressor=RandomK(share=0.1), gamma=1.0)
    states = [algorithm.init(start(), context_of(RING, start(), 0)), *gossip(algorithm, RING, start(), 60)]
    told = [notice for before, after in itertools.pairwise(states) for notice in algorithm.notices(before, after)]

    assert {notice.event for notice in told} == {"running_away"}
    assert len({notice.row for notice in told}) == len(told) >= 1
    assert told[0].detail.startswith("at gamma 1 the exchange drives the models apart")


def test_a_gamma_that_was_set_and_mixes_is_not_told_of():
    algorithm = Choco(compressor=TopK(share=0.1), gamma=0.2)
    states = [algorithm.init(start(), context_of(RING, start(), 0)), *gossip(algorithm, RING, start(), 300)]

    assert not [notice for before, after in itertools.pairwise(states) for notice in algorithm.notices(before, after)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_halves_nothing_over_rounding(dtype):
    """A compressor that loses nothing leaves rounding behind, on each device another one, and models drift apart while they train."""
    algorithm, x_NP = Choco(compressor=Identity()), start().to(dtype)
    state = algorithm.init(x_NP, context_of(RING, x_NP, 0))
    for number in range(40):
        state = one_round(algorithm, RING, {**state, "x": 1.7 * state["x"]}, context_of(RING, x_NP, number))

    assert state["halvings"].tolist() == [0] * 8


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """It does not hold what gamma is now watched by."""
    task = {"name": "averaging", "dimension": 20}
    options = {"nodes": 6, "rounds": 12, "stop": None, "baselines": [], "checkpoint_every": 1}
    experiment = {"task": task, "algorithm": {"name": "choco"}, "compressor": {"name": "sign"}, **options}
    monkeypatch.setattr("p2pfl.simulator.engine._CHECKPOINT_S", 0)

    def interrupt(number, most, row):
        if number == 8:
            raise KeyboardInterrupt

    whole = p2pfl.simulate(experiment, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        p2pfl.simulate(experiment, out=tmp_path / "run", progress=interrupt)
    place = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = read_checkpoint(place)
    new = {"state/lag", "state/stepped", "state/driven_apart"}
    write_checkpoint(place, {name: tensor for name, tensor in tensors.items() if name not in new}, metadata)
    run = p2pfl.simulate({}, resume=tmp_path / "run")

    assert new < tensors.keys()
    assert all(torch.equal(run.models[name], x_P) for name, x_P in whole.models.items())
