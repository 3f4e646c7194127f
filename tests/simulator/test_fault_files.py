"""What of a script of faults the simulator simulates, and what it says that it leaves out."""

from __future__ import annotations

import torch

from p2pfl.faults.plan_file import FaultPlan
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.simulator import simulate

FOUR = {
    "task": {"name": "averaging", "dimension": 3},
    "nodes": 4,
    "topology": {"name": "ring"},
    "rounds": 5,
    "stop": None,
    "baselines": [],
}
CROSSING = [("node-0", "node-3"), ("node-1", "node-2")]


def kill_or(kind: FaultKind) -> Fault:
    return Fault(kind=kind, nodes=("node-3",), rounds=frozenset({4}))


def test_a_partition_and_a_kill_are_simulated_as_cuts_and_a_pause(tmp_path):
    simulated = {}
    for name, faults in {
        "said": [Fault(kind=FaultKind.PARTITION, nodes=("node-0", "node-1"), rounds=frozenset({1, 2})), kill_or(FaultKind.KILL)],
        "spelled": [*(Fault(kind=FaultKind.CUT, nodes=ends, rounds=frozenset({1, 2})) for ends in CROSSING), kill_or(FaultKind.PAUSE)],
    }.items():
        simulated[name] = simulate(FOUR, faults=FaultScript(tuple(faults)), out=tmp_path / name).models

    assert all(torch.equal(model_P, simulated["spelled"][node]) for node, model_P in simulated["said"].items())


def test_a_loss_takes_some_messages_and_the_mean_stays(tmp_path):
    lossy = Fault(kind=FaultKind.LOSS, nodes=("node-0", "node-1"), rounds=frozenset(range(30)), probability=0.5)
    script = FaultScript((lossy,), seed=3)
    lost = [number for number in range(30) if not script.delivers("node-0", "node-1", number)]
    run = simulate(FOUR, rounds=40, faults=script, out=tmp_path / "run")
    skipped = [row["round"] for row in run.node_records if row["node"] == "node-1" and row["skipped"]]

    assert 5 < len(lost) < 25
    assert skipped == lost
    assert not any(row["skipped"] for row in run.node_records if row["node"] != "node-1")


def test_a_file_of_faults_is_simulated_and_what_is_left_out_is_said(tmp_path, caplog):
    path = tmp_path / "faults.yaml"
    path.write_text(
        "repeats_every: 4\nfaults:\n  - {kind: pause, node: 1, rounds: [2, 3]}\n  - {kind: dns, node: 2, rounds: [2, 3]}\n"
        "  - {kind: pause, node: 1, from_s: 2}\n",
        encoding="utf-8",
    )
    run = simulate(FOUR, nodes=8, faults=FaultPlan.load(path), out=tmp_path / "run")
    missed = {(name, row["round"]) for row in run.node_records if row["node"] in ("node-0", "node-4") for name in row["skipped"]}

    assert missed == {(f"node-{place}", number) for place in (1, 5) for number in (2, 3)}
    assert [record.getMessage() for record in caplog.records if record.name == "p2pfl.simulator.start"] == [
        "4 of 6 faults are left out of the simulation (2 dns, 2 pause): rounds have no seconds, bytes, names or clocks here"
    ]
    assert (tmp_path / "run" / "faults.yaml").exists()
