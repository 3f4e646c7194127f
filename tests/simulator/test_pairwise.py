"""AD-PSGD: nodes that meet in pairs, on the virtual clock, for real, and replayed from what they recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from networks import Network, finish, gathered, plan_of, starts
from p2pfl.experiment.loading import experiment_from
from p2pfl.node.clock import Timeouts
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import simulate
from thorough import first_fast

AVERAGING = {
    "task": {"name": "averaging"},
    "nodes": 8,
    "topology": {"name": "ring"},
    "algorithm": {"name": "ad-psgd"},
    "rounds": 30,
    "stop": None,
    "baselines": [],
}
LEARNING = {**AVERAGING, "task": {"name": "synthetic-logistic"}, "algorithm": {"name": "ad-psgd", "local_steps": 2}}
UNEQUAL = {"speeds": {f"node-{i}": 0.6 + 0.13 * i for i in range(8)}}
HASTY = Timeouts(deadline_floor_s=0.3, deadline_factor=1.0, linger_s=20.0, start_within_s=30.0)


def stacked(models) -> Tensor:
    return torch.stack([models[name] for name in sorted(models)])


def moved(models: Tensor, before: Tensor) -> float:
    """How far the mean went, of the disagreement at the start."""
    return float((models.mean(dim=0) - before.mean(dim=0)).norm() / (before - before.mean(dim=0)).norm())


@pytest.mark.no_cover
def test_meetings_keep_the_mean_and_bring_nodes_together(tmp_path):
    before = starts(plan_of(**AVERAGING))
    after = stacked(simulate(AVERAGING, clock=UNEQUAL, out=tmp_path / "run").models)

    assert moved(after, before) < 1e-15
    assert float((after - after.mean(dim=0)).norm()) < 0.01 * float((before - before.mean(dim=0)).norm())


def test_two_that_meet_go_to_the_middle(tmp_path):
    experiment = {**AVERAGING, "nodes": 2, "topology": {"name": "path"}, "rounds": 1}
    before = starts(plan_of(**experiment))
    after = stacked(simulate(experiment, out=tmp_path / "run").models)

    torch.testing.assert_close(after, before.mean(dim=0).expand_as(after), rtol=0, atol=1e-15)


def test_what_was_learnt_from_an_old_start_is_added_to_what_x_is_now():
    from p2pfl.algorithms import ADPSGD

    now, start, trained = ({"x": torch.tensor([[value]])} for value in (5.0, 2.0, 1.5))

    assert ADPSGD().apply_stale_update(now, start, trained)["x"].item() == 4.5


def test_a_node_that_waits_is_met_by_nobody_else(tmp_path):
    # everybody asks in the same moment, and messages take half a round
    (tmp_path / "ring.yaml").write_text(
        "nodes: [node-0, node-1, node-2, node-3]\nedges:\n"
        + "".join(f"  - {{between: [node-{i}, node-{(i + 1) % 4}], latency_ms: 500}}\n" for i in range(4))
    )
    experiment = {**AVERAGING, "nodes": 4, "topology": {"file": str(tmp_path / "ring.yaml")}, "rounds": 20}
    run = simulate(experiment, out=tmp_path / "run")
    before = starts(plan_of(**experiment))
    met = sum(len(row["merged"]) for row in run.node_records)
    declined = sum(len(row["skipped"]) for row in run.node_records)

    assert moved(stacked(run.models), before) < 1e-15
    assert declined > 0
    assert met > declined  # nobody waits in a circle


@pytest.mark.slow
def test_a_slow_node_slows_nobody_on_the_clock(tmp_path):
    run = simulate(LEARNING, clock={"speeds": {"node-3": 0.1}}, out=tmp_path / "run")
    last = {name: max(row["simulated_s"] for row in run.node_records if row["node"] == name) for name in run.models}
    during = [entry for row in run.node_records if row["node"] == "node-3" for entry in row["merged"] if entry[2] == "training"]

    assert {seconds for name, seconds in last.items() if name != "node-3"} == {30.0}
    assert len(during) > 10  # it is met while it trains


@pytest.mark.no_cover
@pytest.mark.parametrize("interrupted_after", first_fast([7, 1]))
def test_a_run_that_is_interrupted_goes_on_exactly(interrupted_after, tmp_path):
    experiment = {**LEARNING, "clock": UNEQUAL, "rounds": 12}
    whole = simulate(experiment, out=tmp_path / "whole")

    class Enough(Exception):
        pass

    def stop(done, most, row):
        if done > interrupted_after:
            raise Enough

    with pytest.raises(Enough):
        simulate(experiment, out=tmp_path / "parts", progress=stop)
    parts = simulate(experiment, resume=tmp_path / "parts")

    assert torch.equal(stacked(parts.models), stacked(whole.models))
    assert [(row["round"], row["loss"], row["simulated_s"]) for row in parts.records] == [
        (row["round"], row["loss"], row["simulated_s"]) for row in whole.records
    ]


def run_daemons(experiment, place, *, timeouts=HASTY, during=None):
    """Models before and after, and the events."""
    plan = plan_of(**experiment)

    async def main():
        async with Network(plan, place, timeouts=timeouts) as network:
            network.start()
            if during is not None:
                await during(network)
            assert set(await network.ended()) == {"rounds"}
            gathered(network, place / "gathered", experiment)
            return network.models(), [event for name in plan.names for event in network.events(name)]

    models, events = finish(main())
    return starts(plan), models, events


@pytest.mark.slow
def test_daemons_keep_the_mean(tmp_path):
    before, after, events = run_daemons(AVERAGING, tmp_path)

    assert moved(after, before) < 1e-15
    assert "unsettled" not in events


@pytest.mark.slow
def test_daemons_are_replayed_from_their_records(tmp_path):
    _, real, _ = run_daemons(LEARNING, tmp_path)
    again = stacked(simulate({}, replay=tmp_path / "gathered", out=tmp_path / "replayed").models)

    assert float(((real - again).norm(dim=1) / again.norm(dim=1)).max()) < 1e-6


def test_what_is_taken_back_after_the_last_round_is_replayed_too(tmp_path):
    """node-1 took in an offer that node-0 had given up: it took it back as it closed, when no row was left to say so."""
    experiment = {"task": {"name": "averaging", "dimension": 3}, "nodes": 2, "algorithm": {"name": "ad-psgd"}, "rounds": 1, "stop": None}
    folder = RunFolder.create(tmp_path / "real", experiment_from(experiment).as_dict())
    row = {"round": 0, "kind": "train", "loss": None, "disagreement": 0.0, "norm": 1.0, "skipped": [], "bytes_sent": 0, "seconds": {}}
    folder.append_node(
        {**row, "node": "node-0", "merged": [["node-1", 0, "waiting", "offered"]]},
        {**row, "node": "node-1", "merged": [["node-0", 0, "training"]]},
    )
    folder.write_summary({"rounds": 1})
    again = stacked(simulate({}, replay=tmp_path / "real", out=tmp_path / "replayed").models)

    assert moved(again, starts(plan_of(**experiment))) < 1e-15
    assert torch.allclose(again, starts(plan_of(**experiment)), rtol=0, atol=1e-15)


@pytest.mark.slow
def test_a_daemon_ten_times_slower_slows_nobody(tmp_path):
    async def main():
        async with Network(plan_of(**LEARNING), tmp_path, timeouts=Timeouts(round_at_least_s=0.02)) as network:
            network.start(*(name for name in network.plan.names if name != "node-3"))
            network.timeouts = Timeouts(round_at_least_s=0.2)
            network.start("node-3")
            await network.ended()
            names = network.plan.names
            events = {name: network.events(name) for name in names}
            return {name: network.summary(name)["rounds"] for name in names}, events, network.rows("node-3")

    rounds, events, rows = finish(main())

    assert rounds["node-3"] < 30
    assert (rounds["node-2"], rounds["node-4"]) == (30, 30)
    assert sum(done == 30 for done in rounds.values()) >= 5
    assert all(done == 30 or "alone" in events[name] for name, done in rounds.items())  # where both neighbours were done before
    assert any(entry[2] == "training" for row in rows for entry in row["merged"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_node_moves_the_mean_by_nothing(seed, tmp_path):
    async def kill(network):
        name = network.plan.names[seed]
        await network.reached(4 + seed, [name])
        await network.kill(name)
        network.start(name)

    timeouts = Timeouts(deadline_floor_s=0.3, deadline_factor=1.0, linger_s=20.0, start_within_s=30.0, round_at_least_s=0.01)
    before, after, events = run_daemons({**AVERAGING, "seed": seed}, tmp_path, timeouts=timeouts, during=kill)

    assert "resumed" in events
    assert "unsettled" not in events
    assert moved(after, before) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("ways", [1, 2])
def test_a_cut_link_moves_the_mean_by_nothing(ways, tmp_path):
    async def cut(network):
        one, other = network.plan.names[2:4]
        await network.reached(3, [one])
        network.cut = {(one, other), (other, one)} if ways == 2 else {(one, other)}
        await network.reached(8, [one])
        network.cut = set()

    before, after, events = run_daemons(AVERAGING, tmp_path, during=cut)

    assert "skipped" in events
    assert "unsettled" not in events
    assert moved(after, before) < 1e-14
