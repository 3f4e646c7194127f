"""What `p2pfl up` does where a daemon ends before the others."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import p2pfl
from commands import hear_interrupts
from networks import wait_until
from p2pfl.errors import P2PFLError
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.run_state import run_state
from p2pfl.inspector.verdict import verdict
from p2pfl.runs.events import exit_code_of
from p2pfl.runs.records import read_run
from p2pfl.tasks import Site, Task

pytestmark = pytest.mark.slow

EXPERIMENT = {"task": {"name": "test_up:two_sites"}, "topology": {"name": "complete"}, "rounds": 3, "stop": None, "baselines": []}
ALLOWED = ("test_up:two_sites", "test_up:three_sites")
BRIEFLY = {"deadline_floor_s": 1.0, "deadline_factor": 2.0, "linger_s": 1.0}
DEADLINE_S = 60.0


@p2pfl.task
def two_sites(fails_at: int | None = None, killed_at: int | None = None, stays_at: int | None = None) -> Task:
    """At site b (five test rows) the metric fails, kills its daemon or stays at the call of that number; 0 is the trial at the start."""
    calls = count()

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        number = next(calls) if len(targets) == 5 else -1
        if number == fails_at:
            raise OSError("disk full")
        if number == stays_at and "node" in sys.argv:
            threading.Event().wait(DEADLINE_S)
        if number == killed_at and "node" in sys.argv:  # a daemon's command line; not `up`, which tries every site as well
            os.kill(os.getpid(), signal.SIGKILL)
        return float((outputs - targets).abs().mean())

    def site(name: str, rows: int) -> Site:
        return Site(name=name, train=(torch.ones(8, 1), torch.zeros(8, 1)), test=(torch.ones(rows, 1), torch.zeros(rows, 1)))

    return Task(
        name="two-sites",
        model=lambda: nn.Linear(1, 1),
        loss=lambda outputs, targets: ((outputs - targets) ** 2).mean(),
        metrics={"error": error},
        sites=[site("a", 4), site("b", 5)],
    )


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Daemons find this module."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[:3])))


@p2pfl.task
def three_sites(killed_at: int | None = None, fails_at: int | None = None, of: tuple[str, ...] = ("b", "c")) -> Task:
    """Three sites of four test rows each; the daemons of some of them are killed, or fail, at a call of the metric by its number."""
    name = next((name for name in "abc" if f"/sites/{name}/" in " ".join(sys.argv)), None)
    calls = count()

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        number = next(calls)
        if name in of and number == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if name in of and number == fails_at:
            raise OSError("disk full")
        return float((outputs - targets).abs().mean())

    rows = torch.ones(8, 1), torch.zeros(8, 1)
    tests = torch.ones(4, 1), torch.zeros(4, 1)
    return Task(
        name="three-sites",
        model=lambda: nn.Linear(1, 1),
        loss=lambda outputs, targets: ((outputs - targets) ** 2).mean(),
        metrics={"error": error},
        sites=[Site(name=name, train=rows, test=tests) for name in "abc"],
    )


def died(place):
    return [event["detail"] for event in read_run(place).events if event["event"] == "died"]


def test_a_daemon_that_fails_of_its_own_accord_is_quoted_and_not_started_again(tmp_path):
    experiment = {**EXPERIMENT, "task": {**EXPERIMENT["task"], "fails_at": 2}, "evaluate_every": 1}
    with pytest.raises(P2PFLError) as told:
        p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY, allow_tasks=ALLOWED)

    assert "b did not finish: task 'two-sites', metric 'error', site 'b'" in str(told.value)
    assert "disk full" in str(told.value)
    assert str(tmp_path / "run" / "sites" / "b" / "node.log") in str(told.value)
    assert len(died(tmp_path / "run")) == 1


def test_a_daemon_that_is_killed_before_any_round_is_not_started_for_ever(tmp_path):
    experiment = {**EXPERIMENT, "task": {**EXPERIMENT["task"], "killed_at": 0}}
    with pytest.raises(P2PFLError, match="b did not finish: killed by signal 9"):
        p2pfl.up(experiment, out=tmp_path / "run", site={**BRIEFLY, "greet_timeout_s": 1.0}, allow_tasks=ALLOWED)

    assert died(tmp_path / "run") == ["killed by signal 9"] * 2


def test_a_daemon_that_was_killed_once_is_started_again(tmp_path):
    experiment = {**EXPERIMENT, "rounds": 400}

    def kill() -> None:
        lock = tmp_path / "run" / "sites" / "b" / "state" / "node.json"
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            for status in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = status.read_bytes().split(b"\0")
                except OSError:
                    continue
                if (
                    str(tmp_path / "run" / "sites" / "b" / "site.yaml").encode() in words
                    and (lock.parent / "checkpoint.safetensors").exists()
                ):
                    os.kill(int(status.parent.name), signal.SIGKILL)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    run = p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY, allow_tasks=ALLOWED, waited_s=1000.0)
    killer.join()

    assert run.summary["stop_reason"] == "rounds"
    seconds = run.summary["seconds"]
    assert seconds["start"] == 1000
    assert seconds["other"] > 0  # making keys, starting processes, gathering
    assert seconds["total"] == pytest.approx(math.fsum(value for part, value in seconds.items() if part != "total"))
    assert died(tmp_path / "run") == ["killed by signal 9"]
    assert (tmp_path / "run" / "sites" / "b" / "node.log").read_text().count("resumed from the checkpoint") == 1
    (tmp_path / "run" / "summary.json").unlink()  # as where `up` was ended before it wrote it
    again = p2pfl.up({}, resume=tmp_path / "run", allow_tasks=ALLOWED)

    assert [(death["node"], death["exit_code"], death["detail"]) for death in again.summary["deaths"]] == [("b", -9, "killed by signal 9")]


def test_two_dead_of_three_are_both_named_and_the_third_is_stopped_at_once(tmp_path, caplog):
    experiment = {**EXPERIMENT, "task": {"name": "test_up:three_sites", "killed_at": 0}}
    with pytest.raises(P2PFLError) as told:
        p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY, allow_tasks=ALLOWED)
    said = [record.getMessage() for record in caplog.records if record.name == "p2pfl.launcher.network"]

    for name in "bc":
        log = tmp_path / "run" / "sites" / name / "node.log"
        assert f"{name} died (killed by signal 9); starting it again" in said
        ends = [line for line in said if line.startswith(f"{name} was killed by signal 9 twice before it greeted; not started again;")]
        assert ends
        assert ends[0].endswith(f"its log is {log}")
        assert f"{name} did not finish: killed by signal 9; its log is {log}" in str(told.value)
    assert died(tmp_path / "run") == ["killed by signal 9"] * 4
    assert not (tmp_path / "run" / "sites" / "a" / "state" / "run" / "nodes.jsonl").exists()  # it has not trained by itself
    state = run_state(read_run(tmp_path / "run"))
    assert state.kind == "silent"
    assert state.sentence == "stopped, since b, c died: killed by signal 9; the others were paused"


def test_a_run_that_goes_on_without_one_of_three_has_a_result_and_says_who_is_missing(tmp_path, caplog):
    task = {"name": "test_up:three_sites", "fails_at": 3, "of": ["c"]}
    experiment = {**EXPERIMENT, "task": task, "evaluate_every": 1, "rounds": 5}
    run = p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY, allow_tasks=ALLOWED)
    said = [record.getMessage() for record in caplog.records if record.name == "p2pfl.launcher.network"]

    first = run.summary["departures"][0]
    assert first["kind"] == "rounds_missed"
    assert first["detail"].startswith("c ended with exit code 1 after round ")
    assert "disk full" in first["detail"]
    assert [death["node"] for death in run.summary["deaths"]] == ["c"]
    assert run.summary["deaths"][0]["exit_code"] == 1
    assert "disk full" in said[-1]
    assert sorted(run.summary["metrics"]["error"]["per_node"]) == ["a", "b"]
    assert run.summary["mean_model"] is None
    assert run.summary["mean_model_reason"] == "c did not finish"
    assert run.summary["rounds"] == 5
    assert exit_code_of(run.summary) == 3
    assert verdict(read_run(run.path), convergence(read_run(run.path)))[0].startswith(
        "It ended, and not as agreed: c ended with exit code 1"
    )
    caplog.clear()
    again = p2pfl.up({}, resume=tmp_path / "run")

    assert exit_code_of(again.summary) == 3
    assert f"{tmp_path / 'run'} has ended, and c without a result: nobody is left to go on with" in caplog.text


def start_up(experiment, place):
    """`p2pfl.up` in a process of its own, which writes to up.log."""
    code = (
        f"import sys, json, p2pfl; p2pfl.up(json.loads(sys.argv[1]), out=sys.argv[2], site=json.loads(sys.argv[3]), allow_tasks={ALLOWED})"
    )
    command = [sys.executable, "-c", code, json.dumps(experiment), str(place / "run"), json.dumps(BRIEFLY)]
    with (place / "up.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=hear_interrupts)  # noqa: PLW1509


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_pauses_the_run_and_the_records_say_so(number, tmp_path):
    running = start_up({**EXPERIMENT, "rounds": 100_000}, tmp_path)
    try:
        wait_until(lambda: (tmp_path / "run" / "rounds.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        running.send_signal(number)
        running.wait(DEADLINE_S)
    finally:
        running.kill()
        running.wait(DEADLINE_S)
    state = run_state(read_run(tmp_path / "run"))

    assert state.kind == "paused"
    assert state.sentence.startswith(f"paused by {number.name} at ")
    assert died(tmp_path / "run") == []
    events = read_run(tmp_path / "run").events
    assert [event["detail"] for event in events if event["event"] == "paused"] == [f"by {number.name}"] * 2
    allowed = " ".join(f"--allow-task {name}" for name in ALLOWED)
    said = f"paused by {number.name}; go on with: p2pfl up --resume {tmp_path / 'run'} {allowed}"
    assert [line for line in (tmp_path / "up.log").read_text().splitlines() if "paused by" in line] == [said]


def test_a_signal_while_a_daemon_is_at_its_end_pauses_the_run_too(tmp_path):
    running = start_up({**EXPERIMENT, "task": {**EXPERIMENT["task"], "stays_at": 1}}, tmp_path)
    ended = tmp_path / "run" / "sites" / "a" / "state" / "run" / "summary.json"
    try:
        wait_until(lambda: ended.exists() or running.poll() is not None, DEADLINE_S)
        running.send_signal(signal.SIGHUP)

        assert running.wait(DEADLINE_S) == -signal.SIGHUP
    finally:
        running.kill()
        running.wait(DEADLINE_S)
    assert "paused" not in {event["event"] for event in read_run(tmp_path / "run").events}  # no daemon was asked in its rounds
    assert run_state(read_run(tmp_path / "run")).sentence.startswith("paused by SIGHUP at ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_results_are_gathered_pauses_the_run_too(number, tmp_path):
    code = (
        "import os, sys, json, p2pfl; from p2pfl.evaluation import conclusion; "
        "conclusion.subgroups = lambda *_: os.kill(os.getpid(), int(sys.argv[4])); "
        f"p2pfl.up(json.loads(sys.argv[1]), out=sys.argv[2], site=json.loads(sys.argv[3]), allow_tasks={ALLOWED})"
    )
    command = [sys.executable, "-c", code, json.dumps(EXPERIMENT), str(tmp_path / "run"), json.dumps(BRIEFLY), str(int(number))]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, start_new_session=True, preexec_fn=hear_interrupts
    )

    assert ended.returncode == -number
    assert f"paused by {number.name}; go on with: p2pfl up --resume {tmp_path / 'run'}" in ended.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run_state(read_run(tmp_path / "run")).sentence.startswith(f"paused by {number.name} at ")
    assert p2pfl.up({}, resume=tmp_path / "run", allow_tasks=ALLOWED).summary["stop_reason"] == "rounds"
