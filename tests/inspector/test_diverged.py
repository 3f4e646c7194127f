"""A run whose training leaves the finite numbers everywhere is no result, and everybody says so first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import p2pfl
from p2pfl.cli import main
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.verdict import verdict
from p2pfl.runs.events import exit_code_of
from p2pfl.runs.records import read_run
from p2pfl.yaml_files import dump_yaml

HOPELESS = {
    "name": "hopeless",
    "task": {"name": "synthetic-logistic"},
    "nodes": 3,
    "topology": {"name": "complete"},
    "algorithm": {"name": "dpsgd", "local_steps": 10},
    "optimizer": {"name": "sgd", "lr": 1e6, "weight_decay": 1e3},
    "rounds": 2,
}


@pytest.mark.parametrize("run", [p2pfl.simulate, pytest.param(p2pfl.up, marks=pytest.mark.slow)])
def test_training_that_diverges_everywhere_is_no_result(run, tmp_path):
    summary = run(HOPELESS, out=tmp_path / "run").summary
    records = read_run(tmp_path / "run")
    said = verdict(records, convergence(records))

    assert summary["stop_reason"] == "diverged"
    assert said[0].startswith("It ended, and not as agreed: ")
    assert said[1].startswith("It has diverged: at every node")
    assert "optimizer.lr" in said[2]
    assert len(said) == 3
    assert [departure["kind"] for departure in summary["departures"]] == ["non_finite"]
    assert "(6 times, first round 0: training became non-finite" in summary["departures"][0]["detail"]


@pytest.mark.parametrize("engine", ["simulate", pytest.param("up", marks=pytest.mark.slow)])
def test_the_command_says_what_to_do_and_that_it_was_not_as_agreed(engine, tmp_path, monkeypatch, capfd):
    path = tmp_path / "hopeless.yaml"
    path.write_text(dump_yaml(HOPELESS))
    monkeypatch.setattr(sys, "argv", ["p2pfl", engine, str(path), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err

    assert end.value.code == 3
    assert "has diverged: at every node" in said
    assert "Traceback" not in said


def test_an_interrupted_run_remembers_that_its_last_training_diverged(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(round: int, most: int, row: object) -> None:
        if round == 4:  # two rounds of settling are over
            raise Interrupted

    with pytest.raises(Interrupted):
        p2pfl.simulate(HOPELESS, out=tmp_path / "run", progress=interrupt)

    assert p2pfl.simulate(HOPELESS, resume=tmp_path / "run").summary["stop_reason"] == "diverged"


def test_where_one_site_learns_there_is_a_result_and_the_others_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run = p2pfl.simulate(
        {**HOPELESS, "task": {"name": "test_diverged:one_steep_site"}, "optimizer": {"lr": 0.1}, "nodes": None},
        out=tmp_path / "run",
        allow_tasks=["test_diverged:one_steep_site"],
    )
    said = verdict(read_run(run.path), convergence(read_run(run.path)))

    assert run.summary["stop_reason"] == "converged"
    assert said[0].startswith("It ended, and not as agreed: steep: training became non-finite and was rolled back (2 times, first round 0")
    assert "rolled back at steep (2 rounds)" in said[2]
    assert exit_code_of(run.summary) == 3


def command(monkeypatch, capfd, *words):
    """Exit code, standard output and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capfd.readouterr()


def test_one_site_that_diverges_is_exit_code_3_and_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    experiment = {**HOPELESS, "task": {"name": "test_diverged:one_steep_site"}, "optimizer": {"lr": 0.1}}
    del experiment["nodes"]
    (tmp_path / "one.yaml").write_text(dump_yaml(experiment))
    code, out, err = command(
        monkeypatch, capfd, "simulate", tmp_path / "one.yaml", "--out", tmp_path / "run", "--allow-task", "test_diverged:one_steep_site"
    )

    assert code == 3
    assert "not as agreed: steep: training became non-finite" in err
    assert "3 nodes" in out


@pytest.mark.parametrize("pace", ["synchronous", "asynchronous"])
def test_a_loss_that_is_no_number_is_not_as_agreed_though_the_weights_are_finite(pace, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    experiment = {
        "task": {"name": "test_diverged:no_loss_at_one_site"},
        "rounds": 2,
        "stop": None,
        "baselines": [],
        "pace": {"name": pace},
        "optimizer": {"lr": 0.2},
    }
    run = p2pfl.simulate(
        {**experiment, "topology": {"name": "complete"}}, out=tmp_path / "run", allow_tasks=["test_diverged:no_loss_at_one_site"]
    )

    assert run.summary["departures"] == [
        {
            "kind": "non_finite",
            "detail": "b: the training loss was infinite or no number, while the weights stayed finite (2 times, first round 0)",
        }
    ]


@p2pfl.task
def no_loss_at_one_site() -> p2pfl.tasks.Task:
    """Two sites of one number; where b has learnt its target the loss is no number, and its gradient is finite."""
    import torch
    from torch import nn

    from p2pfl.tasks import Site, Task

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets) ** 2).mean() + torch.where((outputs.detach().mean() < -0.4) & (targets.mean() < -0.5), torch.nan, 0.0)

    def model() -> nn.Module:
        linear = nn.Linear(1, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    sites = [Site(name=name, train=(torch.ones(8, 1), torch.full((8, 1), target)), test=None) for name, target in (("a", 0.0), ("b", -1.0))]
    return Task(name="no-loss", model=model, loss=loss, metrics={}, sites=sites)


def test_final_models_that_are_not_finite_are_named():
    import torch

    from p2pfl.evaluation.summary import non_finite_models

    x_NP = torch.full((3, 2), 3e38)
    assert non_finite_models(["a", "b", "c"], x_NP) == []
    x_NP[1, 1] = torch.inf
    assert [each.detail for each in non_finite_models(["a", "b", "c"], x_NP)] == ["the final model of b holds numbers that are not finite"]


@p2pfl.task
def one_steep_site() -> p2pfl.tasks.Task:
    """Three sites of one number; the loss of one of them has a slope that no step survives."""
    import torch
    from torch import nn

    from p2pfl.tasks import Site, Task

    def site(name: str, scale: float) -> Site:
        return Site(name=name, train=(torch.full((8, 1), scale), torch.zeros(8, 1)), test=None)

    return Task(
        name="steep",
        model=lambda: nn.Linear(1, 1),
        loss=lambda outputs, targets: ((outputs - targets) ** 2).mean(),
        metrics={},
        sites=[site("flat", 0.1), site("gentle", 0.2), site("steep", 1e18)],
    )
