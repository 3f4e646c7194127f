"""A node whose disk is full waits for room, loses no row, acknowledges nothing that is not on the disk, and goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from networks import HASTY, PATIENT, Institutions, Network, averaging, finish, plan_of, until, wait_until
from p2pfl.errors import DiskFull, P2PFLError, StoreError
from p2pfl.evaluation.results import read_models
from p2pfl.node import run_log
from p2pfl.node.status import read_status
from p2pfl.runs.checkpoint import CheckpointFile
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def rows(path):
    return [row["round"] for row in read_run(path).rounds]


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", {"name": "x"})


@needs_full
def test_rows_for_which_there_is_no_room_are_kept_and_written_in_their_order(folder):
    folder.waits_for_room = True
    folder.append_round({"round": 0, "kind": "train"})
    written = folder.path / "rounds.jsonl"
    aside = written.rename(folder.path / "aside")
    written.symlink_to(FULL)
    folder.append_round({"round": 1, "kind": "train"})
    folder.append_event({"round": 1, "node": "a", "event": "greeted"})
    folder.append_round({"round": 2, "kind": "train"})

    assert folder.num_waiting == 3
    written.unlink()
    aside.rename(written)
    folder.write_waiting()

    assert folder.num_waiting == 0
    assert rows(folder.path) == [0, 1, 2]
    assert len(read_run(folder.path).events) == 1


@needs_full
def test_a_full_disk_is_an_error_for_who_does_not_wait(folder):
    (folder.path / "rounds.jsonl").symlink_to(FULL)

    with pytest.raises(DiskFull, match=r"rounds\.jsonl: cannot be written: No space left on device"):
        folder.append_round({"round": 0, "kind": "train"})


def test_a_node_whose_disk_is_full_waits_and_the_others_go_on(tmp_path, monkeypatch):
    plan = averaging({"name": "ring"}, 3, tolerance=1e-300)
    held = plan.names[1]
    full, told = set(), {}

    writing = CheckpointFile.writing

    def write(file, tensors, metadata):
        write_it = writing(file, tensors, metadata)

        def written():
            if file.path.parent.parent.name in full:
                told[file.path.parent.parent.name] = metadata["round"]
                raise DiskFull(f"{file.path}: cannot be written: No space left on device")
            write_it()

        return written

    monkeypatch.setattr(CheckpointFile, "writing", write)
    monkeypatch.setattr(run_log, "ROOM_AFTER_S", 0.05)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(5)
            full.add(held)
            await until(lambda: held in told)
            others = [name for name in plan.names if name != held]
            there = network.round(held)
            await network.reached(max(map(network.round, others)) + 5, others)
            reports = {name: network.nodes[name].daemon.protocol.neighbours[held].ledger.heard.closed_through for name in others}

            assert network.round(held) == there
            assert "No space left" in network.nodes[held].daemon.status()["disk_full"]
            assert max(reports.values()) < there  # what is not on the disk has not been told
            full.clear()
            await network.reached(there + 5, [held])
            assert network.nodes[held].daemon.status()["disk_full"] is None
            assert {"disk_full", "disk_free"} <= set(network.events(held))

    finish(main(), 60)


def test_a_node_that_is_stopped_while_its_disk_is_full_says_so(tmp_path, monkeypatch):
    plan = averaging({"name": "ring"}, 3, tolerance=1e-300)

    def written():
        raise DiskFull("checkpoint: cannot be written: No space left on device")

    async def main():
        async with Network(plan, tmp_path, timeouts=PATIENT) as network:
            network.start()
            await network.reached(2)
            monkeypatch.setattr(CheckpointFile, "writing", lambda *_: written)
            await until(lambda: network.nodes["node-0"].daemon.status()["disk_full"])
            network.nodes["node-0"].daemon.stop()
            with pytest.raises(StoreError, match="No space left"):
                await network.nodes["node-0"].task

    finish(main(), 60)


@pytest.mark.slow
def test_a_run_whose_disk_was_full_for_a_while_ends_with_the_same_weights(tmp_path):
    """A real file system without room, in a mount namespace of one node's own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare -rm")
    training = {"task": {"name": "breast-cancer"}, "nodes": 3, "topology": {"name": "path"}, "rounds": 60, "stop": None, "baselines": []}
    settings = {"deadline_floor_s": 300.0, "round_at_least_s": 0.05}
    models = {}
    for place in (tmp_path / "roomy", tmp_path / "full"):
        place.mkdir()
        with Institutions(plan_of(**training), place, **settings) as institutions:
            first, middle, last = institutions.plan.names
            institutions.start(first, last)
            state = institutions.state(middle)
            state.mkdir()
            mount = 'mount -t tmpfs -o size=1m,mode=700 none "$1" && shift && exec "$@"'
            command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(state), sys.executable, "-m", "p2pfl", "node", "start"]
            with (
                (place / "middle.log").open("w") as log,
                subprocess.Popen(
                    [*command, str(institutions.site(middle))], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
                ) as process,
            ):
                inside = Path(f"/proc/{process.pid}/root{state}")

                def status(inside=inside):
                    try:
                        return read_status(inside)
                    except (P2PFLError, OSError):
                        return {}

                wait_until(lambda status=status: status().get("round", 0) >= 10)
                if place.name == "full":
                    with suppress(OSError), (inside / "ballast").open("wb", buffering=0) as ballast:
                        while ballast.write(bytes(4096)):
                            pass
                    wait_until(lambda status=status: status().get("disk_full"))
                    assert process.poll() is None
                    (inside / "ballast").unlink()
                assert process.wait(120) == 0, (place / "middle.log").read_text()[-2000:]
            wait_until(lambda institutions=institutions, names=(first, last): all(institutions.exit_code(n) is not None for n in names))
            assert [institutions.exit_code(name) for name in (first, last)] == [0, 0]
            models[place.name] = torch.stack([read_models(institutions.state(name) / "run")[name] for name in (first, last)])

    assert torch.equal(models["roomy"], models["full"])
