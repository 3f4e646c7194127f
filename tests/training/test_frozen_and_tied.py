"""Frozen parameters stay as they are, and tied ones train as in torch, whatever computes the gradients."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, load_model
from test_training import SPECS, by_torch, population_of, recipe_of, sites_of, task_of
from torch import nn
from torch.nn import functional as F

import p2pfl
from p2pfl.algorithms import GradientTracking
from p2pfl.draws import batch_positions
from p2pfl.errors import ConfigError, TaskError
from p2pfl.params import Layout, parameters_of
from p2pfl.tasks import Site, Task
from p2pfl.training import build_model


class Head(nn.Module):
    """A backbone before a head."""

    def __init__(self, freeze="", *, normalised=False):
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()
        self.freeze = freeze
        self.backbone.requires_grad_(freeze != "backbone")
        if freeze == "bias":
            self.backbone.bias.requires_grad_(False)

    def forward(self, x):
        with torch.set_grad_enabled(self.freeze != "no_grad" and torch.is_grad_enabled()):
            features = torch.relu(self.norm(self.backbone(x)))
        return self.head(features)


class Spare(nn.Module):
    """A chain with a layer beside it that no input passes."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        return self.used(x)


class Chain(nn.Module):
    def __init__(self, share, *, drops=False):
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.one if share == "module" else nn.Linear(3, 3)
        if share == "parameter":
            self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3) if drops else nn.Identity()
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.norm(torch.relu(self.two(torch.relu(self.one(x))))))


def sequential(share):
    chain = Chain(share)
    return nn.Sequential(chain.one, nn.ReLU(), chain.two, nn.ReLU(), chain.out)


MODELS = {
    "backbone": lambda: Head("backbone"),
    "bias": lambda: Head("bias"),
    "no_grad": lambda: Head("no_grad"),
    "backbone, row by row": lambda: Head("backbone", normalised=True),
    "no_grad, row by row": lambda: Head("no_grad", normalised=True),
    "spare": Spare,
    "tied parameter": lambda: Chain("parameter"),
    "tied module": lambda: Chain("module"),
    "tied parameter, sequential": lambda: sequential("parameter"),
    "tied module, sequential": lambda: sequential("module"),
    "tied module, row by row": lambda: Chain("module", drops=True),
    "tied parameter, row by row": lambda: Chain("parameter", drops=True),
}


