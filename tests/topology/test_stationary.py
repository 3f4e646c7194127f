"""Weights whose mean counts some nodes more than others: `weights: stationary`."""

from __future__ import annotations

import asyncio
import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topology_weights import connected_graphs

from networks import HASTY, Network, finish
from p2pfl.algorithms import ALGORITHMS
from p2pfl.errors import ConfigError, TopologyError
from p2pfl.experiment.graph import build_schedule
from p2pfl.experiment.loading import experiment_from, load_study
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.simulator import FaultScript
from p2pfl.topology import Topology, load, make, spectral_gap, weighted
from rows import trained
from simulations import run_of, stacked, starting_at, starts_of
from thorough import first_fast

MASSES = [10.0, 20.0, 30.0, 40.0, 100.0]
RING = """
nodes: [{name: node-0, mass: 10}, {name: node-1, mass: 20}, {name: node-2, mass: 30}, {name: node-3, mass: 40}, {name: node-4, mass: 100}]
edges: [[node-0, node-1], [node-1, node-2], [node-2, node-3], [node-3, node-4], [node-4, node-0]]
"""
AVERAGING = {"task": {"name": "averaging", "dimension": 1}, "nodes": 5, "weights": "stationary", "rounds": 0, "baselines": []}


def ring5():
    return weighted(Topology.from_edges("ring", 5, range(5), [1, 2, 3, 4, 0], masses=MASSES), "stationary")


@pytest.fixture
def plan(tmp_path):
    """Five nodes that count 10, 20, 30, 40 and 100 and hold 1, 2, 3, 4 and 10."""
    (tmp_path / "ring.yaml").write_text(RING, encoding="utf-8")
    stop = {"relative_consensus": 1e-9, "settle": 500}
    experiment = experiment_from({**AVERAGING, "topology": {"file": str(tmp_path / "ring.yaml")}, "stop": stop})
    plan = make_plan(experiment, load_sites(experiment))
    return starting_at(plan, torch.tensor([[1.0], [2], [3], [4], [10]], dtype=torch.float64))


def weighted_mean(x_NP):
    return float((torch.tensor(MASSES, dtype=torch.float64)[:, None] * x_NP).sum() / 200)


def test_everybody_ends_at_the_weighted_mean():
    w = ring5().mixing_matrix().toarray()

    assert w[0, 1] == 1 / 3  # min(1 / 3, 20 / 10 / 3)
    assert w[4, 0] == pytest.approx(1 / 30, abs=1e-16)  # min(1 / 3, 10 / 100 / 3)
    assert np.linalg.matrix_power(w, 400) @ [1, 2, 3, 4, 10] == pytest.approx([6.5] * 5, abs=1e-12)


