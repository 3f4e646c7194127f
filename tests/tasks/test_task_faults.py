"""Faults in a user's own task: one sentence with the function, the place and the user's line, never a traceback."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import replace
from functools import partial
from textwrap import dedent

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.algorithms import DPSGD
from p2pfl.cli import main
from p2pfl.errors import ConfigError, DataError, P2PFLError, TaskError
from p2pfl.evaluation.prediction import predict_file
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import make_plan
from p2pfl.experiment.sites import load_sites
from p2pfl.governance.names import checked_name
from p2pfl.simulator import simulate
from p2pfl.tasks import Site, SiteTable, Split, Task, accuracy, auroc, load_task
from p2pfl.training import OptimizerSpec, Population, Recipe, build_model

NUM_ROWS = 6
GENERATOR = torch.Generator().manual_seed(1)


def rows(num_rows=NUM_ROWS, features=3):
    return torch.randn(num_rows, features, generator=GENERATOR), torch.randn(num_rows, 1, generator=GENERATOR)


MARK = "import p2pfl\n@p2pfl.task\n"
MARKED = f"{MARK}def stroke(): ...\n"


def task_of(**fields):
    sites = [Site(name=name, train=rows(), test=rows()) for name in ("basel", "bern", "zurich")]
    whole = {"name": "stroke", "model": lambda: nn.Linear(3, 1), "loss": F.mse_loss, "metrics": {}, "sites": sites, **fields}
    return Task(**whole)


def tried(task, **overrides):
    """What make_plan says of a task."""
    experiment = experiment_from({"task": {"name": "stroke:stroke"}, "algorithm": {"batch_size": 4}, **overrides})
    with pytest.raises(ConfigError) as caught:
        make_plan(experiment, task)
    return caught.value


def population_of(task, *, batch_size=4, repeats_rows=False):
    recipe = Recipe(
        algorithm=DPSGD(),
        optimizer=OptimizerSpec(lr=0.01),
        batch_size=batch_size,
        rounds=5,
        local_steps=1,
        seed=0,
        repeats_rows=repeats_rows,
    )
    return Population(task, task.sites, range(len(task.sites)), build_model(task, torch.float32, 0), recipe)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a user's and gives its task's name; every name is used once, as modules stay imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    written = []

    def write(source):
        name = f"users_{tmp_path.name}_{len(written)}"
        (tmp_path / f"{name}.py").write_text(dedent(source))
        written.append(name)
        return f"{name}:stroke"

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "fault", "line"),
    [
        ("def stroke(:\n", "cannot be imported: SyntaxError: invalid syntax", 1),
        (f"\nraise ValueError('which year?')\n{MARKED}", "cannot be imported: ValueError: which year?", 2),
        (f"import sys\nsys.exit(3)\n{MARKED}", "cannot be imported: SystemExit: 3", 2),
        (f"from math import no_such_thing\n{MARKED}", "cannot be imported: ImportError: cannot import name 'no_such_thing'", 1),
        (f"import not_there_at_all.deep\n{MARKED}", "it needs the module not_there_at_all, which is not installed", 1),
        (f"{MARK}def stroke():\n    return {{}}['age']\n", "the function failed: KeyError: 'age'", 4),
        (f"{MARK}def stroke():\n    raise SystemExit\n", "the function failed: SystemExit", 4),
        (
            f"import ast\n{MARK}def stroke():\n    return ast.literal_eval('(')\n",
            "the function failed: SyntaxError: '(' was never closed",
            5,
        ),
        (f"import json\n{MARK}def stroke():\n    return json.loads('{{')\n", "the function failed: JSONDecodeError: Expecting", 5),
        (f"{MARK}def stroke():\n    return 3\n", "it returned int, expected p2pfl.tasks.Task", None),
        ("stroke = iter\n", "has no function stroke", None),
    ],
)
def test_a_module_that_cannot_be_loaded_is_told_with_its_line(module, source, fault, line):
    name = module(source)
    with pytest.raises(ConfigError) as caught:
        load_task(name, allow_tasks=[name])

    assert str(caught.value).startswith(f"task.name = {name!r}: ")
    assert fault in str(caught.value)
    if line is not None:
        assert str(caught.value).endswith(f"{name.partition(':')[0]}.py:{line})")
        assert caught.value.__cause__ is not None


def test_what_a_task_says_on_purpose_is_left_as_it_is(module):
    at_import = module("from p2pfl.errors import StoreError\nraise StoreError('the archive is closed')\n" + MARKED)
    when_made = module(f"from p2pfl.errors import DataError\n{MARK}def stroke():\n    raise DataError('no rows', 'ucl.csv')\n")

    with pytest.raises(P2PFLError, match=r"^the archive is closed$"):
        load_task(at_import, allow_tasks=[at_import])
    with pytest.raises(DataError, match=r"^ucl.csv: no rows$"):
        load_task(when_made, allow_tasks=[when_made])


@pytest.mark.parametrize("source", [f"raise KeyboardInterrupt\n{MARKED}", f"{MARK}def stroke():\n    raise KeyboardInterrupt\n"])
def test_an_interrupt_in_a_task_stays_an_interrupt(module, source):
    name = module(source)
    with pytest.raises(KeyboardInterrupt):
        load_task(name, allow_tasks=[name])


def test_an_interrupt_in_a_loss_stays_an_interrupt():
    def loss(outputs, targets):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        population_of(task_of(loss=loss))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": 3}, "name is int: expected a text"),
        ({"model": nn.Linear(3, 1)}, "model is Linear: expected a function that makes a torch.nn.Module"),
        ({"model": 3}, "model is int: expected a function that makes a torch.nn.Module"),
        ({"loss": "mse"}, "loss is str: expected a function of outputs and targets, or None"),
        ({"metrics": [F.mse_loss]}, "metrics is a list of function: expected a mapping"),
        ({"metrics": {"auroc": 0.5}}, "metrics['auroc'] is float: expected a function of outputs and targets"),
        ({"metrics": {3: F.mse_loss}}, "metrics has the key 3: expected a text"),
        ({"sites": {"ucl": 3}}, "sites is dict: expected a list of p2pfl.tasks.Site"),
        ({"sites": [rows(), 3]}, "sites is a list of int, tuple: expected a list of p2pfl.tasks.Site"),
        ({"features": "age"}, "features is str: expected a tuple of names, or None"),
        ({"probabilities": "softmax"}, "probabilities is str: expected a function, or None"),
        ({"losses": "log_loss"}, "losses is str: expected a frozenset of metrics' names"),
        ({"notes": "look here"}, "notes is str: expected a tuple of sentences"),
    ],
)
def test_fields_of_a_task_are_what_they_say(fields, fault):
    with pytest.raises(DataError) as caught:
        task_of(**fields)

    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"start": [0.0, 1.0]}, "start is list: expected one floating vector"),
        ({"prepare": 3}, "prepare is int: expected a function, or None"),
        ({"groups": ["f", "m"]}, "groups is list: expected a mapping"),
        ({"groups": {"sex": 3}}, "groups['sex'] is int: expected a list, one value for each test row"),
        ({"test": 3, "groups": {"sex": ["f"]}}, "test is int: expected a pair of tensors"),
        ({"name": 3}, "name = 3: expected the member's name"),
    ],
)
def test_fields_of_a_site_are_what_they_say(fields, fault):
    with pytest.raises(DataError) as caught:
        Site(**{"name": "ucl", "train": None, "test": None, **fields})

    assert fault in str(caught.value)


NAMES = ["ucl", "a.b", "St_Mary-1", "-", "x" * 64, "", "a/0", "../x", "..", ".", ".x", "a b", "Charité", "a\n", "a\\b", "a\0", "x" * 65]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_sites_name_is_what_a_card_allows_and_so_a_files_name(name):
    try:
        checked_name(name)
    except ValueError:
        with pytest.raises(DataError, match="expected the member's name in the roster, 1 to 64 of"):
            Site(name=name, train=None, test=None)
        assert NAMES.index(name) > 4
    else:
        assert Site(name=name, train=None, test=None).name == name


class Frozen(nn.Module):
    """Whole numbers for parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


