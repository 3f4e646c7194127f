import logging
import sys

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.errors import ConfigError, DataError
from p2pfl.params import Layout
from p2pfl.tasks import TASKS, Site, SiteTable, Task, load_task

ROWS = (torch.zeros(3, 2), torch.zeros(3, 1))


def task_of(*sites, **fields):
    return Task(**{"name": "t", "model": lambda: nn.Linear(2, 1), "loss": nn.functional.mse_loss, "metrics": {}, "sites": sites, **fields})


def test_a_site_names_all_its_faults_at_once():
    with pytest.raises(DataError) as caught:
        Site(
            name="ucl",
            train=(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2, 1)),
            test=(torch.zeros(3, 1), torch.zeros(2, 1)),
            groups={"sex": ["f"]},
            start=torch.zeros(2, 2),
        )

    assert caught.value.place == "site 'ucl'"
    assert caught.value.findings == (
        "train inputs: row 1 has a value that is not finite",
        "test has 3 rows of inputs and 2 of targets: expected as many",
        "groups['sex'] has 1 values: expected one for each of the 3 test rows",
        "start is float32[2, 2]: expected one floating vector (P,)",
    )


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"train": (torch.zeros(0, 2), torch.zeros(0, 1))}, "train has no rows"),
        ({"train": [torch.zeros(1), torch.zeros(1)]}, "train is list: expected a pair of tensors"),
        ({"train": (torch.tensor(1.0), torch.zeros(1))}, "train inputs are one number"),
        ({"train": (torch.zeros(1), torch.tensor([float("inf")]))}, "train targets: row 0"),
        ({"start": torch.tensor([float("inf")])}, "start has values that are not finite"),
        ({"name": ""}, "name = ''"),
    ],
)
def test_a_site_that_cannot_be_is_refused(fields, fault):
    with pytest.raises(DataError, match=fault):
        Site(**{"name": "a", "train": None, "test": None, **fields})


def test_a_task_names_all_its_faults_at_once():
    with pytest.raises(DataError) as caught:
        task_of(
            Site(name="a", train=ROWS, test=ROWS),
            Site(name="a", train=(torch.zeros(1, 3), torch.zeros(1, 1)), test=(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))),
            Site(name="b", train=None, test=None),
            losses=frozenset({"mae"}),
            metrics={"auroc": lambda outputs, targets: 0.5},
            dtype="float16",
        )

    assert caught.value.findings == (
        "2 sites are called 'a': expected names that differ",
        "site 'b' has train = None: a task with a loss needs rows to train on",
        "train inputs of site 'a' are float32[1, 3], of site 'a' float32[3, 2]",
        "test targets of site 'a' are int64[1], of site 'a' float32[3, 1]",
        "losses names 'mae': expected one of auroc",
        "dtype = 'float16': expected one of float32, float64",
    )


def test_a_task_without_sites_is_refused():
    with pytest.raises(DataError, match="sites is empty"):
        task_of()


def test_breast_cancer_uses_each_of_the_569_patients_once():
    task = load_task("breast-cancer", nodes=7, seed=3)
    assert [site.name for site in task.sites] == [f"hospital-{i}" for i in range(7)]

    assert sum(len(site.train[0]) + len(site.test[0]) for site in task.sites) == 569
    assert sum(int(site.train[1].sum() + site.test[1].sum()) for site in task.sites) == 357


@pytest.mark.parametrize("seed", range(10))
def test_breast_cancer_has_both_classes_in_every_test_set(seed):
    task = load_task("breast-cancer", seed=seed)

    assert len(task.sites) == 5
    assert task.notes == ()
    assert all(set(site.test[1].flatten().tolist()) == {0.0, 1.0} for site in task.sites)


