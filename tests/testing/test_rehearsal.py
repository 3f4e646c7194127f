"""p2pfl.testing: real daemons that run an experiment while a script of faults is carried out."""

from __future__ import annotations

import sys
from statistics import median

import pytest
import torch

from p2pfl.errors import ConfigError
from p2pfl.runs.events import EventKind
from p2pfl.simulator import simulate
from p2pfl.testing import Fault, FaultKind, FaultScript

EXPERIMENT = {
    "task": {"name": "averaging", "dimension": 3},
    "nodes": 3,
    "topology": {"name": "ring"},
    "rounds": 12,
    "stop": None,
    "baselines": [],
    "checkpoint_every": 1,
}


LEARNING = {**EXPERIMENT, "task": {"name": "quadratic", "dimension": 3}, "rounds": 30}
BUSY = {**EXPERIMENT, "task": {"name": "synthetic-logistic"}, "algorithm": {"name": "dpsgd", "local_steps": 500}}
"""Training takes a good part of a second."""


def script(kind: FaultKind, *nodes: str, rounds: range, factor: float = 1.0) -> FaultScript:
    return FaultScript((Fault(kind=kind, nodes=nodes, rounds=frozenset(rounds), factor=factor),))


@pytest.mark.slow
def test_a_rehearsal_gives_the_weights_of_the_simulator(rehearse, tmp_path):
    simulated = simulate(EXPERIMENT, out=tmp_path / "simulated").models

    rehearsed = rehearse(EXPERIMENT)

    assert set(rehearsed.exit_codes.values()) == {0}
    assert all(torch.equal(model_P, simulated[node]) for node, model_P in rehearsed.models().items())


@pytest.mark.slow
def test_a_killed_node_comes_back_from_its_checkpoint(rehearse):
    faults = script(FaultKind.KILL, "node-1", rounds=range(3, 5))
    rounds = 90
    rehearsed = rehearse(LEARNING, faults=faults, rounds=rounds, site={"round_at_least_s": 0.5})  # a start takes its time

    kinds = [event["event"] for event in rehearsed.records("node-1").events]
    skipped = [row["round"] for row in rehearsed.records("node-0").nodes if "node-1" in row["skipped"]]

    assert EventKind.RESUMED in kinds
    assert min(skipped) in (3, 4)
    assert max(skipped) < rounds - 1
    assert rehearsed.exit_codes == {"node-0": 0, "node-1": 3, "node-2": 0}  # it missed rounds, and nobody agreed to that


@pytest.mark.slow
def test_a_stopped_node_is_skipped_and_waited_for_again(rehearse):
    rehearsed = rehearse(LEARNING, faults=script(FaultKind.PAUSE, "node-2", rounds=range(3, 5)))
    skipped = [row["round"] for row in rehearsed.records("node-0").nodes if "node-2" in row["skipped"]]

    assert skipped
    assert min(skipped) in (3, 4)
    assert max(skipped) < len(rehearsed.records("node-0").nodes) - 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell whose connection it is")
def test_a_cut_edge_costs_its_two_ends_and_nobody_else(rehearse):
    rehearsed = rehearse(LEARNING, faults=script(FaultKind.CUT, "node-0", "node-1", rounds=range(3, 5)))
    skipped = {node: {name for row in rehearsed.records(node).nodes for name in row["skipped"]} for node in rehearsed.exit_codes}

    assert skipped == {"node-0": {"node-1"}, "node-1": {"node-0"}, "node-2": set()}
    assert EventKind.LINK_DOWN in {event["event"] for event in rehearsed.records("node-1").events}


@pytest.mark.slow
def test_a_slow_node_makes_fewer_rounds_than_those_who_do_not_wait_for_it(rehearse):
    faults = script(FaultKind.SLOW, "node-1", rounds=range(1, 1000), factor=8.0)
    rehearsed = rehearse(BUSY, faults=faults, pace={"name": "asynchronous"})
    rows = [row for node in ("node-0", "node-2") for row in rehearsed.records(node).nodes]
    merged = {name: max(number for row in rows for peer, number, _ in row["merged"] if peer == name) for name in rehearsed.exit_codes}

    assert max(row["round"] for row in rows) == 11
    assert merged["node-1"] <= 6  # by the time at which the others had done all of theirs
    assert min(merged["node-0"], merged["node-2"]) > 6
    assert set(rehearsed.exit_codes.values()) == {0}


@pytest.mark.slow
def test_a_slow_node_trains_as_ever_when_its_rounds_are_over(rehearse):
    rehearsed = rehearse(BUSY, faults=script(FaultKind.SLOW, "node-1", rounds=range(3, 7), factor=8.0))
    train_s = [row["seconds"]["train"] for row in rehearsed.records("node-1").nodes]

    assert median(train_s[4:7]) > 3 * median(train_s[8:])
    assert median(train_s[4:7]) > 3 * median(train_s[:3])


def test_a_script_that_cannot_be_carried_out_is_refused_with_all_its_faults(rehearse):
    throttle = Fault(kind=FaultKind.THROTTLE, nodes=("node-0", "node-1"), rounds=frozenset({2}))
    faults = FaultScript((throttle, *script(FaultKind.KILL, "basel", rounds=range(2)).faults))

    with pytest.raises(ConfigError) as refused:
        rehearse(EXPERIMENT, faults=faults)

    assert "throttle of node-0 - node-1: bytes_per_s = inf: expected a number above 0" in str(refused.value)
    assert "no node basel" in str(refused.value)


def test_a_run_that_takes_too_long_ends_with_the_names_of_those_that_ran(rehearse):
    with pytest.raises(TimeoutError, match=r"node-0, node-1, node-2 still ran after 0.5 s"):
        rehearse(EXPERIMENT, deadline_s=0.5)


@pytest.mark.slow
def test_a_fault_that_outlasts_the_run_of_the_others_ends_with_it(rehearse):
    rehearsed = rehearse(LEARNING, faults=script(FaultKind.PAUSE, "node-2", rounds=range(3, 1000)), rounds=8)

    assert rehearsed.exit_codes.keys() == {"node-0", "node-1", "node-2"}
    assert [row["round"] for row in rehearsed.records("node-0").nodes] == list(range(8))
