"""What every runtime starts from: sites, rows, graph, model."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from p2pfl.algorithms import ALGORITHMS, DPSGD, Channel
from p2pfl.errors import ConfigError, ConflictError, TopologyError
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.params import digest_of, parameters_of
from p2pfl.topology import make, weighted

LOGISTIC = {"task": {"name": "synthetic-logistic", "features": 3, "samples": 20}, "nodes": 4}
CLINICS = ("clinics_of_a_test:clinics", "clinics_of_a_test:plain")
DIGITS = {"task": {"name": "digits", "hidden": 4}, "nodes": 5}

MODULE = """
import torch
from torch import nn
from p2pfl.tasks import Site, Task, task

@task
def clinics(nodes=None, seed=None, partition=None, names=("b", "a")):
    SEEN.update(nodes=nodes, seed=seed, partition=partition)
    rows = (torch.ones(4, 2), torch.zeros(4, 1))
    return Task(
        name="clinics",
        model=lambda: nn.Linear(2, 1),
        loss=nn.functional.mse_loss,
        metrics={},
        sites=[Site(name=name, train=rows, test=None) for name in names],
    )

@task
def plain():
    return clinics()

SEEN = {}
"""


def plan_of(raw, **overrides):
    experiment = experiment_from(raw, overrides=overrides)
    return make_plan(experiment, load_sites(experiment, allow_tasks=CLINICS))


@pytest.fixture
def clinics(tmp_path, monkeypatch):
    (tmp_path / "clinics_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "clinics_of_a_test", raising=False)  # of an earlier test's folder
    import clinics_of_a_test

    clinics_of_a_test.SEEN.clear()
    return clinics_of_a_test


def test_a_task_gets_seed_nodes_and_partition_where_it_asks_for_them(clinics):
    raw = {"task": {"name": "clinics_of_a_test:clinics"}, "seed": 9, "nodes": 2, "partition": {"name": "iid"}}
    task = load_sites(experiment_from(raw), allow_tasks=CLINICS)

    assert clinics.SEEN == {"nodes": 2, "seed": 9, "partition": {"name": "iid"}}
    assert [site.name for site in task.sites] == ["a", "b"]
    load_sites(experiment_from({**raw, "task": {**raw["task"], "seed": 3}}), allow_tasks=CLINICS)
    assert clinics.SEEN["seed"] == 3
    load_sites(experiment_from({**raw, "nodes": None}), allow_tasks=CLINICS)
    assert clinics.SEEN["nodes"] is None


def test_a_sites_own_arguments_take_the_place_of_the_experiments(clinics):
    raw = {"task": {"name": "clinics_of_a_test:clinics", "names": ["x", "y"]}}

    assert [site.name for site in load_sites(experiment_from(raw), allow_tasks=CLINICS).sites] == ["x", "y"]
    assert [site.name for site in load_sites(experiment_from(raw), {"names": ["z"]}, allow_tasks=CLINICS).sites] == ["z"]


def test_a_number_of_nodes_partitions_a_task_that_does_not_do_so_itself(clinics):
    task = load_sites(
        experiment_from({"task": {"name": "clinics_of_a_test:plain"}, "nodes": 3, "partition": {"name": "iid"}}), allow_tasks=CLINICS
    )

    assert len(task.sites) == 3
    assert sum(len(site.train[0]) for site in task.sites) == 8


def test_validation_rows_come_from_training_and_never_from_test():
    whole, held = (load_sites(experiment_from({**LOGISTIC, "validation": share})) for share in (0.0, 0.25))

    assert [len(site.train[0]) for site in whole.sites] == [20] * 4
    assert all(abs(len(site.test[0]) - 5) <= 1 for site in held.sites)  # a quarter of each class, rounded
    for before, after in zip(whole.sites, held.sites, strict=True):
        rows = {tuple(row) for row in before.train[0].tolist()}
        assert {tuple(row) for row in torch.cat([after.train[0], after.test[0]]).tolist()} == rows


def test_rows_are_the_nodes_sorted_by_name_and_the_graph_bears_their_names():
    plan = plan_of(DIGITS)

    assert list(plan.names) == sorted(plan.names)
    assert plan.topology.names == plan.names
    assert plan.topology.weights.tolist() == [1 / 3] * 10
    assert set(plan.sites) == set(plan.names)
    assert plan.samples is None


def test_the_start_follows_the_seed_and_nothing_else():
    torch.manual_seed(1)
    first = plan_of(DIGITS)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, other, double = plan_of(DIGITS), plan_of(DIGITS, seed=1), plan_of(DIGITS, dtype="float64")

    assert first.start_digest == second.start_digest == digest_of(parameters_of(first.model))
    assert first.start_digest != other.start_digest
    assert torch.equal(torch.random.get_rng_state(), before)
    assert double.layout.dtype == torch.float64
    assert torch.equal(parameters_of(double.model).float(), parameters_of(first.model))


def test_the_dtype_is_the_experiments_or_else_the_tasks():
    assert plan_of({"task": {"name": "averaging"}}).layout.dtype == torch.float64
    assert plan_of({"task": {"name": "averaging"}}, dtype="float32").layout.dtype == torch.float32
    assert plan_of(LOGISTIC).layout.dtype == torch.float32


def test_populations_hold_the_rows_asked_for_under_their_numbers_in_the_roster():
    plan = plan_of({"task": {"name": "averaging", "dimension": 2}, "nodes": 4})
    one = plan.population([plan.names[2]])

    assert torch.equal(one.state["x"], plan.population(plan.names).state["x"][2:3])
    assert one.context(0, local_steps=0).nodes_N.tolist() == [2]


def test_weighting_by_samples_counts_everybodys_training_rows():
    plan = plan_of({**DIGITS, "partition": {"name": "unequal", "sizes": "linear"}}, weighting="samples")
    counts = {name: len(site.train[0]) for name, site in plan.sites.items()}
    total = sum(counts.values())
    population = plan.population(plan.names)

    assert plan.samples == counts
    assert len(set(counts.values())) == 5
    assert population._scale_N.tolist() == pytest.approx([5 * counts[name] / total for name in plan.names], rel=1e-6)
    assert float(population._scale_N.sum()) == pytest.approx(5, rel=1e-6)


def test_where_not_all_data_are_here_names_graph_and_counts_come_from_the_study():
    experiment = experiment_from(LOGISTIC, overrides={"weighting": "samples"})
    task = load_sites(experiment)
    mine = [site for site in task.sites if site.name == task.sites[1].name]
    names = ["north", "south", task.sites[1].name]
    graph = weighted(make("path", 3), "metropolis").renamed(tuple(sorted(names)))
    samples = {"north": 10, "south": 30, task.sites[1].name: 20}
    plan = make_plan(experiment, replace(task, sites=mine), names=names, topology=graph, samples=samples)

    assert plan.names == tuple(sorted(names))
    assert plan.topology is graph
    assert set(plan.sites) == {task.sites[1].name}
    assert plan.population([task.sites[1].name])._scale_N.tolist() == [1.0]


def test_the_graphs_record_has_its_spectrum():
    plan = plan_of({"task": {"name": "averaging"}, "nodes": 8})
    record = plan.graph_record()

    assert set(record) == {"nodes", "edges", "lambda_2", "lambda_min", "laplacian_lambda_2", "laplacian_lambda_max", "diameter"}
    assert record["nodes"] == list(plan.names)
    assert len(record["edges"]) == 16
    assert record["edges"][0] == [1, 0, pytest.approx(1 / 3)]
    assert record["lambda_2"] == pytest.approx((1 + 2 * math.cos(2 * math.pi / 8)) / 3)
    assert record["laplacian_lambda_2"] == pytest.approx(2 - 2 * math.cos(2 * math.pi / 8))
    assert record["laplacian_lambda_max"] == pytest.approx(4)
    assert record["diameter"] == 4


def test_rows_to_train_on_must_be_somewhere():
    experiment = experiment_from(LOGISTIC)
    task = load_sites(experiment)
    object.__setattr__(task, "sites", [replace(site, train=None) for site in task.sites])

    with pytest.raises(ConfigError, match="task synthetic-logistic: none of its sites here has training rows"):
        make_plan(experiment, task)


def test_a_rule_that_needs_symmetric_links_is_refused_a_directed_graph(monkeypatch):
    class Strict(DPSGD):
        requires = frozenset({"symmetric"})

    monkeypatch.setitem(ALGORITHMS, "strict", Strict)
    directed = {"task": {"name": "averaging"}, "topology": {"name": "exponential"}, "weights": "given", "stop": None}

    with pytest.raises(ConfigError, match="a directed graph; algorithm strict needs a symmetric one"):
        plan_of(directed, **{"algorithm.name": "strict"})


def test_what_cannot_run_is_refused_before_anything_is_written(clinics, monkeypatch):
    class Mute(DPSGD):
        channels: ClassVar = {"x": Channel(missing="own")}

    monkeypatch.setitem(ALGORITHMS, "mute", Mute)
    with pytest.raises(ConfigError, match="nodes = 1: a network needs at least 2"):
        plan_of({"task": {"name": "clinics_of_a_test:clinics", "names": ["alone"]}})
    with pytest.raises(ConfigError, match=r"algorithm mute sends no models that neighbours could compare; it needs stop: null"):
        plan_of({"task": {"name": "averaging"}, "algorithm": {"name": "mute"}})
    with pytest.raises(ConfigError, match=r"task.colour = 'red': averaging takes"):
        plan_of({"task": {"name": "averaging", "colour": "red"}})
    assert plan_of({"task": {"name": "averaging"}, "topology": {"name": "exponential"}, "weights": "given", "stop": None}).stop_rule is None


def test_on_a_directed_graph_the_rule_looks_at_as_many_rounds_as_news_needs():
    rule = plan_of({"task": {"name": "averaging"}, "nodes": 8, "topology": {"name": "exponential"}, "weights": "given"}).stop_rule

    assert (rule.window, rule.diameter) == (3, 3)  # 7 = 1 + 2 + 4


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"topology": {"name": "petersen"}, "nodes": 4}, "petersen has 10 nodes, not 4"),
        ({"topology": {"name": "ring"}, "algorithm": {"name": "relaysgd"}}, "needs a tree"),
        (
            {"topology": {"name": "path"}, "algorithm": {"name": "relaysgd"}, "weights": "lazy"},
            "weights = 'lazy': algorithm relaysgd uses none",
        ),
        ({"algorithm": {"name": "ad-psgd"}, "weights": "lazy", "stop": None}, "weights = 'lazy': algorithm ad-psgd uses none"),
    ],
)
def test_values_that_are_right_one_by_one_and_wrong_together_are_told_from_wrong_ones(raw, words):
    with pytest.raises((ConflictError, TopologyError), match=words):
        plan_of({**LOGISTIC, **raw})


def test_weighting_by_samples_is_refused_where_nobody_has_any():
    experiment = experiment_from({"task": {"name": "averaging"}, "nodes": 4, "weighting": "samples"})
    with pytest.raises(ConfigError) as caught:
        make_plan(experiment, load_sites(experiment))

    assert caught.value.findings == ("weighting = 'samples': none of the sites has training rows; take uniform",)
