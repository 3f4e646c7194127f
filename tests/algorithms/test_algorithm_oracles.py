"""Exact figures of the algorithms on small problems whose answers are known.

Shapes: N rows, P parameters (1 in most).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from p2pfl.algorithms import ALGORITHMS, DPSGD, KGT, GradientTracking, QGDSGDm
from p2pfl.topology import Topology, make, spectral_gap, weighted
from rows import context, inbox_of, mixed, one_round, rounds_until, trained
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

OPTIMUM = 14 / 3
CURVATURE_N1 = torch.arange(1, 9, dtype=torch.float64)[:, None] / 4  # a_i of f_i = a_i (x - b_i)**2 / 2
CENTRE_N1 = torch.arange(8, dtype=torch.float64)[:, None]  # b_i
ZEROS_N1 = torch.zeros(8, 1, dtype=torch.float64)


def ring(num_nodes):
    return weighted(make("ring", num_nodes), "metropolis")


def complete(num_nodes):
    return weighted(make("complete", num_nodes), "metropolis")


def quadratic(x_NP, round, step):
    return CURVATURE_N1 * (x_NP - CENTRE_N1)


def at_optimum(x_NP):
    return float((x_NP - OPTIMUM).abs().max()) < 1e-10


def wave(num_nodes):
    """The slowest mode of a ring."""
    return torch.cos(2 * math.pi * torch.arange(num_nodes, dtype=torch.float64) / num_nodes)[:, None]


# ---- D-PSGD


def test_dpsgd_with_equal_curvatures_ends_where_the_formula_says():
    end_N1 = trained(ALGORITHMS["dpsgd"](), ring(8), ZEROS_N1, lambda x, r, k: x - wave(8), 1000, lr=0.1)

    torch.testing.assert_close(end_N1, 0.291850921 * wave(8), rtol=0, atol=1e-9)
    assert abs(float(end_N1.mean())) < 1e-14


@pytest.mark.parametrize(
    ("lr", "bias", "disagreement"),
    [
        (0.2, -0.2919800, 0.6514065),
        (0.1, -0.1880555, 0.2824397),
        (0.05, -0.1102224, 0.1001966),
        pytest.param(0.01, -0.0256351, 0.0056066, marks=pytest.mark.slow),
    ],
)
def test_dpsgd_with_different_losses_ends_beside_the_optimum(lr, bias, disagreement):
    end_N1 = trained(ALGORITHMS["dpsgd"](), ring(8), ZEROS_N1, quadratic, 6000 if lr < 0.05 else 1500, lr=lr)

    assert float(end_N1.mean()) - OPTIMUM == pytest.approx(bias, abs=1e-6)
    assert float((end_N1 - end_N1.mean()).square().mean()) == pytest.approx(disagreement, abs=1e-6)


@pytest.mark.parametrize(
    ("local_steps", "everybody", "on_a_ring"),
    first_fast([(5, 4.4689226, 4.1399611), (1, 4.6666667, 4.4786112), (10, 4.2657081, 3.9696224)]),
)
def test_local_steps_lead_away_from_the_optimum_on_any_graph(local_steps, everybody, on_a_ring):
    ends = [
        trained(ALGORITHMS[name](), graph, ZEROS_N1, quadratic, 1500, lr=0.1, local_steps=local_steps)
        for name, graph in (("allreduce", complete(8)), ("dpsgd", ring(8)))
    ]

    assert [float(end_N1.mean()) for end_N1 in ends] == pytest.approx([everybody, on_a_ring], abs=1e-6)


def test_noise_of_the_mean_falls_with_the_number_of_nodes():
    """f = ||x||**2 / 2, gradient noise of variance 1, lr 0.1: column p is what one unit of node p's noise in round 0 does ever after."""
    algorithm, graph = ALGORITHMS["dpsgd"](), ring(16)
    state = algorithm.init(torch.zeros(16, 16, dtype=torch.float64), context(graph, 0))
    node_variance, mean_variance = 0.0, 0.0
    for number in range(400):

        def gradient(x_NP, round, step):
            return x_NP + (torch.eye(16, dtype=torch.float64) if round == 0 else 0)

        state = one_round(algorithm, graph, state, context(graph, number, local_steps=1), gradient)
        node_variance += float(state["x"].square().sum(dim=1).mean())
        mean_variance += float(state["x"].mean(dim=0).square().sum())

    assert mean_variance == pytest.approx(0.00328947, abs=1e-8)
    assert node_variance == pytest.approx(0.01013100, abs=1e-8)
    assert node_variance - mean_variance == pytest.approx(0.00684153, abs=1e-8)
    assert mean_variance * 16 == pytest.approx(0.05263158, abs=2e-7)


