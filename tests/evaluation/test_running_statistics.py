"""The mean model has running statistics of its own: computed again here by torch, never a node's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from p2pfl.evaluation.mean_model import mean_model_of
from p2pfl.evaluation.results import Run, read_buffers
from p2pfl.evaluation.subgroups import subgroups
from p2pfl.experiment.plan import Plan, make_plan
from p2pfl.params import load_parameters
from p2pfl.tasks import auroc
from p2pfl.training.running_statistics import recalibrated
from simulations import LOGISTIC, plan_of, run_of


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


@pytest.fixture(scope="module")
def plan():
    """Four sites whose inputs lie apart, so that no node's statistics are those of all."""
    made = plan_of({**LOGISTIC, "task": {**LOGISTIC["task"], "samples": 60}, "rounds": 4})
    sites = {}
    for place, (name, site) in enumerate(made.sites.items()):
        moved = [(inputs + 3 * place, targets) for inputs, targets in (site.train, site.test)]
        sites[name] = replace(site, train=moved[0], test=moved[1], groups={"half": [row % 2 for row in range(len(moved[1][0]))]})
    task = replace(made.task, model=normed, sites=list(sites.values()), metrics={"auroc": auroc}, losses=frozenset())
    return make_plan(made.experiment, task)


@pytest.fixture(scope="module")
def run(plan, tmp_path_factory):
    return run_of(plan, tmp_path_factory.mktemp("normed") / "run")


def expected_model(plan: Plan, run: Run) -> nn.Module:
    """The mean of the saved models, with the moments of the first layer's outputs on all training rows."""
    model = normed()
    load_parameters(model, torch.stack(list(run.models.values())).mean(dim=0))
    inputs = torch.cat([site.train[0] for site in plan.sites.values()])
    with torch.no_grad():
        features = model[0](inputs)
    model[1].running_mean.copy_(features.mean(dim=0))
    model[1].running_var.copy_(features.var(dim=0))
    return model.eval()


def test_the_summary_measures_the_mean_model_with_its_own_statistics(plan, run):
    inputs, targets = (torch.cat([site.test[part] for site in plan.sites.values()]) for part in (0, 1))
    model = expected_model(plan, run)
    with torch.no_grad():
        right = auroc(model(inputs), targets)
        model.load_state_dict(read_buffers(run.path, plan.names[0]), strict=False)
        with_the_first_nodes = auroc(model(inputs), targets)

    assert run.summary["mean_model"]["auroc"] == pytest.approx(right, abs=1e-3)
    assert abs(with_the_first_nodes - right) > 0.01
    assert "mean_model_reason" not in run.summary


def test_statistics_are_the_moments_of_all_training_rows(plan, run):
    saved = [read_buffers(run.path, name) for name in plan.names]
    buffers = {name: torch.stack([own[name] for own in saved]) for name in saved[0]}
    mean = mean_model_of(plan, torch.stack(list(run.models.values())), buffers)
    model = expected_model(plan, run)

    torch.testing.assert_close(mean.buffers["1.running_mean"], model[1].running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.buffers["1.running_var"], model[1].running_var, rtol=1e-5, atol=1e-5)
    assert plan.model[1].running_mean.tolist() == [0.0] * 4


def test_figures_of_all_sites_together_are_of_the_same_mean_model(plan, run):
    population = plan.population(plan.names)
    saved = [read_buffers(run.path, name) for name in plan.names]
    population.take_buffers({name: torch.stack([own[name] for own in saved]) for name in saved[0]})
    x_NP = torch.stack(list(run.models.values()))
    [row] = [r for r in subgroups(plan, population, x_NP, plan.names) if r["site"] is None and r["group"] == "0"]
    model, sites = expected_model(plan, run), plan.sites.values()
    with torch.no_grad():
        logits = torch.cat([model(site.test[0][::2]) for site in sites])

    assert row["auroc"] == pytest.approx(auroc(logits, torch.cat([site.test[1][::2] for site in sites])), abs=1e-3)


def test_without_all_nodes_rows_there_is_no_mean_model_and_the_reason_is_said(plan, run):
    partly = replace(plan, sites={name: plan.sites[name] for name in plan.names[:2]})
    buffers = {"1.running_mean": torch.randn(4, 4)}

    assert mean_model_of(partly, torch.zeros(4, plan.layout.size), buffers) == (
        "its running statistics need all nodes' training rows, which are not here"
    )


class Counts(nn.Linear):
    """Keeps a statistic of its own."""

    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("seen", torch.zeros(()))


def test_a_buffer_that_nobody_can_compute_leaves_no_mean_model(plan):
    found = recalibrated(plan.task, Counts(), torch.zeros(4), {"seen": torch.arange(4.0)}, torch.zeros(5, 3), 0)

    assert found == "buffer seen differs from node to node, and nobody knows how the mean model would have it"


def test_what_is_the_same_at_every_node_and_what_a_task_keeps_fixed_stays(plan):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[1].running_mean.fill_(2.0)
    size = sum(p.numel() for p in model.parameters())
    same = {name: buffer.expand(4, *buffer.shape) for name, buffer in model.named_buffers()}
    fixed = recalibrated(plan.task, model, torch.zeros(size), same, torch.randn(40, 3), 0)
    alike = recalibrated(plan.task, Counts(), torch.zeros(4), {"seen": torch.full((4,), 7.0)}, torch.zeros(5, 3), 0)

    assert fixed["1.running_mean"].tolist() == [2.0] * 4
    assert alike["seen"] == 7.0


def test_many_rows_are_seen_in_batches_and_the_same_way_again(plan):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    size = sum(p.numel() for p in model.parameters())
    x_P, inputs = torch.randn(size, generator=torch.Generator().manual_seed(1)), torch.randn(2000, 3).sort(dim=0).values
    moved = {name: buffer.expand(4, *buffer.shape) + 1 for name, buffer in model.named_buffers()}
    found = [recalibrated(plan.task, model, x_P, moved, inputs, 0) for _ in range(2)]
    load_parameters(model, x_P)
    with torch.no_grad():
        features = model[0](inputs)

    assert found[0]["1.num_batches_tracked"] == 8
    assert torch.equal(found[0]["1.running_var"], found[1]["1.running_var"])
    torch.testing.assert_close(found[0]["1.running_mean"], features.mean(dim=0), rtol=1e-4, atol=1e-4)
    # a batch of 250 rows drawn from all lacks some 1/250 of the variance of its mean, which its own n - 1 makes up for
    torch.testing.assert_close(found[0]["1.running_var"], features.var(dim=0), rtol=0.02, atol=0)
