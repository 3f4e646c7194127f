from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from commands import start_command
from p2pfl.errors import PeerError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.loading import load_study, recorded_experiment
from p2pfl.inspector import read
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate
from p2pfl.wire.codec import decode
from p2pfl.yaml_files import dump_yaml, load_yaml

RECORDED = sorted((Path(__file__).parents[1] / "recorded").iterdir())
DEADLINE_S = 120
MEMBERS = ("hospital-0", "hospital-1", "hospital-2")


@pytest.fixture(params=RECORDED, ids=lambda place: place.name)
def recorded(request, tmp_path):
    place = shutil.copytree(request.param, tmp_path / "recorded")
    for key in place.rglob("private.pem"):
        key.chmod(0o600)  # a checkout leaves them readable
    return place


def test_a_study_keeps_the_digest_that_its_members_have_confirmed(recorded):
    study = load_study(recorded / "study.yaml")

    assert (recorded / "digest.txt").read_text().strip() == study.digest


def test_the_checkpoint_of_a_paused_daemon_is_read(recorded):
    for member in MEMBERS:
        found = read_checkpoint(recorded / member / "state" / "checkpoint.safetensors")
        assert found is not None
        tensors, metadata = found

        assert 31 in {tensor.shape[-1] for tensor in tensors.values()}
        assert metadata["round"] >= 4


@pytest.mark.slow
def test_paused_daemons_of_an_earlier_version_end_with_the_weights_of_its_run(recorded):
    for member in MEMBERS:
        (recorded / member / "state").chmod(0o700)
    daemons = [start_command("node", "start", f"{member}/site.yaml", cwd=recorded) for member in MEMBERS]
    ends = [daemon.communicate(timeout=DEADLINE_S) and daemon.returncode for daemon in daemons]

    assert ends == [0, 0, 0]
    for name, expected_P in read_models(recorded / "run").items():
        (found_P,) = read_models(recorded / name / "state" / "run").values()
        torch.testing.assert_close(found_P, expected_P, rtol=0, atol=1e-6)


def test_a_run_folder_is_read(recorded):
    run = read_run(recorded / "run")

    assert run.summary["stop_reason"] in {"converged", "rounds"}
    assert len(run.rounds) == run.summary["rounds"]
    assert sorted(read_models(recorded / "run")) == list(MEMBERS)
    assert read(recorded / "run") is not None


def test_a_run_is_computed_again_to_the_same_weights(recorded, tmp_path):
    experiment = recorded_experiment(load_yaml(recorded / "run" / "experiment.yaml"), "experiment.yaml")
    again = simulate(experiment, out=tmp_path / "again")

    assert dump_yaml(experiment.as_dict()) == (recorded / "run" / "experiment.yaml").read_text()
    for name, expected_P in read_models(recorded / "run").items():
        torch.testing.assert_close(again.models[name], expected_P, rtol=0, atol=1e-6)


RENAMED = {"Want": "ResendRequest", "Alive": "Heartbeat", "Decline": "Busy", "Share": "PushSum"}
"""Messages whose names of today are others than those in old recordings; on the wire they are numbers."""


def test_every_recorded_message_is_understood_or_refused_by_its_schema(recorded):
    for name, frames in json.loads((recorded / "messages.json").read_text()).items():
        try:
            said = type(decode([bytes.fromhex(frame) for frame in frames])[0]).__name__
        except PeerError as refused:
            said = refused.reason

        assert said in {RENAMED.get(name, name), "wrong_schema"}
