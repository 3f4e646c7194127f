"""The network in one process: exact figures of gossip and D-PSGD, agreeing to stop, what a run leaves.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

import p2pfl
from p2pfl.algorithms import ALGORITHMS, DPSGD, Channel
from p2pfl.errors import ConfigError
from p2pfl.runs.records import read_run
from p2pfl.simulator import FaultScript, simulate
from p2pfl.simulator.start import check_device
from simulations import LOGISTIC, QUICK, distance, drift, plan_of, run_of, stacked, starting_at, starts_of, without_seconds
from thorough import first_fast

SUMMARY_KEYS = [
    "experiment",
    "engine",
    "nodes",
    "rounds",
    "stop_reason",
    "departures",
    "consensus_distance",
    "relative_consensus",
    "metrics",
    "lower_is_better",
    "mean_model",
    "baselines",
    "bytes_sent",
    "seconds",
    "node_rounds_per_second",
    "peak_rss_bytes",
    "row_by_row",
    "compiled",
]

# ---- averaging contracts as the spectrum says


@pytest.mark.parametrize(
    ("topology", "nodes", "contraction"),
    [
        ("ring", 8, (1 + 2 * math.cos(2 * math.pi / 8)) / 3),
        ("torus", 16, 0.6),
        ("hypercube", 16, 0.6),
        ("star", 8, 7 / 8),
        ("path", 8, 1 / 3 + 2 / 3 * math.cos(math.pi / 8)),
    ],
)
def test_the_slowest_mode_contracts_by_the_second_eigenvalue_each_round(topology, nodes, contraction, tmp_path):
    plan = plan_of({"task": {"name": "averaging", "dimension": 1}, "nodes": nodes, "topology": {"name": topology}, "rounds": 20})
    values, vectors = np.linalg.eigh(plan.topology.mixing_matrix().toarray())
    assert values[-2] == pytest.approx(contraction, rel=1e-12)
    x_NP = torch.from_numpy(vectors[:, -2:-1].copy())
    run = run_of(starting_at(plan, 3 + x_NP), tmp_path / "run")
    distances = [row["rms_disagreement"] for row in run.records]

    assert distances == pytest.approx([distance(x_NP) * contraction**r for r in range(20)], rel=1e-10)
    torch.testing.assert_close(stacked(run.models), 3 + contraction**20 * x_NP, rtol=0, atol=1e-13)
    assert run.summary["consensus_distance"] == pytest.approx(distance(x_NP) * contraction**20, rel=1e-10)


def test_a_cosine_on_a_ring_of_eight_is_a_ninth_of_itself_after_ten_rounds(tmp_path):
    plan = plan_of({"task": {"name": "averaging", "dimension": 1}, "nodes": 8, "rounds": 10})
    x_NP = torch.cos(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)[:, None]
    run = run_of(starting_at(plan, x_NP), tmp_path / "run")

    torch.testing.assert_close(stacked(run.models), 0.11390540 * x_NP, rtol=0, atol=5e-9)


@pytest.mark.parametrize("topology", ["ring", "star", "erdos-renyi"])
def test_the_recorded_bounds_hold_the_exact_distance(topology, tmp_path):
    run = simulate({**QUICK, "task": {"name": "averaging"}, "nodes": 9, "topology": {"name": topology}, "rounds": 12}, out=tmp_path / "run")

    for row in run.records:
        assert row["bound_low"] * (1 - 1e-9) <= row["rms_disagreement"] <= row["bound_high"] * (1 + 1e-9)
    for row in run.records:
        of_nodes = [node["disagreement"] for node in run.node_records if node["round"] == row["round"]]
        norms = [node["norm"] for node in run.node_records if node["round"] == row["round"]]
        assert math.fsum(of_nodes) == pytest.approx(row["disagreement"], rel=1e-12)
        assert math.sqrt(math.fsum(norm**2 for norm in norms) / 9) == pytest.approx(row["rms_norm"], rel=1e-12)


def test_allreduce_agrees_after_one_round(tmp_path):
    raw = {"task": {"name": "averaging"}, "nodes": 6, "topology": {"name": "complete"}, "algorithm": {"name": "allreduce"}, "rounds": 1}
    plan = plan_of(raw)
    after = stacked(run_of(plan, tmp_path / "run").models)

    assert float((after - starts_of(plan).mean(dim=0)).abs().max()) < 1e-14


def test_a_directed_graph_with_doubly_stochastic_weights_keeps_the_mean(tmp_path):
    plan = plan_of({"task": {"name": "averaging"}, "nodes": 8, "topology": {"name": "exponential"}, "weights": "given", "rounds": 10})
    after = stacked(run_of(plan, tmp_path / "run").models)

    assert drift(starts_of(plan), after) < 1e-14
    # the gap is 2 / (1 + log2 n) = 1/2 exactly, and the matrix is normal
    assert distance(after) <= distance(starts_of(plan)) * 0.5**10 * (1 + 1e-9)
    with pytest.raises(ConfigError, match="a directed graph; faults need an undirected one"):
        run_of(plan, tmp_path / "faults", FaultScript())


# ---- D-PSGD on quadratics; ring of 8, f_i = a_i (x - b_i)**2 / 2


def quadratic(eta, rounds, *, local_steps=1, topology="ring", **options):
    return {
        **QUICK,
        "task": {"name": "quadratic", **options},
        "nodes": 8,
        "topology": {"name": topology},
        "algorithm": {"local_steps": local_steps, "batch_size": 1},
        "optimizer": {"lr": eta},
        "rounds": rounds,
    }


def test_on_equal_curvatures_the_steady_state_is_the_damped_mode(tmp_path):
    """eta lambda / (1 - (1 - eta) lambda) b, reached at rate ((1 - eta) lambda)**r = 0.724**r."""
    x_NP = stacked(simulate(quadratic(0.1, 80, homogeneous=True), out=tmp_path / "run").models)
    b_NP = torch.cos(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)[:, None]

    torch.testing.assert_close(x_NP, 0.291850921 * b_NP, rtol=0, atol=1e-9)
    assert abs(float(x_NP.mean())) < 1e-14


BIAS = {0.2: (-0.2919800, 0.6514065), 0.1: (-0.1880555, 0.2824397), 0.05: (-0.1102224, 0.1001966), 0.01: (-0.0256351, 0.0056066)}
"""Learning rate to the mean's error and the squared consensus distance of D-PSGD's limit."""


@pytest.mark.parametrize(("eta", "rounds"), first_fast([(0.2, 80), (0.1, 160), (0.05, 320)]))
def test_on_unequal_curvatures_the_limit_is_off_by_the_known_bias(eta, rounds, tmp_path):
    run = simulate(quadratic(eta, rounds), out=tmp_path / "run")
    x_NP = stacked(run.models)

    assert float(x_NP.mean()) - 14 / 3 == pytest.approx(BIAS[eta][0], abs=1e-6)
    assert distance(x_NP) ** 2 == pytest.approx(BIAS[eta][1], abs=1e-6)
    assert run.summary["mean_model"]["distance"] == pytest.approx(-BIAS[eta][0], abs=1e-6)


def test_at_a_small_rate_the_known_limit_stands_still(tmp_path):
    """1,500 rounds from afar; so it starts there, at the solution of x = W (x - eta A (x - b))."""
    plan = plan_of(quadratic(0.01, 10))
    mixing_NN, a_N, b_N = plan.topology.mixing_matrix().toarray(), np.arange(1, 9) / 4, np.arange(8.0)
    x_N = np.linalg.solve(np.eye(8) - mixing_NN @ np.diag(1 - 0.01 * a_N), mixing_NN @ (0.01 * a_N * b_N))
    after = stacked(run_of(starting_at(plan, torch.from_numpy(x_N)[:, None]), tmp_path / "run").models)

    torch.testing.assert_close(after.flatten(), torch.from_numpy(x_N), rtol=0, atol=1e-12)
    assert float(after.mean()) - 14 / 3 == pytest.approx(BIAS[0.01][0], abs=1e-6)
    assert distance(after) ** 2 == pytest.approx(BIAS[0.01][1], abs=1e-6)


@pytest.mark.parametrize(
    ("local_steps", "rounds", "complete", "ring"),
    first_fast([(10, 25, 4.2657081, 3.9696224), (5, 40, 4.4689226, 4.1399611), (1, 160, 4.6666667, 4.4786112)]),
)
def test_local_steps_move_the_limit_by_the_known_amount(local_steps, rounds, complete, ring, tmp_path):
    """sum s_i b_i / sum s_i with s_i = 1 - (1 - eta a_i)**K on the complete graph."""
    for topology, expected in (("complete", complete), ("ring", ring)):
        run = simulate(quadratic(0.1, rounds, local_steps=local_steps, topology=topology), out=tmp_path / topology)
        assert float(stacked(run.models).mean()) == pytest.approx(expected, abs=1e-6)


# ---- algorithms that use more of the interface


@dataclass(frozen=True)
class Twice(DPSGD):
    """Two exchanges a round."""

    phases = 2


@dataclass(frozen=True)
class Differences(DPSGD):
    """x + W d - d: sends no model, so that nothing is known of the disagreement."""

    channels = MappingProxyType({"d": Channel(missing="zero")})

    def outgoing(self, state, phase, ctx):
        return {"d": state["x"]}

    def merge(self, state, phase, inbox, ctx):
        return {**state, "x": inbox.mix("d")}


def test_two_exchanges_a_round_are_two_rounds_of_mixing(tmp_path, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "twice", Twice)
    raw = {**QUICK, "task": {"name": "averaging"}, "nodes": 8, "rounds": 6}
    once = simulate(raw, out=tmp_path / "once", rounds=12)
    twice = simulate({**raw, "algorithm": {"name": "twice"}}, out=tmp_path / "twice")

    assert torch.equal(stacked(once.models), stacked(twice.models))
    assert twice.summary["bytes_sent"] == once.summary["bytes_sent"]
    assert [row["rms_disagreement"] for row in twice.records] == [row["rms_disagreement"] for row in once.records[::2]]


def test_where_no_model_is_sent_the_disagreement_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "differences", Differences)
    plan = plan_of({"task": {"name": "averaging"}, "nodes": 5, "rounds": 3, "algorithm": {"name": "differences"}})
    run = run_of(plan, tmp_path / "run")

    assert [row["rms_disagreement"] for row in run.records] == [None] * 3
    expected = np.linalg.matrix_power(plan.topology.mixing_matrix().toarray(), 3) @ starts_of(plan).numpy()
    np.testing.assert_allclose(stacked(run.models).numpy(), expected, rtol=0, atol=1e-14)


# ---- agreeing to stop


def test_a_complete_graph_stops_in_the_round_that_can_be_counted(tmp_path):
    """Round 0 exchanges the starts and fails; h = 1 ... 4 in rounds 1 to 4; 4 = patience + diameter announces 4 + 2."""
    raw = {"task": {"name": "averaging"}, "nodes": 6, "topology": {"name": "complete"}, "rounds": 0, "stop": {}, "baselines": []}
    run = simulate(raw, out=tmp_path / "run")
    by_round = [[row for row in run.node_records if row["round"] == r] for r in range(7)]

    assert run.summary["rounds"] == 7
    assert run.summary["stop_reason"] == "converged"
    assert [{row["agreed_for"] for row in rows} for rows in by_round] == [{0}, {1}, {2}, {3}, {4}, {5}, {6}]
    assert [{row["stop_round"] for row in rows} for rows in by_round] == [{None}] * 4 + [{6}] * 3
    assert {row["kind"] for row in run.records} == {"settle"}


@pytest.mark.parametrize(("topology", "nodes", "diameter"), [("ring", 8, 4), ("star", 7, 2), ("path", 6, 5)])
def test_all_stop_together_two_diameters_after_the_first_announcement(topology, nodes, diameter, tmp_path):
    stop = {"settle": 1000}
    raw = {"task": {"name": "averaging"}, "nodes": nodes, "topology": {"name": topology}, "rounds": 0, "stop": stop, "baselines": []}
    run = simulate(raw, out=tmp_path / "run")
    announced = min(row["round"] for row in run.node_records if row["stop_round"] is not None)

    assert run.summary["rounds"] == announced + 2 * diameter + 1
    assert {row["stop_round"] for row in run.node_records if row["round"] == run.summary["rounds"] - 1} == {announced + 2 * diameter}
    certified = run.records[announced - diameter]
    assert certified["rms_disagreement"] <= 1e-3 * certified["rms_norm"]
    assert run.summary["relative_consensus"] <= 1e-3


def test_training_rounds_come_first_and_settling_is_capped(tmp_path):
    raw = {**LOGISTIC, "rounds": 4, "stop": {"relative_consensus": 1e-9, "settle": 3}, "baselines": []}
    run = simulate(raw, out=tmp_path / "run")

    assert [row["kind"] for row in run.records] == ["train"] * 4 + ["settle"] * 3
    assert [row["loss"] is None for row in run.records] == [False] * 4 + [True] * 3
    assert run.summary["stop_reason"] == "rounds"
    assert run.summary["rounds"] == 7


# ---- what a run leaves


def test_a_summary_has_the_agreed_keys_and_figures(tmp_path):
    run = simulate({**LOGISTIC, "rounds": 6, "stop": None, "evaluate_every": 2}, out=tmp_path / "run")
    summary = run.summary

    assert list(summary) == SUMMARY_KEYS
    assert (summary["experiment"], summary["engine"], summary["nodes"], summary["rounds"]) == ("experiment", "simulator", 4, 6)
    assert list(summary["seconds"]) == ["sites", "plan", "setup", "train", "mix", "evaluate", "write", "baselines", "total"]
    assert summary["seconds"]["total"] == math.fsum(value for part, value in summary["seconds"].items() if part != "total")
    names = sorted(run.models)
    for figures in (summary["metrics"], summary["baselines"]["local"], summary["baselines"]["pooled"]):
        for values in figures.values():
            assert list(values) == ["mean", "min", "max", "n_defined", "per_node"]
            assert list(values["per_node"]) == names
    assert set(summary["mean_model"]) == set(summary["metrics"])
    assert set(summary["baselines"]) == {"local", "pooled"}
    assert summary["row_by_row"] is None
    assert summary["peak_rss_bytes"] > 2**20
    assert summary["consensus_distance"] == pytest.approx(distance(stacked(run.models).double()), rel=1e-5)
    assert summary["bytes_sent"] == sum(row["bytes_sent"] for row in run.records) == sum(row["bytes_sent"] for row in run.node_records)
    evaluated = [row["round"] for row in run.node_records if "metrics" in row]
    assert evaluated == [1] * 4 + [3] * 4 + [5] * 4
    last = {row["node"]: row["metrics"] for row in run.node_records if row["round"] == 5}
    assert {node: metrics["accuracy"] for node, metrics in last.items()} == summary["metrics"]["accuracy"]["per_node"]


def test_bytes_are_the_models_and_small_headers(tmp_path):
    run = simulate({**QUICK, "task": {"name": "averaging", "dimension": 100}, "nodes": 8, "rounds": 120}, out=tmp_path / "run")

    # numbers above 127 take a byte more: eight in a header, once a node can be there while an update of 12 exchanges ago is still sent
    assert run.summary["bytes_sent"] == 16 * (120 * (800 + 196) + 4 * 8)
    assert {row["bytes_sent"] for row in run.node_records} == {2 * 996, 2 * 1004}


def test_the_same_experiment_gives_the_same_bits_and_another_seed_others(tmp_path):
    one, two, other = (
        simulate({**QUICK, **LOGISTIC, "rounds": 4}, out=tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )

    assert torch.equal(stacked(one.models), stacked(two.models))
    assert without_seconds(one.node_records) == without_seconds(two.node_records)
    assert not torch.equal(stacked(one.models), stacked(other.models))


def test_models_are_kept_every_so_many_rounds_under_the_models_own_names(tmp_path):
    run = simulate({**QUICK, **LOGISTIC, "rounds": 7, "save_models_every": 3}, out=tmp_path / "run")

    assert sorted(path.name for path in (run.path / "models").iterdir() if path.is_dir()) == ["round-000002", "round-000005"]
    short = simulate({**QUICK, **LOGISTIC, "rounds": 6}, out=tmp_path / "short")
    assert torch.equal(stacked(run.models_after(5)), stacked(short.models))
    with pytest.raises(ConfigError, match="no models of round 3: save_models_every decides which are kept"):
        run.models_after(3)


def test_a_thousand_and_one_nodes_are_stacked_and_sampled(tmp_path):
    raw = {**quadratic(0.01, 2, topology="ring"), "nodes": 1001, "save_models_every": 1, "evaluate_every": 1}
    run = simulate(raw, out=tmp_path / "run")

    files = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*.safetensors"))
    assert files == ["models.safetensors", "models/round-000000.safetensors", "models/round-000001.safetensors"]
    assert len(run.models) == 1001
    assert torch.equal(stacked(run.models), stacked(run.models_after(1)))
    assert [len([row for row in run.node_records if row["round"] == r]) for r in (0, 1)] == [100, 100]
    assert {"node-0000", "node-1000"} <= {row["node"] for row in run.node_records}
    figures = run.summary["metrics"]["distance"]
    assert list(figures) == ["mean", "min", "max", "n_defined", "quantiles"]
    assert figures["n_defined"] == 1001
    assert [row["nodes"] for row in run.records] == [1001, 1001]


def test_sites_without_rows_take_part_without_training(tmp_path):
    plan = plan_of(LOGISTIC, rounds=3, baselines=["local", "pooled"])
    quiet = plan.names[1]
    plan = replace(plan, sites={**plan.sites, quiet: replace(plan.sites[quiet], train=None, test=None)})
    run = run_of(plan, tmp_path / "run")

    assert {row["node"] for row in run.node_records if row["loss"] is None} == {quiet}
    assert all(row["loss"] is not None for row in run.records)
    assert run.summary["metrics"]["accuracy"]["n_defined"] == 3
    assert run.summary["metrics"]["accuracy"]["per_node"][quiet] is None
    assert run.summary["baselines"]["local"]["accuracy"]["n_defined"] == 3
    assert not torch.equal(run.models[quiet], torch.zeros(4))


def test_a_node_that_diverges_keeps_to_itself_and_is_named(tmp_path):
    """A learning rate of 1e6 leaves the finite numbers at once but at node-0, whose minimum is the start; rounds of mixing go on."""
    run = simulate(quadratic(1e6, 3, local_steps=60), out=tmp_path / "run")
    diverged = [(row["round"], row["node"]) for row in run.events if row["event"] == "diverged"]

    assert diverged == [(number, f"node-{i}") for number in range(3) for i in range(1, 8)]
    assert torch.equal(stacked(run.models), torch.zeros(8, 1, dtype=torch.float64))


def test_from_python_keys_are_given_by_name_and_an_existing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text("task: {name: averaging}\nstop: null\n")
    run = p2pfl.simulate("small.yaml", rounds=2)

    assert run.path == Path("runs/small")
    assert run.summary["rounds"] == 2
    for out in (None, "runs/small"):
        with pytest.raises(ConfigError, match=r"runs/small: exists already: choose another --out, or continue that run with --resume"):
            p2pfl.simulate("small.yaml", rounds=2, out=out)


@pytest.mark.parametrize("device", ["nonsense", "meta:7:7"])
def test_a_device_that_is_not_there_is_refused(device, tmp_path):
    with pytest.raises(ConfigError, match=r"--device: device = .*: cannot be used here .*; use cpu"):
        simulate({**QUICK, "task": {"name": "averaging"}}, out=tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()
    check_device("cpu")


def test_progress_is_told_of_every_round(tmp_path):
    told = []
    raw = {"task": {"name": "averaging"}, "rounds": 2, "stop": {"settle": 1}, "baselines": []}
    run = simulate(raw, out=tmp_path / "run", progress=lambda number, most, row: told.append((number, most, row["kind"])))

    assert told == [(1, 3, "train"), (2, 3, "train"), (3, 3, "settle")]
    assert len(run.records) == 3


def test_a_round_with_a_missed_message_is_bounded_from_below_only(tmp_path):
    experiment = {"task": {"name": "averaging", "dimension": 5}, "nodes": 6, "topology": {"name": "ring"}, "rounds": 12, "stop": None}
    cut = FaultScript.in_rounds(cut={("node-1", "node-2"): frozenset(range(3, 12, 2))})
    rows = read_run(simulate(experiment, out=tmp_path / "run", faults=cut).path).rounds

    assert [row["round"] for row in rows if row["bound_high"] is None] == [3, 5, 7, 9, 11]
    for row in rows:
        assert row["bound_low"] * (1 - 1e-12) <= row["rms_disagreement"]
        assert row["bound_high"] is None or row["rms_disagreement"] <= row["bound_high"] * (1 + 1e-12)
