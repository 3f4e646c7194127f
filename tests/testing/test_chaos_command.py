"""`p2pfl chaos`: real daemons under a plan of faults, and the report of what these cost."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import yaml

from commands import run_here
from p2pfl.evaluation.results import read_models, write_models
from p2pfl.experiment.loading import resolve
from p2pfl.faults.drawing import KINDS
from p2pfl.faults.plan_file import FaultPlan
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.launcher.processes import ForkServer
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.records import read_run
from p2pfl.testing.chaos import MOST_DRIFT, ChaosReport, FaultOutcome, NodeOutcome, draw_plan, neighbours_of, plan_of, run_chaos
from p2pfl.testing.mean_drift import Drift, measure_drift
from p2pfl.testing.staging import Stage, StagedNode

EXPERIMENT = {
    "task": {"name": "quadratic", "dimension": 3},
    "nodes": 4,
    "topology": {"name": "ring"},
    "rounds": 20,
    "stop": None,
    "baselines": [],
}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell whose connection it is")
SEEDS, PARTS = 20, 4


@pytest.fixture(scope="module")
def forks():
    """One fork server for all runs: what daemons need is imported once."""
    with ForkServer() as server:
        yield server


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch, capfd):
    return lambda *arguments: run_here(*arguments, monkeypatch=monkeypatch, capfd=capfd)


def report(**changed):
    node = {"name": "node-0", "lost": 0, "alone": 0, "starts": 1, "exit_code": 0, "stop_reason": "rounds", "is_disturbed": True}
    rounds = changed.pop("rounds", (20, 20))
    fault = FaultOutcome(what="partition of hospital-0, hospital-1, hospital-3", began_round=2, began_s=1.0, ended_s=None, recovered_s=None)
    given = {
        "nodes": [NodeOutcome(**node, rounds=number) for number in rounds],
        "faults": [fault],
        "drift": Drift(value=1e-9),
        "metrics": {"auroc": (0.9, None)},
        "seconds": 12.0,
    }
    return ChaosReport(**(given | changed))


def test_a_plan_is_written_and_drawn_again_from_the_same_seed(run, experiment, tmp_path):
    code, said, _ = run("chaos", experiment, "--seed", 7, "--write-plan", tmp_path / "faults.yaml")
    plan = plan_of(resolve(experiment, {}), ())

    assert code == 0
    assert said.startswith(f"{len(FaultPlan.load(tmp_path / 'faults.yaml').faults)} faults of 4 nodes are in ")
    assert FaultPlan.load(tmp_path / "faults.yaml") == draw_plan(plan.experiment, neighbours_of(plan), KINDS, 7)
    assert run("chaos", experiment, "--write-plan", tmp_path / "faults.yaml")[0] == 2  # nothing is written over


@pytest.mark.slow
def test_a_written_plan_is_simulated_with_a_thousand_nodes(run, experiment, tmp_path, caplog):
    run("chaos", experiment, "--plan", "kill,partition,throttle", "--seed", 2, "--write-plan", tmp_path / "faults.yaml")
    options = ["--nodes", 1000, "--set", "evaluate_every=100", "--set", "task.name=averaging"]
    code, _, _ = run("simulate", experiment, *options, "--faults", tmp_path / "faults.yaml", "--out", tmp_path / "run", "--json")
    rows = read_run(tmp_path / "run").nodes

    assert code == 0
    assert "are left out of the simulation" in caplog.text
    assert any(row["skipped"] for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plan", ""), "no kind of fault; known: pause, kill"),
        (("--plan", "kill,earthquake"), "--plan: 'earthquake': no kind of fault; known: pause, kill"),
        (("--faults", "nowhere.yaml"), "nowhere.yaml"),
        (("--faults", "f.yaml", "--seed", 3), "--faults has its own kinds and its own seed: leave out --plan and --seed"),
        (("--rounds", 1, "--write-plan", "new.yaml"), "rounds = 1: faults need 3 rounds at least"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_runs(run, experiment, options, said):
    code, _, error = run("chaos", experiment, *options)

    assert code == 2
    assert said in error


def test_a_report_says_what_did_not_hold():
    assert report().findings == []
    assert report(rounds=(20, 19)).findings == ["the nodes ended after different rounds: 19, 20"]
    assert report(rounds=(20, None)).findings == ["no result of node-0"]
    assert report(rounds=(20, 19)).agreed_round is None
    assert report(drift=Drift(value=2e-6)).findings == [f"the mean has drifted by 2e-06, expected less than {MOST_DRIFT:g}"]
    assert report(drift=Drift(value=float("nan"))).findings == [f"the mean has drifted by nan, expected less than {MOST_DRIFT:g}"]
    assert report(drift=Drift(value=None, why="it has no mean")).findings == ["the drift of the mean is unknown: it has no mean"]


def test_a_run_in_which_no_fault_began_is_not_as_agreed():
    never = FaultOutcome(what="kill of node-0", began_round=None, began_s=None, ended_s=None, recovered_s=None)
    one = replace(never, began_round=2, began_s=1.0)

    assert report(faults=[never, never]).findings == ["2 of 2 faults never began: the run was not disturbed"]
    assert report(faults=[never, never]).departures == report(faults=[never, never]).findings
    assert report(faults=[one, never]).findings == []
    assert report(faults=[one, one]).departures == []
    assert report(faults=[one, never]).as_dict()["never_began"] == 1


def test_faults_that_never_began_are_named_and_are_not_as_agreed(run, experiment, tmp_path, monkeypatch):
    cut = Fault(kind=FaultKind.CUT, nodes=("a", "b"), rounds=frozenset({30, 31}))
    late = Fault(kind=FaultKind.KILL, nodes=("node-0",), from_s=90.0)
    never = [
        FaultOutcome(what=fault.text, began_round=None, began_s=None, ended_s=None, recovered_s=None, planned=fault.when)
        for fault in (cut, late)
    ]
    made = report(faults=[*report().faults, *never])
    monkeypatch.setattr("p2pfl.testing.chaos.run_chaos", lambda *_, **__: made)
    code, said, error = run("chaos", experiment, "--plan", "cut", "--out", tmp_path / "run", "--json")

    assert code == 3
    named = ["cut of a - b (rounds 30 to 31)", "kill of node-0 (from 90 s on)"]
    assert f"p2pfl: not as agreed: 2 of 3 faults never began: {', '.join(named)}" in error
    assert json.loads(said)["not_begun"] == named


class Process:
    """A process that runs until it is killed."""

    def __init__(self):
        self.code = None

    def poll(self):
        return self.code

    def send_signal(self, number):
        self.code = -number


def test_a_kill_without_an_end_leaves_an_earlier_one_as_it_is(experiment, tmp_path, monkeypatch):
    plan = plan_of(resolve(experiment, {}), ())
    first = Fault(kind=FaultKind.KILL, nodes=("node-0",), rounds=frozenset({3, 4}))
    last = Fault(kind=FaultKind.KILL, nodes=("node-0",), from_s=60.0)
    meanwhile = Fault(kind=FaultKind.KILL, nodes=("node-1",), rounds=frozenset({3, 4}))
    for_good = Fault(kind=FaultKind.KILL, nodes=("node-1",), from_s=2.5)
    script = FaultScript((first, last, meanwhile, for_good))
    stage = Stage(plan=plan, place=tmp_path, script=script, settings={}, options=())
    stage.nodes = [StagedNode(watched=WatchedNode(name=name, folder=tmp_path / name), process=Process()) for name in plan.names]
    monkeypatch.setattr("p2pfl.testing.staging.start_plainly", lambda *_: Process())

    def look(furthest, elapsed_s):
        for _ in range(2):  # the second one takes up the end of a process
            for node in stage.nodes[:2]:
                stage._look_after(node, furthest, elapsed_s)
        return [(node.process is not None, node.is_over) for node in stage.nodes[:2]]

    assert look(3, 2.0) == [(False, False), (False, False)]
    assert look(4, 3.0) == [(False, False), (False, True)]
    assert look(5, 4.0) == [(True, False), (False, True)]
    assert look(9, 60.0) == [(False, True), (False, True)]


def test_only_faults_of_what_runs_count_as_begun(experiment, tmp_path):
    plan = plan_of(resolve(experiment, {}), ())
    kinds = (FaultKind.KILL, FaultKind.PAUSE, FaultKind.CLOCK)
    script = FaultScript(tuple(Fault(kind=kind, nodes=("node-0",), rounds=frozenset({3})) for kind in kinds))
    stage = Stage(plan=plan, place=tmp_path, script=script, settings={}, options=())
    stage.nodes = [StagedNode(watched=WatchedNode(name=name, folder=tmp_path / name)) for name in plan.names]
    stage._note_times(3, 1.0)

    assert [times.began_round for times in stage.times] == [-1, -1, -1]  # node-0 has ended


def test_faults_after_the_last_round_are_said(run, experiment, tmp_path, caplog):
    path = tmp_path / "faults.yaml"
    path.write_text("faults:\n  - {kind: cut, edge: [node-0, node-1], rounds: [100, 101]}\n", encoding="utf-8")
    code, _, _ = run("simulate", experiment, "--faults", path, "--out", tmp_path / "run", "--json")

    assert code == 0
    assert "1 of 1 faults never begin: the run has 20 rounds at most" in caplog.text


def test_a_file_of_faults_is_named_where_it_names_what_is_not_there(run, experiment, tmp_path):
    path = tmp_path / "faults.yaml"
    path.write_text("faults:\n  - {kind: kill, node: basel, rounds: [3, 4]}\n", encoding="utf-8")
    for command in ("chaos", "simulate"):
        code, _, error = run(command, experiment, "--faults", path, "--out", tmp_path / "run")

        assert code == 2
        assert f"{path}: faults.0: kill: no node basel" in error.replace("\n", "")


def test_a_written_plan_is_told_in_json(run, experiment, tmp_path):
    code, said, _ = run("chaos", experiment, "--write-plan", tmp_path / "faults.yaml", "--json")
    faults = len(FaultPlan.load(tmp_path / "faults.yaml").faults)

    assert (code, json.loads(said)) == (0, {"faults": faults, "nodes": 4, "file": str(tmp_path / "faults.yaml")})


def test_a_dry_run_reads_the_file_of_faults(run, experiment):
    code, _, error = run("simulate", experiment, "--faults", "nowhere.yaml", "--dry-run")

    assert code == 2
    assert "nowhere.yaml" in error


def test_the_report_fits_on_eighty_columns(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    import_module("p2pfl.cli.chaos")._say(report(), tmp_path)
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┏┃┡│└"]

    assert max(map(len, table)) <= 80
    assert any("partition" in line for line in table)


@LINUX
@pytest.mark.slow
def test_the_command_ends_with_a_report_in_its_folder(run, experiment, tmp_path):
    code, said, error = run("chaos", experiment, "--plan", "kill,partition,corrupt", "--seed", 3, "--out", tmp_path / "run", "--json")
    document = json.loads(said)

    assert (code, document["findings"]) == (0, []), error
    assert document == json.loads((tmp_path / "run" / "chaos.json").read_text())
    assert document["agreed_round"] == 20
    assert document["drift"] < MOST_DRIFT
    assert sum(node["lost"] + node["alone"] for node in document["nodes"]) > 0
    assert any(fault["recovered_s"] is not None for fault in document["faults"])
    assert (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "undisturbed" / "summary.json").exists()

    plan = plan_of(resolve(experiment, {}), ())
    watched = {name: WatchedNode(name=name, folder=tmp_path / "run" / "sites" / name) for name in plan.names}
    place, x_P = watched["node-0"].run_folder, read_models(watched["node-0"].run_folder)["node-0"]
    write_models(place, ("node-0",), x_P[None] + 0.04, plan.layout, {})

    assert measure_drift(plan, watched).value == pytest.approx(0.01, abs=1e-5)  # a quarter of what one of four models was moved by


@LINUX
@pytest.mark.slow
def test_a_clock_and_a_name_fail_as_a_file_says(forks, tmp_path):
    path = tmp_path / "faults.yaml"
    path.write_text(
        "faults:\n  - {kind: clock, node: 0, rounds: [2, 6], offset_s: 86400}\n  - {kind: dns, node: 1, rounds: [4, 9]}\n"
        "  - {kind: corrupt, edge: [node-0, node-2], rounds: [10, 11]}\n",
        encoding="utf-8",
    )
    plan = plan_of(resolve(EXPERIMENT, {"nodes": 3, "rounds": 18}), ())
    found = run_chaos(plan, FaultPlan.load(path), place=tmp_path / "run", fork=forks)

    def log(name):
        return (tmp_path / "run" / "sites" / name / "node.log").read_text()

    days = {line.split(" ", 1)[0] for line in log("node-0").splitlines() if " round " in line}

    assert found.findings == []
    assert len(days) >= 2
    assert "name not known: node-1.rehearsal.localhost" in log("node-2")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_twenty_seeds_with_real_daemons_end_at_one_agreed_round_with_the_mean_where_it_was(part, forks, tmp_path):
    plan = plan_of(resolve(EXPERIMENT, {"nodes": 3, "rounds": 12}), ())
    for seed in range(part, SEEDS, PARTS):
        found = run_chaos(plan, draw_plan(plan.experiment, neighbours_of(plan), KINDS, seed), place=tmp_path / str(seed), fork=forks)

        assert found.findings == [], f"seed {seed}"
        assert {node.exit_code for node in found.nodes if not node.is_disturbed} <= {0, 3}
        assert {node.exit_code for node in found.nodes} <= {0, 3}
