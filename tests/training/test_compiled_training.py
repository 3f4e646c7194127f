"""Training in compiled loops gives what torch gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import Network, finish
from p2pfl.compiled import loader
from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.experiment.loading import experiment_from, recorded_experiment
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.params import Layout
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import forecast, mixer, simulate
from p2pfl.simulator.engine import Simulation
from p2pfl.tasks import Site, Task
from p2pfl.training.backends.compiled import Compiled, why_not_compiled
from p2pfl.training.backends.gradients import Batched
from p2pfl.training.backends.layers import SgdStep
from p2pfl.training.backends.tracing import chain_or_fault
from simulations import plan_of
from thorough import first_fast

pytestmark = pytest.mark.usefixtures("numba")


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


def both(model, targets, loss, dtype=torch.float32, whole=None):
    """The chain in torch and in compiled loops, with its examples."""
    count = len(targets)
    inputs = torch.randn(count, 7, dtype=dtype) if whole is None else torch.randint(0, 256, (count, 7)).to(whole)
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
    assert isinstance(compiled, Compiled), compiled
    rows, decay, lr, scale_C = 5, 0.01, 0.2, torch.tensor([0.5, 1, 1.5, 2, 0], dtype=dtype)
    positions = torch.randint(0, 40, (rows, 3, 8))
    expected = x_1P.repeat(rows, 1) + 0.1 * torch.randn(rows, x_1P.shape[1], dtype=dtype)
    found = expected.clone()
    losses = torch.zeros(rows, dtype=dtype)
    for step in positions.unbind(1):
        losses += batched.run(expected, inputs[step], targets[step], SgdStep(expected, lr, decay), scale_C) / 3
    loss_C, finite_C = compiled.sgd_steps(found, positions, lr, decay, scale_C)

    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(loss_C, losses, **tolerance)
    assert finite_C.all()


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_row_that_leaves_the_finite_numbers_is_as_it_was_and_the_others_go_on(is_kept):
    torch.manual_seed(0)
    _, compiled, x_1P, _, _ = both(MODELS["wide"](), *classes(40))
    x_CP = x_1P.repeat(3, 1)
    x_CP[1] = 3e38
    before = x_CP.clone()
    _, finite_C = compiled.sgd_steps(x_CP, torch.randint(0, 40, (3, 4, 8)), 0.1, 0.0, None, before if is_kept else None)

    assert finite_C.tolist() == [True, False, True]
    assert torch.equal(x_CP[1], before[1])
    assert not torch.equal(x_CP[0], before[0])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "LayerNorm is none of them"),
        (nn.Sequential(nn.ReLU(), nn.Linear(7, 3)), "a function stands where a linear layer should"),
    ],
    ids=["layer norm", "activation first"],
)
def test_what_is_not_compiled_is_left_to_torch(model, reason):
    batched, compiled, *_ = both(model, *classes(10))

    assert batched is not None
    assert compiled == f"only chains of linear layers with ReLU, tanh or sigmoid are compiled, and {reason}"


def test_a_loss_of_the_users_own_is_left_to_torch():
    targets, _ = classes(10)
    found = both(nn.Linear(7, 3), targets, lambda outputs, wanted: F.cross_entropy(outputs, wanted) * 2)[1]
    assert found.startswith("of all losses only cross_entropy, ")


class Pixels(nn.Sequential):
    """Whole numbers from 0 to 255 that are standardised in the model."""

    def forward(self, pixels):
        inputs = (pixels.to(next(self.parameters()).dtype) / 255 - 0.1307) / 0.3081
        for layer in self:
            inputs = layer(inputs)
        return inputs


class Doubled(nn.Sequential):
    """Whole numbers that are computed with as such, which uint8 cannot hold."""

    def forward(self, pixels):
        inputs = (pixels * 2).to(next(self.parameters()).dtype)
        for layer in self:
            inputs = layer(inputs)
        return inputs


@pytest.mark.parametrize("dtype", first_fast([torch.float32, torch.float64]))
@pytest.mark.parametrize("whole", first_fast([torch.uint8, torch.int64]))
def test_whole_numbers_that_the_model_standardises_are_compiled(whole, dtype):
    torch.manual_seed(0)
    batched, compiled, x_1P, inputs, targets = both(Pixels(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), *classes(40), dtype, whole)
    assert isinstance(compiled, Compiled), compiled
    positions = torch.randint(0, 40, (4, 3, 8))
    expected, found = x_1P.repeat(4, 1), x_1P.repeat(4, 1)
    for step in positions.unbind(1):
        batched.run(expected, inputs[step], targets[step], SgdStep(expected, 0.2, 0.0), None)
    compiled.sgd_steps(found, positions, 0.2, 0.0, None)

    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)


class Prepared(nn.Module):
    """A layer behind what is done to whole numbers."""

    def __init__(self, prepare):
        super().__init__()
        self.prepare, self.layer = prepare, nn.Linear(7, 3)

    def forward(self, pixels):
        return self.layer(self.prepare(pixels))


@pytest.mark.parametrize(
    ("dtype", "prepare"),
    [
        (torch.float32, lambda pixels: (pixels.float() / 255 - 0.5) / 0.25),
        (torch.float32, lambda pixels: pixels.float().div(255).sub(0.5).mul(4).add(1)),
        (torch.float32, lambda pixels: torch.mul(torch.sub(torch.div(pixels.float(), 255), 0.5), 4)),
        (torch.float64, lambda pixels: pixels.double().div(255).sub(0.5).mul(4).add(1)),
    ],
)
def test_whole_numbers_are_compiled_where_methods_prepare_them(dtype, prepare):
    torch.manual_seed(0)
    model = Prepared(prepare)
    batched, compiled, x_1P, inputs, targets = both(model, *classes(40), dtype, torch.uint8)
    assert isinstance(compiled, Compiled), compiled
    positions = torch.randint(0, 40, (1, 3, 8))
    expected, found = x_1P.clone(), x_1P.clone()
    for step in positions[0]:
        outputs = F.cross_entropy(torch.func.functional_call(model, weights := unflat(expected), inputs[step]), targets[step])
        expected -= 0.2 * torch.cat([part.reshape(-1) for part in torch.autograd.grad(outputs, list(weights.values()))])
    compiled.sgd_steps(found, positions, 0.2, 0.0, None)

    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(batched.outputs(x_1P, inputs[None])[0], model(inputs).detach(), rtol=0, atol=1e-6)


def unflat(x_1P):
    """The parameters of Prepared."""
    weight, bias = x_1P[0].detach().clone().split([21, 3])
    return {"layer.weight": weight.view(3, 7).requires_grad_(), "layer.bias": bias.requires_grad_()}


@pytest.mark.parametrize(
    ("prepare", "step"),
    [
        (lambda pixels: pixels.float().sin(), ".sin()"),
        (lambda pixels: pixels.float().div(255, rounding_mode="floor"), ".div()"),
        (lambda pixels: torch.sub(pixels.float(), 1, alpha=2), "sub"),
        (lambda pixels: torch.exp(pixels.float()), "exp"),
        (nn.Softplus(), "prepare (Softplus)"),
    ],
)
def test_the_step_that_is_not_compiled_is_named(prepare, step):
    model = Prepared(prepare)
    reason = why_not_compiled(chain_or_fault(model, Layout.of(model).slices()), F.cross_entropy, torch.float32, [], torch.uint8)

    assert reason.startswith("only chains of linear layers with ReLU, tanh or sigmoid are compiled, and the step ")
    assert f"the step {step} is none of them" in reason


def test_whole_numbers_that_the_model_computes_with_are_left_to_torch():
    found = both(Doubled(nn.Linear(7, 3)), *classes(40), whole=torch.uint8)[1]

    assert found == "the model computes with whole numbers before it makes real ones of them"


# what an experiment asks for

LOGISTIC = {
    "name": "run",
    "task": {"name": "synthetic-logistic", "features": 6, "heterogeneity": 1.0},
    "nodes": 12,
    "topology": {"name": "random-regular", "degree": 4},
    "algorithm": {"name": "dpsgd", "local_steps": 3, "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.2, "weight_decay": 0.01},
    "weighting": "samples",
    "rounds": 20,
}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_is_the_same_with_and_without(threads, tmp_path, monkeypatch):
    rounds = {}
    monkeypatch.setattr(mixer, "WORTH", 0)
    for compiled in ("off", "on"):
        simulation = Simulation(plan_of({**LOGISTIC, "compiled": compiled}), RunFolder.create(tmp_path / compiled, {}), threads=threads)
        rounds[compiled] = []
        for _ in range(20):
            row = simulation.step()
            rounds[compiled].append((copy.deepcopy(simulation.population.state["x"]), row.disagreement, row.loss))
        assert simulation.population.is_compiled is (compiled == "on")
    for (x_NP, disagreement, loss), (expected_NP, expected, expected_loss) in zip(rounds["on"], rounds["off"], strict=True):
        torch.testing.assert_close(x_NP, expected_NP, rtol=0, atol=1e-6)
        assert disagreement == pytest.approx(expected, rel=1e-4)
        assert loss == pytest.approx(expected_loss, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_three_hundred_rounds_with_relu_are_as_far_apart_as_documented(dtype, tmp_path):
    """docs/performance.md says 6e-15 and 4.6e-5; a processor may round otherwise."""
    found = []
    for compiled in ("off", "on"):
        settings = {"task": {"name": "digits", "hidden": 8}, "nodes": 3, "optimizer": {"lr": 0.1}, "rounds": 300, "dtype": dtype}
        population = plan_of({**settings, "algorithm": {"batch_size": 8, "local_steps": 2}, "compiled": compiled}).population(
            ["node-0", "node-1", "node-2"]
        )
        for number in range(300):
            population.train(number, in_place=True)
        found.append(population.state["x"])

    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0, atol=1e-9 if dtype == "float64" else 1e-2)


@pytest.mark.parametrize("rounds", [1, 10**6])
@pytest.mark.parametrize("asked", ["auto", True, "on"])
def test_auto_is_on_where_model_and_rows_qualify_however_short_the_run(asked, rounds):
    plan = plan_of({**LOGISTIC, "compiled": asked, "rounds": rounds})

    assert plan.experiment.compiled == "on"
    assert plan.recipe.compiled
    assert plan.experiment.as_dict()["compiled"] == "on"


def test_the_answer_stands_in_the_runs_experiment_and_in_its_summary(tmp_path):
    for compiled, answer in (("auto", "on"), (False, "off")):
        run = simulate({**LOGISTIC, "compiled": compiled, "rounds": 2, "stop": None, "baselines": []}, out=tmp_path / answer)

        assert (run.experiment.compiled, run.summary["compiled"]) == (answer, answer)


UNFIT = {
    "momentum": ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum = 0.5: only plain sgd is compiled"),
    "adam": ({"optimizer": {"name": "adam"}}, "optimizer.name = 'adam': only plain sgd is compiled"),
    "clipped": ({"optimizer": {"clip_norm": 1.0}}, "optimizer.clip_norm = 1: only plain sgd is compiled"),
    "tracking": ({"algorithm": {"name": "gradient-tracking"}}, "the local steps of GradientTracking are more than plain sgd"),
    "nothing to train": ({"task": {"name": "averaging"}, "nodes": 4}, "the task averaging trains nothing"),
    "other layers": ({"task": {"name": "quadratic"}, "nodes": None}, "only chains of linear layers with ReLU, tanh or sigmoid"),
}


@pytest.mark.parametrize(("changes", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_compiled_is_off_by_itself_and_refused_where_it_is_asked_for(changes, reason):
    unfit = {**LOGISTIC, "weighting": "uniform", "topology": {"name": "ring"}, "optimizer": {}, **changes}

    assert plan_of(unfit).experiment.compiled == "off"
    with pytest.raises(ConfigError) as caught:
        plan_of({**unfit, "compiled": "on"})
    (finding,) = caught.value.findings
    assert finding.startswith(f"compiled = 'on': {reason}")
    assert finding.endswith("; take off, or auto")


def test_rows_that_do_not_fit_at_any_site_are_named():
    inputs, targets = torch.randn(10, 4), torch.randint(0, 3, (10,))
    left_out = torch.where(torch.arange(10) == 3, -100, targets)  # which cross entropy leaves out
    sites = [Site(name="basel", train=(inputs, targets), test=None), Site(name="bern", train=(inputs, left_out), test=None)]
    task = Task(name="classes", model=lambda: nn.Linear(4, 3), loss=F.cross_entropy, metrics={}, sites=sites)
    experiment = recorded_experiment({"name": "run", "schema": 2, "task": {"name": "tests:classes"}}, "test")

    assert make_plan(experiment, task).experiment.compiled == "off"
    with pytest.raises(ConfigError, match="targets are not all classes from 0 to 2"):
        make_plan(experiment_from({**experiment.as_dict(), "compiled": "on"}), task)
    assert (
        make_plan(
            experiment,
            Task(
                name="classes",
                model=task.model,
                loss=task.loss,
                metrics={},
                sites=sites[:1] * 1 + [Site(name="bern", train=(inputs, targets), test=None)],
            ),
        ).experiment.compiled
        == "on"
    )


def test_without_numba_auto_is_off_and_on_names_the_extra(monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    loader._loaded.cache_clear()
    monkeypatch.setattr(loader, "import_module", missing)
    try:
        assert plan_of(LOGISTIC).experiment.compiled == "off"
        with pytest.raises(MissingExtraError, match=r"compiled = 'on': it needs the extra fast: pip install 'p2pfl-mesh\[fast\]'"):
            plan_of({**LOGISTIC, "compiled": "on"})
    finally:
        loader._loaded.cache_clear()


def test_where_numba_is_switched_off_it_is_not_used(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")

    assert plan_of(LOGISTIC).experiment.compiled == "off"
    with pytest.raises(MissingExtraError, match="NUMBA_DISABLE_JIT is set"):
        plan_of({**LOGISTIC, "compiled": "on"})


def test_daemons_take_the_same_loops_as_the_simulator(tmp_path):
    plan = plan_of({**LOGISTIC, "nodes": 4, "topology": {"name": "ring"}, "rounds": 5, "save_models_every": 1})
    simulation = Simulation(plan, RunFolder.create(tmp_path / "simulator", {}))
    for _ in range(5):
        simulation.step()
    assert simulation.population.is_compiled

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            assert all(node.daemon.node.population.is_compiled for node in network.nodes.values())
            assert network.summary(plan.names[0])["compiled"] == "on"
            assert float((network.models(4) - simulation.population.estimate()).abs().max()) < 1e-6

    finish(main())


@pytest.mark.parametrize("worth", [0, 10**30])
def test_a_run_of_an_earlier_version_goes_on_as_it_began(worth, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "WORTH", worth)
    monkeypatch.setattr(forecast, "_LARGE", 0)
    old = recorded_experiment({**LOGISTIC, "stop": None, "baselines": []}, "experiment.yaml")
    plan = make_plan(old, load_sites(old))
    simulation = Simulation(plan, RunFolder.create(tmp_path / "run", {}))

    assert "compiled" not in plan.experiment.as_dict()
    assert simulation.population.is_compiled is (worth == 0)


def test_a_value_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="compiled = 'yes': one of 'auto', 'on' or 'off'"):
        experiment_from({**LOGISTIC, "compiled": "yes"})
