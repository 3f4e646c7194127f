"""Real daemons and simulations that are killed or stand still, as others see them a moment later."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from killed_hospital import calls_well, printed
from networks import wait_until
from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import edge_health
from p2pfl.inspector.outages import incidents, outages
from p2pfl.inspector.run_state import banner, run_state
from p2pfl.inspector.sources import read_source
from p2pfl.node.status import read_status
from p2pfl.runs.records import read_run
from p2pfl.runs.writing_process import MARK, process_state

DEADLINE_S = 60.0


def pid_of(site):
    """Of the daemon with this site.yaml; None while there is none."""
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(site).encode() in words.read_bytes().split(b"\0"):
                return int(words.parent.name)
    return None


def network(num_nodes, place, site):
    """`p2pfl up` on a ring in a process of its own, whose output goes into a file beside the run."""
    experiment = {"task": {"name": "breast-cancer"}, "nodes": num_nodes, "topology": {"name": "ring"}, "rounds": 1000, "baselines": []}
    code = "import sys, json, p2pfl; p2pfl.up(json.loads(sys.argv[1]), out=sys.argv[2], site=json.loads(sys.argv[3]))"
    command = [sys.executable, "-c", code, json.dumps(experiment), str(place), json.dumps(site)]
    with place.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def rounds_without(node, folder):
    """How many rounds the node's outages have had so far."""
    return sum(found.last - found.first + 1 for found in outages(read_source(str(folder))).found if found.node == node)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the daemon in /proc")
def test_a_daemon_that_stands_still_is_lost_in_every_folder_and_well_again_when_it_goes_on(tmp_path):
    site = {"round_at_least_s": 0.5, "deadline_floor_s": 2.0, "deadline_factor": 2.0}
    place, still = tmp_path / "run", "hospital-2"
    folders = {name: place / "sites" / name / "state" / "run" for name in ("hospital-0", "hospital-1")}
    running = network(5, place, site)
    stopped = None
    try:
        wait_until(lambda: (place / "rounds.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        for name, folder in folders.items():
            wait_until(lambda folder=folder: node_health(read_source(str(folder)))[still].state == "well", DEADLINE_S)
            assert banner(read_source(str(folder))) == f"You see the network as {name} has heard of it."
            assert node_health(read_run(folder))[still].state == "unknown"
        stopped = pid_of(place / "sites" / still / "site.yaml")
        os.kill(stopped, signal.SIGSTOP)
        for folder in folders.values():
            wait_until(lambda folder=folder: node_health(read_source(str(folder)))[still].state == "lost", DEADLINE_S)
            for run in (read_source(str(folder)), read_run(folder)):
                assert not calls_well(printed(run), still)
                assert not calls_well(printed(run, is_live=True), still)
        # told are outages of two rounds; the first may become late ones, which the node has made as well
        wait_until(lambda: rounds_without(still, folders["hospital-1"]) > 3, DEADLINE_S)
        os.kill(stopped, signal.SIGCONT)
        for folder in folders.values():
            wait_until(lambda folder=folder: node_health(read_source(str(folder)))[still].state == "well", DEADLINE_S)
        told = [event["event"] for event in incidents(read_source(str(folders["hospital-1"]))) if event["node"] == still]
        assert told[-2:] == ["stopped answering", "is back"]
    finally:
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
        running.send_signal(signal.SIGINT)
        running.wait(DEADLINE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_killed_simulation_is_not_running_a_moment_later(tmp_path):
    code = "import sys, p2pfl; p2pfl.simulate({'task': {'name': 'averaging'}, 'rounds': 10**6, 'stop': None}, out=sys.argv[1])"
    place = tmp_path / "run"
    running = subprocess.Popen([sys.executable, "-c", code, str(place)], start_new_session=True)
    try:
        wait_until(lambda: (place / "rounds.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        assert run_state(read_source(str(place))).kind == "running"
    finally:
        running.kill()
        running.wait(DEADLINE_S)
    told = printed(read_source(str(place)), width=120)

    assert "stopped: its process ended without a word" in told
    assert not re.search(r"\b(running|well)\b", told)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_killed_daemon_is_lost_in_its_own_folder_a_moment_later(tmp_path):
    place = tmp_path / "run"
    home = place / "sites" / "hospital-2"
    own_run = home / "state" / "run"
    site = {"round_at_least_s": 0.5}
    running = network(4, place, site)
    try:
        wait_until(lambda: (own_run / "nodes.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        wait_until(lambda: node_health(read_source(str(own_run)))["hospital-2"].state == "well", DEADLINE_S)
        daemon = pid_of(home / "site.yaml")
        os.kill(running.pid, signal.SIGSTOP)  # or it would start the daemon again
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: process_state(own_run) == "gone", 5.0)
        run = read_source(str(own_run))
        assert node_health(run)["hospital-2"].state == "lost"
        for text in (printed(run, width=120), printed(run, is_live=True, width=120)):
            assert "its process ended without a word" in text
            assert not calls_well(text, "hospital-2")
        os.kill(running.pid, signal.SIGCONT)
        wait_until(lambda: node_health(read_source(str(own_run)))["hospital-2"].state == "well", DEADLINE_S)
        os.kill(running.pid, signal.SIGKILL)
        running.wait(DEADLINE_S)
        assert run_state(read_source(str(place))).kind == "silent"
        wait_until(lambda: run_state(read_source(str(own_run))).kind == "paused", DEADLINE_S)
        wait_until(lambda: not (own_run / MARK).exists(), DEADLINE_S)
    finally:
        for number in (signal.SIGCONT, signal.SIGINT):
            running.send_signal(number)
        running.wait(DEADLINE_S)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the daemon in /proc")
def test_a_daemon_that_is_told_to_pause_is_paused_for_its_neighbours(tmp_path):
    place = tmp_path / "run"
    near = place / "sites" / "hospital-1" / "state"
    site = {"round_at_least_s": 0.5, "deadline_floor_s": 2.0, "deadline_factor": 2.0}
    running = network(4, place, site)
    try:
        wait_until(lambda: (place / "rounds.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        wait_until(lambda: node_health(read_source(str(near / "run")))["hospital-2"].state == "well", DEADLINE_S)
        os.kill(running.pid, signal.SIGSTOP)  # or it would start the daemon again
        os.kill(pid_of(place / "sites" / "hospital-2" / "site.yaml"), signal.SIGTERM)
        link = frozenset(("hospital-1", "hospital-2"))
        wait_until(lambda: node_health(read_source(str(near / "run")))["hospital-2"].state == "paused", DEADLINE_S)
        wait_until(lambda: "hospital-2" in read_source(str(near / "run")).nodes[-1]["skipped"], DEADLINE_S)
        for run in (read_source(str(near / "run")), read_run(near / "run")):
            assert node_health(run)["hospital-2"].state == "paused"
            assert edge_health(run)[link].state == "paused"
        assert read_status(near)["neighbours"]["hospital-2"]["paused"]
        os.kill(running.pid, signal.SIGCONT)
        wait_until(lambda: node_health(read_source(str(near / "run")))["hospital-2"].state == "well", DEADLINE_S)
        assert not read_status(near)["neighbours"]["hospital-2"]["paused"]
    finally:
        for number in (signal.SIGCONT, signal.SIGINT):
            running.send_signal(number)
        running.wait(DEADLINE_S)