@given(graph=connected_graphs(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_what_one_end_takes_in_the_other_gives_by_their_masses(graph, seed):
    masses_N = np.exp(np.random.default_rng(seed).normal(0, 2, graph.num_nodes))
    found = weighted(Topology.from_edges("random", graph.num_nodes, graph.senders, graph.receivers, masses=masses_N), "stationary")
    w = found.mixing_matrix().toarray()
    flows = masses_N[:, None] * w

    np.testing.assert_allclose(flows, flows.T, rtol=1e-14, atol=0)
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-14)
    assert w.min() >= 0
    assert spectral_gap(found) > 0
    assert found.directed


def test_equal_masses_give_a_symmetric_matrix_only_where_degrees_are_equal():
    """m_i = m_j: min(1 / (1 + d_i), 1 / (1 + d_j)) is Metropolis' rule."""
    graph = make("karate-club")
    equal = Topology.from_edges("karate", 34, graph.senders, graph.receivers, masses=np.ones(34))

    np.testing.assert_allclose(weighted(equal, "stationary").weights, weighted(graph).weights, rtol=1e-15)


# ---- where masses come from


def test_masses_follow_their_nodes_from_a_file(tmp_path):
    (tmp_path / "g.yaml").write_text(
        "nodes: [{name: c, mass: 3}, {name: a, mass: 1}, {name: b, mass: 2.5}]\nedges: [[a, b], [b, c]]\n", encoding="utf-8"
    )
    (tmp_path / "n.yaml").write_text("nodes: [{name: 2, mass: 7}, {name: 0, mass: 5}, {name: 1, mass: 6}]\nedges: [[0, 1], [1, 2]]\n")
    (tmp_path / "g.json").write_text(
        json.dumps({"nodes": [{"id": "b", "mass": 2}, {"id": "a", "mass": 1}], "edges": [{"source": "a", "target": "b"}]})
    )
    (tmp_path / "g.gml").write_text(
        'graph [ node [ id 0 label "b" mass 2.0 ] node [ id 1 label "a" mass 1.0 ] edge [ source 0 target 1 ] ]'
    )

    assert load(tmp_path / "g.yaml").masses.tolist() == [1, 2.5, 3]
    assert load(tmp_path / "n.yaml").masses.tolist() == [5, 6, 7]
    assert load(tmp_path / "g.json").masses.tolist() == load(tmp_path / "g.gml").masses.tolist() == [1, 2]
    assert load(tmp_path / "g.yaml").renamed(["z", "y", "x"]).masses.tolist() == [3, 2.5, 1]


def test_masses_that_cannot_be_are_found_at_once(tmp_path):
    (tmp_path / "g.yaml").write_text("nodes: [{name: a, mass: 0}, {name: b, mas: 2}, {mass: 1}]\nedges: []\n", encoding="utf-8")
    with pytest.raises(TopologyError) as caught:
        load(tmp_path / "g.yaml")

    assert caught.value.findings == (
        "nodes[1].mas = 2: unknown key, did you mean mass? one of name, mass",
        "nodes[2] = null: expected a text; put it in quotes",
        "nodes[0]: mass = 0, expected a number > 0",
        "nodes[1]: no mass, but others have one; give it for all nodes or for none",
    )


def test_without_masses_the_remedy_is_named():
    with pytest.raises(TopologyError, match=r"topology ring does not say how much each node counts; in its file write nodes: \[\{name"):
        weighted(make("ring", 5), "stationary")
    with pytest.raises(TopologyError, match="weights = 'stationary': topology exponential is directed"):
        weighted(make("exponential", 8), "stationary")
    with pytest.raises(
        ConfigError, match=r"weights = 'stationary': how much does node-0, .*node-4 count\? .* give `samples` on every card"
    ):
        make_plan(experiment_from(AVERAGING), load_sites(experiment_from(AVERAGING)))


def test_they_are_the_sites_training_rows_where_no_file_says_otherwise():
    raw = {
        "task": {"name": "digits", "hidden": 4},
        "nodes": 5,
        "partition": {"name": "unequal", "sizes": "linear"},
        "weights": "stationary",
    }
    experiment = experiment_from(raw)
    plan = make_plan(experiment, load_sites(experiment))
    rows_N = np.array([len(plan.sites[name].train[0]) for name in plan.names])
    flows = rows_N[:, None] * plan.topology.mixing_matrix().toarray()

    assert len(set(rows_N.tolist())) == 5
    np.testing.assert_allclose(flows, flows.T, rtol=1e-14)
    assert set(plan.population(plan.names)._scale_N.tolist()) == {1.0}  # losses are not scaled as well


def test_a_study_takes_them_from_the_cards_and_members_take_its_weights(tmp_path):
    experiment = experiment_from({**AVERAGING, "nodes": None, "stop": None, "rounds": 3})
    samples = {"a": 10, "b": 20, "c": 70}
    cards = [Identity.new().card(name, f"tcp://{name}.example:7700", count) for name, count in samples.items()]
    schedule = build_schedule(experiment, sorted(samples), samples=samples)
    Study.create(experiment.as_dict(), cards, schedule.union()).save(tmp_path / "study.yaml")
    study = load_study(tmp_path / "study.yaml")
    member = build_schedule(experiment, study.names, study.topology())

    assert member.at(0).weights.tobytes() == schedule.at(0).weights.tobytes()
    assert member.weighted_mean
    with pytest.raises(ConfigError, match="how much does b count"):
        build_schedule(experiment, sorted(samples), samples={**samples, "b": None})


# ---- what runs on them


@pytest.mark.slow
def test_with_equal_curvatures_training_ends_at_the_weighted_optimum():
    """f_i = (x - b_i)**2 / 2: the weighted mean of x goes to that of b, exactly and whatever the graph."""
    b_N1 = torch.tensor([[1.0], [2], [3], [4], [10]], dtype=torch.float64)
    for name in ("dpsgd", "dfedavgm", "qg-dsgdm", "diloco"):
        end_N1 = trained(ALGORITHMS[name](), ring5(), torch.zeros_like(b_N1), lambda x, r, k: x - b_N1, 4000, lr=0.01)

        assert weighted_mean(end_N1) == pytest.approx(6.5, abs=1e-9), name


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"allreduce", "relaysgd"}))
def test_algorithms_that_need_the_plain_mean_are_refused(name, plan):
    raw = {**plan.experiment.as_dict(), "algorithm": {"name": name}, "stop": None, "rounds": 1}
    del raw["pace"]  # each at its own
    experiment = experiment_from(raw)
    if name in ("dpsgd", "dfedavgm", "qg-dsgdm", "diloco"):
        assert make_plan(experiment, load_sites(experiment))
    else:
        with pytest.raises(ConfigError, match=f"weights = 'stationary' have a weighted mean; algorithm {name} needs a plain one"):
            make_plan(experiment, load_sites(experiment))


