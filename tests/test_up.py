"""What `p2pfl up` does where a daemon ends before the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import p2pfl
from p2pfl.errors import P2PFLError
from p2pfl.records import read_run
from p2pfl.tasks import Site, Task

pytestmark = pytest.mark.slow

EXPERIMENT = {"task": {"name": "test_up:two_sites"}, "topology": {"name": "complete"}, "rounds": 3, "stop": None, "baselines": []}
BRIEFLY = {"deadline_floor_s": 1.0, "deadline_factor": 2.0, "linger_s": 1.0}
DEADLINE_S = 60.0


def two_sites(fails_at: int | None = None, killed_at: int | None = None) -> Task:
    """At site b (five test rows) the metric fails, or kills its daemon, at the call of that number; 0 is the trial before the start."""
    calls = count()

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        number = next(calls) if len(targets) == 5 else -1
        if number == fails_at:
            raise OSError("disk full")
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
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def died(place):
    return [event["detail"] for event in read_run(place).events if event["event"] == "died"]


def test_a_daemon_that_fails_of_its_own_accord_is_quoted_and_not_started_again(tmp_path):
    experiment = {**EXPERIMENT, "task": {**EXPERIMENT["task"], "fails_at": 2}, "evaluate_every": 1}
    with pytest.raises(P2PFLError) as told:
        p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY)

    assert "b did not finish: task 'two-sites', metric 'error', site 'b'" in str(told.value)
    assert "disk full" in str(told.value)
    assert str(tmp_path / "run" / "sites" / "b" / "node.log") in str(told.value)
    assert len(died(tmp_path / "run")) == 1


def test_a_daemon_that_is_killed_before_any_round_is_not_started_for_ever(tmp_path):
    experiment = {**EXPERIMENT, "task": {**EXPERIMENT["task"], "killed_at": 0}}
    with pytest.raises(P2PFLError, match="b did not finish: killed by signal 9"):
        p2pfl.up(experiment, out=tmp_path / "run", site={**BRIEFLY, "greet_timeout_s": 1.0})

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
    run = p2pfl.up(experiment, out=tmp_path / "run", site=BRIEFLY)
    killer.join()

    assert run.summary["stop_reason"] == "rounds"
    assert died(tmp_path / "run") == ["killed by signal 9"]
    assert (tmp_path / "run" / "sites" / "b" / "node.log").read_text().count("resumed from the checkpoint") == 1