# ---- the other order, combine then adapt, which is not shipped: by its figures


class CombineThenAdapt(DPSGD):
    """x <- W x - lr g(x)."""

    def init(self, x_NP, ctx):
        return {"x": x_NP, "moved": torch.zeros_like(x_NP)}

    def adapt(self, state, trained_NP, ctx):
        return {**state, "moved": trained_NP - state["x"]}

    def merge(self, state, phase, inbox, ctx):
        return {**state, "x": inbox.mix("x") + state["moved"]}


class DIGing(GradientTracking):
    """x <- W x - lr y, then y <- W y + g - (g of the round before)."""

    phases = 1

    def adapt(self, state, trained_NP, ctx):
        gradient_NP = (state["x"] - trained_NP) / ctx.lr
        return {**state, "y": state["y"] + gradient_NP - state["gradient"], "gradient": gradient_NP}

    def outgoing(self, state, phase, ctx):
        return {"x": state["x"], "y": state["y"]}

    def merge(self, state, phase, inbox, ctx):
        return {**state, "x": inbox.mix("x") - ctx.lr * state["y"], "y": inbox.mix("y")}


def test_combining_first_ends_further_from_the_optimum():
    end_N1 = trained(CombineThenAdapt(), ring(8), ZEROS_N1, lambda x, r, k: x - wave(8), 1000, lr=0.1)

    torch.testing.assert_close(end_N1, 0.338682088 * wave(8), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("lr", "rounds"), [(0.05, 413), (0.1, 239)])
def test_tracking_that_combines_first_is_exact_at_small_steps(lr, rounds):
    assert abs(rounds_until(at_optimum, DIGing(), ring(8), ZEROS_N1, quadratic, lr=lr) - rounds) <= 2


def test_tracking_that_combines_first_diverges_where_ours_is_stable():
    assert float(trained(DIGing(), ring(8), ZEROS_N1, quadratic, 300, lr=0.2).abs().max()) > 1e6


# ---- exact at the optimum


@pytest.mark.parametrize(
    ("name", "lr", "rounds"),
    [
        *[("gradient-tracking", lr, rounds) for lr, rounds in ((0.05, 418), (0.1, 222))],
        *[("exact-diffusion", lr, rounds) for lr, rounds in ((0.05, 422), (0.1, 220), (0.2, 155), (0.4, 104))],
        *[("extra", lr, rounds) for lr, rounds in ((0.05, 422), (0.1, 210), (0.2, 144), (0.4, 114))],
    ],
)
def test_exact_methods_reach_the_optimum_in_as_many_rounds(name, lr, rounds):
    assert abs(rounds_until(at_optimum, ALGORITHMS[name](), ring(8), ZEROS_N1, quadratic, lr=lr) - rounds) <= 2


@pytest.mark.parametrize(("lr", "rounds"), [(0.2, 270), (0.4, 389)])
def test_gradient_tracking_is_stable_at_large_steps(lr, rounds):
    """The figures are of y_0 = g_0; ours begins with y_0 = W g_0, which takes 5 and 6 rounds less."""
    found = rounds_until(at_optimum, ALGORITHMS["gradient-tracking"](), ring(8), ZEROS_N1, quadratic, lr=lr)

    assert rounds - 7 <= found <= rounds


@pytest.mark.parametrize(("lr", "rounds"), [(0.05, 653), (0.1, 334), (0.2, 167), (0.4, 84)])
def test_exact_diffusion_with_the_whole_matrix_is_d2(lr, rounds):
    """(I + W') / 2 = W for W' = 2 W - I."""
    graph = ring(8)
    twice = graph.with_weights(2 * graph.weights)

    assert abs(rounds_until(at_optimum, ALGORITHMS["exact-diffusion"](), twice, ZEROS_N1, quadratic, lr=lr) - rounds) <= 2


@pytest.mark.parametrize(("local_steps", "lr", "outer_lr", "rounds"), [(5, 0.05, 0.5, 237), (1, 0.1, 1.0, 231)])
def test_kgt_is_exact_with_local_steps(local_steps, lr, outer_lr, rounds):
    found = rounds_until(at_optimum, KGT(outer_lr=outer_lr), ring(8), ZEROS_N1, quadratic, lr=lr, local_steps=local_steps)

    assert abs(found - rounds) <= 2


