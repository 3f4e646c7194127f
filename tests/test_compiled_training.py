"""Training in compiled loops gives what torch gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.records import RunFolder
from p2pfl.simulator import compiling, engine
from p2pfl.simulator.engine import Simulation
from p2pfl.training.batched import Batched
from p2pfl.training.compiled import Compiled
from p2pfl.training.layers import Descent
from runs import plan_of
from thorough import first_fast

pytest.importorskip("numba")


def classes(count):
    return torch.randint(0, 3, (count,)), F.cross_entropy


def events(count):
    return (torch.rand(count, 3) > 0.5).float(), F.binary_cross_entropy_with_logits


def amounts(count):
    return torch.randn(count, 3), F.mse_loss


MODELS = {
    "one layer": lambda: nn.Linear(7, 3),
    "no bias": lambda: nn.Linear(7, 3, bias=False),
    "wide": lambda: nn.Sequential(nn.Linear(7, 300), nn.ReLU(), nn.Linear(300, 3)),
    "deep": lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 6, bias=False), nn.Linear(6, 3)),
    "sigmoid at the end": lambda: nn.Sequential(nn.Linear(7, 3), nn.Sigmoid()),
}


def both(model, targets, loss, dtype=torch.float32):
    """The chain in torch and in compiled loops, with its examples."""
    count = len(targets)
    inputs = torch.randn(count, 7, dtype=dtype)
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    model = model.to(dtype)
    outputs = loss(model(inputs), targets)
    gradient_P = torch.cat([part.reshape(-1) for part in torch.autograd.grad(outputs, list(model.parameters()))])
    batched = Batched.of(model, loss, (inputs, targets), (gradient_P, outputs.detach()))
    x_1P = torch.cat([part.detach().reshape(-1) for part in model.parameters()]).unsqueeze(0)
    return batched, Compiled.of(batched, x_1P, inputs, targets), x_1P, inputs, targets


@pytest.mark.parametrize("dtype", first_fast([torch.float32, torch.float64]))
@pytest.mark.parametrize("kind", [classes, events, amounts])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_torch(name, kind, dtype):
    torch.manual_seed(0)
    batched, compiled, x_1P, inputs, targets = both(MODELS[name](), *kind(40), dtype)
    assert compiled is not None
    rows, decay, lr, scale_C = 5, 0.01, 0.2, torch.tensor([0.5, 1, 1.5, 2, 0], dtype=dtype)
    positions = torch.randint(0, 40, (rows, 3, 8))
    expected = x_1P.repeat(rows, 1) + 0.1 * torch.randn(rows, x_1P.shape[1], dtype=dtype)
    found = expected.clone()
    losses = torch.zeros(rows, dtype=dtype)
    for step in positions.unbind(1):
        losses += batched.run(expected, inputs[step], targets[step], Descent(expected, lr, decay), scale_C) / 3
    loss_C, finite_C = compiled.descend(found, positions, lr, decay, scale_C)

    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(loss_C, losses, **tolerance)
    assert finite_C.all()


def test_a_row_that_leaves_the_finite_numbers_is_as_it_was_and_the_others_go_on():
    torch.manual_seed(0)
    _, compiled, x_1P, _, _ = both(MODELS["wide"](), *classes(40))
    x_CP = x_1P.repeat(3, 1)
    x_CP[1] = 3e38
    before = x_CP.clone()
    _, finite_C = compiled.descend(x_CP, torch.randint(0, 40, (3, 4, 8)), 0.1, 0.0, None)

    assert finite_C.tolist() == [True, False, True]
    assert torch.equal(x_CP[1], before[1])
    assert not torch.equal(x_CP[0], before[0])


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)), nn.Sequential(nn.ReLU(), nn.Linear(7, 3))],
    ids=["layer norm", "activation first"],
)
def test_what_is_not_compiled_is_left_to_torch(model):
    batched, compiled, *_ = both(model, *classes(10))

    assert batched is not None
    assert compiled is None


def test_a_loss_of_the_users_own_is_left_to_torch():
    targets, _ = classes(10)
    assert both(nn.Linear(7, 3), targets, lambda outputs, wanted: F.cross_entropy(outputs, wanted) * 2)[1] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_is_the_same_with_and_without(threads, tmp_path, monkeypatch):
    settings = {
        "task": {"name": "synthetic-logistic", "features": 6, "heterogeneity": 1.0},
        "nodes": 12,
        "topology": {"name": "random-regular", "degree": 4},
        "algorithm": {"name": "dpsgd", "local_steps": 3, "batch_size": 8},
        "optimizer": {"name": "sgd", "lr": 0.2, "weight_decay": 0.01},
        "weighting": "samples",
        "rounds": 20,
    }
    plan = plan_of(settings)
    rounds = {}
    for name, worth in (("torch", 10**30), ("compiled", 0)):
        monkeypatch.setattr(compiling, "_WORTH", worth)
        monkeypatch.setattr(compiling, "_LARGE", worth)
        simulation = Simulation(plan, RunFolder.create(tmp_path / name, {}), threads=threads)
        assert simulation.population.is_compiled is (name == "compiled")
        rounds[name] = []
        for _ in range(20):
            row = simulation.step()
            rounds[name].append((copy.deepcopy(simulation.population.state["x"]), row["disagreement"], row["loss"]))
    for (x_NP, disagreement, loss), (expected_NP, expected, expected_loss) in zip(rounds["compiled"], rounds["torch"], strict=True):
        torch.testing.assert_close(x_NP, expected_NP, rtol=0, atol=1e-6)
        assert disagreement == pytest.approx(expected, rel=1e-4)
        assert loss == pytest.approx(expected_loss, abs=1e-6)


def test_a_short_run_loads_nothing():
    plan = plan_of({"task": {"name": "synthetic-logistic"}, "nodes": 4, "rounds": 2})

    assert not engine.training_is_worth_it(plan)
    assert not compiling.mixing_is_worth_it(plan)
