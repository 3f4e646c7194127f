"""Daemons that exchange twice a round: the simulator's weights, and a mean that stands still whatever fails between the two."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest
import torch

from networks import HASTY, Network, averaging, finish
from p2pfl.algorithms import ALGORITHMS, DPSGD
from simulations import drift, run_of, starts_of

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer


@dataclass(frozen=True)
class Twice(DPSGD):
    """Two exchanges a round."""

    phases = 2


@pytest.fixture(autouse=True)
def twice(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "twice", Twice)


def plan_of_two(topology, nodes, **options):
    return averaging(topology, nodes, algorithm="twice", **options)


def test_weights_and_stop_round_are_the_simulators(tmp_path):
    plan = plan_of_two({"name": "ring"}, 5)
    simulated = run_of(plan, tmp_path / "simulator")

    async def main():
        async with Network(plan, tmp_path / "daemons") as network:
            network.start()
            assert await network.ended() == ["converged"] * 5
            return network.models(), network.summary("node-0")["rounds"]

    models, rounds = finish(main())
    assert rounds == simulated.summary["rounds"]
    assert torch.equal(models, torch.stack([simulated.models[name] for name in plan.names]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_kill_between_the_two_exchanges_moves_the_mean_by_nothing(seed, tmp_path):
    chance = random.Random(seed)
    plan = plan_of_two({"name": "ring"}, 5, seed=seed)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(2, 6), [victim])
            for _ in range(chance.randrange(300)):
                await asyncio.sleep(0)
            await network.kill(victim)
            others = network.neighbours(victim)
            await network.reached(max(network.round(name) for name in others) + seed % 3, others)
            network.start(victim)

            assert set(await network.ended()) == {"converged"}
            assert "resumed" in network.events(victim)
            assert drift(starts_of(plan), network.models()) < 1e-12

    finish(main())