def test_what_is_tracked_sums_to_the_gradients_whoever_misses_whom():
    algorithm, graph = ALGORITHMS["gradient-tracking"](), ring(8)
    state = algorithm.init(ZEROS_N1, context(graph, 0))
    rng = np.random.default_rng(0)
    for number in range(20):
        up = torch.from_numpy(rng.random(8) < 0.5)  # of the edges (i, i + 1)
        present_NK = torch.tensor(
            [[bool(up[min(i, j)] if abs(i - j) == 1 else up[7]) for j in sorted(((i - 1) % 8, (i + 1) % 8))] for i in range(8)]
        )
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=1), quadratic, present_NK)

        assert abs(float(state["y"].sum() - state["gradient"].sum())) < 1e-12


@pytest.mark.parametrize("name", first_fast(["gradient-tracking", "exact-diffusion", "extra", "k-gt"]))
def test_exact_methods_are_exact_where_some_nodes_have_nothing_to_train_on(name):
    """They are not adapted, and count as nodes with no loss."""
    algorithm, graph = ALGORITHMS[name](), ring(8)
    trains = torch.arange(8) % 3 != 1
    state = algorithm.init(ZEROS_N1, context(graph, 0, local_steps=1))
    for number in range(1500):
        ctx = context(graph, number, local_steps=1)
        trained_NP = state["x"] - ctx.lr * algorithm.correct(state, quadratic(state["x"], number, 0), ctx)
        adapted = algorithm.adapt(state, trained_NP, ctx)
        state = {key: torch.where(trains[:, None], adapted[key], state[key]) for key in state}
        state = one_round(algorithm, graph, state, ctx)
    optimum = float((CURVATURE_N1 * CENTRE_N1)[trains].sum() / CURVATURE_N1[trains].sum())

    assert float((algorithm.estimate(state) - optimum).abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["gradient-tracking", "exact-diffusion", "extra", "k-gt"])
def test_exact_methods_are_exact_again_after_rounds_that_only_mix(name):
    algorithm, graph = ALGORITHMS[name](), ring(8)
    state = algorithm.init(ZEROS_N1, context(graph, 0, local_steps=1))
    for number in range(600):
        mixes = 40 <= number < 50
        ctx = context(graph, number, local_steps=0 if mixes else 1)
        before = algorithm.estimate(state).mean()
        state = one_round(algorithm, graph, state, ctx, None if mixes else quadratic)
        if mixes:
            assert abs(float(algorithm.estimate(state).mean() - before)) < 1e-13

    assert at_optimum(algorithm.estimate(state))


# ---- momentum


@pytest.mark.parametrize("local_steps", [1, 3])
def test_quasi_global_momentum_is_its_equations(local_steps):
    graph, beta, lr = ring(8), 0.7, 0.05
    matrix_NN = torch.from_numpy(graph.mixing_matrix().toarray())
    x_N1, momentum_N1 = CENTRE_N1.clone(), ZEROS_N1
    for _ in range(20):
        y_N1 = x_N1
        for _ in range(local_steps):
            y_N1 = y_N1 - lr * (beta * momentum_N1 + CURVATURE_N1 * (y_N1 - CENTRE_N1))
        mixed_N1 = matrix_NN @ y_N1
        momentum_N1 = beta * momentum_N1 + (1 - beta) * (x_N1 - mixed_N1) / (lr * local_steps)
        x_N1 = mixed_N1

    end_N1 = trained(QGDSGDm(beta=beta), graph, CENTRE_N1, quadratic, 20, lr=lr, local_steps=local_steps)
    torch.testing.assert_close(end_N1, x_N1, rtol=0, atol=1e-13)


