"""Chaos for long, with eight real daemons; `make soak` runs it and prints the figures."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest

from p2pfl.experiment.loading import resolve
from p2pfl.faults.drawing import KINDS, Pace, draw_faults
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.launcher.processes import ForkServer
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.testing.chaos import MOST_DRIFT, draw_plan, neighbours_of, plan_of, run_chaos
from p2pfl.testing.mean_drift import measure_drift
from p2pfl.testing.rehearsal import Rehearsed, rehearse_plan
from thorough import LONG

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LONG, reason="it takes an hour and more: make soak"),
    pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell whose connection it is"),
]

EIGHT = {"task": {"name": "quadratic", "dimension": 3}, "nodes": 8, "topology": {"name": "ring"}, "stop": None, "baselines": []}
SEEDS, PARTS = 200, 20
HOUR_S, ROUND_S = 3600.0, 0.25
MOST_STALL_S = 60.0
WITHOUT_S = 600.0


@pytest.fixture(scope="module")
def forks():
    with ForkServer() as server:
        yield server


def longest_stall_s(rehearsed: Rehearsed) -> float:
    """The longest time in which no node at all ended a further round."""
    first_s: dict[int, float] = {}
    for (_, number), moment_s in rehearsed.seen_s.items():
        first_s[number] = min(moment_s, first_s.get(number, math.inf))
    moments_s = sorted(first_s.values())
    return max(later - earlier for earlier, later in pairwise(moments_s))


def last_rounds(rehearsed: Rehearsed) -> set[int]:
    """After which rounds nodes ended."""
    summaries = [rehearsed.records(name).summary for name in rehearsed.exit_codes]
    return {-1 if summary is None else int(summary["rounds"]) for summary in summaries}


def check_states(watched: dict[str, WatchedNode]) -> None:
    for node in watched.values():
        assert read_checkpoint(node.folder / "state" / "checkpoint.safetensors") is not None


@pytest.mark.parametrize("part", range(PARTS))
def test_two_hundred_seeds_with_eight_daemons(part, forks, tmp_path):
    plan = plan_of(resolve(EIGHT, {"rounds": 30}), ())
    for seed in range(part, SEEDS, PARTS):
        found = run_chaos(plan, draw_plan(plan.experiment, neighbours_of(plan), KINDS, seed), place=tmp_path / str(seed), fork=forks)
        recovered = [fault.recovered_s for fault in found.faults if fault.recovered_s is not None]
        longest_s = max(recovered, default=0.0)
        sys.stdout.write(f"seed {seed}: {len(found.faults)} faults, drift {found.drift.value}, recovered in {longest_s:.1f} s at most\n")

        assert found.findings == [], f"seed {seed}"
        assert {node.exit_code for node in found.nodes} <= {0, 3}


def test_an_hour_with_a_fault_every_other_second(forks, tmp_path):
    plan = plan_of(resolve(EIGHT, {"rounds": int(HOUR_S / ROUND_S)}), ())
    pace = Pace(begins=(5.0, HOUR_S - 60.0), every=(0.5, 2.0), lasts=(0.5, 8.0), in_rounds=False)
    script = draw_faults(KINDS, seed=7, neighbours=neighbours_of(plan), pace=pace)
    rehearsed = rehearse_plan(plan, place=tmp_path, script=script, site={"round_at_least_s": ROUND_S}, deadline_s=4 * HOUR_S, fork=forks)
    drift = measure_drift(plan, rehearsed.watched)
    stall_s = longest_stall_s(rehearsed)
    sys.stdout.write(f"{len(script.faults)} faults in {rehearsed.took_s:.0f} s, longest stall {stall_s:.1f} s, drift {drift.value}\n")

    check_states(dict(rehearsed.watched))
    assert last_rounds(rehearsed) == {plan.experiment.rounds}
    assert stall_s < MOST_STALL_S
    assert drift.value is not None
    assert drift.value < MOST_DRIFT


def test_ten_minutes_without_any_packet(forks, tmp_path):
    averaging = {**EIGHT, "task": {"name": "averaging", "dimension": 3}, "rounds": 0}
    plan = plan_of(resolve({**averaging, "stop": {"relative_consensus": 1e-7, "settle": 20_000}}, {}), ())
    silent = (plan.names[1], plan.names[4])
    edges = [ends for name in silent for other in plan.neighbours(name) for ends in ((name, other), (other, name))]
    script = FaultScript(tuple(Fault(kind=FaultKind.LOSS, nodes=ends, from_s=10.0, until_s=10.0 + WITHOUT_S) for ends in edges))
    rehearsed = rehearse_plan(plan, place=tmp_path, script=script, site={"round_at_least_s": ROUND_S}, deadline_s=3 * WITHOUT_S, fork=forks)
    drift = measure_drift(plan, rehearsed.watched)
    sys.stdout.write(f"{rehearsed.took_s:.0f} s, ended after rounds {last_rounds(rehearsed)}, drift {drift.value}\n")

    check_states(dict(rehearsed.watched))
    assert len(last_rounds(rehearsed)) == 1
    assert {rehearsed.records(name).summary["stop_reason"] for name in plan.names} == {"converged"}
    assert drift.value is not None
    assert drift.value < MOST_DRIFT
