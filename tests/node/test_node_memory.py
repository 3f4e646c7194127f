"""How much memory a node needs is little, and known before."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from links import ZeroMQLinks, finish, send_until_refused, send_when_up, until
from networks import Network, averaging, plan_of
from networks import finish as finish_network
from p2pfl.algorithms import DPSGD, InboxFactory
from p2pfl.cli import app
from p2pfl.node import checkpoint
from p2pfl.node.exchange_memory import exchange_memory
from p2pfl.node.memory import forecast_node
from p2pfl.params import Layout, TensorSpec, sharing_parameters

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
DEADLINE_S = 240


def measured(*options):
    """Nodes of the benchmark, each a process of its own, with what they took."""
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    return json.loads(done.stdout)["nodes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"),
    [
        pytest.param(["--parameters", "10000000", "--rounds", "2"], 9, id="chain"),
        # torch loads libraries of 80 MB for layers that are not written out, which is two models of 10 million parameters
        pytest.param(["--parameters", "25000000", "--rounds", "2", "--model", "residual"], 9, id="residual"),
        pytest.param(["--parameters", "12000000", "--rounds", "2", "--algorithm", "choco"], 18, id="choco"),
    ],
)
def test_a_node_needs_what_was_foretold_where_it_hears_nobody_while_it_trains(options, most):
    found = measured("--order", "deaf", *options)

    assert len(found) == 3
    for node in found:
        assert node["models"] <= most, node
        assert node["models"] == pytest.approx(node["foretold"], rel=0.1), node


@pytest.mark.slow
def test_the_benchmark_measures_nodes_with_a_small_model_in_another_order():
    found = measured("--parameters", "400000", "--rounds", "2", "--order", "early", "--set", '{"algorithm": {"name": "diloco"}}')

    assert [node["ended"] for node in found] == ["rounds"] * 3
    assert all(node["models"] > 4 and node["foretold"] > 11 for node in found)
    assert all({"train", "send", "merge", "checkpoint", "evaluate", "finish"} <= node["by_stage"].keys() for node in found)


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        pytest.param({}, 3 + 2 * 2, id="plain"),
        pytest.param({"optimizer": {"name": "adam"}}, 2 + 2 + 1 + 2 + 1 + 2 + 3, id="adam"),
        pytest.param({"topology": {"name": "complete"}}, 3 + 2 * 3, id="three-neighbours"),
        # the moved parameters and a gradient of the last step, then the new gradient and y beside the old ones
        pytest.param({"algorithm": {"name": "gradient-tracking"}}, 1 + 3 + 1 + 2 + 4, id="gradient-tracking"),
    ],
)
def test_models_are_counted_by_algorithm_optimiser_and_neighbours(changes, models):
    plan = plan_of(**{"task": {"name": "digits"}, "nodes": 4, "topology": {"name": "ring"}, **changes})
    name = plan.names[0]
    found = forecast_node(plan, plan.population([name]), len(plan.neighbours(name)))

    assert found.model_bytes == plan.layout.size_bytes
    loaded_bytes = found.library_bytes + found.links_bytes + 32 * 2**20
    assert (found.peak_bytes - loaded_bytes) / found.model_bytes == pytest.approx(models, abs=0.02)  # and some numbers for each row


@dataclass(frozen=True)
class Wasteful(DPSGD):
    """Makes five models for a moment before it sends one."""

    def outgoing(self, state, phase, ctx):
        made = [state["x"] + number for number in range(5)]
        return {"x": made[0] - 0.0}


def test_what_a_rule_makes_for_a_moment_is_counted_and_a_large_model_is_counted_on_a_small_one():
    plan = plan_of(task={"name": "digits"}, nodes=3, topology={"name": "complete"}, baselines=[])
    wasteful = replace(plan, recipe=replace(plan.recipe, algorithm=Wasteful()))
    large = Layout(tensors=(TensorSpec("weight", (4000, 2500), "float32"), TensorSpec("bias", (4000,), "float32")))

    usual, more = exchange_memory(plan, 2, in_files=False), exchange_memory(wasteful, 2, in_files=False)
    on_small = exchange_memory(replace(plan, layout=large), 2, in_files=False)
    in_files = exchange_memory(replace(plan, layout=large), 2, in_files=True)

    model_bytes = plan.layout.size_bytes
    # x, the update before, two flows, five models and what is sent; not yet received are others' updates, and nothing is merged
    assert more.mixing_bytes / model_bytes == pytest.approx(1 + 1 + 2 + 5 + 1, abs=0.02)
    assert usual.mixing_bytes / model_bytes == pytest.approx(1 + 2 + 1, abs=0.02)
    assert on_small.mixing_bytes / large.size_bytes == pytest.approx(1 + 2 + 1, abs=0.02)
    assert on_small.training_bytes / large.size_bytes == pytest.approx(1 + 1 + 2, abs=0.02)
    assert in_files.training_bytes / large.size_bytes == pytest.approx(1 + 1, abs=0.02)


def test_a_dry_run_of_up_says_what_a_node_needs(tmp_path):
    (tmp_path / "trial.yaml").write_text("task: {name: averaging}\nnodes: 4\nrounds: 3\nstop: null\n")
    done = CliRunner().invoke(app, ["up", str(tmp_path / "trial.yaml"), "--dry-run"])
    as_json = CliRunner().invoke(app, ["up", str(tmp_path / "trial.yaml"), "--dry-run", "--json"])

    assert done.stdout.splitlines()[-1].startswith("memory of a node: models need at most 34 MB")
    assert json.loads(as_json.stdout)["memory"]["peak_bytes"] > 32 * 2**20


def test_flows_take_the_place_of_what_came():
    own, theirs = torch.randn(1, 7), {name: torch.randn(7) for name in ("b", "c")}

    def inbox(messages, *, writes_over):
        return InboxFactory(channels=DPSGD.channels).for_node(
            {"x": own},
            ["b", "c"],
            {name: {"x": message} for name, message in messages.items()},
            {"b": 0.3, "c": 0.2},
            self_weight=0.5,
            dtype=torch.float32,
            flows={},
            writes_over=writes_over,
        )

    kept = inbox(theirs, writes_over=False)
    written = inbox({name: message.clone() for name, message in theirs.items()}, writes_over=True)
    room = {written.slot("x", k, None).data_ptr() for k in range(2)}

    assert torch.equal(kept.mix("x"), written.mix("x"))
    assert kept.squared_distances("x") == written.squared_distances("x")
    assert {flow["x"].data_ptr() for flow in written.flows.values()} == room
    assert all(torch.equal(kept.flows[place]["x"], flow["x"]) for place, flow in written.flows.items())


def test_a_rule_with_a_merge_of_its_own_is_not_taken_to_read_each_message_once():
    class Twice(DPSGD):
        def merge(self, state, phase, inbox, ctx):
            return {**state, "x": (inbox.mix("x") + inbox.mix("x")) / 2}

    class Same(DPSGD):
        pass

    assert (DPSGD.reads_once, Same.reads_once, Twice.reads_once) == (True, True, False)


def test_a_full_queue_keeps_nothing_that_was_refused():
    async def main():
        links = ZeroMQLinks(max_queued=4)
        try:
            async with links.member("a", "b") as a, links.member("b", "a") as b:
                await send_when_up(b, "a", [b"up"])
                await a.receive()
                gc.disable()
                for sender, peer in ((a, "b"), (b, "a")):
                    payload = np.zeros(2**20, dtype=np.uint8)
                    held = weakref.ref(payload)
                    await send_until_refused(sender, peer, memoryview(payload), 0.05)
                    del payload
                    reader = b if sender is a else a
                    async with asyncio.TaskGroup() as group:
                        reading = group.create_task(read_all(reader))
                        await until(lambda: held() is None)  # noqa: B023 - awaited here
                        reading.cancel()
        finally:
            gc.enable()
            links.close()

    finish(main())


async def read_all(transport):
    while True:
        await transport.receive()


def test_updates_that_nobody_can_ask_for_any_more_are_let_go(tmp_path, monkeypatch):
    kept, snapshot = [], checkpoint.snapshot

    def looked_at(protocol):
        if protocol.edges.closing is None:
            kept.append(len(protocol.transfers.sent))
        return snapshot(protocol)

    monkeypatch.setattr(checkpoint, "snapshot", looked_at)

    async def main():
        async with Network(averaging({"name": "ring"}, 3, dimension=4), tmp_path) as network:
            network.start()
            await network.ended()

    finish_network(main())

    assert len(kept) > 3
    assert max(kept) == 1  # after a merge the neighbours have closed the exchange before it


def test_a_copy_that_shares_parameters_has_buffers_of_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    copied = sharing_parameters(model)
    copied(torch.randn(5, 3))

    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert not torch.equal(copied[1].running_mean, model[1].running_mean)
    assert all(p.grad is None for p in model.parameters())