def test_diloco_on_the_complete_graph_is_an_outer_nesterov_step():
    start_N1 = torch.full((8, 1), 2.0, dtype=torch.float64)
    centre = torch.nn.Parameter(start_N1[0].clone())
    outer = torch.optim.SGD([centre], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(15):
        y_N1 = centre.detach().expand(8, 1)
        for _ in range(4):
            y_N1 = y_N1 - 0.05 * CURVATURE_N1 * (y_N1 - CENTRE_N1)
        centre.grad = centre.detach() - y_N1.mean(dim=0)
        outer.step()

    end_N1 = trained(ALGORITHMS["diloco"](), complete(8), start_N1, quadratic, 15, lr=0.05, local_steps=4)
    torch.testing.assert_close(end_N1, centre.detach().expand(8, 1), rtol=0, atol=1e-12)


def test_dfedavgm_begins_each_round_without_momentum_unless_told_to_keep_it():
    assert ALGORITHMS["dfedavgm"]().resets_optimizer
    assert not ALGORITHMS["dfedavgm"](keep_momentum=True).resets_optimizer


# ---- push-sum


def five_one_way():
    """0 -> 1 and 2, 1 -> 2, 2 -> 3 and 0, 3 -> 4, 4 -> 0."""
    edges = ((0, 1), (0, 2), (1, 2), (2, 3), (2, 0), (3, 4), (4, 0))
    return Topology.from_edges("five", 5, *zip(*edges, strict=True), directed=True)


def split(graph):
    """Every sender gives its receivers and itself the same share."""
    given_N = np.bincount(graph.senders, minlength=graph.num_nodes)
    return graph.with_weights(1 / (1 + given_N[graph.senders]))


FIVE_N1 = torch.tensor([[1.0], [2.0], [3.0], [4.0], [10.0]], dtype=torch.float64)


@pytest.mark.parametrize(("rounds", "error", "rtol"), [(10, 4.80e-2, 2e-3), (20, 4.26e-4, 2e-3), (40, 3.35e-8, 2e-3)])
def test_push_sum_finds_the_mean_over_one_way_links(rounds, error, rtol):
    end_N1 = mixed(ALGORITHMS["push-sum"](), split(five_one_way()), FIVE_N1, rounds)

    assert float((end_N1 - 4).abs().max()) == pytest.approx(error, rel=rtol)


def test_push_sum_is_exact_in_the_end_and_its_weights_are_the_graphs():
    algorithm, graph = ALGORITHMS["push-sum"](), split(five_one_way())
    state = algorithm.init(FIVE_N1, context(graph, 0, local_steps=0))
    for number in range(80):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0))

    assert float((algorithm.estimate(state) - 4).abs().max()) < 1e-14
    assert state["w"].flatten().tolist() == pytest.approx([1.25, 5 / 6, 1.25, 5 / 6, 5 / 6], abs=1e-4)


def test_averaging_what_comes_is_another_mean_over_one_way_links():
    graph = five_one_way()
    taken = graph.with_weights(1 / (1 + graph.degrees[graph.receivers]))

    torch.testing.assert_close(mixed(ALGORITHMS["dpsgd"](), taken, FIVE_N1, 200), torch.full_like(FIVE_N1, 3.666667), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("loss", "error"), [(0.2, 1e-6), (0.5, 1e-4)])
def test_push_sum_loses_nothing_with_lost_messages(loss, error):
    algorithm, graph = ALGORITHMS["push-sum"](), split(ring(16))
    rng = np.random.default_rng(1)
    state = algorithm.init(torch.arange(16, dtype=torch.float64)[:, None], context(graph, 0, local_steps=0))
    for number in range(400):
        came_NK = torch.from_numpy(rng.random((16, 2)) >= loss)
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0), present_NK=came_NK)
        everything = torch.cat([state["x"], state["w"]], dim=-1).sum(dim=0)
        sums = inbox_of(algorithm, graph, {"sigma": state["sigma"]}).stack("sigma")[0]
        under_way = ((sums - state["rho"]) / 3).sum(dim=(0, 1))

        torch.testing.assert_close(everything + under_way, torch.tensor([120.0, 16.0], dtype=torch.float64), rtol=0, atol=1e-10)

    assert float((algorithm.estimate(state) - 7.5).abs().max()) < error


def test_push_sum_keeps_its_mass_where_sums_have_grown_beyond_the_precision():
    """In float32 a sum of 10**6 has steps of 1/16: what they cut off a share stays with the sender."""
    algorithm, graph = ALGORITHMS["push-sum"](), split(ring(16))
    ctx = context(graph, 0, local_steps=0)
    state = algorithm.init(torch.arange(16, dtype=torch.float32)[:, None], ctx)
    state["sigma"], state["rho"] = state["sigma"] + 10**6, state["rho"] + 10**6
    for _ in range(300):
        inbox = inbox_of(algorithm, graph, algorithm.outgoing(state, 0, ctx))
        inbox = replace(inbox, weights_NK=inbox.weights_NK.float(), self_weights_N=inbox.self_weights_N.float())
        state = algorithm.merge(state, 0, inbox, ctx)
    mean = float(state["x"].double().sum() / state["w"].double().sum())

    assert mean == pytest.approx(7.5, rel=300 * 2**-24)  # a rounding a round