def test_features_are_standardised_alike_at_every_hospital_by_the_reference():
    sites = load_task("breast-cancer").sites
    inputs = torch.cat([part[0] for site in sites for part in (site.train, site.test)]).double()

    assert len(inputs) == 569
    torch.testing.assert_close(inputs.mean(0), torch.zeros(30, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(30, dtype=torch.float64), atol=1e-5, rtol=0)


def test_features_are_standardised_by_the_sites_own_training_rows_where_asked():
    for site in load_task("breast-cancer", standardise="site").sites:
        inputs = site.train[0].double()

        torch.testing.assert_close(inputs.mean(0), torch.zeros(30, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(inputs.std(0, correction=1), torch.ones(30, dtype=torch.float64), atol=1e-6, rtol=0)


def test_prepare_makes_of_raw_rows_what_the_site_trains_on():
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer().data
    task = load_task("breast-cancer")
    prepared = {tuple(row) for site in task.sites[:1] for row in site.prepare(raw).tolist()}

    assert task.features[0] == "mean radius"
    assert {tuple(row) for row in task.sites[0].train[0].tolist()} <= prepared


def test_prepare_names_the_cell_that_is_no_number():
    task = load_task("breast-cancer")
    raw = np.ones((2, 30))
    raw[1, 2] = np.nan

    with pytest.raises(DataError, match="row 1, mean perimeter = nan: expected a finite number"):
        task.sites[0].prepare(raw)
    with pytest.raises(DataError, match=r"features of shape \[2, 29\]: expected rows of 30"):
        task.sites[0].prepare(raw[:, 1:])


@pytest.mark.parametrize("name", ["breast-cancer", "digits", "synthetic-logistic"])
def test_probabilities_have_the_outputs_shape_and_are_probabilities(name):
    task = load_task(name)
    outputs = task.model()(task.sites[0].prepare(np.zeros((4, len(task.features)))))
    probabilities = task.probabilities(outputs)

    assert probabilities.shape == outputs.shape
    assert bool(((probabilities > 0) & (probabilities < 1)).all())


def test_digits_takes_a_hidden_layer_or_none():
    assert Layout.of(load_task("digits", hidden=32).model()).size == 64 * 32 + 32 + 32 * 10 + 10
    assert Layout.of(load_task("digits", hidden=0).model()).size == 64 * 10 + 10
    assert [site.name for site in load_task("digits", nodes=12).sites][:2] == ["node-00", "node-01"]
    with pytest.raises(ConfigError, match=r"task\.hidden = -1"):
        load_task("digits", hidden=-1)


def test_quadratic_gradients_are_exact_for_any_batch_size():
    task = load_task("quadratic")
    for i, site in enumerate(task.sites, start=1):
        for batch_size in (1, 3):
            model = task.model()
            rows = torch.zeros(batch_size, dtype=torch.int64)
            task.loss(model(site.train[0][rows]), site.train[1][rows]).backward()
            slope = -(2 * i / 8) * (i - 1)  # a_i (0 - b_i)

            assert model.x.grad.item() == pytest.approx(slope, abs=1e-14)


def test_quadratic_tells_its_optimum():
    assert load_task("quadratic").sites[0].test[1].item() == pytest.approx(14 / 3, abs=1e-14)
    assert load_task("quadratic", homogeneous=True, dimension=2).sites[0].test[1].tolist() == [pytest.approx([0, 0], abs=1e-15)]
    task = load_task("quadratic", dimension=2)
    site = task.sites[0]

    assert task.losses == {"distance"}
    assert task.metrics["distance"](task.model()(site.test[0]).detach(), site.test[1]) == pytest.approx(14 / 3 * 2**0.5, rel=1e-14)


@pytest.mark.parametrize(("homogeneous", "expected"), [(False, -0.1880555), (True, 0.0)])
def test_gossip_on_the_quadratic_ends_where_the_reference_says(homogeneous, expected):
    # x <- W (x - 0.1 grad) on a ring of 8: mean error -.1880555 of the heterogeneous one, .291850921 b of the homogeneous one
    task = load_task("quadratic", homogeneous=homogeneous)
    curvature = torch.cat([site.train[0] ** 2 for site in task.sites]).flatten()
    pull = torch.cat([site.train[0] * site.train[1] for site in task.sites]).flatten()
    mixing = sum(torch.roll(torch.eye(8, dtype=torch.float64), shift, 0) for shift in (-1, 0, 1)) / 3
    x = torch.zeros(8, dtype=torch.float64)
    for _ in range(3000):
        x = mixing @ (x - 0.1 * (curvature * x - pull))
    optimum = task.sites[0].test[1].item()

    assert (x.mean() - optimum).item() == pytest.approx(expected, abs=1e-6)
    if homogeneous:
        torch.testing.assert_close(x, 0.291850921 * pull, atol=1e-9, rtol=0)


def test_averaging_starts_do_not_depend_on_how_many_nodes_there_are():
    few, many = load_task("averaging", dimension=4, nodes=3, seed=5), load_task("averaging", dimension=4, nodes=100, seed=5)

    assert many.sites[1].name == "node-01"
    assert [site.start.tolist() for site in few.sites] == [site.start.tolist() for site in many.sites[:3]]
    assert few.sites[0].start.shape == (4,) == (Layout.of(few.model()).size,)
    assert few.sites[0].start.dtype == torch.float64
    assert few.loss is None
    assert few.sites[0].start.tolist() != load_task("averaging", dimension=4, seed=6).sites[0].start.tolist()


def test_synthetic_logistic_nodes_differ_only_where_asked():
    def means(heterogeneity):
        return torch.stack([s.train[0].mean(0) for s in load_task("synthetic-logistic", samples=4000, heterogeneity=heterogeneity).sites])

    assert means(0.0).abs().max() < 5 / 4000**0.5
    assert means(1.0).abs().max() > 1
    site = load_task("synthetic-logistic", features=3, samples=7, nodes=2, seed=1).sites[1]
    assert (site.train[0].shape, site.test[0].shape) == ((7, 3), (4, 3))


@pytest.mark.parametrize(("seed", "heterogeneity"), [(0, 1.0), (2**40 + 3, 0.5), (-1, 0.0)])
def test_synthetic_logistic_draws_each_site_from_a_generator_of_its_own(seed, heterogeneity):
    task = load_task("synthetic-logistic", features=3, samples=9, nodes=5, seed=seed, heterogeneity=heterogeneity)
    shared = np.random.default_rng([seed % 2**64, 2]).standard_normal(3)

    assert isinstance(task.sites, SiteTable)
    for node, site in enumerate(task.sites):
        rng = np.random.default_rng([seed % 2**64, 3, node])
        weights = shared + heterogeneity * rng.standard_normal(3)
        raw = heterogeneity * rng.standard_normal(3) + rng.standard_normal((13, 3))
        classes = rng.random(13) < 1 / (1 + np.exp(-raw @ weights))
        assert torch.cat([site.train[0], site.test[0]]).tolist() == raw.astype(np.float32).tolist()
        assert torch.cat([site.train[1], site.test[1]]).flatten().tolist() == classes.tolist()
        assert site.prepare(raw).tolist() == raw.astype(np.float32).tolist()


def test_synthetic_sites_are_drawn_in_blocks_without_a_seam(monkeypatch):
    whole = load_task("synthetic-logistic", features=2, samples=4, nodes=7).sites
    monkeypatch.setattr("p2pfl.tasks.synthetic._DRAWN_AT_ONCE", 2 * 8 * 3)
    in_blocks = load_task("synthetic-logistic", features=2, samples=4, nodes=7).sites

    assert in_blocks.inputs.tolist() == whole.inputs.tolist()
    assert in_blocks.targets.tolist() == whole.targets.tolist()


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("quadratic", {"nodes": 0}, "nodes = 0"),
        ("averaging", {"dimension": 1.5}, r"task\.dimension = 1.5"),
        ("synthetic-logistic", {"heterogeneity": -1}, r"task\.heterogeneity = -1"),
        ("breast-cancer", {"test_share": 1}, r"task\.test_share = 1"),
        ("breast-cancer", {"nodes": 400}, "nodes = 400: expected 1 to 284"),
    ],
)
def test_values_that_cannot_be_are_refused_by_key(name, arguments, fault):
    with pytest.raises(ConfigError, match=fault):
        load_task(name, **arguments)


def test_the_same_arguments_give_the_same_rows():
    for name in ("breast-cancer", "digits", "synthetic-logistic"):
        one, other = load_task(name, seed=4), load_task(name, seed=4)
        assert all(
            torch.equal(a.train[0], b.train[0]) and torch.equal(a.test[1], b.test[1]) for a, b in zip(one.sites, other.sites, strict=True)
        )


def test_digits_says_which_sites_lack_which_digit(caplog):
    with caplog.at_level(logging.WARNING):
        task = load_task("digits")

    assert (
        task.notes[0] == "site 'node-0' has no test row of class 2, 7: AUROC and balanced accuracy there are means over the other classes"
    )
    assert "(and 5 more sites)" in caplog.text


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        load_task("brest-cancer")

    assert str(caught.value) == f"task.name = 'brest-cancer': one of {', '.join(TASKS)}, or package.module:function"


def test_unknown_and_missing_arguments_are_named_all_at_once(tmp_path, monkeypatch):
    (tmp_path / "my_needy_task.py").write_text("import p2pfl\n@p2pfl.task\ndef stroke(data, *, depth=1): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    with pytest.raises(ConfigError) as caught:
        load_task("my_needy_task:stroke", allow_tasks=["my_needy_task:stroke"], deep=2, wide=3)
    assert caught.value.findings == (
        "task.deep = 2: my_needy_task:stroke takes data, depth",
        "task.wide = 3: my_needy_task:stroke takes data, depth",
        "task.data is missing: my_needy_task:stroke needs it",
    )


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_task.py").write_text(
        "from p2pfl.tasks import load_task, task\n"
        "@task\ndef stroke(**options): return load_task('quadratic', **options)\n"
        "@task\ndef wrong(): return 3\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    assert len(load_task("my_own_task:stroke", allow_tasks=["my_own_task:stroke"], nodes=3).sites) == 3
    for name, fault in {
        "my_own_task:wrong": "it returned int",
        "my_own_task:strok": "has no function strok",
        "my_own_task:number": "has no function number",
        "my_absent_task:stroke": "no module my_absent_task is installed",
        "my_own_task:": "or package.module:function",
        "../my_own_task:stroke": "or package.module:function",
    }.items():
        with pytest.raises(ConfigError, match=fault):
            load_task(name, allow_tasks=[name] if name.startswith("my_") and not name.endswith(":") else [])
