"""Compressed messages that are lost: noticed, repaired, and the mean stands still. Scripted in the simulator, as they come in daemons.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks import HASTY, PATIENT, Network, finish, until
from p2pfl.errors import StoreError
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.params import Layout
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import FaultScript, Simulation
from p2pfl.wire.codec import decode
from simulations import distance, drift, plan_of, run_of, stacked, starting_at, starts_of
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

DRIFT = 1e-12
"""What the mean may move by in float64, of the disagreement at the start: rounding, no more."""


class Grid(nn.Module):
    """A matrix and a vector, 25 numbers, for an algorithm that treats them differently."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, scale):
        return scale * torch.cat([self.weight.flatten(), self.bias])


CHOCO = {"algorithm": {"name": "choco"}, "compressor": {"name": "int8"}}
TOP_K = {"algorithm": {"name": "choco"}, "compressor": {"name": "top-k", "share": 0.5}}
GAMMA = {"algorithm": {"name": "choco", "gamma": 0.5}, "compressor": {"name": "sign"}}
POWERGOSSIP = {"algorithm": {"name": "powergossip", "rank": 2}}
RULES = {"choco-int8": CHOCO, "choco-top-k": TOP_K, "choco-sign-gamma": GAMMA, "powergossip": POWERGOSSIP}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def averaging(rule, *, rounds, nodes=5, topology="ring", seed=0, **more):
    """Nothing to learn in float64."""
    task = {"name": "averaging", "dimension": 25}
    more = {"topology": {"name": topology}, "checkpoint_every": 1, **rule, **more}
    plan = plan_of({"task": task, "nodes": nodes, "rounds": rounds, "seed": seed, **more})
    return replace(plan, model=Grid(), layout=Layout.of(Grid()))


def script(plan, rng, rounds, share):
    """Every kind of fault, each with the given chance in each round."""

    def chosen():
        return frozenset(np.flatnonzero(rng.random(rounds) < share).tolist())

    edges = [(plan.names[i], plan.names[j]) for i, j in zip(plan.topology.senders, plan.topology.receivers, strict=True) if i < j]
    return FaultScript.in_rounds(
        paused={name: frozenset(r for r in chosen() if rng.random() < 0.3) for name in plan.names},
        cut={edge: chosen() for edge in edges},
        lost={edge: chosen() for edge in itertools.chain(edges, [edge[::-1] for edge in edges])},
    )


# ---- in the simulator


@every_rule
@given(seed=st.integers(0, 2**32 - 1), topology=st.sampled_from(["ring", "star", "complete"]), share=st.floats(0.05, 0.95))
@settings(max_examples=10, deadline=None)
def test_whatever_is_lost_the_mean_stands_still(rule, seed, topology, share):
    rng = np.random.default_rng(seed)
    rounds = int(rng.integers(1, 12))
    plan = averaging(rule, rounds=rounds, topology=topology, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        after = stacked(run_of(plan, Path(place) / "run", script(plan, rng, rounds, share)).models)

    assert drift(starts_of(plan), after) < DRIFT


@pytest.mark.slow
@every_rule
def test_after_the_last_loss_the_network_agrees_on_the_mean_of_the_start(rule, tmp_path):
    plan = averaging(rule, rounds=300)
    faults = script(plan, np.random.default_rng(1), 15, 0.3)
    run = run_of(plan, tmp_path / "run", faults)
    after, before = stacked(run.models), starts_of(plan)

    assert sum(row["skipped"] for row in run.records[:15]) > 10
    assert sum(row["skipped"] for row in run.records[15:]) == 0
    assert drift(before, after) < DRIFT
    assert distance(after) < 1e-6 * distance(before)


def test_one_message_lost_is_repaired_in_the_next_round(tmp_path):
    """Two nodes at 0 and 8 with weight 1/2, nothing compressed: what plain gossip does."""
    rule = {"algorithm": {"name": "choco", "gamma": 1.0}}
    task = {"name": "averaging", "dimension": 1}
    plan = plan_of({"task": task, "nodes": 2, "topology": {"name": "path"}, "rounds": 2, "save_models_every": 1, **rule})
    plan = starting_at(plan, torch.tensor([[0.0], [8.0]], dtype=torch.float64))
    a, b = plan.names
    run = run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost={(a, b): frozenset({0})}))

    # a goes to 0 + 1/2 (8 - 0), b stays; then a: 4 + 1/2 (8 - 4), less the 4 that b did not give; b: 8 + 1/2 (4 - 8)
    assert stacked(run.models_after(0)).flatten().tolist() == [4.0, 8.0]
    assert stacked(run.models_after(1)).flatten().tolist() == [2.0, 6.0]
    events = [(event["round"], event["node"], event["detail"]) for event in run.events if event["event"] == "resynchronised"]
    assert events == [(1, b, f"{a} at exchange 1")]