@pytest.mark.slow
def test_push_sum_trains_to_the_optimum_of_the_mean_loss_on_one_way_links():
    """Beside it by O(lr), as D-PSGD is."""
    graph, curvature_N1 = split(five_one_way()), torch.arange(1, 6, dtype=torch.float64)[:, None] / 3
    optimum = float((curvature_N1 * FIVE_N1).sum() / curvature_N1.sum())
    distances = []
    for lr in (0.02, 0.01, 0.005):
        end_N1 = trained(ALGORITHMS["push-sum"](), graph, FIVE_N1, lambda x, r, k: curvature_N1 * (x - FIVE_N1), int(40 / lr), lr=lr)
        distances.append(float((end_N1 - optimum).abs().max()))

    assert distances[0] < 0.5
    assert [a / b for a, b in pairwise(distances)] == pytest.approx([2, 2], rel=0.05)


# ---- relay


def test_relayed_sums_are_the_exact_mean_at_the_diameter_and_not_before():
    """A balanced binary tree of 15 nodes, diameter 6."""
    tree = Topology.from_edges("binary tree", 15, [(child - 1) // 2 for child in range(1, 15)], list(range(1, 15)))
    graph = weighted(tree, "metropolis")
    x_NP = torch.from_numpy(np.random.default_rng(0).standard_normal((15, 3)))
    errors = [float((mixed(ALGORITHMS["relaysgd"](), graph, x_NP, rounds) - x_NP.mean(dim=0)).abs().max()) for rounds in range(1, 9)]

    assert min(errors[:5]) > 1e-2
    assert max(errors[5:]) < 1e-15 * 15


def test_relaysgd_ends_at_the_mean_of_the_last_models():
    graph = weighted(make("path", 8), "metropolis")
    algorithm = ALGORITHMS["relaysgd"]()
    state = algorithm.init(ZEROS_N1, context(graph, 0, local_steps=2))
    for number in range(30):
        last = one_round(algorithm, graph, state, context(graph, number, local_steps=2), quadratic)
        state = last
    for number in range(30, 37):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0))

    torch.testing.assert_close(state["x"], last["trained"].mean(dim=0).expand(8, 1), rtol=0, atol=1e-13)


def test_relaysgd_waits_with_the_last_message_for_the_next():
    graph = weighted(make("path", 8), "metropolis")
    algorithm = ALGORITHMS["relaysgd"]()
    x_NP = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 3)))
    state = algorithm.init(x_NP, context(graph, 0, local_steps=0))
    rng = np.random.default_rng(3)
    for number in range(60):
        came_NK = torch.from_numpy(rng.random((8, 2)) < 0.5)
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0), present_NK=came_NK)

    assert float((state["x"] - x_NP.mean(dim=0)).abs().max()) < 1e-15 * 8


# ---- Chebyshev


@pytest.mark.parametrize(("rounds", "largest"), [(10, 0.07701126), (20, 0.002974187), (43, 1.66556e-6)])
def test_chebyshev_takes_off_what_the_polynomial_says(rounds, largest):
    graph = ring(16)
    rho = 1 - spectral_gap(graph)
    end_N1 = mixed(ALGORITHMS["chebyshev"](rho=rho), graph, wave(16), rounds)

    assert float(end_N1.abs().max()) == pytest.approx(1 / math.cosh(rounds * math.acosh(1 / rho)), rel=1e-8)
    assert float(end_N1.abs().max()) == pytest.approx(largest, rel=1e-5)


def test_chebyshev_trains_as_dpsgd_and_begins_anew_after_each_training():
    graph, algorithm = ring(8), ALGORITHMS["chebyshev"](rho=0.8)
    ends = [trained(ALGORITHMS["dpsgd"](), graph, CENTRE_N1, quadratic, 5, lr=0.1)]
    state = algorithm.init(CENTRE_N1, context(graph, 0))
    for number in range(5):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=1), quadratic)
    ends.append(state["x"])
    for number in range(5, 10):
        state = one_round(algorithm, graph, state, context(graph, number, local_steps=0))

    assert torch.equal(*ends)
    torch.testing.assert_close(state["x"], mixed(algorithm, graph, ends[0], 5), rtol=0, atol=0)
