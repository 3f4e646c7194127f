"""Every model at every site: the figures are those of the saved models, computed again by torch and scikit-learn alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

import p2pfl
from p2pfl.draws import Purpose, torch_seed
from p2pfl.evaluation import cross_site
from p2pfl.evaluation.gain_over_local import gains_over_local
from p2pfl.experiment.plan import load_sites
from p2pfl.inspector.report import report
from p2pfl.runs.records import read_run
from simulations import LOGISTIC, plan_of

EXPERIMENT = {"task": {"name": "breast-cancer"}, "nodes": 5, "rounds": 10, "stop": None, "baselines": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return p2pfl.simulate(EXPERIMENT, out=tmp_path_factory.mktemp("cross") / "run")


def test_every_figure_is_that_of_the_saved_model(run):
    found = read_run(run.path).cross_site
    sites = {site.name: site for site in load_sites(run.experiment).sites}
    names = list(run.models)
    models = [run.models[name] for name in names]
    models.append(torch.stack(models).mean(dim=0))

    assert (found["metric"], found["confidence"], found["models"]) == ("auroc", 0.95, [*names, "mean model"])
    assert [site["name"] for site in found["sites"]] == names
    for place, name in enumerate(names):
        inputs, targets = sites[name].test
        support = {str(label): int((targets == label).sum()) for label in (0, 1)}
        assert (found["sites"][place]["rows"], found["sites"][place]["support"]) == (len(inputs), support)
        for number, x_P in enumerate(models):
            logits = inputs.float() @ x_P[:-1] + x_P[-1]
            value, low, high = (found[key][number][place] for key in ("value", "low", "high"))
            assert value == pytest.approx(roc_auc_score(targets.flatten(), logits), abs=1e-6)
            assert 0 <= low <= value <= high <= 1


def test_a_nodes_own_cell_is_its_metric_in_the_summary(run):
    found = read_run(run.path).cross_site

    for number, node in enumerate(found["models"][:-1]):
        assert found["value"][number][number] == pytest.approx(run.summary["metrics"]["auroc"]["per_node"][node], abs=1e-12)


def test_the_page_shows_it_with_intervals_and_support(run):
    pytest.importorskip("plotly")
    page = report(read_run(run.path))

    assert "Every model at every site" in page
    assert "In brackets 95% confidence intervals" in page
    assert "of each class" in page


@pytest.fixture
def regression():
    """A plan whose only metric has no interval of its own, and four random models."""
    plan = plan_of({**LOGISTIC, "task": {**LOGISTIC["task"], "samples": 120}, "rounds": 1})
    metrics = {"error": lambda outputs, targets: F.mse_loss(outputs, targets).item()}
    plan = replace(plan, task=replace(plan.task, losses=frozenset(), metrics=metrics))
    return plan, plan.population(plan.names), torch.randn(4, plan.layout.size, generator=torch.Generator().manual_seed(1))


def test_other_metrics_have_intervals_from_leaving_out_groups_of_rows(regression):
    plan, population, x_NP = regression
    found = cross_site.cross_site(plan, population, x_NP)

    assert found["method"] == "jackknife of 20 groups of rows"
    for number, x_P in enumerate((*x_NP, x_NP.mean(dim=0))):
        for place, name in enumerate(plan.names):
            inputs, targets = plan.sites[name].test
            squares = ((inputs.float() @ x_P[:-1, None] + x_P[-1] - targets) ** 2).numpy().ravel()
            group = np.arange(len(squares)) % 20
            np.random.default_rng(torch_seed(plan.experiment.seed, Purpose.RESAMPLE, node=place)).shuffle(group)
            without = np.array([squares[group != number].mean() for number in range(20)])
            reach = t.ppf(0.975, 19) * np.sqrt(19 * without.var())
            ends = squares.mean() - reach, squares.mean() + reach
            assert (found["low"][number][place], found["high"][number][place]) == pytest.approx(ends, rel=1e-4)
            assert found["no_interval"][number][place] is None


def test_of_a_large_matrix_only_own_and_mean_models_have_such_intervals(regression, monkeypatch):
    monkeypatch.setattr("p2pfl.tasks.intervals.MOST_CALLS", 399)
    found = cross_site.cross_site(*regression)

    for number in range(5):
        for place in range(4):
            assert (found["low"][number][place] is not None) == (number in (place, 4))
    assert found["no_interval"][0][1] == (
        "the metric's kind has none, and leaving out rows would take 400 calls of the metric, where 399 are the most"
    )


def test_a_slow_metric_of_the_users_own_is_called_a_bounded_number_of_times(regression):
    plan, population, x_NP = regression
    calls = []

    def error(outputs, targets):
        calls.append(1)
        return F.mse_loss(outputs, targets).item()

    plan = replace(plan, task=replace(plan.task, metrics={"error": error}))
    cross_site.cross_site(plan, population, x_NP)
    gains_over_local(plan, population, x_NP, plan.names, population)

    assert len(calls) == 20 + 20 * 20 + 8 + 8 * 20


def test_where_no_interval_is_known_the_page_claims_none_and_says_why(regression, run):
    pytest.importorskip("plotly")
    plan, population, x_NP = regression
    small = {name: replace(site, test=(site.test[0][:9], site.test[1][:9])) for name, site in plan.sites.items()}
    found = cross_site.cross_site(replace(plan, sites=small), population, x_NP)
    page = report(replace(read_run(run.path), cross_site=found))

    assert found["method"] is None
    assert {why for row in found["no_interval"] for why in row} == {"of fewer than 10 test rows none is given"}
    assert "In brackets 95% confidence intervals" not in page
    assert "No interval: of fewer than 10 test rows none is given (20 values)." in page


def test_of_too_many_nodes_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cross_site, "MOST_SITES", 3)
    made = p2pfl.simulate({**LOGISTIC, "rounds": 2, "stop": None, "baselines": []}, out=tmp_path / "run")

    assert read_run(made.path).cross_site is None
    assert not (made.path / "cross_site.json").exists()


def test_where_nothing_is_measured_there_is_none(tmp_path):
    made = p2pfl.simulate({"task": {"name": "averaging"}, "nodes": 4, "rounds": 2, "stop": None}, out=tmp_path / "run")

    assert read_run(made.path).cross_site is None
