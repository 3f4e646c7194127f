"""Processes that are forked from one, first with a tiny program, then the daemons of `p2pfl up`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import p2pfl
from networks import DEADLINE_S, finish, plan_of, start_process, starts, until, wait_until
from p2pfl.launcher.fork_server import ROOM
from p2pfl.launcher.founding import found_network
from p2pfl.launcher.processes import ForkServer, can_fork, start_plainly
from p2pfl.yaml_files import dump_yaml

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")

BALLAST_BYTES = 2**26
GIB = 2**30
TWO_THREADS = "2 threads run in it, and what they hold at a fork nobody would ever let go of"

SERVER = f"""
import numpy.random, os, signal, sys, threading
from p2pfl.launcher import fork_server

fork_server.PATIENCE_S = 0.3
ballast = b"x" * {BALLAST_BYTES}

def program(arguments):
    match arguments:
        case ["say", word]:
            print(word)
        case ["exit", code]:
            sys.exit(int(code))
        case ["fail"]:
            raise ValueError("on purpose")
        case ["draw"]:
            print(numpy.random.random())
        case ["compiled"]:
            loops = sys.modules.get("p2pfl.compiled.training_loops")
            print(loops is not None and len(loops.sgd_steps.signatures))
        case ["stay"]:
            print("here", flush=True)
            sys.stdin.read()
            print("told to go")
        case ["stay for ever"]:
            print("here", flush=True)
            signal.pause()

if sys.argv[1:2] == ["thread"]:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
fork_server.serve(program, shared=[])
"""

PARENT = """
import asyncio, json, sys
from pathlib import Path
from p2pfl.launcher.processes import ForkServer

async def main():
    with ForkServer(json.loads(sys.argv[1])) as server:
        assert await server.is_fit()
        for name in ("a", "b"):
            server.start(name, ["stay" if name == "a" else "stay for ever"], Path(sys.argv[2]) / name)
        while True:
            server.exchange()
            await asyncio.sleep(0.01)

asyncio.run(main())
"""


def tiny(*arguments: str) -> ForkServer:
    return ForkServer([sys.executable, "-c", SERVER, *arguments, " " * ROOM])


class Started:
    """Some tiny processes, one a line of arguments."""

    def __init__(self, server: ForkServer, place: Path, **arguments: str) -> None:
        self.place = place
        self.processes = {name: server.start(name, line.split(","), place / name) for name, line in arguments.items()}

    def said(self, name: str) -> str:
        path = self.place / name
        return path.read_text() if path.exists() else ""

    def are_here(self) -> bool:
        return all(process.poll() is None and self.said(name) == "here\n" for name, process in self.processes.items())

    async def codes(self) -> dict[str, int | None]:
        await until(lambda: all(process.poll() is not None for process in self.processes.values()))
        return {name: process.poll() for name, process in self.processes.items()}


def running(place: Path) -> list[int]:
    """Processes whose standard output is a file of this folder or below."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "fd" / "1").readlink().is_relative_to(place):
                found.append(int(entry.name))
        except OSError:  # ended, or not ours
            continue
    return sorted(found)


def by_output(place: Path) -> dict[str, int]:
    return {Path(f"/proc/{pid}/fd/1").readlink().name: pid for pid in running(place)}