def test_what_is_taken_back_has_the_gamma_of_both_ends_of_its_edge(tmp_path):
    plan = averaging(TOP_K, rounds=12)
    faults = script(plan, np.random.default_rng(2), 10, 0.4)
    folder = RunFolder.create(tmp_path / "run", plan.experiment.as_dict(), topology=plan.graph_record(), engine="simulator")
    simulation = Simulation(plan, folder, faults=faults)
    simulation.population.state["halvings"] = torch.tensor([0, 1, 2, 3, 0], dtype=torch.uint8)
    simulation.run()

    assert simulation.population.state["halvings"].tolist() == [0, 1, 2, 3, 0]
    assert drift(starts_of(plan), simulation.population.estimate()) < DRIFT


@pytest.mark.parametrize("gamma", [0.5, "auto"])
def test_a_row_holds_nothing_for_each_neighbour(gamma):
    plan = plan_of({"task": {"name": "averaging", "dimension": 9}, "nodes": 8, "topology": {"name": "complete"}, **CHOCO, "rounds": 1})
    plan = replace(plan, recipe=replace(plan.recipe, algorithm=replace(plan.recipe.algorithm, gamma=gamma)))
    state = plan.population(plan.names).state

    assert max(tensor.numel() for tensor in state.values()) == 8 * 9


# ---- in daemons


def of_exchanges(frames, exchanges):
    """Whether a message is an update, or a piece of one, of one of these exchanges."""
    return len(frames) == 2 and decode(frames)[0].exchange in exchanges


def assert_neighbours_hold_what_nodes_have(network):
    """Bit for bit, but for who came too late to the last round."""
    daemons = {name: node.daemon for name, node in network.nodes.items()}
    for name, daemon in daemons.items():
        late = network.rows(name)[-1]["skipped"]
        for other in daemon.protocol.neighbours.keys() - late:
            held = daemon.protocol.values
            assert held.digests[other] == daemons[other].protocol.values.own, (name, other)
            assert torch.equal(held.values[other]["xhat"], daemons[other].node.population.state["xhat"][0])


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["top-k", "none", "int8"])
def test_a_loss_does_in_daemons_what_it_does_in_the_simulator(compressor, tmp_path):
    """Some rounds' updates from one node do not reach another, which then gives up; the others wait as long as it takes.

    Never in two rounds running: who is missed is not waited for, so that it would be chance when it counts again.
    """
    plan = averaging({"algorithm": {"name": "choco"}, "compressor": {"name": compressor}}, rounds=8, save_models_every=1)
    sender, receiver = plan.names[1], plan.names[2]
    rounds = frozenset({0, 3, 7})
    simulated = run_of(plan, tmp_path / "simulator", FaultScript.in_rounds(lost={(sender, receiver): rounds}))

    async def main():
        async with Network(plan, tmp_path, timeouts_of={receiver: replace(HASTY, deadline_floor_s=0.5)}) as network:
            network.links.network.lost = lambda one, other, frames: (one, other) == (sender, receiver) and of_exchanges(frames, rounds)
            network.start()

            assert set(await network.ended()) == {"rounds"}
            for number in range(8):
                assert torch.equal(network.models(number), stacked(simulated.models_after(number))), number
            if compressor != "none":
                assert_neighbours_hold_what_nodes_have(network)  # also of a node that has rolled back its last flow
            assert torch.equal(network.models(), stacked(simulated.models))
            resynchronised = [event for event in simulated.events if event["event"] == "resynchronised"]
            assert [event["round"] for event in resynchronised] == [1, 4]
            assert network.events(receiver).count("resynchronised") == 2
            assert network.nodes[receiver].daemon.status()["resynchronised"] == 2
            assert sum(network.summary(name)["bytes_sent"] for name in plan.names) == simulated.summary["bytes_sent"]

    finish(main())