def test_of_weights_that_a_rule_cannot_have_nothing_is_said_of_the_graph():
    raw = {"task": {"name": "synthetic-logistic", "features": 3, "samples": 20}, "nodes": 5, "topology": {"name": "star"}}
    experiment = experiment_from({**raw, "weights": "stationary", "algorithm": {"name": "exact-diffusion"}})
    with pytest.raises(ConfigError) as caught:
        make_plan(experiment, load_sites(experiment))

    (finding,) = caught.value.findings
    assert finding.endswith(
        "weights = 'stationary' have a weighted mean; algorithm exact-diffusion needs a plain one: take metropolis, or dpsgd"
    )


def test_weights_that_are_not_meant_are_refused_as_before(plan):
    raw = {**plan.experiment.as_dict(), "topology": {"name": "star"}, "weights": "push-sum"}
    with pytest.raises(ConfigError, match="algorithm dpsgd needs doubly stochastic weights: on this graph use push-sum"):
        make_plan(experiment_from(raw), load_sites(experiment_from(raw)))


def test_what_would_count_twice_or_not_at_all_is_refused():
    with pytest.raises(ConfigError, match="weighting = 'samples': weights: stationary counts the samples already; keep one of both"):
        experiment_from({**AVERAGING, "weighting": "samples"})
    with pytest.raises(
        ConfigError, match="weights = 'stationary': topology base-2 changes from round to round and has its own; leave it out"
    ):
        experiment_from({**AVERAGING, "topology": {"name": "base-2"}})


@pytest.mark.slow
def test_both_runtimes_reach_the_weighted_mean(plan, tmp_path):
    simulated = run_of(plan, tmp_path / "simulator")

    async def main():
        async with Network(plan, tmp_path / "daemons") as network:
            network.start()
            assert set(await network.ended()) == {"converged"}
            return network.models()

    models = finish(main())
    assert simulated.summary["stop_reason"] == "converged"
    assert torch.equal(models, stacked(simulated.models))
    assert models.flatten().tolist() == pytest.approx([6.5] * 5, abs=1e-7)
    assert weighted_mean(models) == pytest.approx(6.5, abs=1e-13)


@pytest.mark.parametrize("seed", first_fast(range(3)))
def test_lost_messages_leave_the_weighted_mean_where_it_is(plan, seed, tmp_path):
    rng = np.random.default_rng(seed)
    lost = {edge: frozenset(np.flatnonzero(rng.random(40) < 0.4).tolist()) for edge in itertools.permutations(plan.names, 2)}
    models = stacked(run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost=lost)).models)

    assert weighted_mean(models) == pytest.approx(6.5, abs=1e-13)
    assert models.flatten().tolist() == pytest.approx([6.5] * 5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_daemon_leaves_the_weighted_mean_where_it_is(plan, seed, tmp_path):
    chance = random.Random(seed)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path / "daemons", timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(1, 6), [victim])
            for _ in range(chance.randrange(300)):
                await asyncio.sleep(0)
            await network.kill(victim)
            others = [name for name in plan.names if name != victim]
            await network.reached(max(network.round(name) for name in others) + 1, others[:1])
            network.start(victim)
            await network.ended()
            return network.models()

    assert weighted_mean(finish(main())) == pytest.approx(6.5, abs=1e-12)
    assert float(starts_of(plan).mean()) == 4
