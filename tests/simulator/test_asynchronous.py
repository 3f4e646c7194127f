"""Nodes that do not wait for each other: on the virtual clock, for real, and replayed from what they recorded."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from networks import Network, finish, gathered, plan_of
from p2pfl.errors import ConfigError
from p2pfl.evaluation.results import Run
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.node.clock import Timeouts
from p2pfl.paces import PACES
from p2pfl.paces.asynchronous import Asynchronous
from p2pfl.paces.base import PacedEdges
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from thorough import first_fast

LEARNING = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 8,
    "topology": {"name": "ring"},
    "pace": {"name": "asynchronous"},
    "rounds": 12,
    "stop": None,
    "baselines": [],
    "save_models_every": 1,
}
PAIRWISE = {**LEARNING, "algorithm": {"name": "ad-psgd"}, "pace": {"name": "pairwise"}}


def models(run: Run, after: int) -> Tensor:
    found = run.models_after(after)
    return torch.stack([found[name] for name in sorted(found)])


@pytest.mark.slow
def test_nodes_of_one_speed_do_what_synchronous_ones_do(tmp_path):
    together = simulate({**LEARNING, "pace": {"name": "synchronous"}}, out=tmp_path / "synchronous")
    alone = simulate(LEARNING, out=tmp_path / "asynchronous")

    for number in range(12):
        assert torch.equal(models(together, number), models(alone, number))
    assert together.summary["bytes_sent"] == alone.summary["bytes_sent"]


@dataclass(slots=True, kw_only=True)
class InCompany(Asynchronous):
    """Waits for a new update of every neighbour that has not left."""

    edges: PacedEdges

    @classmethod
    def of(cls, edges, times, *, max_age):
        return cls(edges=edges, max_age=max_age)

    def awaited(self):
        there = [name for name in self.edges.neighbourhood.weights if not self.edges.is_missed(name)]
        return [name for name in there if name not in self.held or self.held[name].age]


def test_a_pace_that_waits_for_everybody_does_what_synchronous_nodes_do(tmp_path, monkeypatch):
    monkeypatch.setitem(PACES, "in-company", InCompany)
    pair = {**LEARNING, "nodes": 2}
    together = simulate({**pair, "pace": {"name": "synchronous"}}, out=tmp_path / "synchronous")
    waiting = simulate({**pair, "pace": {"name": "in-company"}}, clock={"speeds": {"node-1": 0.3}}, out=tmp_path / "in-company")

    assert all(torch.equal(models(together, number), models(waiting, number)) for number in range(12))


def test_a_slow_node_slows_nobody_on_the_clock(tmp_path):
    slow = simulate(LEARNING, clock={"speeds": {"node-3": 0.1}}, out=tmp_path / "slow")
    rows = {name: [row for row in slow.node_records if row["node"] == name] for name in slow.models}

    assert {row["simulated_s"] for row in slow.node_records if row["round"] == 11} == {12.0}
    assert [row["simulated_s"] for row in rows["node-3"]] == [10.0, 20.0]  # then its neighbours have finished
    # between two rounds of the slow one they go on with what they have of it, which counts less and less
    assert [[m for m in row["merged"] if m[0] == "node-3"] for row in rows["node-2"]][8:] == [
        [],
        [["node-3", 0, 0]],
        [["node-3", 0, 1]],
        [["node-3", 0, 2]],
    ]


def slow(factor: float, **when) -> FaultScript:
    return FaultScript((Fault(kind=FaultKind.SLOW, nodes=("node-3",), factor=factor, **when),))


@pytest.mark.no_cover
@pytest.mark.parametrize("experiment", [LEARNING, PAIRWISE], ids=["asynchronous", "pairwise"])
def test_a_node_that_a_script_slows_makes_fewer_rounds_by_its_factor(experiment, tmp_path):
    run = simulate(experiment, faults=slow(4, from_s=0), out=tmp_path / "run")
    ended = {name: [row["simulated_s"] for row in run.node_records if row["node"] == name] for name in run.models}

    assert ended.pop("node-3")[:3] == [4, 8, 12]  # when the others are over
    assert all(moments == list(range(1, 13)) for moments in ended.values())


@pytest.mark.no_cover
def test_a_script_and_the_clock_slow_the_same_node_alike(tmp_path):
    by_clock = simulate(LEARNING, clock={"speeds": {"node-3": 0.125}}, out=tmp_path / "clock")
    by_script = simulate(LEARNING, faults=slow(8, rounds=frozenset(range(12))), out=tmp_path / "script")

    assert all(torch.equal(model, by_script.models[name]) for name, model in by_clock.models.items())


@pytest.mark.no_cover
def test_a_slow_node_is_itself_again_when_the_fault_is_over(tmp_path):
    by_rounds = simulate(LEARNING, faults=slow(4, rounds=frozenset({1})), out=tmp_path / "rounds")
    by_seconds = simulate(LEARNING, faults=slow(4, from_s=1.5, until_s=5.5), out=tmp_path / "seconds")
    ended = [[row["simulated_s"] for row in run.node_records if row["node"] == "node-3"] for run in (by_rounds, by_seconds)]

    assert ended[0][:8] == [1, 5, 6, 7, 8, 9, 10, 11]
    assert ended[1][:8] == [1, 3.5, 6, 7, 8, 9, 10, 11]  # half of a round before, a whole one within, half of one after


@pytest.mark.parametrize("experiment", [LEARNING, PAIRWISE], ids=["asynchronous", "pairwise"])
def test_no_checkpoint_goes_on_without_its_script(experiment, tmp_path):
    run = simulate(experiment, checkpoint_every=1, faults=slow(4, from_s=0), out=tmp_path / "run")

    assert not (run.path / "checkpoint.safetensors").exists()
    with pytest.raises(ConfigError, match="faults: a recorded run has had its own"):
        simulate(experiment, replay=run.path, faults=slow(4, from_s=0), out=tmp_path / "replay")


def test_nodes_without_common_rounds_are_slow_and_nothing_else(tmp_path):
    with pytest.raises(ConfigError, match="faults: pause of node-3: cannot be done here; possible: slow"):
        simulate(LEARNING, faults=FaultScript.in_rounds(paused={"node-3": {1}}), out=tmp_path / "run")


def test_a_model_counts_less_each_time_it_is_merged_again():
    plan = plan_of(**{**LEARNING, "pace": {"name": "asynchronous", "staleness": 2.0}})

    assert plan.weights_by_age({"node-1": 0.25, "node-2": 0.5}, {"node-1": 0, "node-2": 3}) == {"node-1": 0.25, "node-2": 0.5 / 16}


def test_what_is_older_than_the_bound_is_left_out(tmp_path):
    run = simulate(LEARNING, pace={"name": "asynchronous", "max_age": 1}, clock={"speeds": {"node-3": 0.1}}, out=tmp_path / "run")
    ages = {row["round"]: [m[2] for m in row["merged"] if m[0] == "node-3"] for row in run.node_records if row["node"] == "node-2"}
    skipped = {row["round"]: row["skipped"] for row in run.node_records if row["node"] == "node-2"}

    assert [ages[number] for number in range(8, 12)] == [[], [0], [1], []]
    assert [skipped[number] for number in range(8, 12)] == [["node-3"], [], [], ["node-3"]]


def test_messages_take_as_long_as_the_graph_says(tmp_path):
    (tmp_path / "two.yaml").write_text(
        "nodes: [node-0, node-1]\nedges:\n  - {between: [node-0, node-1], latency_ms: 2500, bandwidth_mbps: 1}\n"
    )
    run = simulate({**LEARNING, "nodes": 2, "topology": {"file": str(tmp_path / "two.yaml")}}, out=tmp_path / "run")
    merged = [row["merged"] for row in run.node_records if row["node"] == "node-0"]

    assert merged[:5] == [[], [], [], [["node-1", 0, 0]], [["node-1", 1, 0]]]  # 2.5 s and a little for some bytes at 1 Mbit/s


@pytest.mark.no_cover
def test_push_sum_finds_the_exact_mean_at_any_pace(tmp_path):
    experiment = {
        **LEARNING,
        "task": {"name": "averaging"},
        "algorithm": {"name": "push-sum"},
        "weights": "push-sum",
        "rounds": 100,
        "nodes": 4,
    }
    clock = {"speeds": {f"node-{i}": 0.55 + 0.17 * i for i in range(4)}}
    run = simulate(experiment, clock=clock, save_models_every=None, out=tmp_path / "run")
    mean = plan_of(**experiment).population(sorted(run.models)).estimate().mean(dim=0)

    for model in run.models.values():
        torch.testing.assert_close(model, mean, rtol=0, atol=1e-9)


@pytest.mark.no_cover
@pytest.mark.parametrize("interrupted_after", first_fast([5, 1]))
def test_a_run_that_is_interrupted_goes_on_exactly(interrupted_after, tmp_path):
    experiment = {**LEARNING, "clock": {"speeds": {"node-1": 0.3, "node-5": 1.7}}}
    whole = simulate(experiment, out=tmp_path / "whole")

    class Enough(Exception):
        pass

    def stop(done, most, row):
        if done > interrupted_after:
            raise Enough

    with pytest.raises(Enough):
        simulate(experiment, out=tmp_path / "parts", progress=stop)
    parts = simulate(experiment, resume=tmp_path / "parts")

    assert {name: model.tolist() for name, model in parts.models.items()} == {name: model.tolist() for name, model in whole.models.items()}
    assert [(row["round"], row["loss"], row["simulated_s"]) for row in parts.records] == [
        (row["round"], row["loss"], row["simulated_s"]) for row in whole.records
    ]


@pytest.mark.no_cover
@pytest.mark.parametrize("algorithm", first_fast(["qg-dsgdm", "dpsgd", "push-sum"]))
def test_daemons_are_replayed_from_their_records(algorithm, tmp_path):
    weights = "push-sum" if algorithm == "push-sum" else "metropolis"
    experiment = {**LEARNING, "algorithm": {"name": algorithm}, "weights": weights}

    async def main():
        async with Network(plan_of(**experiment), tmp_path) as network:
            network.start()
            assert set(await network.ended()) == {"rounds"}
            gathered(network, tmp_path / "gathered", experiment)
            return network.models()

    real = finish(main())
    replayed = simulate({}, replay=tmp_path / "gathered", out=tmp_path / "replayed")
    again = torch.stack([replayed.models[name] for name in sorted(replayed.models)])

    assert float(((real - again).norm(dim=1) / again.norm(dim=1)).max()) < 1e-6


@pytest.mark.slow
def test_a_daemon_ten_times_slower_slows_nobody(tmp_path):
    async def main():
        async with Network(plan_of(**{**LEARNING, "rounds": 30}), tmp_path, timeouts=Timeouts(round_at_least_s=0.02)) as network:
            network.start(*(name for name in network.plan.names if name != "node-3"))
            network.timeouts = Timeouts(round_at_least_s=0.2)
            network.start("node-3")
            await network.ended()
            names = network.plan.names
            return {name: network.summary(name)["rounds"] for name in names}, {name: network.events(name) for name in names}

    rounds, events = finish(main())

    # whose neighbours are both done before it stops as well; those beside the slow one have a neighbour to the end
    assert all(done == 30 or "alone" in events[name] for name, done in rounds.items())
    assert (rounds["node-2"], rounds["node-4"]) == (30, 30)
    assert rounds["node-3"] < 30
    assert all(rounds["node-3"] < done for name, done in rounds.items() if name != "node-3")


@pytest.mark.slow
def test_a_daemon_that_was_killed_goes_on_and_is_replayed(tmp_path):
    experiment = {**LEARNING, "rounds": 20}

    async def main():
        async with Network(plan_of(**experiment), tmp_path, timeouts=Timeouts(round_at_least_s=0.02)) as network:
            network.start()
            await network.reached(5, ["node-2"])
            await network.kill("node-2")
            network.start("node-2")
            await network.ended()
            gathered(network, tmp_path / "gathered", experiment)
            return network.models(), network.events("node-2")

    real, events = finish(main())
    replayed = simulate({}, replay=tmp_path / "gathered", out=tmp_path / "replayed")
    again = torch.stack([replayed.models[name] for name in sorted(replayed.models)])

    assert "resumed" in events
    assert float(((real - again).norm(dim=1) / again.norm(dim=1)).max()) < 1e-6
    assert read_run(tmp_path / "replayed").summary["stop_reason"] == "rounds"
