"""Every file of examples/ runs, and the demonstration shows what it promises."""

import os
import sys
from pathlib import Path

import pytest

from p2pfl.experiment.graph import build_topology
from p2pfl.experiment.loading import load_experiment
from p2pfl.launcher import up
from p2pfl.simulator import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_DATA = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files")


@pytest.fixture(autouse=True)
def examples_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(EXAMPLES)
    # daemons look for a task's module in the folder that they are started from
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def assert_shows_a_gain(summary):
    """What `make demo` prints: agreed; as good as with all data pooled; nobody worse off than alone."""
    network, local, pooled = summary["metrics"]["auroc"], summary["baselines"]["local"]["auroc"], summary["baselines"]["pooled"]["auroc"]

    assert (summary["nodes"], summary["stop_reason"]) == (5, "converged")
    assert summary["relative_consensus"] <= 1e-3
    assert network["n_defined"] == 5
    assert network["mean"] >= pooled["mean"] - 0.01
    for node, alone in local["per_node"].items():
        assert network["per_node"][node] >= alone - 0.02, node


def test_every_experiment_is_run_here():
    assert sorted(path.name for path in EXAMPLES.glob("*.yaml")) == ["breast_cancer.yaml", "custom_task.yaml", "heart_disease.yaml"]
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["custom_task.py"]


def test_breast_cancer_is_as_good_as_pooled_and_nobody_loses(tmp_path):
    run = simulate("breast_cancer.yaml", out=tmp_path / "run")

    assert_shows_a_gain(run.summary)


@pytest.mark.slow
def test_breast_cancer_by_five_daemons_is_the_same(tmp_path):
    run = up("breast_cancer.yaml", out=tmp_path / "run")

    assert_shows_a_gain(run.summary)
    assert run.summary["engine"] == "daemons"


def test_heart_disease_names_the_four_hospitals_and_the_published_budget():
    experiment = load_experiment("heart_disease.yaml")
    topology = build_topology(experiment, ["cleveland", "hungary", "switzerland", "va"])

    assert (experiment.rounds, experiment.algorithm.local_steps, experiment.algorithm.batch_size) == (15, 100, 4)
    assert (topology.names, len(topology.senders)) == (("cleveland", "hungary", "switzerland", "va"), 8)


@pytest.mark.slow
@NEEDS_DATA
def test_heart_disease_learns(tmp_path):
    summary = simulate("heart_disease.yaml", out=tmp_path / "run").summary

    assert sorted(summary["metrics"]["auroc"]["per_node"]) == ["cleveland", "hungary", "switzerland", "va"]
    # one seed of the five of docs/heart-disease.md
    assert summary["metrics"]["auroc"]["mean"] >= 0.8


@pytest.mark.parametrize("runtime", [simulate, pytest.param(up, marks=pytest.mark.slow)])
def test_a_task_of_ones_own_runs_in_both_runtimes(runtime, tmp_path):
    run = runtime("custom_task.yaml", out=tmp_path / "run", rounds=5, stop=None, allow_tasks=["custom_task:stroke"])

    assert run.summary["rounds"] == 5
    assert sorted(run.summary["metrics"]["auroc"]["per_node"]) == ["hospital-a", "hospital-b", "hospital-c"]
    assert run.experiment.task.name == "custom_task:stroke"


def test_a_task_of_ones_own_gains_from_the_network(tmp_path):
    summary = simulate("custom_task.yaml", out=tmp_path / "run", allow_tasks=["custom_task:stroke"]).summary

    assert summary["stop_reason"] == "converged"
    assert summary["metrics"]["auroc"]["mean"] > summary["baselines"]["local"]["auroc"]["mean"]
