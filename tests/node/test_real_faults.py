"""Pure averaging by daemons in processes of their own that are stopped, cut off and killed: the mean stands still, and the others go on."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest
import torch

from networks import Institutions, finish, plan_of, starts, wait_until
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.testing.tcp_proxy import TcpProxy
from p2pfl.yaml_files import dump_yaml
from simulations import distance, drift

pytestmark = pytest.mark.slow

NODES = 5
DEADLINE_S = 240.0  # for a machine that has much else to do
DRIFT = 1e-6
"""What the mean may move by, of the disagreement at the start."""
HASTY = {"deadline_floor_s": 2.0, "deadline_factor": 3.0, "round_at_least_s": 0.03}
"""Who is late is skipped soon, but not before a node has asked once more for what it misses, which it does after half a second. Rounds take
a moment, or the network would agree before the last fault."""


def slow_ring(place, *, weight, tolerance, patience=3):
    """Averaging on a ring whose edges weigh so little that the network is still far from agreed when the last fault is over."""
    names = [f"node-{i}" for i in range(NODES)]
    edges = [{"between": [names[i - 1], names[i]], "weight": weight} for i in range(NODES)]
    (place / "ring.yaml").write_text(dump_yaml({"nodes": names, "edges": edges}), encoding="utf-8")
    return plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=NODES,
        topology={"file": str(place / "ring.yaml")},
        weights="given",
        rounds=0,
        stop={"relative_consensus": tolerance, "patience": patience, "settle": 100_000},
        checkpoint_every=1,
        seed=1,
    )


@pytest.fixture
def plan(tmp_path):
    return slow_ring(tmp_path, weight=0.03, tolerance=1e-3)


def ring_neighbours(plan, name):
    return [plan.names[j] for j in plan.topology.neighbours(plan.names.index(name))]


def wait_for_round(network, number, names):
    wait_until(lambda: all(network.round(name) >= number for name in names), DEADLINE_S)


def wait_for_skips(network, name, skipped, times):
    """Until a node has closed so many rounds without another."""
    wait_until(lambda: sum(skipped in row["skipped"] for row in network.rows(name)) >= times, DEADLINE_S)


def next_event(network, name, number_known):
    """The first that a node has recorded beyond those known."""
    wait_until(lambda: len(network.events(name)) > number_known, DEADLINE_S)
    return read_run(network.state(name) / "run").events[number_known]


def assert_agreed_on_the_mean(network):
    wait_until(network.is_over, DEADLINE_S)
    names = network.plan.names
    before_NP = starts(network.plan)

    departures = {name: {departure["kind"] for departure in network.summary(name)["departures"]} for name in names}
    assert set().union(*departures.values()) <= {"rounds_missed"}  # whoever was away has jumped over rounds, and has lost no state
    assert [network.exit_code(name) for name in names] == [3 if departures[name] else 0 for name in names]
    assert [network.summary(name)["stop_reason"] for name in names] == ["converged"] * NODES
    after_NP = network.models()
    assert drift(before_NP, after_NP) < DRIFT
    assert distance(after_NP) <= network.plan.stop_rule.tolerance * float(torch.linalg.vector_norm(after_NP)) / NODES**0.5


def test_a_process_that_is_stopped_for_three_rounds_moves_the_mean_by_nothing(plan, tmp_path):
    sleeper = "node-2"
    with Institutions(plan, tmp_path / "sites", **HASTY) as network:
        network.start()
        wait_for_round(network, 5, plan.names)
        network.signal(sleeper, signal.SIGSTOP)
        for name in ring_neighbours(plan, sleeper):
            wait_for_skips(network, name, sleeper, 3)
        network.signal(sleeper, signal.SIGCONT)

        assert_agreed_on_the_mean(network)
        assert "jumped" in network.events(sleeper)


def test_a_cable_that_is_cut_for_two_rounds_moves_the_mean_by_nothing(plan, tmp_path):
    one, other = "node-1", "node-2"  # only the later of two neighbours dials, so that nobody else comes to node-1 this way

    async def main():
        async with TcpProxy() as cable:

            def via(name, address):
                if name != one:
                    return address
                cable.lead_to(address)
                return cable.address

            with Institutions(plan, tmp_path / "sites", via=via, **HASTY) as network:
                network.start()
                await asyncio.to_thread(wait_for_round, network, 5, plan.names)
                cable.cut()
                await asyncio.to_thread(wait_for_skips, network, one, other, 2)
                await asyncio.to_thread(wait_for_skips, network, other, one, 2)
                cable.heal()
                await asyncio.to_thread(assert_agreed_on_the_mean, network)

                assert cable.accepted > 1
                assert all("returned" in network.events(name) for name in (one, other))

    finish(main(), 3 * DEADLINE_S)


def test_a_process_that_is_killed_and_started_again_moves_the_mean_by_nothing(plan, tmp_path):
    victim = "node-3"
    with Institutions(plan, tmp_path / "sites", **HASTY) as network:
        network.start()
        wait_for_round(network, 5, plan.names)
        network.end(victim, signal.SIGKILL)
        for name in ring_neighbours(plan, victim):
            wait_for_skips(network, name, victim, 3)
        network.start(victim)

        assert_agreed_on_the_mean(network)
        assert {"resumed", "jumped"} <= set(network.events(victim))


def test_twenty_kills_at_random_moments_and_the_others_never_stop(tmp_path):
    chance = random.Random(20)
    # whoever is killed is skipped, and patience begins anew: the network cannot stop before the last kill
    plan = slow_ring(tmp_path, weight=2e-3, tolerance=0.02, patience=100)
    with Institutions(plan, tmp_path / "sites", **HASTY) as network:
        network.start()
        wait_for_round(network, 3, plan.names)
        for number in range(10):
            victims = chance.sample(plan.names, 2)  # two at a time: starting a process is what takes long
            others = [name for name in plan.names if name not in victims]
            left = {}
            for victim in victims:
                witness = chance.choice(others)
                wait_for_round(network, network.round(witness) + chance.randrange(1, 8), [witness])
                time.sleep(chance.uniform(0, 0.03))  # anywhere within a round
                network.end(victim, signal.SIGKILL)
                _, metadata = read_checkpoint(network.state(victim) / CHECKPOINT)
                left[victim] = metadata, read_run(network.state(victim) / "run")
            if number % 2:
                network.start(*victims)
            for name in others:
                wait_for_round(network, network.round(name) + 2, [name])
            if number % 2 == 0:
                network.start(*victims)
            for victim, (metadata, run) in left.items():
                event = next_event(network, victim, len(run.events))

                assert (event["event"], event["round"]) == ("resumed", metadata["round"])
                assert event["round"] >= max(row["round"] for row in run.nodes)

        assert_agreed_on_the_mean(network)
