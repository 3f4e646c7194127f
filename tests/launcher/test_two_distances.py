"""Two names for two distances: `disagreement` of what was sent, before mixing; `consensus_distance` of what came of it, after mixing."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from networks import HASTY, Network, finish, plan_of, until
from p2pfl.cli.node import _standing
from p2pfl.evaluation.mean_model import consensus_distance, squared_distances_from_mean
from p2pfl.evaluation.results import Run
from p2pfl.inspector import read
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.terminal import print_page
from p2pfl.inspector.verdict import certificate
from p2pfl.runs.records import RunRecords, read_rounds, read_run
from p2pfl.runs.rows import NodeRow, disagreement_of, squared_norm_of
from p2pfl.simulator import FaultScript, simulate

AVERAGING = {
    "task": {"name": "averaging", "dimension": 3},
    "nodes": 5,
    "topology": {"name": "ring"},
    "rounds": 4,
    "stop": None,
    "baselines": [],
    "save_models_every": 1,
}
CHOCO = {"algorithm": {"name": "choco", "gamma": 0.3}, "compressor": {"name": "none"}}
LOGISTIC = {
    **AVERAGING,
    "task": {"name": "synthetic-logistic", "samples": 8},
    "algorithm": {"local_steps": 2},
    "topology": {"name": "complete"},
}


def numbers_of(models):
    return np.stack([models[name].double().numpy() for name in sorted(models)])


def distance_from_mean(x_NP):
    """Root mean square."""
    return math.sqrt(float(((x_NP - x_NP.mean(axis=0)) ** 2).sum(axis=1).mean()))


def over_links(x_NP, edges):
    return sum(float(((x_NP[i] - x_NP[j]) ** 2).sum()) for i, j in {(min(i, j), max(i, j)) for i, j, _ in edges})


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return simulate(AVERAGING, out=tmp_path_factory.mktemp("distances") / "run")


def test_the_simulator_records_what_was_sent_and_what_came_of_it(averaged):
    edges = json.loads((averaged.path / "topology.json").read_text())["edges"]
    after = [numbers_of(averaged.models_after(number)) for number in range(4)]
    for row, sent_NP, mixed_NP in zip(averaged.records[1:], after[:-1], after[1:], strict=True):  # nobody trains: sent is what was there
        assert row["rms_disagreement"] == pytest.approx(distance_from_mean(sent_NP), rel=1e-12)
        assert row["consensus_distance"] == pytest.approx(distance_from_mean(mixed_NP), rel=1e-12)
        assert row["disagreement"] == pytest.approx(over_links(sent_NP, edges), rel=1e-12)
        assert row["bound_low"] * (1 - 1e-12) <= row["rms_disagreement"] <= row["bound_high"] * (1 + 1e-12)
        assert row["consensus_distance"] < row["rms_disagreement"]
    assert averaged.summary["consensus_distance"] == averaged.records[-1]["consensus_distance"]
    assert averaged.summary["relative_consensus"] == pytest.approx(
        distance_from_mean(after[-1]) / np.linalg.norm(after[-1].mean(axis=0)), rel=1e-12
    )


@pytest.mark.parametrize("experiment", [LOGISTIC, {**AVERAGING, **CHOCO}], ids=["training", "choco"])
def test_every_way_of_mixing_records_the_distance_after_it(experiment, tmp_path):
    run = simulate(experiment, out=tmp_path / "run")

    for row in run.records:
        assert row["consensus_distance"] == pytest.approx(
            distance_from_mean(numbers_of(run.models_after(row["round"]))), rel=1e-5, abs=1e-7
        )
    if experiment is LOGISTIC:  # on a complete graph one round ends all disagreement that training has made
        assert all(row["rms_disagreement"] > 1e3 * row["consensus_distance"] for row in run.records)


def test_at_their_own_pace_only_the_distance_after_mixing_is_known(tmp_path):
    run = simulate({**AVERAGING, "pace": {"name": "asynchronous"}}, out=tmp_path / "run")

    assert {row["rms_disagreement"] for row in run.records} == {None}
    assert run.records[-1]["consensus_distance"] == pytest.approx(distance_from_mean(numbers_of(run.models)), rel=1e-12)
    course = convergence(read_run(run.path))
    assert (course.basis, course.distance) == ("after mixing", [row["consensus_distance"] for row in run.records])


@pytest.mark.parametrize(
    "experiment",
    [
        CHOCO,
        {"weights": "push-sum", "algorithm": {"name": "push-sum"}, "topology": {"name": "path"}},
        {"topology": {"name": "path"}, "algorithm": {"name": "relaysgd"}},
    ],
)
def test_where_no_models_are_sent_no_disagreement_is_known(experiment, tmp_path):
    run = simulate({**AVERAGING, "nodes": 4, "topology": {"name": "ring"}, "rounds": 2, **experiment}, out=tmp_path / "run")

    unknown = ("disagreement", "bound_low", "bound_high", "rms_norm", "rms_disagreement")
    assert {row[key] for row in run.records for key in unknown} == {None}
    assert {row[key] for row in run.node_records for key in ("disagreement", "norm")} == {None}
    assert run.records[-1]["consensus_distance"] > 0
    course = convergence(found := read_run(run.path))
    assert (course.basis, course.slowest) == ("after mixing", [])
    assert certificate(found, course) == "The nodes' records certify no distance: no models were compared."
    with (console := Console(width=100)).capture() as page:
        print_page(found, console)
    assert "before mixing" not in page.get()
    by_daemons = replace(found, rounds=[{**row, "consensus_distance": None} for row in found.rounds], summary=None)
    with console.capture() as theirs:  # nobody sees all models
        print_page(by_daemons, console)
    assert "unknown (no models were compared)" in theirs.get()
    assert "consensus distance (after mixing)" in page.get()


def test_the_zeros_of_earlier_versions_are_still_read():
    zeros = dict.fromkeys(("disagreement", "bound_low", "bound_high", "rms_norm"), 0.0)
    rows = [{"round": number, "kind": "train", **zeros, "rms_disagreement": None, "consensus_distance": 0.3} for number in range(3)]
    course = convergence(RunRecords(experiment={}, environment={}, topology=None, rounds=rows, nodes=[], events=[], summary=None))

    assert (course.basis, course.distance, course.consensus) == ("upper bound", [0.0] * 3, [0.3] * 3)


def test_the_status_says_that_nothing_was_compared():
    known, unknown = {"disagreement": 2.718, "agreed_for": 3}, {"disagreement": None, "agreed_for": 0, "last_round_time": 0.0}

    assert [*_standing(known)] == ["disagreement with neighbours 2.72, agreed for 3 rounds"]
    assert [*_standing(unknown)] == [
        "disagreement with neighbours unknown (no models were compared in the last round), agreed for 0 rounds"
    ]


def test_a_node_that_meets_nobody_in_a_round_of_pairs_compares_nothing(tmp_path):
    run = simulate({**AVERAGING, "algorithm": {"name": "ad-psgd"}, "rounds": 6}, out=tmp_path / "run")

    met = [any(len(entry) == 3 and entry[0] != row["node"] for entry in row["merged"]) for row in run.node_records]
    assert [row["disagreement"] is not None for row in run.node_records] == met
    assert all(row["disagreement"] is None for row in run.records) is (not any(met))


def test_a_simulated_node_that_hears_nobody_in_a_round_compares_nothing(tmp_path):
    cut = FaultScript.in_rounds(cut={(other, "node-0"): frozenset({2}) for other in ("node-1", "node-4")})
    run = simulate(AVERAGING, out=tmp_path / "run", faults=cut)

    unknown = [(row["round"], row["node"]) for row in run.node_records if row["disagreement"] is None]
    assert unknown == [(2, "node-0")]
    assert all(row["norm"] > 0 for row in run.node_records)
    seen = [row["disagreement"] for row in run.node_records if row["round"] == 2 and row["node"] != "node-0"]
    assert run.records[2]["disagreement"] == pytest.approx(math.fsum(seen), rel=1e-12)
    assert run.records[2]["bound_high"] is None


def test_a_daemon_that_goes_on_without_anybody_knows_no_disagreement(tmp_path, caplog):
    caplog.set_level(logging.INFO, "p2pfl.node")
    plan = plan_of(**{**AVERAGING, "nodes": 2, "topology": {"name": "path"}, "rounds": 6, "save_models_every": None})

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(2)
            network.cut |= {("node-0", "node-1"), ("node-1", "node-0")}
            await until(lambda: any(row["skipped"] for row in network.rows("node-0")) or network.nodes["node-0"].task.done())
            status = network.nodes["node-0"].daemon.status()
            return network.rows("node-0"), status

    rows, status = finish(main())
    assert {(row["disagreement"] is None) for row in rows if row["skipped"]} == {True}
    assert {(row["disagreement"] is None) for row in rows if not row["skipped"]} == {False}
    assert status["disagreement"] is None
    assert "disagreement unknown, skipped node-1" in caplog.text


def test_the_network_sums_what_its_daemons_compared():
    in_step, by_choco = plan_of(**AVERAGING).bound_rule, plan_of(**AVERAGING, **CHOCO).bound_rule

    def row(disagreement, norm, *skipped):
        known = {"round": 0, "node": "node-0", "kind": "train", "loss": None, "agreed_for": 0, "stop_round": None}
        return NodeRow.of({**known, "disagreement": disagreement, "norm": norm, "skipped": skipped, "bytes_sent": 0, "seconds": {}})

    heard, alone = row(3.0, 2.0), row(None, 2.0, "node-1")
    large = unsent = row(None, None)

    assert (disagreement_of(in_step, [heard, alone]), squared_norm_of(in_step, [heard, alone])) == (3.0, 4.0)
    assert disagreement_of(in_step, [alone, alone]) is None
    assert (disagreement_of(in_step, [heard, large]), squared_norm_of(in_step, [heard, large])) == (math.inf, math.inf)
    assert (disagreement_of(by_choco, [unsent, unsent]), squared_norm_of(by_choco, [unsent, unsent])) == (None, None)


@pytest.mark.slow
def test_daemons_record_the_disagreement_of_what_they_sent(tmp_path):
    async def main():
        async with Network(plan_of(**AVERAGING), tmp_path) as network:
            network.start()
            await network.ended()
            edges = [(int(i), int(j), 0) for i, j in zip(network.plan.topology.senders, network.plan.topology.receivers, strict=True)]
            for number in range(1, 4):
                sent_NP = network.models(number - 1).double().numpy()
                rows = [next(row for row in network.rows(name) if row["round"] == number) for name in network.plan.names]
                assert sum(row["disagreement"] for row in rows) == pytest.approx(over_links(sent_NP, edges), rel=1e-12)

    finish(main())


def test_the_inspector_tells_both_apart(averaged):
    course = convergence(read_run(averaged.path))

    assert course.basis == "exact"
    assert course.distance == [row["rms_disagreement"] for row in averaged.records]
    assert course.consensus == [row["consensus_distance"] for row in averaged.records]
    assert course.relative == averaged.records[-1]["rms_disagreement"] / averaged.records[-1]["rms_norm"]
    assert course.relative_consensus == averaged.summary["relative_consensus"]
    columns = read(averaged.path).rounds[0].keys()
    assert {"disagreement", "rms_disagreement", "consensus_distance"} <= columns


@pytest.mark.parametrize(("pace", "before", "after"), [("synchronous", 0.25, None), ("asynchronous", None, 0.25)])
def test_rounds_of_earlier_versions_are_read_by_todays_names(pace, before, after, averaged, tmp_path):
    (tmp_path / "experiment.yaml").write_text(f"name: old\npace: {{name: {pace}}}\n")
    old = {"round": 0, "kind": "train", "rms_norm": 1.0, "consensus_distance": 0.25}
    new = {"round": 1, "kind": "train", "rms_norm": 1.0, "rms_disagreement": 0.2, "consensus_distance": 0.1}
    (tmp_path / "rounds.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")

    for rows in (read_run(tmp_path).rounds, read_rounds(tmp_path), Run(tmp_path).records):
        assert [(row["rms_disagreement"], row["consensus_distance"]) for row in rows] == [(before, after), (0.2, 0.1)]


@pytest.mark.parametrize("shape", [(3, 2**18 + 5), (2**16, 9), (1, 4), (4, 0)])
def test_distances_block_by_block_are_those_of_all_at_once(shape):
    x_NP = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_N = (x_NP - x_NP.mean(dim=0)).square().sum(dim=1)

    assert torch.allclose(squared_distances_from_mean(x_NP), expected_N, rtol=1e-12)
    assert torch.allclose(squared_distances_from_mean(x_NP, x_NP.mean(dim=0)), expected_N, rtol=1e-12)
    assert consensus_distance(x_NP) == pytest.approx(float(expected_N.mean().sqrt()), rel=1e-12)