def ran(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def proportional_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def test_each_process_has_its_own_output_and_ends_in_its_own_way(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="say,one", b="say,two", c="exit,3", d="fail")

            assert await started.codes() == {"a": 0, "b": 0, "c": 3, "d": 1}
            assert (started.said("a"), started.said("b"), started.said("c")) == ("one\n", "two\n", "")
            assert started.said("d").endswith("\nValueError: on purpose\n")
            again = Started(server, tmp_path, a="say,three")

            assert await again.codes() == {"a": 0}
            assert again.said("a") == "one\nthree\n"

    finish(main())


def test_each_is_a_child_of_the_server_in_a_session_of_its_own_and_listed_as_what_it_runs(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="stay", b="stay")
            await until(started.are_here)
            pids = running(tmp_path)

            assert len(pids) == 2
            assert [os.getsid(pid) for pid in pids] == pids
            assert [parent(parent(pid)) for pid in pids] == [os.getpid()] * 2
            assert [ran(pid) for pid in pids] == [[sys.executable, "-m", "p2pfl", "stay"]] * 2

    finish(main())


def test_a_signal_reaches_the_one_that_it_is_for(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="stay", b="stay", c="stay")
            await until(started.are_here)
            started.processes["a"].send_signal(signal.SIGTERM)
            os.kill(by_output(tmp_path)["c"], signal.SIGKILL)
            await until(lambda: None not in (started.processes["a"].poll(), started.processes["c"].poll()))

            assert {name: process.poll() for name, process in started.processes.items()} == {"a": -15, "b": None, "c": -9}
            started.processes["a"].send_signal(signal.SIGTERM)

            assert server.fate() is None

    finish(main())


def test_on_leaving_all_are_told_and_who_stays_is_killed(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="stay", b="stay for ever")
            await until(started.are_here)
        return started

    started = finish(main())

    assert running(tmp_path) == []
    assert (started.said("a"), started.said("b")) == ("here\ntold to go\n", "here\n")


def test_processes_die_with_a_server_that_is_killed_and_it_is_said(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="stay", b="stay for ever", c="exit,3")
            await until(lambda: started.processes["c"].poll() == 3 and len(running(tmp_path)) == 2)
            os.kill(parent(running(tmp_path)[0]), signal.SIGKILL)

            assert await started.codes() == {"a": -9, "b": -9, "c": 3}
            assert running(tmp_path) == []
            assert server.fate() == "the process that the daemons are forked from was killed by signal 9, and they ended with it"

    finish(main())


def test_nothing_is_left_where_whoever_started_them_is_killed(tmp_path):
    parent_of_all = subprocess.Popen([sys.executable, "-c", PARENT, json.dumps(tiny().command), str(tmp_path)])
    wait_until(lambda: [(tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"] == ["here\n"] * 2)
    parent_of_all.kill()
    parent_of_all.wait()
    wait_until(lambda: running(tmp_path) == [])

    assert (tmp_path / "a").read_text() == "here\ntold to go\n"


def test_a_server_with_threads_says_that_it_cannot_fork():
    async def main():
        with tiny("thread") as server:
            assert not await server.is_fit()
            assert server.unfit == TWO_THREADS

    finish(main())


def test_a_server_that_fails_before_it_is_ready_is_no_endless_wait(capfd):
    async def main():
        with ForkServer([sys.executable, "-c", "raise SystemExit('no such module')"]) as server:
            await server.is_fit()
            return server.fate()

    assert finish(main()) == "the process that the daemons are forked from ended with exit code 1, and they ended with it"
    assert capfd.readouterr().err == "no such module\n"


def test_what_none_changes_is_in_memory_once(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            await until(Started(server, tmp_path, a="stay", b="stay", c="stay").are_here)
            return [proportional_bytes(pid) for pid in running(tmp_path)]

    sizes = finish(main())

    assert len(sizes) == 3
    # a quarter of the ballast each, the server has the fourth; and less than half of it for all else
    assert all(BALLAST_BYTES / 4 <= size < 3 * BALLAST_BYTES / 4 for size in sizes)


def test_numpy_draws_other_numbers_in_each(tmp_path):
    async def main():
        with tiny() as server:
            assert await server.is_fit()
            started = Started(server, tmp_path, a="draw", b="draw", c="draw")
            await started.codes()
            return {started.said(name) for name in "abc"}

    assert len(finish(main())) == 3


@pytest.mark.parametrize(("platform", "expected"), [("linux", True), ("darwin", False), ("win32", False)])
def test_only_linux_forks(platform, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)

    assert can_fork() is expected


AVERAGING = {"task": {"name": "averaging", "dimension": 3}, "nodes": 3, "rounds": 400, "stop": None, "baselines": []}
BREAST_CANCER = {"task": {"name": "breast-cancer"}, "topology": {"name": "ring"}, "rounds": 20, "stop": None}


@pytest.fixture
def up(tmp_path):
    """Starts `p2pfl up` on an experiment; the test must not leave it behind."""
    started = []

    def start(experiment: dict[str, Any]) -> subprocess.Popen[bytes]:
        file = tmp_path / "experiment.yaml"
        file.write_text(dump_yaml(experiment))
        started.append(start_process("up", str(file), "--out", str(tmp_path / "run"), log=tmp_path / "said"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def are_at_work(place: Path, num_daemons: int) -> bool:
    return len(list(place.glob("run/sites/*/state/checkpoint.safetensors"))) == num_daemons


def daemons(place: Path) -> dict[str, int]:
    found = {}
    for pid in running(place / "run" / "sites"):
        with suppress(FileNotFoundError):  # it has just ended
            found[Path(f"/proc/{pid}/fd/1").readlink().parent.name] = pid
    return found


def said_last(run: Path) -> list[str]:
    return [path.read_text().splitlines()[-1] for path in run.glob("sites/*/node.log")]


def assert_is_the_mean_of_all(run: p2pfl.Run) -> None:
    start_NP = starts(plan_of(**AVERAGING))
    x_NP = torch.stack([run.models[name] for name in ("node-0", "node-1", "node-2")])

    assert (x_NP - start_NP.mean(dim=0)).abs().max().item() < 1e-12


@pytest.mark.slow
def test_up_says_what_to_do_when_the_fork_server_is_killed_and_goes_on(tmp_path, up):
    process = up(AVERAGING)
    wait_until(lambda: are_at_work(tmp_path, 3))
    os.kill(parent(daemons(tmp_path)["node-0"]), signal.SIGKILL)

    assert process.wait(DEADLINE_S) == 1
    assert running(tmp_path) == []
    assert (tmp_path / "said").read_text().splitlines()[-1] == (
        "p2pfl: the process that the daemons are forked from was killed by signal 9, and they ended with it; nothing is lost that their "
        f"checkpoints hold: go on with --resume {tmp_path / 'run'}"
    )
    run = p2pfl.up(AVERAGING, resume=tmp_path / "run")

    assert (run.summary["stop_reason"], run.summary["rounds"]) == ("rounds", 400)
    assert [event["event"] for event in run.events].count("resumed") == 3
    assert_is_the_mean_of_all(run)


@pytest.mark.slow
def test_a_daemon_that_is_killed_is_forked_again(tmp_path, up):
    process = up(AVERAGING)
    wait_until(lambda: are_at_work(tmp_path, 3))
    before = daemons(tmp_path)
    os.kill(before["node-1"], signal.SIGKILL)
    wait_until(lambda: daemons(tmp_path).get("node-1", before["node-1"]) != before["node-1"])
    after = daemons(tmp_path)

    assert [after[name] for name in ("node-0", "node-2")] == [before[name] for name in ("node-0", "node-2")]
    assert parent(after["node-1"]) == parent(after["node-0"])
    assert ran(parent(after["node-1"]))[-2:] == ["node", "fork-server"]
    assert ran(after["node-1"])[2:8] == [
        "p2pfl", "--verbose", "node", "start", str(tmp_path / "run" / "sites" / "node-1" / "site.yaml"), "--until-stdin-closes"
    ]  # fmt: skip
    assert process.wait(DEADLINE_S) == 0
    assert running(tmp_path) == []
    run = p2pfl.Run(tmp_path / "run")

    assert [event["event"] for event in run.events].count("resumed") == 1
    assert_is_the_mean_of_all(run)


@pytest.mark.slow
@pytest.mark.usefixtures("numba")
def test_compiled_loops_are_loaded_once_for_all_where_the_study_has_them(tmp_path):
    plan = plan_of(task={"name": "breast-cancer"}, nodes=2, topology={"name": "path"}, rounds=1, stop=None, compiled="on")
    with ExitStack() as ports:
        found_network(plan, tmp_path, ports, {})

    async def main():
        with tiny() as server:
            assert await server.is_fit()
            server.say(read=str(tmp_path / "study.yaml"))
            started = Started(server, tmp_path, a="compiled")
            await started.codes()
            return started.said("a")

    assert finish(main()) == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGHUP, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_up_leaves_no_process_behind_however_it_is_ended(number, code, tmp_path, up):
    process = up({**AVERAGING, "rounds": 100_000})
    wait_until(lambda: are_at_work(tmp_path, 3))
    server = parent(daemons(tmp_path)["node-0"])
    process.send_signal(number)

    assert process.wait(DEADLINE_S) == code
    wait_until(lambda: running(tmp_path) == [] and not Path(f"/proc/{server}").exists())

    assert said_last(tmp_path / "run") == (["stopped: paused"] * 3)
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "paused by" in line]
    name = signal.Signals(number).name
    expected = [f"p2pfl: paused by {name}; go on with: p2pfl up --resume {tmp_path / 'run'}"]
    assert said == ([] if number == signal.SIGKILL else expected)


@pytest.mark.slow
def test_without_forking_the_result_is_the_same(tmp_path):
    experiment = {**AVERAGING, "rounds": 10}
    forked = p2pfl.up(experiment, out=tmp_path / "forked")
    plain = p2pfl.up(experiment, out=tmp_path / "plain", fork=False)

    assert {name: x_P.tolist() for name, x_P in forked.models.items()} == {name: x_P.tolist() for name, x_P in plain.models.items()}
    assert said_last(tmp_path / "forked") == said_last(tmp_path / "plain") == ["stopped: rounds"] * 3


@pytest.mark.slow
def test_where_nothing_can_be_forked_up_says_so_and_each_daemon_is_a_python_of_its_own(tmp_path, monkeypatch, caplog):
    (tmp_path / "sitecustomize.py").write_text("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = p2pfl.up({**AVERAGING, "nodes": 2, "rounds": 3}, out=tmp_path / "run")

    assert run.summary["rounds"] == 3
    assert [record.getMessage() for record in caplog.records if record.name == "p2pfl.launcher.network"] == [
        f"each daemon is a Python of its own, since the process to fork them from is unfit: {TWO_THREADS}"
    ]


@pytest.mark.slow
def test_64_daemons_greet_each_other_and_need_less_than_8_gib(tmp_path, up):
    process = up({**BREAST_CANCER, "nodes": 64})
    wait_until(lambda: len(list(tmp_path.glob("run/sites/*/state/run/nodes.jsonl"))) == 64)  # each has ended its first round
    pids = running(tmp_path)
    for pid in daemons(tmp_path).values():
        os.kill(pid, signal.SIGSTOP)  # looking takes longer than their rounds
    size = sum(map(proportional_bytes, pids))
    for pid in daemons(tmp_path).values():
        os.kill(pid, signal.SIGCONT)

    assert greeted(tmp_path) == 128
    assert len(pids) == 66  # with `p2pfl up` and the fork server
    assert size < 8 * GIB
    assert process.wait(DEADLINE_S) == 0
    run = p2pfl.Run(tmp_path / "run")

    assert (run.summary["rounds"], run.summary["nodes"]) == (20, 64)
    assert running(tmp_path) == []


def greeted(place: Path) -> int:
    """Ordered pairs of neighbours of which the second has greeted the first."""
    pairs = set()
    for path in place.glob("run/sites/*/state/run/events.jsonl"):
        whole, _, _torn = path.read_text().rpartition("\n")
        events = [json.loads(line) for line in whole.splitlines()]
        pairs |= {(event["node"], event["detail"].split(" ")[0]) for event in events if event["event"] == "greeted"}
    return len(pairs)


def test_a_process_that_cannot_be_started_leaves_no_file_open(tmp_path):
    num_open = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(ValueError, match="null byte"):
        start_plainly("node-0", ["node\0start"], tmp_path / "node.log")
    with pytest.raises(FileNotFoundError):
        start_plainly("node-0", ["--version"], tmp_path / "nowhere" / "node.log")

    assert num_open == len([*Path("/proc/self/fd").iterdir()])


def test_a_process_that_nobody_asks_for_any_more_is_told_by_the_end_of_its_input(tmp_path):
    running = start_plainly("node-0", ["--version"], tmp_path / "node.log")
    lifeline = running.stdin
    running.wait()
    del running

    assert lifeline.closed
