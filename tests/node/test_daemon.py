"""What a daemon does with its state folder."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
import torch

from networks import PATIENT, STUDY, averaging, finish, signing_of
from p2pfl.errors import ConfigError, StoreError
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.runs.checkpoint import CheckpointFile, read_checkpoint, write_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.transports import MemoryNetwork


def daemons(plan, folder, *, study=STUDY, incarnation=1):
    network = MemoryNetwork()
    signing = signing_of(plan)
    made = []
    for i, name in enumerate(plan.names):
        links = network.transport(name, [plan.names[j] for j in plan.topology.neighbours(i)])
        made.append(
            Daemon(
                Node(
                    plan,
                    name,
                    links,
                    study_digest=study,
                    state=folder / name,
                    timeouts=PATIENT,
                    incarnation=incarnation + i,
                    signing=signing[name],
                ),
                status_port=None,
            )
        )
    return made


async def all_of(network):
    return await asyncio.gather(*(daemon.run() for daemon in network))


@pytest.fixture
def finished(tmp_path):
    plan = averaging({"name": "ring"}, 3)
    assert finish(all_of(daemons(plan, tmp_path))) == ["converged"] * 3
    return plan, tmp_path


def test_a_finished_node_stays_finished(finished):
    plan, folder = finished
    before = read_run(folder / plan.names[0] / "run").summary

    assert finish(daemons(plan, folder, incarnation=10)[0].run()) == "converged"
    assert read_run(folder / plan.names[0] / "run").summary == before


def test_a_state_folder_of_another_study_is_refused(finished):
    plan, folder = finished

    with pytest.raises(ConfigError, match="another study"):
        finish(daemons(plan, folder, study="cd" * 32)[0].run())


def test_a_damaged_checkpoint_is_said_to_be_one(finished):
    plan, folder = finished
    path = folder / plan.names[0] / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(StoreError, match="not a readable checkpoint"):
        finish(daemons(plan, folder)[0].run())


@pytest.mark.parametrize(
    ("key", "value"),
    [("round", "three"), ("diverged", 7), ("protocol", {"marks": 0}), ("seen", {"skipped": 0}), ("seconds", None)],
)
def test_a_checkpoint_that_somebody_has_changed_is_told_and_not_a_traceback(finished, key, value):
    plan, folder = finished
    path = folder / plan.names[0] / CHECKPOINT
    tensors, metadata = read_checkpoint(path)
    write_checkpoint(path, tensors, metadata | {"finished": False} | {key: value})

    with pytest.raises(StoreError, match=r"is not a checkpoint as p2pfl writes it for this run.*restore it from a backup"):
        finish(daemons(plan, folder)[0].run())


def test_a_checkpoint_that_is_taken_up_is_on_the_disk_whatever_its_process_had_time_for(finished, monkeypatch):
    plan, folder = finished
    fsync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    finish(daemons(plan, folder)[0].run())

    assert {(folder / plan.names[0] / CHECKPOINT).stat().st_ino, (folder / plan.names[0]).stat().st_ino} <= set(synced)


@pytest.mark.parametrize("changed", [lambda tensors: {}, lambda tensors: tensors | {"state/x": torch.zeros(1, 7)}])
def test_a_checkpoint_without_its_models_does_not_go_on_from_the_first_parameters(finished, changed):
    plan, folder = finished
    path = folder / plan.names[0] / CHECKPOINT
    tensors, metadata = read_checkpoint(path)
    write_checkpoint(path, changed(tensors), metadata)

    with pytest.raises(StoreError, match=r"is not a checkpoint as p2pfl writes it for this run.*models:"):
        finish(daemons(plan, folder)[0].run())


def test_metadata_of_a_checkpoint_is_a_mapping(tmp_path):
    write_checkpoint(tmp_path / CHECKPOINT, {}, ["not", "a", "mapping"])
    with pytest.raises(StoreError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / CHECKPOINT)


def test_a_start_that_was_killed_at_once_does_not_stand_in_the_way(tmp_path):
    plan = averaging({"name": "ring"}, 3)
    (tmp_path / plan.names[0] / "run").mkdir(parents=True)

    assert finish(all_of(daemons(plan, tmp_path))) == ["converged"] * 3


def test_the_time_of_checkpoints_is_in_the_seconds_of_every_round_and_of_the_summary(tmp_path, monkeypatch):
    plan, waited_s = averaging({"name": "ring"}, 3), dict.fromkeys(("node-0", "node-1", "node-2"), 0.0)

    writing = CheckpointFile.writing

    def slowly(file, tensors, metadata):
        waited_s[file.path.parent.name] += 5.0
        return writing(file, tensors, metadata)

    monkeypatch.setattr(CheckpointFile, "writing", slowly)
    network = daemons(plan, tmp_path)
    for daemon in network:
        daemon.clock.now_s = lambda name=daemon.node.me: time.monotonic() + waited_s[name]
    finish(all_of(network))
    run = read_run(tmp_path / "node-0" / "run")
    written = [row["seconds"]["checkpoint"] for row in run.nodes]

    assert all(spent >= 5.0 for spent in written[1:])  # that of the round before
    assert sum(written) + 5.0 <= run.summary["seconds"]["checkpoint"]
    assert run.summary["seconds"]["total"] >= sum(written)
