"""Updates of neighbours that lie in files: the same weights, little memory, and a node that outlives its disk's faults."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from networks import HASTY, Network, averaging, finish, plan_of, starts, until
from p2pfl.node import spill
from p2pfl.node.memory import forecast_node
from p2pfl.runs.events import EventKind
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from thorough import first_fast

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
DEADLINE_S = 300
LEARNING = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 4,
    "rounds": 4,
    "stop": None,
    "topology": {"name": "complete"},
    "evaluate_every": 10,
}

needs_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")


def file_at(address):
    """The file that is mapped to an address of this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, _, *file = line.split(maxsplit=5)
        first, end = (int(place, 16) for place in span.split("-"))
        if first <= address < end:
            return file[0] if file else ""
    raise AssertionError(f"nothing is mapped to {address:x}")


def num_open_in(folder):
    """How many files of a folder this process has open."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by another thread in the meantime
            found += str(each.readlink()).startswith(str(folder))
    return found


def events_of(network, name):
    return Counter(event["event"] for event in read_run(network.states[name] / "run").events)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("algorithm", first_fast(["dpsgd", "choco", "push-sum"]))
def test_updates_in_files_give_the_weights_of_the_simulator_and_leave_nothing(algorithm, tmp_path):
    weights = {"weights": "push-sum"} if algorithm == "push-sum" else {}
    raw = {**LEARNING, "algorithm": {"name": algorithm}, "baselines": [], **weights}
    plan = plan_of(**raw)

    async def main(place, spill_mb):
        async with Network(plan, place, spill_mb=spill_mb) as network:
            network.start()
            await network.ended()
            return network.models(), names_in(network.states[plan.names[0]]), network.nodes[plan.names[0]].daemon.node.room.spills

    in_files, left, spills = finish(main(tmp_path / "files", 0))
    in_memory, left_of_memory, _ = finish(main(tmp_path / "memory", None))
    simulated = simulate(raw, out=tmp_path / "simulated").models

    assert spills
    assert torch.equal(in_files, in_memory)
    assert torch.equal(in_files, torch.stack([simulated[name] for name in plan.names]))
    assert left == left_of_memory


@needs_linux
def test_open_flows_lie_in_files_after_a_kill_as_before_it(tmp_path):
    plan = averaging({"name": "complete"}, 3)
    place, found = {}, {}

    async def main():
        async with Network(plan, tmp_path, spill_mb=0) as network:
            network.start()
            await network.reached(3)
            edges = network.nodes[plan.names[0]].daemon.protocol.edges
            await until(lambda: edges.flows)  # between two exchanges none may be open
            place["before"] = [file_at(flow.amounts["x"].data_ptr()) for flow in edges.flows.values()]
            await network.kill(plan.names[0])
            network.start(plan.names[0])
            edges = network.nodes[plan.names[0]].daemon.protocol.edges
            await network.reached(5)
            place["after"] = [file_at(flow.amounts["x"].data_ptr()) for flow in edges.flows.values()]
            await network.ended()
            found["models"] = network.models()

    finish(main())

    assert place["before"]
    assert all(file.startswith(str(tmp_path)) for file in place["before"] + place["after"])
    torch.testing.assert_close(found["models"], starts(plan).mean(dim=0).expand_as(found["models"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("code", first_fast([errno.ENOSPC, errno.EMFILE, errno.EIO]))
def test_a_disk_that_gives_no_room_costs_memory_and_is_said_once(code, tmp_path, monkeypatch):
    plan = averaging({"name": "complete"}, 3)
    failing = plan.names[0]

    def refuse(folder, size_bytes, make=spill._file_of):
        if failing in Path(folder).parts:
            raise OSError(code, os.strerror(code))
        return make(folder, size_bytes)

    monkeypatch.setattr(spill, "_file_of", refuse)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY, spill_mb=0) as network:
            network.start()
            await network.ended()
            return network.models(), {name: events_of(network, name)[EventKind.NOT_SPILLED] for name in plan.names}

    models, said = finish(main())

    assert said == {name: int(name == failing) for name in plan.names}
    torch.testing.assert_close(models, starts(plan).mean(dim=0).expand_as(models), rtol=0, atol=1e-6)


@needs_linux
def test_a_file_is_not_begun_where_too_little_of_the_disk_is_free(tmp_path):
    said = []
    room = spill.UpdateRoom(tmp_path, spills=True, on_event=lambda kind, detail: said.append((kind, detail)))

    array = room.make(2**20)

    assert file_at(array.ctypes.data).startswith(str(tmp_path))
    assert said == []

    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(OSError, match="MB are free: too few for"):
        spill._file_of(tmp_path, free_bytes)

    assert names_in(tmp_path) == set()


@needs_linux
def test_a_copy_lies_in_one_file_and_a_tensor_without_numbers_is_no_fault(tmp_path):
    said = []
    room = spill.UpdateRoom(tmp_path, spills=True, on_event=lambda kind, detail: said.append((kind, detail)))
    tensors = {f"t{size}": torch.arange(size, dtype=torch.float64) for size in (3, 0, 100, 1)} | {
        "number": torch.tensor(7, dtype=torch.int8)
    }

    copies = room.copy(tensors)

    assert num_open_in(tmp_path) == 1
    assert copies.keys() == tensors.keys()
    assert all(copies[name].dtype == tensors[name].dtype and torch.equal(copies[name], tensors[name]) for name in tensors)
    copies["t3"][:] = -1
    assert torch.equal(copies["t100"], tensors["t100"])
    assert torch.equal(tensors["t3"], torch.arange(3, dtype=torch.float64))
    assert room.make(0).nbytes == 0
    assert room.copy({"none": torch.zeros(0)})["none"].shape == (0,)
    assert said == []


def test_a_disk_that_fails_on_and_off_is_said_once_in_ten_minutes(tmp_path, monkeypatch):
    said, now_s, failing = [], [0.0], [True]
    make = spill._file_of

    def refuse_at_times(folder, size_bytes):
        if failing[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(folder, size_bytes)

    monkeypatch.setattr(spill, "_file_of", refuse_at_times)
    monkeypatch.setattr(spill.time, "monotonic", lambda: now_s[0])
    room = spill.UpdateRoom(tmp_path, spills=True, on_event=lambda kind, detail: said.append(now_s[0]))
    for now_s[0], failing[0] in [(0, True), (700, True), (701, False), (702, True), (703, False), (704, True), (1310, False), (1311, True)]:
        room.make(8)

    assert said == [0, 702, 1311]


@pytest.mark.parametrize(("neighbours", "spill_mb", "models"), [(2, None, 7), (2, 0, 4), (4, 0, 4), (4, 10**6, 11)])
def test_models_in_memory_are_counted_without_those_in_files(neighbours, spill_mb, models):
    plan = plan_of(task={"name": "digits"}, nodes=neighbours + 1, topology={"name": "complete"})
    name = plan.names[0]

    found = forecast_node(plan, plan.population([name]), neighbours, spill_mb=spill_mb)

    assert (found.peak_bytes - found.links_bytes - 32 * 2**20) / found.model_bytes == pytest.approx(models, abs=0.02)
    assert found.spilled_bytes == (3 * neighbours * found.model_bytes if spill_mb == 0 else 0)
    assert ("of files" in found.text) == (spill_mb == 0)


@needs_linux
def test_large_updates_that_come_before_their_exchange_lie_in_files_wherever_others_lie(tmp_path):
    room = spill.UpdateRoom(tmp_path, spills=False, num_neighbours=4, on_event=lambda kind, detail: None)
    small = spill.UpdateRoom(tmp_path, spills=False, num_neighbours=1, on_event=lambda kind, detail: None)
    large = room.make_early(3 * 10**6)

    assert file_at(large.ctypes.data).startswith(str(tmp_path))
    assert not file_at(room.make(3 * 10**6).ctypes.data).startswith(str(tmp_path))
    assert not file_at(small.make_early(3 * 10**6).ctypes.data).startswith(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"),
    [
        pytest.param(["--order", "deaf", "--spill-mb", "0"], 5, id="in-files"),
        pytest.param(["--order", "deaf"], 9, id="in-memory"),
        # the first node takes four updates more before it mixes
        pytest.param(["--order", "early"], 9, id="in-memory-early"),
    ],
)
def test_a_node_with_four_neighbours_needs_five_models_beside_its_files_and_nine_without(options, most):
    command = [sys.executable, str(BENCHMARK), "--parameters", "25000000", "--rounds", "2", "--neighbours", "4", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    found = json.loads(done.stdout)["nodes"]

    assert len(found) == 5
    for node in found:
        assert node["models"] <= most, node
        assert node["models"] <= 1.1 * node["foretold"], node
    assert max(node["models"] / node["foretold"] for node in found) >= 0.9, found