def test_a_value_that_is_sent_whole_may_come_in_pieces(tmp_path):
    task = {"name": "averaging", "dimension": 200_000}  # 1.6 MB
    plan = plan_of({"task": task, "nodes": 3, "topology": {"name": "path"}, "rounds": 3, **TOP_K})
    sender, receiver = plan.names[1], plan.names[2]
    simulated = run_of(plan, tmp_path / "simulator", FaultScript.in_rounds(lost={(sender, receiver): frozenset({0})}))

    async def main():
        async with Network(plan, tmp_path, timeouts_of={receiver: replace(HASTY, deadline_floor_s=0.5)}) as network:
            network.links.network.lost = lambda one, other, frames: (one, other) == (sender, receiver) and of_exchanges(frames, {0})
            network.start()

            assert set(await network.ended()) == {"rounds"}
            assert torch.equal(network.models(), stacked(simulated.models))
            assert network.events(receiver).count("resynchronised") == 1
            assert sum(network.summary(name)["bytes_sent"] for name in plan.names) == simulated.summary["bytes_sent"]

    finish(main())


def assert_agreed(network, reasons):
    """Everybody has come to the end, on the mean of the start."""
    after, before = network.models(), starts_of(network.plan)

    assert set(reasons) == {"rounds"}
    assert drift(before, after) < DRIFT
    assert distance(after) < 1e-2 * distance(before)  # by how much depends on when in its 60 rounds a node that was away has come back


several = pytest.mark.parametrize(
    ("rule", "seed"), first_fast([(CHOCO, 0), (TOP_K, 1), (POWERGOSSIP, 2)]), ids=["choco", "top-k", "powergossip"]
)


@several
@pytest.mark.slow
def test_a_node_that_stands_still_for_three_rounds_moves_the_mean_by_nothing(rule, seed, tmp_path):
    chance, plan = random.Random(seed), averaging(rule, rounds=60, seed=seed)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(chance.randrange(1, 8), [victim])
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            network.pause(victim)
            others = network.neighbours(victim)
            await network.reached(max(network.round(name) for name in others) + 4, others)
            network.wake(victim)

            assert_agreed(network, await network.ended())
            assert "jumped" in network.events(victim)
            if "compressor" in rule:
                assert_neighbours_hold_what_nodes_have(network)
                assert "resynchronised" in network.events(victim)

    finish(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "seed", "both_ways"),
    [(CHOCO, 0, True), (CHOCO, 0, False), (TOP_K, 1, False), (POWERGOSSIP, 2, True), (POWERGOSSIP, 3, False)],
    ids=["choco-both-ways", "choco", "top-k", "powergossip-both-ways", "powergossip"],
)
def test_a_link_that_is_cut_for_two_rounds_moves_the_mean_by_nothing(rule, seed, both_ways, tmp_path):
    chance, plan = random.Random(seed), averaging(rule, rounds=60, seed=seed)
    one, other = (plan.names[i] for i in chance.choice(list(zip(plan.topology.senders, plan.topology.receivers, strict=True))))

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
            assert {"skipped", "jumped"} & set(network.events(other))
            if "compressor" in rule:
                assert_neighbours_hold_what_nodes_have(network)
                assert "resynchronised" in network.events(other)

    finish(main())


@pytest.mark.slow
@several
def test_a_node_that_is_killed_and_resumed_moves_the_mean_by_nothing(rule, seed, tmp_path):
    chance, plan = random.Random(seed), averaging(rule, rounds=60, seed=seed)
    victim = chance.choice(plan.names)
    missed_rounds = seed  # from a restart at once to one that has to jump

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
            if "compressor" in rule:
                assert_neighbours_hold_what_nodes_have(network)

    finish(main())


@several
@pytest.mark.slow
def test_messages_lost_at_random_move_the_mean_by_nothing(rule, seed, tmp_path):
    """Any message of any kind, one in twenty."""
    chance, plan = random.Random(seed), averaging(rule, rounds=60, seed=seed)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.links.network.lost = lambda sender, receiver, frames: chance.random() < 0.05 and network.round(sender) < 20
            network.start()

            assert set(await network.ended()) == {"rounds"}
            assert drift(starts_of(plan), network.models()) < DRIFT
            if "compressor" in rule:
                assert_neighbours_hold_what_nodes_have(network)

    finish(main())


