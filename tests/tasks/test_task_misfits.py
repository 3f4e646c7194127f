"""Misfits of a task's functions, found in a dry run on every site before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_task_faults import NUM_ROWS, population_of, rows, task_of, tried
from torch import nn
from torch.nn import functional as F

from p2pfl.errors import TaskError
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import make_plan
from p2pfl.tasks import Site, SiteTable, Split, accuracy, auroc


def test_a_misfit_says_what_was_given():
    assert "it was given float32[4, 3] (tried" in str(tried(task_of(model=lambda: nn.Linear(4, 1))))
    said = tried(task_of(loss=F.cross_entropy, model=lambda: nn.Linear(3, 2)))

    assert str(said).startswith("task 'stroke', loss, site 'basel': ")
    assert "it was given float32[4, 2], float32[4, 1] (tried" in str(said)
    assert said.__cause__ is not None


@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (
            lambda outputs, targets: 0.5,
            "it returned float: expected one floating number, a tensor without axes; it was given float32[4, 1]",
        ),
        (lambda outputs, targets: (outputs - targets).square(), "it returned float32[4, 1]: expected one floating number"),
        (lambda outputs, targets: None, "it returned None: expected one floating number"),
        (lambda outputs, targets: (outputs > targets).sum(), "it returned int64[]: expected one floating number"),
        (lambda outputs, targets: F.mse_loss(outputs.detach(), targets), "does not depend on the model's parameters"),
    ],
)
def test_a_loss_is_one_number_that_depends_on_the_parameters(loss, fault):
    said = str(tried(task_of(loss=loss)))

    assert said.startswith("task 'stroke', loss, site 'basel': ")
    assert fault in said


class Pair(nn.Linear):
    """Two outputs in evaluation, one in training."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if self.training else (outputs, outputs)


def test_outputs_of_evaluation_are_a_tensor_with_a_row_for_each_row():
    assert "model, site 'basel': TypeError: it returned tuple: expected a tensor" in str(tried(task_of(model=lambda: Pair(3, 1))))
    flat = nn.Flatten(start_dim=0)
    said = str(tried(task_of(model=lambda: nn.Sequential(nn.Linear(3, 2), flat), loss=lambda outputs, targets: outputs.mean())))

    assert "it returned float32[12] for float32[6, 3]: expected as many rows" in said


