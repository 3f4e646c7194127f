"""Validation rows come out of the training rows; test rows are set aside, measured once, and never used for choosing."""

from __future__ import annotations

import pytest
import torch

from networks import Network, finish, plan_of
from p2pfl.evaluation.results import build_loaded, read_buffers
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites
from p2pfl.inspector import read
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.report import report
from p2pfl.inspector.verdict import verdict
from p2pfl.params import load_parameters
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from p2pfl.tasks.metrics import auroc

LOGISTIC = {
    "task": {"name": "synthetic-logistic", "features": 3, "samples": 30, "heterogeneity": 0.5},
    "nodes": 3,
    "rounds": 4,
    "stop": None,
    "baselines": [],
    "validation": 0.2,
}


def outputs_of(run, node, x_P, inputs):
    model = build_loaded(load_sites(run.experiment), run.experiment, x_P, read_buffers(run.path, node))
    load_parameters(model, x_P)
    with torch.no_grad():
        return model(inputs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate(LOGISTIC, out=tmp_path_factory.mktemp("validation") / "run")


def test_metrics_are_of_validation_rows_and_test_rows_stand_beside(run):
    whole = {site.name: site for site in load_sites(experiment_from({**LOGISTIC, "validation": 0.0})).sites}
    held = {site.name: site for site in load_sites(run.experiment).sites}
    test = run.summary["test"]

    assert test["use"] == "not used for choosing"
    for name, x_P in run.models.items():
        assert torch.equal(held[name].set_aside[0], whole[name].test[0])
        for rows, metrics in ((held[name].test, run.summary["metrics"]), (whole[name].test, test["metrics"])):
            expected = auroc(outputs_of(run, name, x_P, rows[0]), rows[1])
            assert metrics["auroc"]["per_node"][name] == pytest.approx(expected, abs=1e-12)
    mean_P = torch.stack([run.models[name] for name in sorted(run.models)]).mean(dim=0)
    inputs, targets = (torch.cat([whole[name].test[part] for name in sorted(whole)]) for part in (0, 1))
    expected = auroc(outputs_of(run, "node-0", mean_P, inputs), targets)
    assert test["mean_model"]["auroc"] == pytest.approx(expected, abs=1e-12)


def test_pages_and_tables_name_the_rows_and_mark_what_chooses_nothing(run):
    records = read_run(run.path)
    figures = run.summary["test"]
    said = (
        f"On test rows, not used for choosing: auroc {figures['mean_model']['auroc']:.3f} of the mean model, "
        f"{figures['metrics']['auroc']['mean']:.3f} on average over the sites, {figures['metrics']['auroc']['min']:.3f} at the worst site."
    )

    assert said in verdict(records, convergence(records))
    row = next(row for row in read(run.path).sites if (row["node"], row["metric"]) == ("node-1", "auroc"))
    assert row["network"] == run.summary["metrics"]["auroc"]["per_node"]["node-1"]
    assert (row["measured_on"], row["test_is"]) == ("validation rows", "not used for choosing")
    assert row["test"] == figures["metrics"]["auroc"]["per_node"]["node-1"]


def test_the_report_has_test_rows_apart_from_validation_rows(run):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'p2pfl-mesh[report]'")
    page = report(read_run(run.path))

    assert "<h3>On test rows, not used for choosing</h3>" in page
    assert "The mean model, on all validation rows together: " in page
    assert "own test rows" not in page.rsplit("</script>", 1)[-1]


def test_without_validation_rows_a_summary_has_no_part_for_test_rows(tmp_path):
    assert {"test", "measured_on"}.isdisjoint(simulate({**LOGISTIC, "validation": 0.0}, out=tmp_path / "run").summary)


@pytest.mark.slow
def test_daemons_measure_the_same_rows(run, tmp_path):
    async def main():
        async with Network(plan_of(**LOGISTIC), tmp_path) as network:
            network.start()
            await network.ended()
            for name in network.plan.names:
                summary = network.summary(name)
                for mine, all_nodes in (
                    (summary["metrics"], run.summary["metrics"]),
                    (summary["test"]["metrics"], run.summary["test"]["metrics"]),
                ):
                    assert mine["auroc"]["per_node"] == {name: pytest.approx(all_nodes["auroc"]["per_node"][name], abs=1e-6)}
                assert summary["test"]["mean_model"] is None

    finish(main())
