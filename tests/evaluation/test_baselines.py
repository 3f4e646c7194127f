"""What a network is measured against is torch alone on the same rows with the same number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.algorithms import DPSGD
from p2pfl.draws import batch_positions
from p2pfl.evaluation import baselines
from p2pfl.evaluation.baselines import pooled_baseline, trained_alone
from p2pfl.tasks import Site, Task
from p2pfl.training import OptimizerSpec, Population, Recipe, build_model
from simulations import LOGISTIC, plan_of, run_of
from thorough import first_fast

POOLED_NODE = 2**32 - 1
SIZES = [5, 9]


def rows(size, generator):
    return torch.randn(size, 2, generator=generator), torch.randn(size, 1, generator=generator)


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    sites = [Site(name=f"n{i}", train=rows(size, generator), test=rows(3, generator)) for i, size in enumerate(SIZES)]
    metrics = {"mse": lambda outputs, targets: float(F.mse_loss(outputs, targets))}
    return Task(name="test", model=lambda: nn.Linear(2, 1), loss=F.mse_loss, metrics=metrics, sites=sites)


RECIPE = Recipe(algorithm=DPSGD(), optimizer=OptimizerSpec(lr=0.1, momentum=0.5), batch_size=4, rounds=3, local_steps=2, seed=6)


def by_torch(task, train, node):
    """A model trained by torch alone for all rounds' steps."""
    model = build_model(task, torch.float64, RECIPE.seed)
    inputs, targets = train[0].double(), train[1].double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for batch in batch_positions(RECIPE.seed, torch.tensor([node]), torch.tensor([len(inputs)]), 0, 6, 4)[0]:
        optimizer.zero_grad()
        F.mse_loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return model


def mse(model, rows):
    with torch.no_grad():
        return F.mse_loss(model(rows[0].double()), rows[1].double()).item()


def test_alone_means_each_sites_own_rows_and_as_many_steps(task):
    found = trained_alone(task, task.sites, [0, 1], build_model(task, torch.float64, RECIPE.seed), RECIPE).evaluate()

    # the metric is computed against float32 targets
    assert [metrics["mse"] for metrics in found] == pytest.approx(
        [mse(by_torch(task, site.train, node), site.test) for node, site in enumerate(task.sites)], rel=1e-6
    )


def test_alone_starts_as_the_networks_node_does(task):
    """One population trained without an exchange: the same model, start, batches."""
    model = build_model(task, torch.float64, RECIPE.seed)
    population = Population(task, task.sites, [0, 1], model, RECIPE)
    for number in range(RECIPE.rounds):
        population.train(number)

    assert trained_alone(task, task.sites, [0, 1], model, RECIPE).evaluate() == population.evaluate()
    one = trained_alone(task, task.sites[1:], [1], model, RECIPE).evaluate()[0]["mse"]
    assert one == pytest.approx(population.evaluate()[1]["mse"], rel=1e-9)


def test_pooled_means_all_rows_in_one_place_measured_at_each_site(task):
    found = pooled_baseline(task, task.sites, build_model(task, torch.float64, RECIPE.seed), RECIPE)
    everything = tuple(torch.cat([site.train[part] for site in task.sites]) for part in (0, 1))
    model = by_torch(task, everything, POOLED_NODE)

    assert [metrics["mse"] for metrics in found] == pytest.approx([mse(model, site.test) for site in task.sites], rel=1e-6)


def test_a_site_without_rows_adds_none_and_one_without_test_rows_is_not_measured(task):
    model = build_model(task, torch.float64, RECIPE.seed)
    sites = [task.sites[0], replace(task.sites[1], train=None, test=None)]

    assert pooled_baseline(task, sites, model, RECIPE) == [pooled_baseline(task, sites[:1], model, RECIPE)[0], {}]
    assert trained_alone(task, sites, [0, 1], model, RECIPE).evaluate()[1] == {}


def test_nobody_with_rows_leaves_the_start(task):
    model = build_model(task, torch.float64, RECIPE.seed)
    sites = [replace(site, train=None) for site in task.sites]
    start = [mse(model, site.test) for site in sites]

    assert [m["mse"] for m in pooled_baseline(task, sites, model, RECIPE)] == pytest.approx(start, rel=1e-6)
    assert [m["mse"] for m in trained_alone(task, sites, [0, 1], model, RECIPE).evaluate()] == pytest.approx(start, rel=1e-6)


def test_batch_norms_statistics_of_the_pooled_model_are_used_at_every_site(task):
    normed = replace(task, model=lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    model = build_model(normed, torch.float64, RECIPE.seed)
    found = pooled_baseline(normed, normed.sites, model, RECIPE)
    everything = tuple(torch.cat([site.train[part] for site in normed.sites]) for part in (0, 1))
    trained = by_torch(normed, everything, POOLED_NODE).eval()

    assert [metrics["mse"] for metrics in found] == pytest.approx([mse(trained, site.test) for site in normed.sites], rel=1e-6)


@pytest.mark.parametrize("name", first_fast(["push-sum", "gradient-tracking", "choco", "relaysgd", "k-gt", "extra", "diloco"], 3))
def test_baselines_are_plain_steps_whatever_the_algorithm(name):
    def plan(algorithm, weights):
        return plan_of({**LOGISTIC, "topology": {"name": "path"}, "weights": weights, "rounds": 3, "stop": None, "algorithm": algorithm})

    def both(made):
        sites = [made.sites[name] for name in made.names]
        return (
            trained_alone(made.task, sites, range(len(sites)), made.model, made.recipe).evaluate(),
            pooled_baseline(made.task, sites, made.model, made.recipe),
        )

    assert both(plan({"name": name}, "push-sum" if name == "push-sum" else "metropolis")) == both(plan({"name": "dpsgd"}, "metropolis"))


def test_momentum_that_is_reset_starts_each_round_from_nothing(tmp_path):
    heavy = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "rounds": 3, "stop": None}
    kept, reset = (
        run_of(plan_of({**LOGISTIC, **heavy, "algorithm": {"name": "dfedavgm", "keep_momentum": keep}}), tmp_path / str(keep)).models
        for keep in (True, False)
    )

    assert not any(torch.equal(kept[name], reset[name]) for name in kept)


def test_both_at_once_are_what_they_are_one_by_one(task, monkeypatch):
    model = build_model(task, torch.float64, RECIPE.seed)
    together = baselines.both_baselines(task, task.sites, [0, 1], model, RECIPE)
    monkeypatch.setattr(baselines, "_SMALL", 0)
    one_by_one = baselines.both_baselines(task, task.sites, [0, 1], model, RECIPE)

    for found, expected in zip((together[0].evaluate(range(2)), together[1]), (one_by_one[0].evaluate(), one_by_one[1]), strict=True):
        assert [m["mse"] for m in found] == pytest.approx([m["mse"] for m in expected], rel=1e-12)
