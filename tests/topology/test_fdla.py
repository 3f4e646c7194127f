"""The fastest weights of all: known optima, what may not use them, and who needs the solver."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_topology_weights import connected_graphs

from networks import Network, finish
from p2pfl.algorithms import ALGORITHMS, DPSGD
from p2pfl.errors import ConfigError, MissingExtraError, TopologyError
from p2pfl.experiment.loading import experiment_from, load_study
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.experiment.requirements import negative_weights
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.simulator import simulate
from p2pfl.topology import Schedule, Topology, make, make_schedule, spectral_gap, weighted

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

pytest.importorskip("cvxpy")

AVERAGING = {"task": {"name": "averaging"}, "nodes": 5, "topology": {"name": "bull"}, "weights": "fdla", "rounds": 0, "baselines": []}


def bipartite(a, b):
    """K_{a,b}."""
    return Topology.from_edges(f"k-{a}-{b}", a + b, np.repeat(np.arange(a), b), np.tile(np.arange(a, a + b), a))


KNOWN = [
    *((make("path", n), math.cos(math.pi / n)) for n in (4, 5, 6)),
    (make("ring", 5), 1 / math.sqrt(5)),
    (make("ring", 8), 0.744521),
    (make("ring", 16), 0.926670),
    *((make("star", n), (n - 1) / (n + 1)) for n in (5, 8, 16)),
    *((make("hypercube", 2**p), (p - 1) / (p + 1)) for p in (3, 4, 5)),
    (make("petersen"), 3 / 7),
    (bipartite(3, 2), 3 / 7),
    (make("house"), 3 / 7),
    (make("bull"), 1 / math.sqrt(2)),
    (make("barbell", 6, bridge=0), math.sqrt(2 / 3)),
    (make("grid", 9), 0.692551),
    (make("karate-club"), 0.924587),
]
EDGE_TRANSITIVE = ("ring", "star", "hypercube", "petersen", "k-3-2")


def contraction(graph):
    return 1 - spectral_gap(graph)


@pytest.mark.parametrize(("graph", "expected"), KNOWN, ids=[f"{graph.name}-{graph.num_nodes}" for graph, _ in KNOWN])
def test_the_contraction_is_the_published_one(graph, expected):
    found = weighted(graph, "fdla")
    w = found.mixing_matrix().toarray()

    assert contraction(found) == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(w, w.T)
    assert np.abs(w.sum(axis=0) - 1).max() < 1e-14
    assert contraction(found) <= contraction(weighted(graph, "best-constant")) + 1e-7


@pytest.mark.parametrize("graph", [graph for graph, _ in KNOWN if graph.name in EDGE_TRANSITIVE], ids=lambda g: f"{g.name}-{g.num_nodes}")
def test_where_all_edges_are_alike_it_is_the_best_constant(graph):
    np.testing.assert_allclose(weighted(graph, "fdla").weights, weighted(graph, "best-constant").weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [4, 5, 6])
def test_on_a_path_every_weight_is_a_half(n):
    np.testing.assert_allclose(weighted(make("path", n), "fdla").weights, 0.5, rtol=0, atol=1e-4)


@given(graph=connected_graphs())
@settings(max_examples=10, deadline=None)
def test_no_other_rule_is_faster(graph):
    fastest = contraction(weighted(graph, "fdla"))

    assert all(fastest <= contraction(weighted(graph, rule)) + 1e-7 for rule in ("metropolis", "max-degree", "lazy", "best-constant"))


def test_weights_below_nothing_are_refused_where_single_messages_count(monkeypatch):
    """Karate needs some: with weights of 0 or more .925028 is the best."""

    class Robust(DPSGD):
        requires = frozenset({"fixed mean", "nonnegative weights"})

    monkeypatch.setitem(ALGORITHMS, "robust", Robust)
    karate = weighted(make("karate-club"), "fdla")
    raw = {**AVERAGING, "nodes": 34, "topology": {"name": "karate-club"}, "algorithm": {"name": "robust"}}
    task = load_sites(experiment_from(raw))

    assert karate.weights.min() < -0.05
    assert contraction(karate) < 0.925028 - 1e-4
    with pytest.raises(ConfigError, match=r"a message may count -0\.\d+; algorithm robust needs weights of 0 or more: take metropolis"):
        make_plan(experiment_from(raw), task)
    assert make_plan(experiment_from({**raw, "weights": "metropolis"}), task)


@pytest.mark.parametrize(
    ("schedule", "least"),
    [
        (Schedule.static(weighted(make("star", 5), "best-constant")), 1 - 4 / 3),  # the centre's own
        (make_schedule("matcha", 8, budget=0.5), 1 - 2 * 0.607369),
        (Schedule.static(weighted(make("star", 5))), None),
        (make_schedule("base-3", 7), None),
        (make_schedule("el-local", 7), None),
    ],
    ids=["best-constant", "matcha", "metropolis", "base-3", "el-local"],
)
def test_a_nodes_own_weight_may_be_below_nothing_as_well(schedule, least):
    expected = [] if least is None else [f"a message may count {least:.3g}; aggregator x needs weights of 0 or more: take metropolis"]

    assert negative_weights(schedule, "aggregator x") == expected


def test_without_the_extra_it_is_named(monkeypatch):
    for missing in ("cvxpy", "clarabel"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(MissingExtraError, match=r"^weights = 'fdla' needs cvxpy: pip install 'p2pfl-mesh\[optimal\]'$"):
                weighted(make("ring", 4), "fdla")


def test_a_graph_that_would_take_minutes_is_refused():
    with pytest.raises(TopologyError, match="topology ring of 65 nodes would take minutes; expected at most 64; take best-constant"):
        weighted(make("ring", 65), "fdla")


def test_members_of_a_study_take_its_weights_and_need_no_solver(tmp_path, monkeypatch):
    experiment = experiment_from(AVERAGING)
    task = load_sites(experiment)
    plan = make_plan(experiment, task)
    cards = [Identity.new().card(name, f"tcp://127.0.0.1:{7700 + i}", None) for i, name in enumerate(plan.names)]
    Study.create(plan.experiment.as_dict(), cards, plan.topology).save(tmp_path / "study.yaml")
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    study = load_study(tmp_path / "study.yaml")
    member = make_plan(experiment_from(study.experiment), task, names=study.names, topology=study.topology())

    assert member.topology.weights.tobytes() == plan.topology.weights.tobytes()
    assert member.stop_rule == plan.stop_rule
    with pytest.raises(MissingExtraError):
        make_plan(experiment, task)  # whoever makes the study does need it


def test_a_command_that_does_not_ask_for_it_does_not_import_the_solver():
    program = "import sys, p2pfl.topology as t; t.weighted(t.make('ring', 5)); assert not {'cvxpy', 'clarabel'} & {*sys.modules}"

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.slow
def test_daemons_and_simulator_agree_as_fast_as_predicted(tmp_path):
    experiment = experiment_from(AVERAGING)
    plan = make_plan(experiment, load_sites(experiment))
    simulated = simulate(experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan, tmp_path / "daemons") as network:
            network.start()
            assert set(await network.ended()) == {"converged"}
            return network.models()

    assert torch.equal(finish(main()), torch.stack([simulated.models[name] for name in plan.names]))
    distances = [row["consensus_distance"] for row in simulated.records]
    assert distances[-1] / distances[0] == pytest.approx((1 / math.sqrt(2)) ** (len(distances) - 1), rel=0.5)
