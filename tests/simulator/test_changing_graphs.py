"""Graphs that are directed or change from round to round: agreeing to stop, and what fails in between."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from networks import HASTY, Network, averaging, finish, plan_of
from p2pfl.algorithms.stopping import TimeVaryingBound
from simulations import drift, run_of, starts_of
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

CHANGING = [
    ("one-peer-exponential", 8, {}),
    ("one-peer-exponential", 6, {}),
    ("base-2", 7, {}),
    ("base-3", 5, {}),
    ("el-oracle", 8, {"degree": 3}),
    ("random-matching", 6, {}),
    ("matchings", 6, {"base": "path"}),
    ("matcha", 6, {"base": {"name": "complete"}, "budget": 0.5}),
]


@pytest.mark.parametrize(("name", "nodes", "options"), first_fast(CHANGING))
def test_daemons_agree_to_stop_when_the_simulator_does(name, nodes, options, tmp_path):
    plan = averaging({"name": name, **options}, nodes)
    simulated = run_of(plan, tmp_path / "simulator")

    async def main():
        async with Network(plan, tmp_path / "daemons") as network:
            network.start()
            assert await network.ended() == ["converged"] * nodes
            return network.models(), network.summary(plan.names[0])["rounds"]

    models, rounds = finish(main())
    assert simulated.summary["stop_reason"] == "converged"
    assert rounds == simulated.summary["rounds"]
    assert torch.equal(models, torch.stack([simulated.models[name] for name in plan.names]))
    apart = (models - models.mean(dim=0)).norm(dim=1).square().mean().sqrt()
    assert apart <= plan.stop_rule.tolerance * models.norm(dim=1).square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "nodes"), [("base-2", 7), ("base-3", 8), ("matcha", 5)])
def test_a_kill_moves_the_mean_by_nothing_where_edges_go_both_ways(name, nodes, seed, tmp_path):
    chance = random.Random(seed)
    plan = averaging({"name": name}, nodes, seed=seed, tolerance=1e-9)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(1, 4), [victim])
            for _ in range(chance.randrange(300)):
                await asyncio.sleep(0)
            await network.kill(victim)
            others = [name for name in plan.names if name != victim]
            await network.reached(max(network.round(name) for name in others) + seed % 3, others[:1])
            network.start(victim)

            assert set(await network.ended()) == {"converged"}
            assert drift(starts_of(plan), network.models()) < 1e-12

    finish(main())


def test_the_bound_holds_for_every_pair_that_met():
    """Random walks, random meetings: what the rows add up to is at least what the links' distances add up to now."""
    chance = np.random.default_rng(0)
    for _ in range(50):
        num_nodes, window = 6, int(chance.integers(1, 5))
        links = set()
        x_NP = chance.standard_normal((num_nodes, 3))
        bound = TimeVaryingBound(window=window, num_neighbours_N=np.full(num_nodes, num_nodes - 1))
        before_NP = x_NP
        for _ in range(window):
            squared_N = np.zeros(num_nodes)
            for _ in range(3):
                i, j = chance.choice(num_nodes, 2, replace=False)
                if (min(i, j), max(i, j)) not in links:
                    links.add((min(i, j), max(i, j)))
                    squared_N[[i, j]] += np.square(x_NP[i] - x_NP[j]).sum()
            bound_N = bound.bound(squared_N, np.linalg.norm(x_NP - before_NP, axis=1))
            before_NP, x_NP = x_NP, x_NP + chance.standard_normal((num_nodes, 3)) * chance.choice([0.0, 0.1, 1.0])
        now = sum(np.square(before_NP[i] - before_NP[j]).sum() for i, j in links)

        assert bound_N.sum() / 2 >= now * (1 - 1e-12)


@pytest.mark.parametrize(
    ("name", "nodes", "rounds"),
    first_fast(
        [
            ("one-peer-exponential", 8, 3),
            ("one-peer-hypercube", 8, 3),
            *(("base-2", nodes, rounds) for nodes, rounds in ((8, 3), (12, 5))),
            *(("base-3", nodes, rounds) for nodes, rounds in ((8, 3), (12, 3))),
            *(("base-4", nodes, rounds) for nodes, rounds in ((8, 2), (12, 2))),
            *(("base-5", nodes, rounds) for nodes, rounds in ((8, 2), (12, 2))),
            ("simple-base-2", 12, 7),
        ],
        4,
    ),
)
def test_daemons_hold_the_exact_mean_after_as_many_rounds_as_published(name, nodes, rounds, tmp_path):
    plan = plan_of(task={"name": "averaging"}, nodes=nodes, topology={"name": name}, rounds=rounds, stop=None)

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            assert set(await network.ended()) == {"rounds"}
            return network.models()

    models, mean = finish(main()), starts_of(plan).mean(dim=0)

    assert {plan.experiment.rounds, plan.schedule.exact_after} == {rounds}
    assert float((models - mean).abs().max()) < 1e-12
