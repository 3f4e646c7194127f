"""One experiment gives the same weights in the simulator and in daemons, after every round."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from links import ZeroMQLinks
from networks import Network, finish, plan_of
from p2pfl.algorithms import ALGORITHMS, COMPRESSORS
from p2pfl.evaluation.results import Run
from p2pfl.launcher import up
from p2pfl.simulator import simulate

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

TOLERANCE = 1e-6
PATIENT = {"deadline_floor_s": 300.0, "deadline_factor": 100.0}
FOUR_HOSPITALS = Path(__file__).parents[2] / "topologies" / "four-hospitals.yaml"

BREAST_CANCER = {"task": {"name": "breast-cancer"}, "topology": {"name": "ring"}, "rounds": 30}
HEART_DISEASE = {"task": {"name": "heart-disease"}, "topology": {"file": str(FOUR_HOSPITALS)}, "rounds": 30}
DIGITS = {
    "task": {"name": "digits", "hidden": 16},
    "nodes": 8,
    "topology": {"name": "torus"},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "rounds": 30,
    "stop": {"relative_consensus": 1e-2, "settle": 60},
}
NEEDS_DATA = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files")


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Of any node's weights, relative to their norm; (N, P)."""
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


def stacked(run: Run, after: int) -> Tensor:
    models = run.models_after(after)
    return torch.stack([models[name] for name in sorted(models)])


def bytes_sent(network: Network) -> int:
    return sum(network.summary(name)["bytes_sent"] for name in network.plan.names)


def each_round(**experiment):
    return {**experiment, "save_models_every": 1, "baselines": []}


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(BREAST_CANCER, id="breast-cancer-ring-5", marks=pytest.mark.slow),
        pytest.param(HEART_DISEASE, id="heart-disease-four-hospitals", marks=[pytest.mark.slow, NEEDS_DATA]),
        pytest.param(DIGITS, id="momentum-torus-8", marks=pytest.mark.slow),
        pytest.param({**BREAST_CANCER, "weighting": "samples", "topology": {"name": "star"}}, id="samples-star-5", marks=pytest.mark.slow),
        pytest.param({**BREAST_CANCER, "rounds": 5, "stop": None, "dtype": "float64"}, id="float64-fixed-rounds", marks=pytest.mark.slow),
    ],
)
def test_daemons_in_one_process_equal_the_simulator(experiment, tmp_path):
    experiment = each_round(**experiment)
    simulated = simulate(experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan_of(**experiment), tmp_path) as network:
            network.start()

            assert set(await network.ended()) == {simulated.summary["stop_reason"]}
            assert {network.summary(name)["rounds"] for name in network.plan.names} == {simulated.summary["rounds"]}
            for number in range(simulated.summary["rounds"]):
                assert largest_difference(network.models(number), stacked(simulated, number)) < TOLERANCE
            assert not any(row["skipped"] for name in network.plan.names for row in network.rows(name))
            assert bytes_sent(network) == simulated.summary["bytes_sent"]

    finish(main())


def experiment_for(name):
    """Thirty rounds at eight nodes on a graph that the algorithm can run on."""
    requires = ALGORITHMS[name]().requires
    topology = "complete" if "complete" in requires else "path" if "tree" in requires else "torus"
    weights = "push-sum" if "column stochastic" in requires else "metropolis"
    return each_round(
        task={"name": "synthetic-logistic"},
        nodes=8,
        topology={"name": topology},
        weights=weights,
        algorithm={"name": name, "local_steps": 2},
        optimizer={"lr": 0.05},
        rounds=30,
        stop=None,
    )


IN_ROUNDS = sorted(name for name, rule in ALGORITHMS.items() if "pairwise" not in rule.requires)
"""Nodes that meet in pairs are replayed from what they recorded, in test_pairwise.py."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compressor"), [*((name, "none") for name in IN_ROUNDS), *(("choco", c) for c in COMPRESSORS if c != "none")]
)
def test_every_algorithm_gives_the_same_weights_both_ways(name, compressor, tmp_path):
    experiment = {**experiment_for(name), "compressor": {"name": compressor}}
    simulated = simulate(experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan_of(**experiment), tmp_path) as network:
            network.start()

            assert set(await network.ended()) == {"rounds"}
            for number in range(30):
                assert largest_difference(network.models(number), stacked(simulated, number)) < TOLERANCE
            assert bytes_sent(network) == simulated.summary["bytes_sent"]
            assert not any(row["skipped"] for node in network.plan.names for row in network.rows(node))

    finish(main())


def test_daemons_over_zeromq_equal_the_simulator(tmp_path):
    experiment = each_round(**{**BREAST_CANCER, "rounds": 5})
    simulated = simulate(experiment, out=tmp_path / "simulator")
    links = ZeroMQLinks()

    async def main():
        async with Network(plan_of(**experiment), tmp_path, links=links) as network:
            network.start()

            assert set(await network.ended()) == {simulated.summary["stop_reason"]}
            for number in range(simulated.summary["rounds"]):
                assert largest_difference(network.models(number), stacked(simulated, number)) < TOLERANCE

    finish(main())
    links.close()


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param({**BREAST_CANCER, "nodes": 3, "rounds": 3, "stop": None}, id="three-nodes-three-rounds", marks=pytest.mark.slow),
        pytest.param(BREAST_CANCER, id="breast-cancer-ring-5", marks=pytest.mark.slow),
        pytest.param(HEART_DISEASE, id="heart-disease-four-hospitals", marks=[pytest.mark.slow, NEEDS_DATA]),
        pytest.param(DIGITS, id="momentum-torus-8", marks=pytest.mark.slow),
    ],
)
def test_processes_with_encrypted_links_equal_the_simulator(experiment, tmp_path):
    experiment = each_round(**experiment)
    simulated = simulate(experiment, out=tmp_path / "simulator")
    ran = up(experiment, out=tmp_path / "daemons", site=PATIENT)

    assert (ran.summary["rounds"], ran.summary["stop_reason"]) == (simulated.summary["rounds"], simulated.summary["stop_reason"])
    for number in range(simulated.summary["rounds"]):
        assert largest_difference(stacked(ran, number), stacked(simulated, number)) < TOLERANCE
    for metric, values in simulated.summary["metrics"].items():
        assert ran.summary["metrics"][metric]["per_node"] == pytest.approx(values["per_node"], rel=1e-4)
    assert ran.summary["bytes_sent"] == simulated.summary["bytes_sent"]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "weights"), [("exponential", "given"), ("one-peer-exponential", "metropolis")])
def test_links_that_go_one_way_and_change_equal_the_simulator(topology, weights, tmp_path):
    experiment = each_round(task={"name": "averaging"}, topology={"name": topology}, weights=weights, nodes=8, stop=None, rounds=6)
    simulated = simulate(experiment, out=tmp_path / "simulator")
    ran = up(experiment, out=tmp_path / "daemons", site=PATIENT)

    for number in range(6):
        assert largest_difference(stacked(ran, number), stacked(simulated, number)) < TOLERANCE
    assert ran.summary["bytes_sent"] == simulated.summary["bytes_sent"]
    if topology == "one-peer-exponential":
        models = stacked(ran, 2)
        assert torch.allclose(models, models.mean(dim=0).expand_as(models), rtol=0, atol=1e-12)