@pytest.mark.parametrize(
    ("metric", "fault"),
    [
        (lambda outputs, targets: None, "it returned None: expected one number; it was given float32[6, 1], float32[6, 1]"),
        (lambda outputs, targets: "good", "it returned str: expected one number"),
        (lambda outputs, targets: "0.5", "it returned str: expected one number"),
        (lambda outputs, targets: outputs, "it returned float32[6, 1]: expected one number"),
        (lambda outputs, targets: outputs.numpy(), "it returned an array float32[6, 1]: expected one number"),
        (lambda outputs, targets: 1j, "it returned complex: expected one number"),
        (lambda outputs, targets: {"auroc": 0.5}, "it returned dict: expected one number"),
        (lambda outputs, targets: outputs.no_such_thing, "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    ],
)
def test_a_metric_is_one_number(metric, fault):
    task = task_of(metrics={"gain": metric})
    assert str(tried(task)).startswith("task 'stroke', metric 'gain', site 'basel': ")
    population = population_of(task)
    population.train(2)
    with pytest.raises(TaskError) as caught:
        population.evaluate()

    assert str(caught.value).startswith("task 'stroke', metric 'gain', site 'basel', round 2: ")
    assert fault in str(caught.value)
    assert (caught.value.function, caught.value.site, caught.value.round) == ("metric 'gain'", "basel", 2)


@pytest.mark.parametrize(
    "value", [2, 2.0, torch.tensor(2.0), torch.tensor(2), np.float32(2), np.int64(2), np.array(2.0), torch.tensor([2.0])]
)
def test_numbers_of_any_kind_are_metrics(value):
    found = population_of(task_of(metrics={"gain": lambda outputs, targets: value})).evaluate()[0]["gain"]

    assert (found, type(found)) == (2.0, float)
    assert population_of(task_of(metrics={"gain": lambda outputs, targets: True})).evaluate()[0]["gain"] == 1.0


def test_probabilities_have_the_shape_of_the_outputs():
    said = str(tried(task_of(probabilities=lambda outputs: outputs.sum())))

    assert said.startswith("task 'stroke', probabilities, site 'basel': it returned float32[] for float32[6, 1]: expected the same shape")


def test_a_start_that_does_not_fit_the_model_is_found():
    task = task_of()
    said = str(tried(replace(task, sites=[replace(site, start=torch.zeros(3)) for site in task.sites[:2]])))

    assert "task 'stroke':" in said
    assert "site 'bern': start has 3 parameters, the model has 4" in said


def test_a_metric_is_tried_on_all_rows_where_a_part_of_them_lacks_a_class():
    def needs_the_last_row(outputs, targets):
        seen.append(len(targets))
        if not (targets == 7).any():
            raise ValueError("only one class")
        return 0.5

    seen = []
    inputs, targets = rows(1001)
    targets[998] = 7
    task = task_of(metrics={"gain": needs_the_last_row})
    task = replace(task, sites=[replace(site, test=(inputs, targets)) for site in task.sites])
    make_plan(experiment_from({"task": {"name": "stroke:stroke"}}), task)

    assert seen == [256, 1001] * 3


def classes(coding, num_rows=NUM_ROWS):
    return torch.tensor([coding[row % 2] for row in range(num_rows)])[:, None].float()


def labelled(*codings, **fields):
    """A task of two classes whose sites code them in these ways, in training and test rows."""
    sites = [
        Site(name=f"site-{place:04d}", train=(rows()[0], classes(train)), test=(rows()[0], classes(test)))
        for place, (train, test) in enumerate(codings)
    ]
    whole = {"loss": F.binary_cross_entropy_with_logits, "metrics": {"auroc": auroc}, "sites": sites, **fields}
    return task_of(**whole)


@pytest.mark.parametrize(
    ("coding", "found"), [((1, 2), "1 and 2"), ((-1, 1), "-1 and 1"), ((0, 255), "0 and 255"), ((0, 0.9), "0 and 0.9")]
)
def test_test_labels_that_only_the_last_site_codes_otherwise_are_found(coding, found):
    said = str(tried(labelled(((0, 1), (0, 1)), ((0, 1), (0, 1)), ((0, 1), coding))))

    assert said == f"task 'stroke', metric 'auroc', site 'site-0002': targets {found}: expected 0 and 1 (tried before the first round)"


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(), partial(F.binary_cross_entropy_with_logits)])
def test_training_labels_that_only_the_last_site_codes_otherwise_are_found(loss):
    said = str(tried(labelled(((0, 1), (0, 1)), ((1, 2), (0, 1)), loss=loss)))

    assert said == "task 'stroke', loss, site 'site-0001': targets 1 and 2: expected 0 and 1 (tried before the first round)"


def test_soft_labels_may_be_trained_on():
    make_plan(experiment_from({"task": {"name": "stroke:stroke"}}), labelled(*[((0.1, 0.9), (0, 1))] * 2))


def test_one_row_of_a_thousand_that_is_no_class_is_found():
    targets = torch.tensor([row % 2 for row in range(1000)])
    targets[501] = 7
    task = task_of(model=lambda: nn.Linear(3, 2), loss=F.cross_entropy, metrics={"accuracy": accuracy})
    sites = [replace(site, train=(torch.zeros(1000, 3), targets), test=(torch.zeros(1000, 3), targets)) for site in task.sites]
    said = tried(replace(task, sites=sites)).findings

    told = "site 'basel': targets 0, 1 and 7: expected 0 and 1 (tried before the first round; and 2 more sites)"
    assert said == (f"task 'stroke', loss, {told}", f"task 'stroke', metric 'accuracy', {told}")