def news_only(network, victim):
    """What a node sends gets there; of what comes to it, updates are lost."""
    network.links.network.lost = lambda sender, receiver, frames: receiver == victim and len(frames) == 2


def marks_of(network, name):
    """What a node's values are to itself, and to its neighbours."""
    held = {tuple(network.nodes[other].daemon.protocol.values.digests[name].items()) for other in network.neighbours(name)}
    return tuple(network.nodes[name].daemon.protocol.values.own.items()), held


@pytest.mark.slow
def test_a_node_that_jumps_after_it_has_posted_is_noticed_and_sends_its_values_whole(tmp_path):
    plan = averaging(CHOCO, rounds=60)
    victim = plan.names[1]

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY, timeouts_of={victim: PATIENT}) as network:
            network.start()
            await network.reached(3)
            news_only(network, victim)
            await until(lambda: "jumped" in network.events(victim))
            own, held = marks_of(network, victim)
            network.links.network.lost = None

            assert held != {own}  # its neighbours have taken in an update that it has not merged itself
            assert_agreed(network, await network.ended())
            assert_neighbours_hold_what_nodes_have(network)
            assert "resynchronised" in network.events(victim)
            assert any("resynchronised" in network.events(name) for name in network.neighbours(victim))

    finish(main())


@pytest.mark.slow
@pytest.mark.parametrize("missed_rounds", [3, 0])
def test_a_node_that_is_killed_after_it_has_posted_sends_the_same_again_or_its_values_whole(missed_rounds, tmp_path):
    plan = averaging(CHOCO, rounds=60)
    victim = plan.names[1]

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY, timeouts_of={victim: PATIENT}) as network:
            network.start()
            await network.reached(3)
            news_only(network, victim)
            others = network.neighbours(victim)
            await until(lambda: marks_of(network, victim)[1] != {marks_of(network, victim)[0]})
            await network.kill(victim)
            network.links.network.lost = None
            if missed_rounds:
                await network.reached(max(network.round(name) for name in others) + missed_rounds, others)
            network.start(victim)

            assert_agreed(network, await network.ended())
            assert_neighbours_hold_what_nodes_have(network)
            if missed_rounds:
                assert any("resynchronised" in network.events(name) for name in others)

    finish(main())


@pytest.mark.parametrize("seed", first_fast(range(3)))
@pytest.mark.slow
def test_a_killed_node_goes_on_exactly_however_rarely_a_checkpoint_was_asked_for(seed, tmp_path):
    chance, plan = random.Random(seed), averaging(CHOCO, rounds=60, seed=seed, checkpoint_every=4)
    victim = chance.choice(plan.names)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(5 + seed, [victim])
            await network.kill(victim)
            network.start(victim)

            assert set(await network.ended()) == {"rounds"}
            assert drift(starts_of(plan), network.models()) < DRIFT
            assert_neighbours_hold_what_nodes_have(network)

    finish(main())


def test_what_a_checkpoint_holds_of_the_neighbours_comes_back(tmp_path):
    plan = averaging(CHOCO, rounds=5)

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            before = network.nodes["node-2"].daemon.protocol
            await network.kill("node-2")
            network.start("node-2")
            await network.nodes["node-2"].task
            after = network.nodes["node-2"].daemon.protocol

            assert after is not before
            sent = after.transfers.sent
            assert (after.values.own, sent.keys()) == (before.values.own, before.transfers.sent.keys())
            for exchange, posted in before.transfers.sent.items():
                for name in network.neighbours("node-2"):
                    assert sent[exchange].updates[name] == posted.updates[name]
                    assert sent[exchange].full[name].encoded == posted.full[name].encoded
            for name in before.neighbours:
                assert before.values.digests[name] == after.values.digests[name]
                assert torch.equal(before.values.values[name]["xhat"], after.values.values[name]["xhat"])

    finish(main())


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path):
    plan = averaging(CHOCO, rounds=1)

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            place = network.states["node-0"] / CHECKPOINT
            tensors, metadata = read_checkpoint(place)
            del metadata["protocol"]["marks"]
            write_checkpoint(place, tensors, metadata)
            network.start("node-0")
            with pytest.raises(StoreError, match="was written by an earlier version"):
                await network.nodes["node-0"].task

    finish(main())
