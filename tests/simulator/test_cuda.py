"""On a GPU a run comes to what it comes to on the CPU: data, training, mixing and metrics, all of it there."""

from __future__ import annotations

import pytest
import torch

from p2pfl.evaluation.results import Run
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation
from simulations import plan_of, without_seconds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here")

TASK = {"task": {"name": "synthetic-logistic", "features": 6, "heterogeneity": 1.0}, "nodes": 8, "dtype": "float64"}
ALGORITHMS = ["dpsgd", "dfedavgm", "qg-dsgdm", "gradient-tracking", "k-gt", "exact-diffusion", "extra", "push-sum", "choco", "powergossip"]


def ended(folder, device, **settings):
    plan = plan_of({**TASK, "rounds": 8, **settings})
    made = RunFolder.create(folder, plan.experiment.as_dict(), topology=plan.graph_record(), engine="simulator")
    simulation = Simulation(plan, made, device=device)
    assert simulation.population.state["x"].device.type == device
    simulation.run()
    return Run(folder)


def assert_same(on_gpu, on_cpu):
    for name, x_P in on_cpu.models.items():
        torch.testing.assert_close(on_gpu.models[name].cpu(), x_P, rtol=0, atol=1e-9)
    for found, expected in zip(without_seconds(on_gpu.records), without_seconds(on_cpu.records), strict=True):
        assert found.keys() == expected.keys()
        assert found["bytes_sent"] == expected["bytes_sent"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-9)
        assert found["disagreement"] == pytest.approx(expected["disagreement"], rel=1e-6, abs=1e-12)
    for metric, figures in on_cpu.summary["metrics"].items():
        assert on_gpu.summary["metrics"][metric]["mean"] == pytest.approx(figures["mean"], abs=1e-9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(name, tmp_path):
    settings = {"algorithm": {"name": name}}
    assert_same(ended(tmp_path / "cuda", "cuda", **settings), ended(tmp_path / "cpu", "cpu", **settings))


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "momentum": 0.9}, {"name": "adam", "lr": 0.01}])
@pytest.mark.parametrize("topology", [{"name": "random-regular", "degree": 4}, {"name": "one-peer-exponential"}])
def test_optimisers_and_graphs(topology, optimizer, tmp_path):
    settings = {"topology": topology, "optimizer": {"lr": 0.05, **optimizer}}
    assert_same(ended(tmp_path / "cuda", "cuda", **settings), ended(tmp_path / "cpu", "cpu", **settings))


def test_it_goes_on_from_a_checkpoint_on_the_other_device(tmp_path):
    plan = plan_of({**TASK, "rounds": 8})
    simulation = Simulation(plan, RunFolder.create(tmp_path / "run", plan.experiment.as_dict(), engine="simulator"), device="cuda")
    for _ in range(4):
        simulation.step()
    simulation.save()
    resumed = Simulation(plan, RunFolder.open(tmp_path / "run"), device="cpu")
    resumed.restore()
    resumed.run()

    assert_same(Run(tmp_path / "run"), ended(tmp_path / "cpu", "cpu"))