class Locked(nn.Linear):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.lock = threading.Lock()


def broken():
    raise ZeroDivisionError("in the making")


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (broken, f"task 'stroke', model: ZeroDivisionError: in the making ({__file__}:"),
        (lambda: F.relu, "task 'stroke', model: it returned function: expected a torch.nn.Module"),
        (nn.ReLU, "task 'stroke', model: the model has no parameters"),
        (Frozen, "task 'stroke', model: none of the model's parameters requires a gradient: there is nothing to learn"),
        (Complex, "task 'stroke', model: parameter phase is complex: expected a floating dtype"),
        (Locked, "task 'stroke', copy of the model: TypeError: cannot pickle '_thread.lock' object"),
        (lambda: nn.LazyLinear(1), "task 'stroke', model: it has lazy layers"),
        (
            lambda: nn.Linear(4, 1),
            "task 'stroke', model, site 'basel': RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x3 and 4x1)",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_found_before_the_first_round(model, fault):
    said = tried(task_of(model=model))

    assert str(said).startswith(fault)
    assert str(said).endswith("(tried before the first round)")


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


def test_a_loss_that_fails_in_a_later_round_names_site_and_round():
    def loss(outputs, targets):
        if armed:
            raise RuntimeError("nonsense came up")
        return F.mse_loss(outputs, targets)

    armed = []
    population = population_of(task_of(loss=loss))
    population.train(0)
    assert population.row_by_row is None
    armed.append(True)
    with pytest.raises(TaskError) as caught:
        population.train(3)

    assert str(caught.value).startswith(f"task 'stroke', loss, site 'basel', round 3: RuntimeError: nonsense came up ({__file__}:")
    assert str(caught.value).endswith("); it was given float32[4, 1], float32[4, 1]")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_fault_at_one_site_is_told_of_that_site():
    def loss(outputs, targets):
        if bool((targets > 50).any()):
            raise ValueError("a stay of 50 days")
        return F.mse_loss(outputs, targets)

    task = task_of(loss=loss)
    long = (rows()[0], torch.full((NUM_ROWS, 1), 99.0))
    population = population_of(replace(task, sites=[*task.sites[:2], replace(task.sites[2], train=long)]))
    assert population.row_by_row.startswith("the model cannot be vectorised: ")
    with pytest.raises(TaskError, match=r"^task 'stroke', loss, site 'zurich', round 1: ValueError: a stay of 50 days"):
        population.train(1)


def test_what_only_vectorising_cannot_do_goes_row_by_row_whatever_it_raises():
    def by_numpy(outputs, targets):
        if float(outputs.detach().mean()) > 1e6:  # a value of a vectorised row cannot be asked for
            raise AssertionError
        return F.mse_loss(outputs, targets)

    def by_type(outputs, targets):
        if torch._C._functorch.is_functorch_wrapped_tensor(outputs):
            raise TypeError("a kind of tensor that I do not know")
        return F.mse_loss(outputs, targets)

    alone, strict, together = (population_of(task_of(loss=loss)) for loss in (by_numpy, by_type, F.mse_loss))
    assert alone.row_by_row.startswith("the model cannot be vectorised: ")
    assert strict.row_by_row == "the model cannot be vectorised: a kind of tensor that I do not know"
    assert together.row_by_row is None
    assert bool(alone.train(0).isfinite().all())


def test_what_vectorising_cannot_do_later_goes_on_row_by_row_with_the_same_figures():
    def loss(outputs, targets):
        if late and torch._C._functorch.is_functorch_wrapped_tensor(outputs):
            raise RuntimeError("no batching rule")
        return F.mse_loss(outputs, targets)

    late = []
    task = task_of(loss=loss)
    population, plain = population_of(task), population_of(replace(task, loss=F.mse_loss))
    late.append(True)
    found, expected = population.train(0), plain.train(0)

    assert population.row_by_row == "the model cannot be vectorised: no batching rule"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(population.state["x"], plain.state["x"], rtol=1e-5, atol=1e-6)


def test_a_model_that_fails_in_evaluation_names_the_site_and_the_shapes():
    task = task_of()
    population = population_of(replace(task, sites=[replace(site, test=rows(5, features=2)) for site in task.sites]))
    population.train(0)
    with pytest.raises(TaskError) as caught:
        population.evaluate()

    assert str(caught.value).startswith("task 'stroke', model, site 'basel', round 0: RuntimeError: mat1 and mat2 shapes")
    assert str(caught.value).endswith("it was given float32[5, 2]")


def test_what_a_loss_says_on_purpose_is_left_as_it_is():
    def loss(outputs, targets):
        if armed:
            raise DataError("no consent", "ucl.csv")
        return F.mse_loss(outputs, targets)

    armed = []
    population = population_of(task_of(loss=loss))
    armed.append(True)

    with pytest.raises(DataError, match=r"^ucl.csv: no consent$"):
        population.train(0)


def test_what_a_metric_says_on_purpose_is_left_as_it_is():
    def metric(outputs, targets):
        raise DataError("no consent", "ucl.csv")

    with pytest.raises(DataError, match=r"^ucl.csv: no consent$"):
        population_of(task_of(metrics={"gain": metric})).evaluate()


def test_the_line_is_the_innermost_of_the_users_own(module):
    name = module("""
        import json
        import p2pfl
        def parse(text):
            return json.loads(text)
        @p2pfl.task
        def stroke():
            return parse("{")
        """)

    with pytest.raises(ConfigError, match=r"\.py:5\)$"):
        load_task(name, allow_tasks=[name])


def test_the_traceback_is_logged_for_those_who_ask(caplog):
    with caplog.at_level(logging.INFO, logger="p2pfl"):
        tried(task_of(metrics={"gain": lambda outputs, targets: 1 / 0}))

    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text


GOOD = """
import torch
from torch import nn
from torch.nn import functional as F
from p2pfl.tasks import Site, Task, task

ROWS = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(8, 1)
CALLS = []

def loss(outputs, targets):
    return F.mse_loss(outputs, targets)

def prepare(raw):
    return torch.tensor(raw)

def probabilities(outputs):
    return outputs.sigmoid()

def mse(outputs, targets):
    return F.mse_loss(outputs, targets)

@task
def stroke():
    sites = [Site(name=name, train=ROWS, test=ROWS, prepare=lambda raw: prepare(raw)) for name in ("a", "b")]
    return Task(name="stroke", model=lambda: nn.Linear(2, 1), loss=loss, metrics={"mse": mse}, sites=sites,
                features=("age", "weight"), probabilities=lambda outputs: probabilities(outputs))
"""


@pytest.fixture
def p2pfl(capfd, monkeypatch):
    """Runs a command in this process; its exit code and what it said on standard error."""

    def p2pfl(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capfd.readouterr().err

    return p2pfl


def experiment_with(module, tmp_path, source):
    """The file, and the task that it names."""
    file, name = tmp_path / "stroke.yaml", module(source)
    file.write_text(f"task: {{name: '{name}'}}\nrounds: 3\nstop: null\nevaluate_every: 1\nbaselines: []\n")
    return file, name


def test_a_broken_module_ends_a_command_with_2_and_no_traceback(module, tmp_path, p2pfl):
    file, name = experiment_with(module, tmp_path, GOOD.replace("import torch\n", "import torhc\n", 1))
    code, said = p2pfl("simulate", file, "--allow-task", name)

    assert code == 2
    assert "it needs the module torhc, which is not installed" in said
    assert "Traceback" not in said


def test_a_misfit_ends_a_command_with_2_before_there_is_a_run(module, tmp_path, p2pfl):
    file, name = experiment_with(module, tmp_path, GOOD.replace("nn.Linear(2, 1)", "nn.Linear(5, 1)"))
    code, said = p2pfl("simulate", file, "--allow-task", name)

    assert code == 2
    assert "task 'stroke', model, site 'a': RuntimeError: mat1 and mat2 shapes cannot be multiplied" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_fails_in_the_run_ends_a_command_with_1(module, tmp_path, p2pfl):
    source = GOOD.replace(
        "def mse(outputs, targets):\n",
        "def mse(outputs, targets):\n    CALLS.append(outputs)\n    if len(CALLS) == 6: raise OSError('disk full')\n",
    )
    file, name = experiment_with(module, tmp_path, source)
    code, said = p2pfl("simulate", file, "--allow-task", name)

    assert code == 1
    assert "p2pfl: task 'stroke', metric 'mse', site 'b', round 1: OSError: disk full (" in said
    assert ".py:21); it was given float32[8, 1], float32[8, 1]" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("return torch.tensor(raw)", "return raw", "prepare, site 'a': it returned an array float64[2, 2] for an array float64[2, 2]"),
        ("return torch.tensor(raw)", "return torch.tensor(raw)[:1]", "prepare, site 'a': it returned float64[1, 2] for"),
        ("return torch.tensor(raw)", "return raw.no", "prepare, site 'a': AttributeError: 'numpy.ndarray' object has no attribute 'no'"),
        ("return torch.tensor(raw)", "return torch.tensor(raw)[:, :1]", "model, site 'a': RuntimeError: mat1 and mat2 shapes"),
        ("return outputs.sigmoid()", "return outputs.no", "probabilities, site 'a': AttributeError: 'Tensor' object has no attribute 'no'"),
        ("return outputs.sigmoid()", "return outputs.sum()", "probabilities, site 'a': it returned float32[] for float32[2, 1]"),
    ],
)
def test_what_fails_in_a_prediction_is_named(module, tmp_path, old, new, fault):
    file, name = experiment_with(module, tmp_path, GOOD)
    run = simulate(file, out=tmp_path / "run", allow_tasks=[name])
    (tmp_path / "new.csv").write_text("age,weight\n50,70\n60,80\n")
    assert len(predict_file(run.path, "a", tmp_path / "new.csv", [name])) == 2
    users = sys.modules[run.experiment.task.name.partition(":")[0]]
    exec(GOOD.replace(old, new), users.__dict__)
    with pytest.raises(TaskError) as caught:
        predict_file(run.path, "a", tmp_path / "new.csv", [name])

    assert str(caught.value).startswith(f"task 'stroke', {fault}")


def test_rows_that_cannot_be_prepared_are_named_by_the_lines_of_their_file(module, tmp_path):
    file, name = experiment_with(module, tmp_path, GOOD)
    run = simulate(file, out=tmp_path / "run", allow_tasks=[name])
    (tmp_path / "new.csv").write_text('note,age,weight\n\n"two\nlines",50,70\n-,60,80\n')
    users = sys.modules[run.experiment.task.name.partition(":")[0]]
    faults = ["row 1, weight = 80: expected less", "row 0, age = 50: expected less", "expected other rows"]
    exec(GOOD.replace("return torch.tensor(raw)", f"from p2pfl.errors import DataError; raise DataError({faults})"), users.__dict__)
    with pytest.raises(DataError) as caught:
        predict_file(run.path, "a", tmp_path / "new.csv", [name])

    assert caught.value.place == str(tmp_path / "new.csv")
    assert caught.value.findings == ("line 5, weight = 80: expected less", "line 4, age = 50: expected less", "expected other rows")


def test_what_make_plan_takes_of_a_module_is_what_the_module_gives(module):
    name = module(GOOD)
    experiment = experiment_from({"task": {"name": name}})

    assert make_plan(experiment, load_sites(experiment, allow_tasks=[name])).layout.size == 3
