"""Exit codes of commands that a signal ends."""

from __future__ import annotations

import os
import signal

import pytest
import typer

import p2pfl
from p2pfl.cli.long_runs import pausable
from p2pfl.errors import Paused
from p2pfl.inspector.run_state import run_state
from p2pfl.runs.records import read_run
from p2pfl.simulator import FaultScript

AVERAGING = {"task": {"name": "averaging", "dimension": 3}, "nodes": 3, "rounds": 5, "stop": None, "baselines": []}
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def interrupt(number, most, row):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", ENDING)
def test_what_can_be_gone_on_with_ends_with_0_and_says_how(number, capsys):
    def run():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise Paused("go on with: that") from None

    with pytest.raises(typer.Exit) as ended, pausable(hears=True):
        run()

    assert ended.value.exit_code == 0
    assert capsys.readouterr().err == f"p2pfl: paused by {number.name}; go on with: that\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", ENDING)
def test_what_cannot_be_gone_on_with_ends_as_a_shell_expects(number, capsys):
    with pytest.raises(typer.Exit) as ended, pausable(hears=True):
        os.kill(os.getpid(), number)

    assert ended.value.exit_code == 128 + number
    assert capsys.readouterr().err == ""


def test_a_signal_that_somebody_has_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pausable(hears=True):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_simulation_says_how_it_goes_on(tmp_path):
    place = tmp_path / "a run"
    with pytest.raises(Paused) as paused:
        p2pfl.simulate(AVERAGING, out=place, progress=interrupt)

    assert str(paused.value) == f"paused by SIGINT; go on with: p2pfl simulate --resume '{place}'"
    assert run_state(read_run(place)).sentence.startswith("paused: it was interrupted")
    assert p2pfl.simulate({}, resume=place).summary["rounds"] == 5
    assert run_state(read_run(place)).kind == "finished"


def test_a_simulation_of_scripted_faults_cannot_be_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt) as interrupted:
        p2pfl.simulate(AVERAGING, out=tmp_path / "run", faults=FaultScript(), progress=interrupt)

    assert not isinstance(interrupted.value, Paused)
