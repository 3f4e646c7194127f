"""What a network is worth to each site: the saved models against models trained alone, on the same rows, with an honest interval."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t
from test_daemon import all_of, daemons
from torch.nn import functional as F

import networks
import p2pfl
from p2pfl.draws import Purpose, torch_seed
from p2pfl.evaluation.baselines import trained_alone
from p2pfl.evaluation.gain_over_local import gains_over_local
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.report import report
from p2pfl.inspector.tables import read, tables_of
from p2pfl.inspector.verdict import gain_sentence, verdict
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.tasks.intervals import interval_of_difference
from p2pfl.tasks.metrics import auroc, balanced_accuracy
from simulations import LOGISTIC, plan_of

KEYS = ["site", "metric", "alone", "network", "gain", "low", "high", "rows", "method", "confidence", "lower_is_better", "no_interval"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = {"task": {"name": "breast-cancer"}, "nodes": 3, "rounds": 10, "stop": None, "baselines": ["local", "pooled"]}
    return p2pfl.simulate(experiment, out=tmp_path_factory.mktemp("worth") / "run")


def test_every_row_is_of_the_saved_model_and_the_one_trained_alone(run):
    rows = {row["site"]: row for row in read_run(run.path).gains}
    plan = make_plan(run.experiment, load_sites(run.experiment))
    sites = plan.sites
    alone = trained_alone(plan.task, [sites[name] for name in plan.names], range(3), plan.model, plan.recipe)

    assert list(rows) == list(run.models) == list(plan.names)
    for number, name in enumerate(plan.names):
        inputs, targets = sites[name].test
        network, before = (inputs.float() @ x_P[:-1, None] + x_P[-1] for x_P in (run.models[name], alone.estimate()[number]))
        interval, row = interval_of_difference(auroc, network, before, targets), rows[name]
        assert list(row) == KEYS
        assert (row["metric"], row["rows"], row["confidence"]) == ("auroc", len(inputs), 0.95)
        assert (row["alone"], row["network"]) == pytest.approx((auroc(before, targets), auroc(network, targets)), abs=1e-6)
        assert row["gain"] == row["network"] - row["alone"]
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_both_figures_are_those_of_the_summary(run):
    summary = run.summary

    for row in read_run(run.path).gains:
        assert row["alone"] == pytest.approx(summary["baselines"]["local"]["auroc"]["per_node"][row["site"]], abs=1e-12)
        assert row["network"] == pytest.approx(summary["metrics"]["auroc"]["per_node"][row["site"]], abs=1e-12)


def test_it_is_on_the_page_in_the_tables_and_in_the_verdict(run):
    pytest.importorskip("plotly")
    records = read_run(run.path)
    page, [counted] = report(records), [sentence for sentence in verdict(records, convergence(records)) if "intervals" in sentence]

    for row in records.gains:
        assert gain_sentence(row) in page
        assert f"[{row['low']:+.3f}, {row['high']:+.3f}]" in page
    assert "of 3 sites" in counted
    kept = ("site", "metric", "alone", "network", "rows", "method", "confidence", "lower_is_better", "no_interval")
    renamed = {"gain": "better_by", "low": "better_by_low", "high": "better_by_high"}
    assert read(run.path).worth == [
        {key: row[key] for key in kept} | {new: row[key] for key, new in renamed.items()} for row in records.gains
    ]


def test_in_the_table_less_of_a_loss_is_better_too(run):
    records = replace(read_run(run.path), gains=(row_of("bern", -0.031, -0.058, -0.004, "log_loss"),))
    [row] = tables_of(records).worth

    assert (row["better_by"], row["better_by_low"], row["better_by_high"]) == (0.031, 0.004, 0.058)
    assert "gain" not in row


FOUR = {**LOGISTIC, "task": {**LOGISTIC["task"], "samples": 60}, "rounds": 3, "stop": None, "baselines": ["local"]}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """By site, of four."""
    made = p2pfl.simulate(FOUR, out=tmp_path_factory.mktemp("worth") / "simulated")
    return {row["site"]: row for row in read_run(made.path).gains}


def same(row):
    return pytest.approx({key: value for key, value in row.items() if key not in ("site", "metric", "method")}, abs=1e-6)


def test_a_daemon_writes_its_own_sites_row(simulated, tmp_path):
    plan = networks.plan_of(**FOUR)
    networks.finish(all_of(daemons(plan, tmp_path)))

    for name in plan.names:
        [row] = read_run(tmp_path / name / "run").gains
        assert (row["site"], row["metric"], row["method"]) == (name, "auroc", simulated[name]["method"])
        assert {key: value for key, value in row.items() if key not in ("site", "metric", "method")} == same(simulated[name])


@pytest.mark.slow
def test_a_network_of_daemons_gathers_every_sites_row(simulated, tmp_path):
    rows = read_run(p2pfl.up(FOUR, out=tmp_path / "run").path).gains

    assert [row["site"] for row in rows] == list(simulated)
    for row in rows:
        assert {key: value for key, value in row.items() if key not in ("site", "metric", "method")} == same(simulated[row["site"]])


def row_of(site, gain, low, high, metric="auroc"):
    return {"site": site, "metric": metric, "gain": gain, "low": low, "high": high, "rows": 114, "confidence": 0.95}


def test_a_sites_gain_in_words():
    assert gain_sentence(row_of("bern", 0.031, 0.004, 0.058)) == "bern gains 0.031 (0.004 to 0.058): sure."
    assert gain_sentence(row_of("bern", -0.03, -0.05, -0.01)) == "bern loses 0.030 (0.010 to 0.050): sure."
    assert gain_sentence(row_of("bern", 0.01, -0.02, 0.04)) == "bern: +0.010 (-0.020 to +0.040): cannot be told from 114 test rows."
    assert gain_sentence(row_of("bern", None, None, None)) == "bern: auroc is undefined on its 114 test rows."
    assert gain_sentence(row_of("bern", 0.01, None, None)) == "bern: +0.010, without an interval from 114 test rows."


def test_the_task_says_of_which_metrics_less_is_better():
    """Its name would not: mae."""
    assert gain_sentence(row_of("bern", -0.031, -0.058, -0.004, "mae") | {"lower_is_better": True}).startswith("bern gains 0.031")


def test_less_of_a_loss_is_a_gain():
    assert gain_sentence(row_of("bern", -0.031, -0.058, -0.004, "log_loss")) == "bern gains 0.031 (0.004 to 0.058): sure."


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(0.1, 0.2)] * 3 + [(-0.1, 0.2)] * 2, "3 of 5 sites gain for sure, 2 cannot be told, none loses."),
        ([(0.1, 0.2), (-0.2, -0.1)], "1 of 3 sites gains for sure, 1 cannot be told, 1 loses for sure."),
        ([(-0.2, -0.1)] * 2 + [(None, None)], "none of 3 sites gains for sure, 1 cannot be told, 2 lose for sure."),
    ],
)
def test_the_verdict_counts_who_gains_for_sure(run, ends, said):
    rows = tuple(row_of(f"site {number}", 0.1, low, high) for number, (low, high) in enumerate(ends))
    records = replace(read_run(run.path), gains=rows)

    assert verdict(records, convergence(records))[-1] == f"With 95% intervals from each site's own test rows, {said}"


@pytest.fixture
def regression():
    """A plan whose only metric has no interval of its own, and two populations of four random models each."""
    plan = plan_of({**LOGISTIC, "task": {**LOGISTIC["task"], "samples": 120}, "rounds": 1})
    plan = replace(
        plan,
        task=replace(
            plan.task, losses=frozenset({"error"}), metrics={"error": lambda outputs, targets: F.mse_loss(outputs, targets).item()}
        ),
    )
    return plan, plan.population(plan.names), torch.randn(4, plan.layout.size, generator=torch.Generator().manual_seed(1))


def test_other_metrics_leave_out_the_same_rows_for_both_models(regression):
    plan, population, x_NP = regression
    rows = gains_over_local(plan, population, x_NP, plan.names, population)

    for number, row in enumerate(rows):
        inputs, targets = plan.sites[row["site"]].test
        before_P = population.estimate()[number]
        network, before = (
            ((inputs.float() @ model_P[:-1, None] + model_P[-1] - targets) ** 2).numpy().ravel() for model_P in (x_NP[number], before_P)
        )
        apart = network - before
        group = np.arange(len(apart)) % 20
        np.random.default_rng(torch_seed(plan.experiment.seed, Purpose.RESAMPLE, node=number)).shuffle(group)
        without = np.array([apart[group != left_out].mean() for left_out in range(20)])
        reach = t.ppf(0.975, 19) * np.sqrt(19 * without.var())
        assert row["gain"] == pytest.approx(apart.mean(), rel=1e-5)
        assert (row["low"], row["high"]) == pytest.approx((apart.mean() - reach, apart.mean() + reach), rel=1e-3)
        assert (row["method"], row["no_interval"]) == ("jackknife of 20 groups of rows", None)


def test_there_is_none_where_nothing_was_trained_alone_and_of_too_many_sites(regression, monkeypatch):
    plan, population, x_NP = regression
    assert gains_over_local(plan, population, x_NP, plan.names, None) == []
    monkeypatch.setattr("p2pfl.tasks.intervals.MOST_CALLS", 159)
    [why] = {row["no_interval"] for row in gains_over_local(plan, population, x_NP, plan.names, population)}
    assert why == "the metric's kind has none, and leaving out rows would take 160 calls of the metric, where 159 are the most"
    monkeypatch.setattr("p2pfl.evaluation.gain_over_local.MOST_SITES", 3)
    assert gains_over_local(plan, population, x_NP, plan.names, population) == []


def test_where_there_is_no_interval_the_sentence_says_why_and_no_caption_claims_one(run):
    pytest.importorskip("plotly")
    row = row_of("bern", 0.01, None, None) | {"no_interval": "of fewer than 10 test rows none is given", "method": None}
    records = replace(read_run(run.path), gains=(row,))
    page, sentences = report(records), verdict(records, convergence(records))

    assert gain_sentence(row) == "bern: +0.010 (no interval: of fewer than 10 test rows none is given)."
    assert gain_sentence(row) in page
    assert "In brackets the 95% interval" not in page
    assert sentences[-1] == "How sure the gains are is not known: of fewer than 10 test rows none is given."


def test_a_metric_may_say_itself_that_less_is_better(regression):
    plan, population, x_NP = regression
    metric = p2pfl.Metric(plan.task.metrics["error"], kind="mean", less_is_better=True)
    plan = replace(plan, task=replace(plan.task, metrics={"mae": metric}, losses=frozenset()))

    assert {row["lower_is_better"] for row in gains_over_local(plan, population, x_NP, plan.names, population)} == {True}


def test_an_undefined_metric_is_null(regression):
    plan, population, x_NP = regression
    one_class = {name: replace(site, test=(site.test[0], torch.ones_like(site.test[1]))) for name, site in plan.sites.items()}
    task = replace(plan.task, losses=frozenset(), metrics={"balanced_accuracy": balanced_accuracy})
    rows = gains_over_local(replace(plan, task=task, sites=one_class), population, x_NP, plan.names[:1], population)

    assert [rows[0][key] for key in ("network", "gain", "low", "high", "method")] == [None] * 5


def test_a_resumed_run_forgets_it(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"name": "a"})
    folder.write_found("worth", [row_of("bern", 0.1, 0.0, 0.2)])
    assert read_run(folder.path).gains == (row_of("bern", 0.1, 0.0, 0.2),)
    assert json.loads((folder.path / "worth.json").read_text()).keys() == {"rows"}

    folder.truncate(0)

    assert read_run(folder.path).gains == ()
