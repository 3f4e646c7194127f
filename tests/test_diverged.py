"""A run whose training leaves the finite numbers everywhere is no result, and everybody says so first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import p2pfl
from p2pfl.cli import main
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.verdict import verdict
from p2pfl.records import read_run
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
    assert said[0].startswith("It has diverged: at every node")
    assert "optimizer.lr" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize("engine", ["simulate", pytest.param("up", marks=pytest.mark.slow)])
def test_the_command_fails_and_says_what_to_do(engine, tmp_path, monkeypatch, capfd):
    path = tmp_path / "hopeless.yaml"
    path.write_text(dump_yaml(HOPELESS))
    monkeypatch.setattr(sys, "argv", ["p2pfl", engine, str(path), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err

    assert end.value.code == 1
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
        {**HOPELESS, "task": {"name": "test_diverged:one_steep_site"}, "optimizer": {"lr": 0.1}, "nodes": None}, out=tmp_path / "run"
    )
    said = verdict(read_run(run.path), convergence(read_run(run.path)))

    assert run.summary["stop_reason"] == "converged"
    assert "taken back at steep (2 rounds)" in said[1]


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