def trained_by_torch(site, node, recipe, rounds, make_model):
    """The whole model in a plain loop with torch's own optimiser over all its parameters."""
    model = build_model(task_of([site], make_model), torch.float64, recipe.seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = by_torch(recipe.optimizer, model.parameters())
    inputs, targets = (tensor.double() for tensor in site.train)
    for number in range(rounds):
        optimizer.param_groups[0]["lr"] = recipe.optimizer.lr_at(number, recipe.rounds)
        which = torch.tensor([node]), torch.tensor([len(inputs)]), number * recipe.local_steps, recipe.local_steps
        for batch in batch_positions(recipe.seed, *which, recipe.batch_size)[0]:
            optimizer.zero_grad()
            F.mse_loss(model(inputs[batch]), targets[batch]).backward()
            if recipe.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
            optimizer.step()
    return model, start


@pytest.mark.no_cover
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("spec", SPECS)
def test_training_is_torchs_with_weight_decay_and_momentum(spec, make_model):
    recipe = recipe_of(SPECS[spec])
    sites = [site for site in sites_of() if site.train is not None]
    population = population_of(recipe, sites=sites, make_model=make_model)
    for number in range(3):
        population.train(number)

    for row, site in enumerate(sites):
        expected, _ = trained_by_torch(site, row, recipe, 3, make_model)
        torch.testing.assert_close(population.state["x"][row], parameters_of(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("numba")
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_plain_steps_with_decay_are_torchs(make_model):
    recipe = recipe_of(p2pfl.training.OptimizerSpec(lr=0.1, weight_decay=0.1))
    sites = [site for site in sites_of() if site.train is not None]
    population = population_of(recipe, sites=sites, make_model=make_model)
    population.compile()
    for number in range(3):
        population.train(number, in_place=True)

    for row, site in enumerate(sites):
        expected, start = trained_by_torch(site, row, recipe, 3, make_model)
        torch.testing.assert_close(population.state["x"][row], parameters_of(expected), rtol=1e-12, atol=1e-12)
        if make_model is MODELS["no_grad"]:
            assert torch.equal(Layout.of(expected).views(population.state["x"][row])["backbone.weight"], start["backbone.weight"])


def test_a_frozen_parameter_is_in_no_vector_and_in_the_digest():
    whole, frozen = Layout.of(Head()), Layout.of(Head("backbone"))

    assert [spec.name for spec in frozen.tensors] == ["head.weight", "head.bias"]
    assert [spec.name for spec in frozen.frozen] == ["backbone.weight", "backbone.bias"]
    assert frozen.size == 9
    assert frozen.digest != Layout(tensors=frozen.tensors).digest
    # names, shapes and dtypes as JSON, as before there were frozen parameters
    canonical = json.dumps([[s.name, list(s.shape), s.dtype] for s in whole.tensors], separators=(",", ":"))
    assert whole.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert (
        json.dumps(whole.table()[0]) == '{"name": "backbone.weight", "shape": [8, 3], "dtype": "float32", "trains": true, "travels": true}'
    )


def test_other_frozen_values_are_another_layout():
    torch.manual_seed(0)
    one, other = Head("backbone"), Head("backbone")

    assert Layout.of(one).digest == Layout.of(other).digest
    assert Layout.of(one, with_values=True).digest != Layout.of(other, with_values=True).digest


def run_task(make_model):
    sites = []
    draw = torch.Generator().manual_seed(0)
    for name in ("basel", "bern", "zurich"):
        x = torch.randn(20, 3, generator=draw)
        y = x.sum(1, keepdim=True)
        sites.append(Site(name=name, train=(x[5:], y[5:]), test=(x[:5], y[:5])))
    return Task(name="run", model=make_model, loss=F.mse_loss, metrics={"mse": lambda o, t: float(F.mse_loss(o, t))}, sites=sites)


@pytest.fixture
def task_named(monkeypatch):
    def named(make_model):
        from p2pfl.tasks import TASKS

        monkeypatch.setitem(TASKS, "frozen-or-tied", lambda: run_task(make_model))
        return "frozen-or-tied"

    return named


def experiment_of(name, **changes):
    base = {"task": {"name": name}, "rounds": 2, "stop": None, "baselines": [], "optimizer": {"lr": 0.1, "weight_decay": 0.1}}
    return {**base, "topology": {"name": "complete"}, "algorithm": {"batch_size": 4}, **changes}


@pytest.mark.parametrize("kind", ["backbone", "backbone, row by row", "tied module", "tied parameter, sequential"])
def test_a_run_gives_back_the_whole_model(task_named, tmp_path, kind):
    run = p2pfl.simulate(experiment_of(task_named(MODELS[kind])), out=tmp_path / "run")
    start = build_model(run_task(MODELS[kind]), torch.float32, 0)
    loaded = p2pfl.load(run, "bern")
    by_file = MODELS[kind]()
    missing, unexpected = load_model(by_file, tmp_path / "run" / "models" / "bern.safetensors", strict=False)

    assert not missing
    assert not unexpected
    for (name, before), after, again in zip(start.named_parameters(), loaded.parameters(), by_file.parameters(), strict=True):
        assert torch.equal(after, again)
        assert torch.equal(before, after) != before.requires_grad, name
        assert after.requires_grad == before.requires_grad
    assert set(load_file(tmp_path / "run" / "models" / "bern.safetensors")) >= {name for name, _ in start.named_parameters()}


def test_a_model_with_nothing_to_learn_is_refused(task_named, tmp_path):
    def nothing():
        return Head().requires_grad_(False)

    with pytest.raises(TaskError, match="none of the model's parameters requires a gradient: there is nothing to learn"):
        build_model(run_task(nothing), torch.float32, 0)
    with pytest.raises(ConfigError, match="nothing to learn"):
        p2pfl.simulate(experiment_of(task_named(nothing)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tracking_leaves_an_unused_parameter_alone():
    population = population_of(recipe_of(algorithm=GradientTracking()), make_model=Spare)
    before = population.state["x"].clone()
    population.train(0)

    spare = Layout.of(Spare()).views(population.state["y"])["spare.weight"]
    assert torch.equal(spare, torch.zeros_like(spare))
    assert torch.equal(Layout.of(Spare()).views(before)["spare.weight"], Layout.of(Spare()).views(population.state["x"])["spare.weight"])
