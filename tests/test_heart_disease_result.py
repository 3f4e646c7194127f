"""The figures of docs/heart-disease.md are what the example gives."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch

import p2pfl
from p2pfl.experiment import load_experiment

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "heart_disease.yaml"
SEEDS = range(42, 47)
HOSPITALS = ("cleveland", "hungary", "switzerland", "va")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files"),
]


def documented(label, column):
    """(mean, sample standard deviation) in the row of a label, in the first table whose columns are those asked for."""
    tables = (ROOT / "docs" / "heart-disease.md").read_text().split("\n\n")
    for table in tables:
        lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
        if lines and lines[0][0] == "models" and column in lines[0]:
            cells = {line[0]: line[lines[0].index(column)] for line in lines}
            mean, _, deviation = cells[label].partition(" ± ")
            return float(mean), float(deviation)
    raise AssertionError(f"no table of docs/heart-disease.md has a column {column!r}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heart-disease")
    return {seed: p2pfl.simulate(EXAMPLE, out=folder / str(seed), seed=seed, baselines=[]) for seed in SEEDS}


def over_seeds(runs, metric, part="mean"):
    values = [run.summary["metrics"][metric] for run in runs.values()]
    return [v["mean"] if part == "mean" else v["per_node"][part] for v in values]


def as_documented(values):
    return pytest.approx((statistics.fmean(values), statistics.stdev(values)), abs=5.1e-5)  # four decimals


def test_the_example_keeps_to_the_published_budget():
    experiment = load_experiment(EXAMPLE)

    assert (experiment.rounds, experiment.algorithm.local_steps, experiment.algorithm.batch_size) == (15, 100, 4)
    assert (experiment.stop, experiment.validation, experiment.task.options) == (None, 0.0, {})


def test_accuracy_is_above_the_best_published_federated_figure(runs):
    assert statistics.fmean(over_seeds(runs, "accuracy")) >= 0.745


@pytest.mark.xfail(
    raises=AssertionError, reason="0.8205: the setting chosen on validation rows falls short, and docs/heart-disease.md says so"
)
def test_auroc_is_at_least_0_825(runs):
    assert statistics.fmean(over_seeds(runs, "auroc")) >= 0.825


@pytest.mark.parametrize(("metric", "column"), [("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy"), ("auroc", "auroc")])
def test_averages_are_as_documented(runs, metric, column):
    values = over_seeds(runs, metric)

    assert documented("network", column) == as_documented(values)


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_each_hospitals_figures_are_as_documented(runs, hospital):
    assert documented("network", hospital) == as_documented(over_seeds(runs, "accuracy", hospital))
    assert documented("network", f"auroc {hospital}") == as_documented(over_seeds(runs, "auroc", hospital))


def test_daemons_give_the_same_models_and_figures(runs, tmp_path):
    run = p2pfl.up(EXAMPLE, overrides={"baselines": []}, out=tmp_path / "run")
    simulated = runs[42].models

    assert run.summary["metrics"] == runs[42].summary["metrics"]
    for hospital in HOSPITALS:
        difference = torch.linalg.vector_norm(run.models[hospital] - simulated[hospital]) / torch.linalg.vector_norm(simulated[hospital])

        assert difference < 1e-6
