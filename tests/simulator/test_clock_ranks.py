"""A simulated network with a clock, shared by two ranks: the seconds of one process, as long as every message comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfl.evaluation.results import Run
from p2pfl.simulator import Simulation, simulate
from simulations import LOGISTIC, without_seconds

pytestmark = pytest.mark.slow  # two processes, for all of it

DEADLINE_S = 240
CALM = {"speeds": {"node-1": 0.5}, "latency_ms": 20, "uplink_mbps": 1, "stragglers": {"share": 0.2, "factor": 3}}
LATE = {**CALM, "stragglers": {"share": 0.05, "factor": 300}, "deadline_floor_s": 5}
"""Late for the first time in round 4."""

CHOCO = {**LOGISTIC, "dtype": "float64", "nodes": 6, "rounds": 9, "stop": None, "baselines": [], "algorithm": {"name": "choco"}}
PLAIN = {**CHOCO, "algorithm": {"name": "dpsgd"}}
LOSSY = {**PLAIN, "clock": {**CALM, "loss": 0.1, "churn": {"share": 0.1, "rounds": 2}}}

AS_RANK = """
import json, os, sys
from pathlib import Path
from p2pfl.errors import ConfigError
from p2pfl.simulator import engine, simulate

engine._CHECKPOINT_S = 0.0
for name, raw in json.loads(sys.argv[1]).items():
    try:
        simulate(raw or {}, **{"out" if raw else "resume": name})
    except ConfigError as error:
        Path(f"{name}.refused-by-{os.environ['RANK']}").write_text(str(error), encoding="utf-8")
"""


def begun_alone(rounds, raw, place):
    """A run of one process that left a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulation, "run", lambda self, _: [self.step() for _ in range(rounds)] and self.save())
        simulate(raw, out=place)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All that two ranks are asked to do, in one start."""
    place = tmp_path_factory.mktemp("shared")
    begun_alone(3, {**CHOCO, "clock": CALM}, place / "begun-alone")
    begun_alone(6, {**CHOCO, "clock": LATE}, place / "late-already")
    jobs = {"plain": {**PLAIN, "clock": CALM}, "choco": {**CHOCO, "clock": CALM}, "late": {**CHOCO, "clock": LATE}, "lossy": LOSSY}
    jobs |= {"begun-alone": None, "late-already": None}
    (place / "as_rank.py").write_text(AS_RANK, encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "as_rank.py", json.dumps(jobs)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place


def told(run):
    """Of each node's rounds all but what two ranks add up in another order."""
    sums = ("disagreement", "norm")
    return [
        {**row, **{name: float(f"{row[name]:.12g}") for name in sums if row[name] is not None}} for row in without_seconds(run.node_records)
    ]


def refusals(place):
    return [Path(f"{place}.refused-by-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]


@pytest.mark.parametrize(("name", "raw"), [("plain", PLAIN), ("choco", CHOCO), ("begun-alone", CHOCO)])
def test_two_ranks_tell_the_seconds_of_one_process(name, raw, two_ranks, tmp_path):
    alone, shared = simulate({**raw, "clock": CALM}, out=tmp_path / "alone"), Run(two_ranks / name)

    assert told(shared) == told(alone)
    assert [row["simulated_s"] for row in shared.records] == [row["simulated_s"] for row in alone.records]
    assert shared.summary["seconds"]["simulated"] == alone.summary["seconds"]["simulated"] > 9


def test_ranks_refuse_a_clock_that_loses_messages(two_ranks):
    remedy = "cannot be shared among 2 ranks; start one process, without torchrun, or let every message come"

    assert refusals(two_ranks / "lossy") == [f"clock.loss = 0.1: {remedy}\nclock.churn = {{'share': 0.1, 'rounds': 2}}: {remedy}"] * 2
    assert not (two_ranks / "lossy").exists()


def test_ranks_stop_before_the_first_message_that_is_too_late_and_one_process_goes_on(two_ranks, tmp_path):
    refused = (
        "clock: in round 4 the deadline is over for 2 messages, which 2 ranks cannot take back; "
        "go on with --resume in one process, without torchrun, or start again with a higher clock.deadline_floor_s"
    )
    assert refusals(two_ranks / "late") == [refused] * 2
    whole = simulate({**CHOCO, "clock": LATE}, out=tmp_path / "whole")

    assert told(simulate({}, resume=two_ranks / "late")) == told(whole)


def test_ranks_do_not_go_on_with_what_has_still_to_be_taken_back(two_ranks):
    refused = (
        "late-already/checkpoint.safetensors: messages were lost, and 2 ranks cannot take them back; go on in one process, without torchrun"
    )

    assert refusals(two_ranks / "late-already") == [refused] * 2
