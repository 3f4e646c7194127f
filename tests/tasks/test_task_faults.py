"""Faults in a user's own task: one sentence with the function, the place and the user's line, never a traceback."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import replace
from textwrap import dedent

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.algorithms import DPSGD
from p2pfl.cli import main
from p2pfl.errors import ConfigError, DataError, P2PFLError, TaskError
from p2pfl.evaluation.results import predict_file
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.governance.names import checked_name
from p2pfl.simulator import simulate
from p2pfl.tasks import Site, Task, load_task
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
