"""Seconds of a run are those that its user waited for."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from p2pfl import simulate
from p2pfl.cli import app
from p2pfl.evaluation import conclusion
from p2pfl.runs import stopwatch
from p2pfl.runs.records import read_summary
from p2pfl.runs.stopwatch import Stopwatch, process_age_s, with_rest
from p2pfl.simulator import engine, mixer, start
from p2pfl.yaml_files import dump_yaml
from simulations import LOGISTIC, QUICK

DEADLINE_S = 60


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where a function is slowed down."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))

    def slow(place, name, seconds):
        function = getattr(place, name)

        def slowed(*arguments, **named):
            clock.now_s += seconds
            return function(*arguments, **named)

        monkeypatch.setattr(place, name, slowed)

    clock.slow = slow
    return clock


@pytest.fixture
def slow_simulation(clock):
    clock.slow(start, "load_sites", 1)
    clock.slow(start, "make_plan", 2)
    clock.slow(start, "refuse_what_does_not_fit", 4)
    clock.slow(start.RunFolder, "create", 8)
    clock.slow(mixer.Mixer, "participation", 16)
    clock.slow(engine.Agreement, "end_round", 2048)
    clock.slow(engine.Simulation, "_evaluated", 32)  # of the last round, and at the end
    clock.slow(engine.Simulation, "_record", 64)
    clock.slow(conclusion, "write_models", 128)
    clock.slow(conclusion, "mean_model_metrics", 256)
    clock.slow(conclusion, "baselines_of", 512)
    clock.slow(conclusion, "summary_of", 1024)
    return clock


def test_every_part_of_a_simulation_is_in_its_seconds_and_its_total(slow_simulation, tmp_path):
    run = simulate({**LOGISTIC, **QUICK, "rounds": 1}, out=tmp_path / "run", waited_s=0.5)
    seconds = run.summary["seconds"]

    assert seconds == {
        "start": 0.5,
        "sites": 1,
        "plan": 2 + 4 + 8,
        "setup": 0,
        "train": 16,
        "mix": 2048,
        "evaluate": 32 + 32 + 256,
        "write": 64 + 128 + 1024,
        "baselines": 512,
        "total": slow_simulation.now_s + 0.5,
    }


@pytest.mark.parametrize(("pace", "algorithm"), [("asynchronous", "dpsgd"), ("pairwise", "ad-psgd")])
def test_a_simulation_at_the_nodes_own_pace_counts_from_its_beginning_too(clock, tmp_path, pace, algorithm):
    clock.slow(start, "load_sites", 1)
    clock.slow(start, "make_plan", 2)
    asked = {**LOGISTIC, **QUICK, "pace": {"name": pace}, "algorithm": {"name": algorithm}, "rounds": 2}
    run = simulate(asked, out=tmp_path / "run", waited_s=0.5)

    assert run.summary["seconds"]["total"] == 3.5


def test_what_an_earlier_process_took_is_added():
    now, earlier = Stopwatch(waited_s=2.0), {"start": 3.0, "train": 5.0}
    now.resume(earlier)
    now.lap("mix")

    assert now.spent["start"] == 5
    assert now.spent["train"] == 5
    assert earlier == {"start": 3.0, "train": 5.0}


def test_what_no_part_has_is_in_the_rest():
    assert with_rest({"train": 2.0, "mix": 1.0}, 10.0) == {"train": 2.0, "mix": 1.0, "other": 7.0}
    assert with_rest({"train": 2.0}, 1.0) == {"train": 2.0, "other": 0.0}


def test_all_seconds_until_now_are_those_booked_and_those_since(clock):
    stopwatch = Stopwatch(waited_s=2.0)
    clock.now_s += 3
    stopwatch.lap("train")
    clock.now_s += 4

    assert stopwatch.so_far_s() == 9


def test_a_command_counts_from_the_start_of_its_process(monkeypatch, tmp_path):
    monkeypatch.setattr(stopwatch, "process_age_s", lambda: 1000.0)
    (tmp_path / "experiment.yaml").write_text(dump_yaml({**LOGISTIC, **QUICK, "rounds": 1}))
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "experiment.yaml"), "--out", str(tmp_path / "run")])
    seconds = read_summary(tmp_path / "run")["seconds"]

    assert done.exit_code == 0
    assert seconds["start"] == 1000
    assert seconds["total"] == math.fsum(value for name, value in seconds.items() if name != "total")


def test_the_age_of_a_process_is_counted_from_its_start_and_not_from_an_import():
    code = (
        "import time; began = time.monotonic(); from p2pfl.runs.stopwatch import process_age_s; "
        "print(began, time.monotonic() - process_age_s())"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    began, started = map(float, done.stdout.split())

    assert before - 0.02 <= started < began  # the kernel counts in hundredths


def test_where_the_system_does_not_tell_the_age_counts_from_the_import(monkeypatch, tmp_path):
    monkeypatch.setattr(stopwatch, "_STAT", tmp_path / "none")

    assert process_age_s() == pytest.approx(time.monotonic() - stopwatch._IMPORTED_S, abs=1)
