"""K local steps of N rows are torch.optim's steps on each row alone.

Shapes: N rows, K local steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.algorithms import ALGORITHMS, DPSGD, Inbox
from p2pfl.draws import batch_positions, batch_sizes
from p2pfl.params import Layout, load_parameters, parameters_of
from p2pfl.tasks import Site, Task
from p2pfl.training import OptimizerSpec, Population, Recipe, StackedOptimizer, build_model, clipped

SEED = 4
SIZES = [7, 30, 12]

SPECS = {
    "sgd": OptimizerSpec(name="sgd", lr=0.1),
    "sgd-momentum-decay": OptimizerSpec(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": OptimizerSpec(name="adam", lr=0.01, weight_decay=0.01),
    "adamw": OptimizerSpec(name="adamw", lr=0.01, weight_decay=0.1),
    "rmsprop": OptimizerSpec(name="rmsprop", lr=0.01),
    "rmsprop-momentum": OptimizerSpec(name="rmsprop", lr=0.01, momentum=0.5, weight_decay=0.01),
    "adagrad": OptimizerSpec(name="adagrad", lr=0.1, weight_decay=0.01),
}
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def by_torch(spec, parameters):
    momentum = {"momentum": spec.momentum} if spec.momentum else {}
    return TORCH[spec.name](parameters, lr=spec.lr, weight_decay=spec.weight_decay, **momentum)


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def sites_of(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(size):
        return torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator)

    return [Site(name=f"n{i}", train=None if size is None else rows(size), test=rows(4)) for i, size in enumerate(sizes)]


def task_of(sites, model=mlp, loss=F.mse_loss):
    return Task(
        name="test",
        model=model,
        loss=loss,
        metrics={"mse": lambda outputs, targets: float(F.mse_loss(outputs, targets))},
        sites=[site for site in sites if site.train is not None],
    )


def recipe_of(spec=SPECS["sgd"], **changes):
    base = Recipe(algorithm=DPSGD(), optimizer=spec, batch_size=4, rounds=10, local_steps=3, seed=SEED)
    return replace(base, **changes)


def population_of(recipe=None, *, sites=None, make_model=mlp, loss=F.mse_loss, nodes=None, dtype=torch.float64, **options):
    sites = sites_of() if sites is None else sites
    task = task_of(sites, make_model, loss)
    model = build_model(task, dtype, SEED)
    return Population(task, sites, nodes or range(len(sites)), model, recipe or recipe_of(), **options)


def trained_by_hand(site, node, recipe, rounds, *, make_model=mlp, scale=1.0, dtype=torch.float64):
    """torch alone on one row: the same model, the same batches, torch.optim with its own state."""
    model = build_model(task_of([site], make_model), dtype, SEED)
    optimizer = by_torch(recipe.optimizer, model.parameters())
    inputs, targets = (tensor.to(dtype) for tensor in site.train)
    losses, size_1 = [], torch.tensor([len(inputs)])
    batch_size = int(batch_sizes(size_1, recipe.batch_size, repeating=recipe.repeats_rows))
    for number in range(rounds):
        optimizer.param_groups[0]["lr"] = recipe.optimizer.lr_at(number, recipe.rounds)
        steps = batch_positions(
            SEED, torch.tensor([node]), size_1, number * recipe.local_steps, recipe.local_steps, batch_size, repeating=recipe.repeats_rows
        )[0]
        of_round = []
        for batch in steps:
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs[batch]), targets[batch])
            (scale * loss).backward()
            if recipe.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
            optimizer.step()
            of_round.append(loss.item())
        losses.append(sum(of_round) / len(of_round))
    return parameters_of(model), losses


def snapshot(population):
    return {name: tensor.clone() for name, tensor in population.tensors().items()}


# ---- optimisers


@pytest.mark.parametrize("name", SPECS)
def test_an_optimiser_on_stacked_rows_is_torchs_on_each(name):
    spec = SPECS[name]
    torch.manual_seed(0)
    start_NP = torch.randn(3, 8, dtype=torch.float64)
    gradients = torch.randn(3 * 4, 3, 8, dtype=torch.float64)
    x_NP, state = start_NP, spec.init(start_NP)
    for number in range(3):  # four steps a round
        optimizer = StackedOptimizer(spec, x_NP, state, lr=spec.lr, first_step=4 * number)
        for gradient_NP in gradients[4 * number : 4 * number + 4]:
            optimizer.step(gradient_NP.clone())
        x_NP, state = optimizer.x, optimizer.state

    assert set(state) == set(spec.state_names())
    for row in range(3):
        parameter = nn.Parameter(start_NP[row].clone())
        reference = by_torch(spec, [parameter])
        for gradient_NP in gradients:
            parameter.grad = gradient_NP[row].clone()
            reference.step()
        torch.testing.assert_close(x_NP[row], parameter.detach(), rtol=1e-13, atol=1e-15)
        for key in spec.state_names():
            torch.testing.assert_close(state[key][row], reference.state[parameter][key], rtol=1e-13, atol=1e-15)


def test_an_optimiser_does_not_change_what_it_is_given():
    spec = SPECS["adam"]
    x_NP = torch.ones(2, 3)
    state = spec.init(x_NP)
    StackedOptimizer(spec, x_NP, state, lr=0.1, first_step=0).step(torch.ones(2, 3))

    assert torch.equal(x_NP, torch.ones(2, 3))
    assert all(torch.equal(tensor, torch.zeros(2, 3)) for tensor in state.values())


def test_adams_step_count_is_that_of_the_round():
    """Fresh moments in round 5 of K = 3: the bias correction is that of step 16, not of step 1."""
    spec = OptimizerSpec(name="adam", lr=0.1)
    x_NP = torch.zeros(1, 1, dtype=torch.float64)
    optimizer = StackedOptimizer(spec, x_NP, spec.init(x_NP), lr=0.1, first_step=5 * 3)
    optimizer.step(torch.full((1, 1), 2.0, dtype=torch.float64))
    mean, square = 0.1 * 2 / (1 - 0.9**16), 0.001 * 4 / (1 - 0.999**16)

    assert optimizer.x.item() == pytest.approx(-0.1 * mean / (math.sqrt(square) + 1e-8), rel=1e-12)


def test_clipping_is_per_row():
    gradient_NP = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [0.0, -2.0]])

    torch.testing.assert_close(clipped(gradient_NP, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.0, -1.0]]))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]),
        ("cosine", [0.05, 0.1, 0.1, 0.1 * (1 + math.sqrt(0.5)) / 2, 0.05, 0.1 * (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_a_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    spec = OptimizerSpec(lr=0.1, schedule=schedule, warmup_rounds=2)

    assert [spec.lr_at(number, 6) for number in range(6)] == pytest.approx(expected, rel=1e-12)
    assert OptimizerSpec(lr=0.1, warmup_rounds=4).lr_at(0, 2) == pytest.approx(0.025)


# ---- local steps


@pytest.mark.parametrize("name", SPECS)
def test_a_population_trains_each_row_as_torch_would_alone(name):
    recipe = recipe_of(SPECS[name])
    population = population_of(recipe)
    losses = [population.train(number) for number in range(3)]

    assert population.row_by_row is None
    for row, site in enumerate(population.sites):
        expected_P, expected = trained_by_hand(site, row, recipe, 3)
        torch.testing.assert_close(population.state["x"][row], expected_P, rtol=1e-9, atol=1e-11)
        assert [float(loss[row]) for loss in losses] == pytest.approx(expected, rel=1e-9)


def test_clipping_and_schedule_are_applied_to_each_row():
    recipe = recipe_of(OptimizerSpec(lr=0.5, clip_norm=0.1, schedule="cosine", warmup_rounds=2, momentum=0.5))
    population = population_of(recipe)
    for number in range(4):
        population.train(number)

    for row, site in enumerate(population.sites):
        expected_P, _ = trained_by_hand(site, row, recipe, 4)
        # torch adds 1e-6 to the norm it divides by
        torch.testing.assert_close(population.state["x"][row], expected_P, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd-momentum-decay", "adam"])
def test_one_row_alone_is_its_row_among_many(name):
    together = population_of(recipe_of(SPECS[name]))
    for number in range(3):
        together.train(number)
    for row, site in enumerate(together.sites):
        alone = population_of(recipe_of(SPECS[name]), sites=[site], nodes=[row])
        for number in range(3):
            alone.train(number)
        torch.testing.assert_close(alone.state["x"][0], together.state["x"][row], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SPECS)
def test_a_row_that_does_not_train_is_not_touched(name):
    population = population_of(recipe_of(SPECS[name]))
    population.train(0)
    before = snapshot(population)
    loss_N = population.train(1, torch.tensor([True, False, True]))
    after = snapshot(population)

    assert loss_N.isnan().tolist() == [False, True, False]
    for key, tensor in before.items():
        assert torch.equal(tensor[1], after[key][1]), key
        assert not torch.equal(tensor[0], after[key][0]), key
    whole = population_of(recipe_of(SPECS[name]))
    whole.train(0)
    whole.train(1)
    torch.testing.assert_close(whole.state["x"][[0, 2]], population.state["x"][[0, 2]], rtol=1e-12, atol=1e-13)


def test_rows_without_data_stay_and_the_others_train_as_ever():
    mixed = population_of(sites=sites_of([7, None, 30]))
    start_P = mixed.state["x"][1].clone()
    loss_N = mixed.train(0)
    alone = population_of(sites=[mixed.sites[2]], nodes=[2])
    alone.train(0)

    assert loss_N.isnan().tolist() == [False, True, False]
    assert torch.equal(mixed.state["x"][1], start_P)
    torch.testing.assert_close(mixed.state["x"][2], alone.state["x"][0], rtol=1e-12, atol=1e-13)
    assert mixed.train(1, torch.tensor([False, True, False])).isnan().all()


def test_nothing_to_train_is_nothing_done():
    idle = population_of(recipe_of(local_steps=0))
    before = snapshot(idle)

    assert idle.train(0).isnan().all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in idle.tensors().items())
    averaging = population_of(sites=sites_of(), loss=None)
    assert not averaging.trains
    assert averaging.row_by_row is None
    assert averaging.buffers == {}
    assert averaging.train(0).isnan().all()


@pytest.mark.parametrize("repeats_rows", [False, True])
def test_a_site_smaller_than_a_batch_trains_on_all_of_its_rows(repeats_rows):
    recipe = recipe_of(batch_size=16, repeats_rows=repeats_rows)
    population = population_of(recipe)
    population.train(0)

    torch.testing.assert_close(population.state["x"][0], trained_by_hand(population.sites[0], 0, recipe, 1)[0], rtol=1e-9, atol=1e-11)


def test_a_weighted_row_descends_its_scaled_loss_and_reports_the_loss_itself():
    recipe = recipe_of()
    population = population_of(recipe, loss_scale=[0.5, 2.0, 1.0])
    loss_N = population.train(0)

    for row, scale in enumerate([0.5, 2.0, 1.0]):
        expected_P, losses = trained_by_hand(population.sites[row], row, recipe, 1, scale=scale)
        torch.testing.assert_close(population.state["x"][row], expected_P, rtol=1e-9, atol=1e-11)
        assert float(loss_N[row]) == pytest.approx(losses[0], rel=1e-9)


def test_sites_start_from_their_own_vectors_where_they_have_them():
    size = Layout.of(mlp()).size
    sites = sites_of()
    sites[1] = replace(sites[1], start=torch.arange(float(size)))
    population = population_of(sites=sites)

    assert torch.equal(population.state["x"][1], torch.arange(float(size), dtype=torch.float64))
    assert torch.equal(population.state["x"][0], population.state["x"][2])
    with pytest.raises(ValueError, match=r"site n1: start has shape \(3,\), the model has 26 parameters"):
        population_of(sites=[sites[0], replace(sites[1], start=torch.ones(3))])


def test_class_numbers_stay_whole_numbers():
    sites = [
        Site(name=f"n{i}", train=(torch.randn(8, 3), torch.randint(0, 2, (8,))), test=(torch.randn(4, 3), torch.randint(0, 2, (4,))))
        for i in range(2)
    ]
    task = Task(name="classes", model=lambda: nn.Linear(3, 2), loss=F.cross_entropy, metrics={}, sites=sites)
    population = Population(task, sites, [0, 1], build_model(task, torch.float64, 0), recipe_of())

    assert population.train(0).isfinite().all()


def test_a_model_with_batch_norm_keeps_its_statistics_at_each_row_over_rounds_and_checkpoints():
    def make_model():
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    population = population_of(make_model=make_model)
    population.train(0)
    assert population.row_by_row == "the model changes its buffers while it trains (1.running_mean); they stay at each node"
    assert population.buffers["1.num_batches_tracked"].tolist() == [3, 3, 3]
    assert len({tuple(row) for row in population.buffers["1.running_mean"].tolist()}) == 3
    resumed = population_of(make_model=make_model)
    resumed.restore(snapshot(population))
    population.train(1, torch.tensor([True, False, True]))
    resumed.train(1, torch.tensor([True, False, True]))

    assert population.buffers["1.num_batches_tracked"].tolist() == [6, 3, 6]
    assert all(torch.equal(tensor, resumed.tensors()[key]) for key, tensor in population.tensors().items())
    assert population.evaluate() == resumed.evaluate()


@pytest.mark.parametrize("name", SPECS)
def test_what_a_population_holds_brings_back_another_exactly(name):
    recipe = recipe_of(SPECS[name])
    population = population_of(recipe)
    population.train(0)
    saved = snapshot(population)
    population.train(1)
    resumed = population_of(recipe)
    resumed.restore(saved)
    resumed.train(1)

    assert {key.split("/")[0] for key in saved} == ({"state", "optimizer"} if recipe.optimizer.state_names() else {"state"})
    assert all(torch.equal(tensor, resumed.tensors()[key]) for key, tensor in population.tensors().items())


@pytest.mark.parametrize("make_model", [mlp, lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))])
@pytest.mark.parametrize("name", ["sgd-momentum-decay", "adam"])
def test_a_row_that_leaves_the_numbers_stays_where_it_was(name, make_model):
    """Targets of 1e300 square to infinity: gradients are infinite, and what follows is not a number."""
    sites = sites_of()
    sites[1] = replace(sites[1], train=(sites[1].train[0].double(), torch.full((30, 1), 1e300, dtype=torch.float64)))
    sites = [replace(site, train=(site.train[0].double(), site.train[1].double())) for site in sites]
    population = population_of(recipe_of(SPECS[name]), sites=sites, make_model=make_model)
    before = snapshot(population)
    loss_N = population.train(0)

    assert population.diverged == ("n1",)
    assert loss_N.isfinite().tolist() == [True, False, True]
    for key, tensor in population.tensors().items():
        assert torch.equal(tensor[1], before[key][1]), key
        assert not torch.equal(tensor[0], before[key][0]), key
    assert population.train(1, torch.tensor([True, False, True])).isfinite().tolist() == [True, False, True]
    assert population.diverged == ()


def test_a_row_whose_algorithm_leaves_the_numbers_stays_where_it_was():
    """The trained x is finite; what gradient-tracking adds to y is not."""
    algorithm = ALGORITHMS["gradient-tracking"]()
    population = population_of(replace(recipe_of(SPECS["sgd"]), algorithm=algorithm))
    population.state["gradient"][1] = -torch.finfo(population.layout.dtype).max
    population.state["y"][1] = torch.finfo(population.layout.dtype).max
    before = snapshot(population)
    population.train(0)

    assert population.diverged == ("n1",)
    for key, tensor in population.tensors().items():
        assert torch.equal(tensor[1], before[key][1]), key


# ---- what an algorithm may do to it


@dataclass(frozen=True)
class Doubled(DPSGD):
    """Gradients at 2 x, given to the optimiser negated: an algorithm that uses all its rights."""

    def correct(self, state, gradient_NP, ctx):
        return -gradient_NP

    def estimate(self, state):
        return 2 * state["x"]

    def adapt(self, state, trained_NP, ctx):
        return {**state, "x": trained_NP + ctx.round}


def test_gradients_are_taken_at_the_estimate_and_corrected_before_the_step():
    recipe = recipe_of(local_steps=1, algorithm=Doubled())
    population = population_of(recipe)
    x_NP = population.state["x"].clone()
    population.train(2)

    for row, site in enumerate(population.sites):
        model = mlp().double()
        load_parameters(model, 2 * x_NP[row])
        batch = batch_positions(SEED, torch.tensor([row]), torch.tensor([SIZES[row]]), 2, 1, 4)[0, 0]
        F.mse_loss(model(site.train[0].double()[batch]), site.train[1].double()[batch]).backward()
        gradient_P = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(population.state["x"][row], x_NP[row] + 0.1 * gradient_P + 2, rtol=1e-9, atol=1e-11)


def test_a_merge_leaves_rows_that_are_not_active_as_they_are():
    population = population_of()
    population.train(0)
    before = population.state["x"].clone()
    sent = population.outgoing(0, 0, local_steps=3)

    def slot(channel, k, rows):
        index = torch.tensor([1, 2, 0]) if rows is None else torch.tensor([1, 2, 0])[rows]
        return sent[channel][index]

    inbox = Inbox(
        channels=DPSGD.channels,
        sent=sent,
        weights_NK=torch.full((3, 1), 0.5, dtype=torch.float64),
        present_NK=torch.ones(3, 1, dtype=torch.bool),
        slot=slot,
    )
    population.merge(0, 0, inbox, local_steps=3, active_N=torch.tensor([True, False, True]))

    assert torch.equal(population.state["x"][1], before[1])
    torch.testing.assert_close(population.state["x"][0], (before[0] + before[1]) / 2)
    torch.testing.assert_close(population.state["x"][2], (before[2] + before[0]) / 2)


# ---- evaluation


def test_metrics_are_each_rows_model_on_its_own_sites_test_rows():
    sites = sites_of()
    sites[2] = replace(sites[2], test=None)
    population = population_of(sites=sites)
    population.train(0)
    found = population.evaluate()

    assert found[2] == {}
    for row in (0, 1):
        model = mlp().double()
        load_parameters(model, population.state["x"][row])
        with torch.no_grad():
            expected = F.mse_loss(model(sites[row].test[0].double()), sites[row].test[1].double())
        assert found[row]["mse"] == pytest.approx(expected.item(), rel=1e-6)


def test_sites_of_any_sizes_are_evaluated_as_each_is_alone(monkeypatch):
    """Also where not all with as many test rows are evaluated together."""
    sites = [replace(site, test=tuple(rows[:keep] for rows in site.test)) for site, keep in zip(sites_of(), (4, 4, 3), strict=True)]
    population = population_of(sites=sites)
    population.train(0)
    alone = [population.metrics(population.estimate()[row], site, row) for row, site in enumerate(sites)]

    assert [found["mse"] for found in population.evaluate()] == pytest.approx([figures["mse"] for figures in alone], rel=1e-12)
    monkeypatch.setattr("p2pfl.training.evaluation.CACHE_BYTES", 1)
    assert [found["mse"] for found in population.evaluate([2, 0])] == pytest.approx([alone[2]["mse"], alone[0]["mse"]], rel=1e-12)


def test_the_given_model_is_never_changed():
    task = task_of(sites_of())
    model = build_model(task, torch.float64, SEED)
    before = parameters_of(model)
    population = Population(task, sites_of(), range(3), model, recipe_of())
    population.train(0)
    population.evaluate()

    assert torch.equal(parameters_of(model), before)


@pytest.mark.no_cover
def test_weighting_by_samples_moves_the_fixed_point_to_the_sample_weighted_one():
    """f_i = a_i (x - b_i)**2 / 2 scaled by n m_i / M on a complete graph: sum m_i a_i b_i / sum m_i a_i."""
    curvatures, minima, samples = [0.5, 1.0, 2.0], [0.0, 1.0, 5.0], [10, 20, 70]

    def site(i):
        root = torch.full((samples[i], 1), math.sqrt(curvatures[i]), dtype=torch.float64)
        return Site(name=f"n{i}", train=(root, root * minima[i]), test=None)

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1))

        def forward(self, scale: Tensor) -> Tensor:
            return scale * self.x

    def half_square(outputs, targets):
        return (outputs - targets).square().mean() / 2

    def limit(loss_scale):
        recipe = recipe_of(OptimizerSpec(lr=0.1), local_steps=1, batch_size=1, rounds=400)
        population = population_of(recipe, sites=[site(i) for i in range(3)], make_model=Scalar, loss=half_square, loss_scale=loss_scale)
        for number in range(400):
            population.train(number)
            population.replace_state({"x": population.state["x"].mean(dim=0, keepdim=True).expand(3, -1).clone()})
        return population.state["x"][0].item()

    weighted = sum(m * a * b for m, a, b in zip(samples, curvatures, minima, strict=True)) / sum(
        m * a for m, a in zip(samples, curvatures, strict=True)
    )
    uniform = sum(a * b for a, b in zip(curvatures, minima, strict=True)) / sum(curvatures)

    assert limit([3 * m / 100 for m in samples]) == pytest.approx(weighted, rel=1e-9)
    assert limit(None) == pytest.approx(uniform, rel=1e-9)
    assert abs(weighted - uniform) > 0.5
