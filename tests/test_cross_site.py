"""Every model at every site: the figures are those of the saved models, computed again by torch and scikit-learn alone."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

import p2pfl
from p2pfl import cross_site
from p2pfl.inspector.report import report
from p2pfl.plan import load_sites
from p2pfl.records import read_run
from runs import LOGISTIC

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


def test_of_too_many_nodes_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cross_site, "MOST_SITES", 3)
    made = p2pfl.simulate({**LOGISTIC, "rounds": 2, "stop": None, "baselines": []}, out=tmp_path / "run")

    assert read_run(made.path).cross_site is None
    assert not (made.path / "cross_site.json").exists()


def test_where_nothing_is_measured_there_is_none(tmp_path):
    made = p2pfl.simulate({"task": {"name": "averaging"}, "nodes": 4, "rounds": 2, "stop": None}, out=tmp_path / "run")

    assert read_run(made.path).cross_site is None
