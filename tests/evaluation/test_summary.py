"""What summary.json says, and the bounds that every round's record carries."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from p2pfl.evaluation.baselines import baselines_of
from p2pfl.evaluation.mean_model import MeanModel, mean_model_metrics
from p2pfl.evaluation.summary import FinalModels, Outcome, by_metric, summary_of
from p2pfl.params import load_parameters
from p2pfl.runs.rows import network_row
from p2pfl.runs.stopwatch import peak_rss_bytes
from simulations import plan_of

LOGISTIC = {"task": {"name": "synthetic-logistic", "features": 3, "samples": 12}, "nodes": 4, "rounds": 2}


@pytest.fixture(scope="module")
def plan():
    return plan_of(LOGISTIC, baselines=["local", "pooled"])


X_NP = torch.tensor([[1.0, 0.0], [1.0, 2.0], [5.0, 0.0], [5.0, 2.0]])


def finished(plan, *, x_NP=X_NP, seconds=None):
    spent = {"setup": 1.0, "train": 2.0, "mix": 3.0, "evaluate": 4.0, "baselines": 5.0} if seconds is None else seconds
    models = None
    if x_NP is not None:
        models = FinalModels(names=plan.names[: len(x_NP)], x_NP=x_NP, buffers={}, population=plan.population(plan.names))
    outcome = Outcome(
        scope="network",
        engine="simulator",
        rounds=10,
        stop_reason="rounds",
        bytes_sent=7,
        metrics={},
        models=models,
        book=lambda _: spent,
        row_by_row=None,
        peak_rss_bytes=9,
    )
    return summary_of(plan, outcome, baselines={}, departures=())


def test_the_consensus_distance_is_the_root_of_the_mean_square(plan):
    summary = finished(plan)

    assert summary["consensus_distance"] == pytest.approx(math.sqrt(5))  # each at (2, 1) from (3, 1)
    assert summary["relative_consensus"] == pytest.approx(math.sqrt(5 / 10))
    nobody = finished(plan, x_NP=None)
    assert (nobody["consensus_distance"], nobody["relative_consensus"]) == (None, None)
    around_zero = finished(plan, x_NP=torch.tensor([[1.0], [-1.0]]))
    assert (around_zero["consensus_distance"], around_zero["relative_consensus"]) == (1.0, None)


def test_seconds_name_what_the_schema_names_and_total_everything(plan):
    summary = finished(plan)

    assert list(summary["seconds"].items()) == [
        ("setup", 1.0),
        ("train", 2.0),
        ("mix", 3.0),
        ("evaluate", 4.0),
        ("baselines", 5.0),
        ("total", 15.0),
    ]
    assert summary["node_rounds_per_second"] == 4 * 10 / 5
    assert finished(plan, seconds={})["node_rounds_per_second"] is None
    assert finished(plan, seconds={})["seconds"] == {"setup": 0.0, "train": 0.0, "mix": 0.0, "evaluate": 0.0, "total": 0.0}


def test_undefined_figures_are_null_and_counted(plan):
    per_node = dict(zip(plan.names, ({"auroc": 0.5}, {"auroc": float("nan")}, {}, {"auroc": 1.0}), strict=True))
    figures = by_metric(plan, per_node)["auroc"]

    assert (figures["mean"], figures["min"], figures["max"], figures["n_defined"]) == (0.75, 0.5, 1.0, 2)
    assert list(figures["per_node"].values()) == [0.5, None, None, 1.0]
    assert set(by_metric(plan, per_node)) == set(plan.task.metrics)


def test_a_rounds_record_bounds_the_disagreement_by_the_spectrum(plan):
    def row(kind, losses, disagreement, mean_squared_norm, nodes=4, **others):
        figures = {"losses": losses, "disagreement": disagreement, "mean_squared_norm": mean_squared_norm, "nodes": nodes}
        return network_row(plan.bound_rule, 3, kind, **figures, skipped=others.pop("skipped", 0), **others)

    whole = row("train", [1.0, None, float("nan"), 2.0], 8.0, 4.0, rms_disagreement=0.5, consensus_distance=0.25)

    low, high = pytest.approx(math.sqrt(8 / (4 * 4))), pytest.approx(math.sqrt(8 / (4 * 2)))  # a ring of 4: L's eigenvalues are 0, 2, 2, 4
    assert whole.as_row() == {
        "round": 3,
        "kind": "train",
        "loss": 1.5,
        "disagreement": 8.0,
        "bound_low": low,
        "bound_high": high,
        "rms_norm": 2.0,
        "rms_disagreement": 0.5,
        "consensus_distance": 0.25,
        "nodes": 4,
        "skipped": 0,
    }
    assert row("settle", [None] * 4, 0.0, 0.0).loss is None
    nothing = row("train", [1.0] * 4, None, None)
    assert {nothing.disagreement, nothing.bound_low, nothing.bound_high, nothing.rms_norm} == {None}
    # with distances missing from the sum it bounds from below only
    for partly in (row("train", [], 8.0, 4.0, skipped=1), row("train", [], 8.0, 4.0, nodes=3), row("train", [], 8.0, 4.0, unknown=1)):
        assert (partly.bound_low, partly.bound_high) == (low, None)
    summed = row("train", [], None, None, between=(2.0, 8.0), rounding=0.5)
    assert (summed.bound_low, summed.bound_high) == (pytest.approx(math.sqrt(2 / 16) / 2), pytest.approx(math.sqrt(8 / 8) * 1.5))


def test_rounds_that_are_not_in_step_or_over_a_changing_graph_bound_nothing(plan):
    for rule in (replace(plan.bound_rule, extremes=None), None):
        row = network_row(rule, 3, "train", losses=[], disagreement=8.0, mean_squared_norm=4.0, nodes=4, skipped=0)

        assert (row.bound_low, row.bound_high, row.disagreement) == (None, None, 8.0)


def test_baselines_are_those_asked_for(plan):
    both = baselines_of(plan)[0]
    given = dict.fromkeys(plan.names, dict.fromkeys(plan.task.metrics, 0.25))

    assert set(both) == {"local", "pooled"}
    assert set(both["local"]) == set(both["pooled"]) == set(plan.task.metrics)
    assert baselines_of(plan, given)[0]["local"]["auroc"]["mean"] == 0.25
    assert set(baselines_of(plan_of(LOGISTIC, baselines=["pooled"]))[0]) == {"pooled"}
    assert baselines_of(plan_of(LOGISTIC, baselines=[]))[0] == {}
    # nothing to train is nothing to compare with
    assert baselines_of(plan_of({"task": {"name": "averaging"}, "rounds": 2}, baselines=["local", "pooled"]))[0] == {}
    assert baselines_of(plan_of(LOGISTIC, rounds=0, stop={}, baselines=["local", "pooled"]))[0] == {}


def test_where_not_all_data_are_here_there_is_no_pooled_baseline(plan):
    name = plan.names[0]
    alone = replace(plan, sites={name: plan.sites[name]})

    assert baselines_of(alone)[0] == {"local": None, "pooled": None}
    own = baselines_of(alone, {name: {"auroc": 0.5}})[0]
    assert own["local"]["auroc"]["per_node"] == {name: 0.5}
    assert own["pooled"] is None


def test_the_mean_model_is_measured_on_all_test_rows_pooled(plan):
    population = plan.population(plan.names)
    mean_P = torch.tensor([0.5, -1.0, 2.0, 0.1])
    model = plan.task.model()
    load_parameters(model, mean_P)
    inputs, targets = (torch.cat([plan.sites[name].test[part] for name in plan.names]) for part in (0, 1))
    with torch.no_grad():
        expected = {name: float(metric(model(inputs), targets)) for name, metric in plan.task.metrics.items()}

    assert mean_model_metrics(plan, MeanModel(x_P=mean_P, buffers={}), population) == pytest.approx(expected)
    averaging = plan_of({"task": {"name": "averaging"}, "rounds": 2})
    assert mean_model_metrics(averaging, MeanModel(x_P=torch.zeros(10), buffers={}), averaging.population(averaging.names)) == {}


def test_the_most_memory_is_in_bytes():
    assert 50 * 2**20 < peak_rss_bytes() < 2**40


@pytest.mark.slow
def test_the_most_memory_is_this_processs_own():
    """A process that a large one started has not held what that one held."""
    large = bytearray(600 * 2**20)
    large[:: 2**12] = b"1" * len(large[:: 2**12])  # every page
    code = "from p2pfl.runs.stopwatch import peak_rss_bytes; print(peak_rss_bytes())"
    peak = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, preexec_fn=int).stdout

    assert int(peak) < 600 * 2**20 < len(large) + 1
