"""Pure averaging, where the mean must stand still whatever fails: nodes that stand still, links that are cut, processes that are killed."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from torch import Tensor

from networks import HASTY, Network, averaging, finish, plan_of, starts, until
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.verdict import verdict
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from p2pfl.topology import describe
from p2pfl.wire.codec import decode
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

SEEDS = range(10)
GRAPHS = [({"name": "ring"}, 5), ({"name": "torus"}, 9), ({"name": "hypercube"}, 8), ({"name": "star"}, 5)]
DRIFT = 1e-6
"""What the mean may move by, of the disagreement at the start. Exact settlement leaves rounding only, which is far less."""


def disagreement(models_NP: Tensor) -> float:
    return float((models_NP - models_NP.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def drift(before_NP: Tensor, after_NP: Tensor) -> float:
    """How far the mean has moved, relative to the disagreement at the start."""
    return float((after_NP.mean(dim=0) - before_NP.mean(dim=0)).norm()) / disagreement(before_NP)


def graph_of(seed: int) -> tuple[dict[str, str], int]:
    return GRAPHS[seed % len(GRAPHS)]


def assert_agreed(network: Network, reasons: list[str]) -> None:
    """Everybody has stopped agreed, on the mean of the start."""
    after, before = network.models(), starts(network.plan)

    assert set(reasons) == {"converged"}
    assert drift(before, after) < DRIFT
    assert disagreement(after) < 1e-5 * disagreement(before)


# ---- nothing fails


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "nodes"), [({"name": "ring"}, 8), ({"name": "star"}, 8), ({"name": "torus"}, 16), ({"name": "hypercube"}, 16)]
)
def test_disagreement_contracts_as_the_spectrum_predicts_in_both_runtimes(topology, nodes, tmp_path):
    plan = averaging(topology, nodes)
    simulated = simulate(plan.experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            assert_agreed(network, await network.ended())
            rows = zip(*(network.rows(name) for name in plan.names), strict=True)
            return [sum(row["disagreement"] for row in of_round) for of_round in rows]

    by_daemons = np.array(finish(main()))
    by_simulator = np.array([row["disagreement"] for row in simulated.records])
    # exactly what the mixing matrix says, round by round
    x_NP, expected = starts(plan).numpy(), []
    for _ in by_simulator:
        expected.append(float(np.square(x_NP[plan.topology.senders] - x_NP[plan.topology.receivers]).sum() / 2))
        x_NP = plan.topology.mixing_matrix() @ x_NP
    rate = 1 - describe(plan.topology)["spectral_gap"]

    np.testing.assert_allclose(by_daemons, by_simulator, rtol=1e-6)
    np.testing.assert_allclose(by_simulator, expected, rtol=1e-6)
    assert np.sqrt(by_simulator[-1] / by_simulator[-2]) == pytest.approx(rate, rel=1e-3)


# ---- a node stands still


@pytest.mark.parametrize("seed", first_fast(SEEDS))
def test_a_node_that_stands_still_for_three_rounds_moves_the_mean_by_nothing(seed, tmp_path):
    topology, nodes = graph_of(seed)
    chance = random.Random(seed)
    plan = averaging(topology, nodes, seed=seed)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(1, 8), [victim])
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            network.pause(victim)
            others = network.neighbours(victim)
            at = max(network.round(name) for name in others)
            await network.reached(at + 4, others)
            network.wake(victim)
            reasons = await network.ended()

            assert_agreed(network, reasons)
            assert "jumped" in network.events(victim)
            assert not any("wrong_report" in node.daemon.protocol.edges.refused for node in network.nodes.values())
            # on a machine that is busy a neighbour may have fallen behind too, and have jumped over the rounds in which others skip
            assert all({"skipped", "jumped"} & set(network.events(name)) for name in others)

    finish(main())


def test_a_rule_that_needs_every_message_says_when_it_went_on_without_one(tmp_path):
    plan = plan_of(
        task={"name": "averaging", "dimension": 2},
        nodes=4,
        topology={"name": "ring"},
        algorithm={"name": "exact-diffusion"},
        rounds=12,
        stop=None,
    )
    victim = "node-1"

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(2, [victim])
            network.pause(victim)
            others = network.neighbours(victim)
            await network.reached(max(network.round(name) for name in others) + 3, others)
            network.wake(victim)
            await network.ended()
            return [network.events(name) for name in others], [read_run(network.states[name] / "run") for name in others]

    events, runs = finish(main())
    assert all(kinds.count("inexact") == 1 for kinds in events)
    for run in runs:
        (event,) = (event for event in run.events if event["event"] == "inexact")
        assert event["detail"].endswith("algorithm exact-diffusion is exact where every message comes, and is not from here on")
        assert victim in event["detail"]
        assert any(sentence.startswith("The algorithm needs every message, and node-") for sentence in verdict(run, convergence(run)))


# ---- a link is cut


@pytest.mark.parametrize("both_ways", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["both ways", "one way"])
@pytest.mark.parametrize("seed", first_fast(SEEDS))
def test_a_link_that_is_cut_for_two_rounds_moves_the_mean_by_nothing(seed, both_ways, tmp_path):
    topology, nodes = graph_of(seed)
    chance = random.Random(seed)
    plan = averaging(topology, nodes, seed=seed)
    edges = list(zip(plan.topology.senders, plan.topology.receivers, strict=True))
    one, other = (plan.names[i] for i in chance.choice(edges))

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(1, 8), [one])
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            network.cut = {(one, other), (other, one)} if both_ways else {(one, other)}
            await network.reached(network.round(other) + 3, [other])
            network.cut = set()

            assert_agreed(network, await network.ended())
            # on a machine that is busy it may have fallen behind itself, and have jumped over the rounds in which it would skip
            assert {"skipped", "jumped"} & set(network.events(other))

    finish(main())


# ---- a process is killed


@pytest.mark.parametrize("seed", first_fast(SEEDS))
def test_a_node_that_is_killed_and_resumed_moves_the_mean_by_nothing(seed, tmp_path):
    topology, nodes = graph_of(seed)
    chance = random.Random(seed)
    plan = averaging(topology, nodes, seed=seed)
    victim = chance.choice(plan.names)
    missed_rounds = seed % 3  # from a restart at once to one that has to jump

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(2, 8), [victim])
            for _ in range(chance.randrange(200)):
                await asyncio.sleep(0)
            await network.kill(victim)
            others = network.neighbours(victim)
            if missed_rounds:
                await network.reached(max(network.round(name) for name in others) + 1 + missed_rounds, others)
            network.start(victim)

            assert_agreed(network, await network.ended())
            assert "resumed" in network.events(victim)

    finish(main())


def on_disk(network: Network, name: str) -> tuple[set[str], dict]:
    """What a restart would find: the names of the tensors, and the metadata."""
    found = read_checkpoint(network.states[name] / "checkpoint.safetensors")
    return (set(), {"round": 0, "joined": False}) if found is None else (set(found[0]), found[1])


@pytest.mark.slow
def test_a_flow_that_was_open_when_its_node_was_killed_is_taken_back_after_the_restart(tmp_path):
    plan = averaging({"name": "ring"}, 5)
    victim, deaf = "node-1", "node-2"

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(2)
            network.cut = {(victim, deaf)}
            await until(lambda: any(name.startswith(f"flow/{deaf}/{network.round(deaf)}/") for name in on_disk(network, victim)[0]))
            at = network.round(deaf)
            await network.kill(victim)
            await network.reached(at + 1, [deaf])  # which closes the exchange without the victim
            network.cut = set()
            network.start(victim)

            assert_agreed(network, await network.ended())
            assert "took_back" in network.events(victim)

    finish(main())


@pytest.mark.slow
def test_what_is_to_be_taken_back_survives_a_kill_after_a_jump(tmp_path):
    plan = averaging({"name": "ring"}, 5)
    victim = "node-1"

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(2)
            at = network.round(victim)

            def lost(sender, receiver, frames):
                """Its updates reach nobody, and soon it hears how far the others are, but nothing that it could merge."""
                if len(frames) == 1 or victim not in (sender, receiver):
                    return False
                now = network.round(victim)
                return sender == victim or (now > at + 1 and decode(frames)[0].exchange in (now, now + 1))

            network.links.network.lost = lost
            await until(
                lambda: on_disk(network, victim)[1]["joined"] and any(name.startswith("back/") for name in on_disk(network, victim)[0])
            )
            await network.kill(victim)
            network.links.network.lost = None
            network.start(victim)

            assert_agreed(network, await network.ended())

    finish(main())


@pytest.mark.slow
def test_twenty_kills_at_any_moment_and_the_others_never_stop(tmp_path):
    chance = random.Random(20)
    plan = averaging({"name": "ring"}, 5, tolerance=1e-9)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            for number in range(20):
                victim = chance.choice(plan.names)
                await network.reached(min(2 + number, 30), [victim])
                for _ in range(chance.randrange(200)):
                    await asyncio.sleep(0)
                await network.kill(victim)
                read_checkpoint(network.states[victim] / "checkpoint.safetensors")
                network.start(victim)

            assert_agreed(network, await network.ended())

    finish(main())


@pytest.mark.slow
def test_every_node_killed_at_once_goes_on_where_it_was(tmp_path):
    plan = averaging({"name": "torus"}, 9)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(6)
            for name in plan.names:
                await network.kill(name)
            network.start()

            assert_agreed(network, await network.ended())

    finish(main())


# ---- everything at once


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_pauses_cuts_and_kills_together_move_the_mean_by_nothing(seed, tmp_path):
    topology, nodes = graph_of(seed)
    chance = random.Random(seed)
    plan = averaging(topology, nodes, seed=seed, tolerance=1e-9)
    edges = list(zip(plan.topology.senders, plan.topology.receivers, strict=True))

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(2)
            for _ in range(6):
                network.cut = {tuple(plan.names[i] for i in edge) for edge in chance.sample(edges, 3)}
                sleeper, victim = chance.sample(plan.names, 2)
                network.pause(sleeper)
                for _ in range(chance.randrange(300)):
                    await asyncio.sleep(0)
                await network.kill(victim)
                for _ in range(chance.randrange(300)):
                    await asyncio.sleep(0)
                network.wake(sleeper)
                network.start(victim)
                network.cut = set()
                for _ in range(chance.randrange(300)):
                    await asyncio.sleep(0)

            assert_agreed(network, await network.ended())

    finish(main())