def test_all_findings_are_told_at_once_and_alike_ones_are_summed_up():
    codings = [((1, 2), (1, 2))] * 991 + [((0, 1), (0, 1))] * 9 + [((0, 1), (-1, 1))]
    said = tried(labelled(*codings, metrics={"auroc": auroc, "accuracy": accuracy})).findings

    assert len(said) == 5
    assert said[0].endswith("loss, site 'site-0000': targets 1 and 2: expected 0 and 1 (tried before the first round; and 990 more sites)")
    assert any("metric 'accuracy', site 'site-1000': targets -1 and 1" in finding for finding in said)


def test_a_table_of_sites_is_looked_at_as_a_whole():
    num_sites = 5000
    targets = classes((0, 1), 4 * num_sites)
    targets[4 * 4321 + 3] = 2
    split = Split(starts=torch.arange(num_sites + 1) * 4)
    names = [f"node-{place:04d}" for place in range(num_sites)]
    table = SiteTable(names=names, inputs=torch.zeros(4 * num_sites, 3), targets=targets, train=split, test=split)
    task = task_of(loss=F.binary_cross_entropy_with_logits, metrics={"auroc": auroc}, sites=table)

    assert [finding.partition(": ")[0] for finding in tried(task).findings] == [
        "task 'stroke', loss, site 'node-4321'",
        "task 'stroke', metric 'auroc', site 'node-4321'",
    ]


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        nn.L1Loss(),
        lambda outputs, targets: F.huber_loss(input=outputs, target=targets),
        lambda outputs, targets: (outputs - targets).square().mean(),
        lambda outputs, targets: F.softplus(outputs).mean() - (outputs.sigmoid() * targets).mean(),
    ],
)
@pytest.mark.parametrize("flat", ["targets", "outputs"])
def test_a_loss_that_compares_every_row_with_every_row_is_refused(loss, flat):
    model = (lambda: nn.Linear(3, 1)) if flat == "targets" else (lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    task = task_of(loss=loss, model=model)
    if flat == "targets":
        sites = [replace(site, train=(site.train[0], site.train[1][:, 0])) for site in task.sites]
        task = replace(task, sites=sites)
    shapes = "float32[4, 1], targets float32[4]" if flat == "targets" else "float32[4], targets float32[4, 1]"

    assert f"loss, site 'basel': outputs are {shapes}: every row's output is compared with every row's target" in str(tried(task))


def sites_after_one_of_one_row(**first):
    """Sites whose targets are flat; the first is small."""
    (x, y), (other_x, other_y) = rows(), rows()
    sizes = {"train": NUM_ROWS, "test": NUM_ROWS, **first}
    small = Site(name="aarau", **{part: (other_x[:size], other_y[:size, 0]) for part, size in sizes.items()})
    return [small, Site(name="basel", train=(x, y[:, 0]), test=(x, y[:, 0]))]


def test_a_loss_that_compares_every_row_with_every_row_is_found_behind_a_site_of_one_row():
    task = task_of(loss=lambda outputs, targets: ((outputs - targets) ** 2).mean(), sites=sites_after_one_of_one_row(train=1))
    assert "loss, site 'basel': outputs are float32[4, 1], targets float32[4]: every row's" in str(tried(task))


def test_a_metric_that_compares_every_row_with_every_row_is_found_behind_a_site_of_one_row():
    metrics = {name: lambda outputs, targets: ((outputs - targets) ** 2).mean() for name in ("error", "again")}
    task = task_of(loss=lambda o, t: F.mse_loss(o[:, 0], t), sites=sites_after_one_of_one_row(test=1), metrics=metrics)
    said = str(tried(task))
    for name in metrics:
        assert f"metric '{name}', site 'basel': outputs are float32[6, 1], targets float32[6]: every row's" in said


def test_a_metric_that_compares_every_row_with_every_row_is_refused():
    task = task_of(metrics={"error": lambda outputs, targets: F.mse_loss(outputs[:, 0], targets).item()})
    said = tried(task).findings

    assert len(said) == 1
    assert "metric 'error', site 'basel': outputs are float32[6, 1], targets float32[6, 1]: every row's" in said[0]


def flat_targets(task):
    return replace(task, sites=[replace(site, test=(site.test[0], site.test[1][:, 0])) for site in task.sites])


@pytest.mark.parametrize("flat", ["targets", "outputs"])
@pytest.mark.parametrize(
    "metric",
    [
        lambda o, t: ((o.numpy() > 0) == (t.numpy() > 0)).mean(),
        lambda o, t: np.square(np.subtract(o.numpy(), t.numpy())).mean(),
    ],
)
def test_a_metric_in_numpy_that_compares_every_row_with_every_row_is_refused(metric, flat):
    def unlike():
        x, y = rows(20)
        return x, torch.where(torch.arange(20)[:, None] % 3 == 0, y.abs(), -y.abs())

    sites = [Site(name=name, train=rows(), test=unlike()) for name in ("basel", "bern")]
    model = (lambda: nn.Linear(3, 1)) if flat == "targets" else (lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    task = task_of(model=model, loss=lambda o, t: F.mse_loss(o.reshape(-1), t.reshape(-1)), metrics={"error": metric}, sites=sites)
    shapes = "float32[20, 1], targets float32[20]" if flat == "targets" else "float32[20], targets float32[20, 1]"

    said = str(tried(flat_targets(task) if flat == "targets" else task))
    assert f"metric 'error', site 'basel': outputs are {shapes}: every row's output is compared with every row's target" in said


@pytest.mark.parametrize(
    "metric",
    [
        lambda o, t: np.square(o.numpy()[:, 0] - t.numpy()).mean(),
        lambda o, t: np.square(o.numpy()[..., 0] - t.numpy()).mean(),
        lambda o, t: np.square(o.numpy().mean(-1) - t.numpy()).mean(),
        lambda o, t: (np.sign(o.numpy() - o.numpy().T) == np.sign(t.numpy()[:, None] - t.numpy()[None])).mean(),
        lambda o, t: o.numpy().mean() - t.numpy().mean(),
        lambda _o, _t: np.random.default_rng().random(),
        lambda _o, _t: float("nan"),
    ],
)
def test_a_metric_in_numpy_that_minds_the_shape_is_taken(metric):
    task = flat_targets(task_of(metrics={"error": metric}))
    make_plan(experiment_from({"task": {"name": "stroke:stroke"}}), task)


def test_a_loss_over_risk_sets_may_compare_all_times_with_all():
    def cox(outputs, targets):
        at_risk = targets >= targets[:, None]
        return ((at_risk.float() @ outputs.exp()).log() - outputs).mean()

    task = task_of(loss=cox)
    sites = [replace(site, train=(site.train[0], site.train[1][:, 0])) for site in task.sites]
    make_plan(experiment_from({"task": {"name": "stroke:stroke"}}), replace(task, sites=sites))


def test_a_loss_that_is_no_number_at_the_last_site_is_refused():
    task = task_of(loss=lambda outputs, targets: (outputs.mean() * 0 + targets.mean()).log())
    good = [replace(site, train=(site.train[0], torch.ones(NUM_ROWS, 1))) for site in task.sites[:2]]
    bad = replace(task.sites[2], train=(task.sites[2].train[0], -torch.ones(NUM_ROWS, 1)))
    said = str(tried(replace(task, sites=[*good, bad])))

    assert "task 'stroke', loss, site 'zurich': it returned nan at the start: expected a finite number" in said


def test_trying_a_task_draws_nothing_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    plan = make_plan(
        experiment_from({"task": {"name": "stroke:stroke"}}),
        task_of(model=lambda: model, metrics={"chance": lambda outputs, targets: torch.rand(1)}),
    )

    assert torch.equal(torch.random.get_rng_state(), before)
    assert plan.model[1].num_batches_tracked == 0
    assert plan.model[1].running_mean.tolist() == [0.0] * 4


def test_a_site_of_one_row_had_batch_normalisation_in_files_of_schema_1():
    task = task_of(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    task = replace(task, sites=[replace(task.sites[0], train=rows(1))])
    population = population_of(task, repeats_rows=True)

    assert bool(population.train(0).isfinite().all())
