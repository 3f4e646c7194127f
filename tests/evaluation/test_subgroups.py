"""Figures of parts of the patients are those of scikit-learn on the saved models, and nothing is said of few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.nn import functional as F

from p2pfl.algorithms import DPSGD
from p2pfl.evaluation.subgroups import _figures, subgroups
from p2pfl.inspector.report import report
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.simulator import Simulation
from p2pfl.tasks import Site, Task
from p2pfl.tasks.metrics import CLASSIFICATION
from p2pfl.training import OptimizerSpec, Population, Recipe, build_model
from simulations import LOGISTIC, plan_of

ROWS = 60


def site(name, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, 3, generator=generator)
    targets = (inputs[:, :1] + torch.randn(ROWS, 1, generator=generator) > 0).float()
    groups = {"sex": ["female", "male"] * (ROWS // 2), "ward": ["east"] * 52 + ["west"] * 8}
    return Site(name=name, train=(inputs, targets), test=(inputs, targets), groups=groups)


@pytest.fixture
def study():
    """A plan, its population and models."""
    task = Task(
        name="wards",
        model=lambda: nn.Linear(3, 1),
        loss=F.binary_cross_entropy_with_logits,
        metrics=CLASSIFICATION,
        sites=[site("basel", 0), site("bern", 1)],
    )
    recipe = Recipe(algorithm=DPSGD(), optimizer=OptimizerSpec(), batch_size=8, rounds=1, local_steps=1, seed=0)
    population = Population(task, task.sites, [0, 1], build_model(task, torch.float64, 0), recipe)
    plan = plan_of({**LOGISTIC, "rounds": 1})
    plan = replace(plan, task=task, names=("basel", "bern"), sites={each.name: each for each in task.sites})
    return plan, population, torch.tensor([[1.0, 0.2, 0.0, 0.1], [0.3, 1.0, 0.0, -0.2]], dtype=torch.float64)


def by_hand(logits, targets):
    """AUROC, sensitivity at specificity .9, calibration error."""
    false_alarms, found, _ = roc_curve(targets, logits, drop_intermediate=False)
    probabilities = 1 / (1 + np.exp(-logits))
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (probabilities >= low) & (probabilities < low + 0.1)
        error += abs((probabilities[inside] - targets[inside]).sum()) / len(targets)
    return roc_auc_score(targets, logits), found[false_alarms <= 0.1].max(), error


def test_every_figure_is_scikit_learns(study):
    plan, population, x_NP = study
    rows = {(row["site"], row["attribute"], row["group"]): row for row in subgroups(plan, population, x_NP, plan.names)}

    assert len(rows) == 3 * 4  # two sites and all, two attributes of two groups
    for number, name in enumerate(plan.names):
        inputs, targets = plan.sites[name].test
        logits = (inputs.double() @ x_NP[number, :3] + x_NP[number, 3]).numpy()
        for group, where in (("female", slice(0, None, 2)), ("male", slice(1, None, 2))):
            row = rows[name, "sex", group]
            expected = by_hand(logits[where], targets.numpy().ravel()[where])
            assert row["rows"] == ROWS // 2
            assert (row["auroc"], row["sensitivity"], row["calibration_error"]) == pytest.approx(expected, abs=1e-6)
            assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
    assert rows[None, "sex", "male"]["rows"] == ROWS


def test_sensitivity_is_that_of_the_best_threshold_also_among_equal_scores():
    """Three scores that two positive rows and a negative one of twenty share: the second threshold has specificity .9."""
    logits = np.array([3.0] * 3 + [2.0] * 3 + [1.0] * 3 + [0.0] * 17 + [-1.0] * 4)
    classes = np.array([1, 1, 0] * 3 + [0] * 17 + [1] * 4)

    assert _figures(logits, classes)["sensitivity"] == pytest.approx(4 / 10)


def test_of_few_rows_nothing_is_said_not_even_how_many(study):
    plan, population, x_NP = study
    rows = [row for row in subgroups(plan, population, x_NP, plan.names) if row["group"] == "west"]

    assert [row["site"] for row in rows] == ["basel", "bern", None]
    for row in rows[:2]:
        assert {row[key] for key in row.keys() - {"site", "attribute", "group"}} == {None}
    assert rows[2]["rows"] == 16  # of both sites together


def test_a_single_institution_says_nothing_of_others(study):
    plan, population, x_NP = study
    found = subgroups(plan, population, x_NP[:1], ["basel"])

    assert {row["site"] for row in found} == {"basel"}


def test_a_site_without_groups_and_a_task_of_other_classes_have_none(study):
    plan, population, x_NP = study
    bare = {name: replace(each, groups={}) for name, each in plan.sites.items()}
    assert subgroups(replace(plan, sites=bare), population, x_NP, plan.names) == []
    counted = {name: replace(each, test=(each.test[0], each.test[1] * 3)) for name, each in plan.sites.items()}
    assert subgroups(replace(plan, sites=counted), population, x_NP, plan.names) == []


def test_they_are_in_the_run_and_on_the_page(tmp_path):
    pytest.importorskip("plotly")
    plan = plan_of({**LOGISTIC, "rounds": 2})
    sites = {name: replace(each, groups={"half": [str(i % 2) for i in range(len(each.test[0]))]}) for name, each in plan.sites.items()}
    plan = replace(plan, sites=sites)
    Simulation(plan, RunFolder.create(tmp_path / "run", plan.experiment.as_dict(), engine="simulator")).run()
    run = read_run(tmp_path / "run")

    assert {row["attribute"] for row in run.subgroups} == {"half"}
    assert "For whom: subgroups" in report(run)


def test_any_population_will_do_where_models_have_no_buffers(study):
    plan, population, x_NP = study
    one = Population(plan.task, plan.task.sites[:1], [0], build_model(plan.task, torch.float64, 0), population.recipe)

    assert subgroups(plan, one, x_NP, plan.names) == subgroups(plan, population, x_NP, plan.names)


def test_small_groups_are_counted_by_patient_and_not_by_row(study):
    """Eleven test rows of ten patients are shown, of nine they are not; an id is somebody else at the other site."""
    plan, population, x_NP = study

    def shown(num_patients):
        ids = [f"p{place % num_patients}" if place < 11 else f"q{place}" for place in range(ROWS)]
        groups = {"ward": ["east" if place < 11 else "west" for place in range(ROWS)]}
        sites = {name: replace(each, groups=groups, test_patients=ids) for name, each in plan.sites.items()}
        found = subgroups(replace(plan, sites=sites), population, x_NP, plan.names)
        return {(row["site"], row["group"]): row["rows"] for row in found}

    assert shown(10) == {("basel", "east"): 11, ("bern", "east"): 11, (None, "east"): 22} | {
        (name, "west"): rows for name, rows in (("basel", 49), ("bern", 49), (None, 98))
    }
    assert shown(9)["basel", "east"] is None
    assert shown(9)[None, "east"] == 22
    assert shown(4)[None, "east"] is None
