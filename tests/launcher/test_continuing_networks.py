"""`p2pfl up --continues`: real daemons go on from the models that an earlier network of real daemons left."""

from __future__ import annotations

import os
import signal

import pytest
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.errors import ConfigError, Paused
from p2pfl.experiment.loading import load_study
from p2pfl.launcher import up
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.params import digest_of
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run

EXPERIMENT = {
    "name": "lines",
    "task": {"name": "synthetic-logistic", "features": 3, "samples": 12},
    "nodes": 8,
    "topology": {"name": "ring"},
    "rounds": 2,
    "stop": None,
    "baselines": [],
}


def model_in(run, name):
    return read_checkpoint(run / "sites" / name / "state" / CHECKPOINT)[0]["state/x"][0]


def pause(round, most, row):
    """As somebody who stops the command after some rounds."""
    if round >= 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_paused_ring_of_eight_goes_on_elsewhere_with_one_member_more(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    with pytest.raises(Paused):
        up({**EXPERIMENT, "rounds": 10**6}, out=old, progress=pause, say=None)
    models = {path.name: model_in(old, path.name) for path in sorted((old / "sites").iterdir())}
    run = up({**EXPERIMENT, "nodes": 9, "rounds": 1}, out=new, continues=old)
    before, after = load_study(old / "study.yaml"), load_study(new / "study.yaml")
    said = {event["node"]: event["detail"] for event in run.events if event["event"] == "continued"}

    assert run.summary["stop_reason"] == "rounds"
    assert len(models) == 8
    assert after.continues.study == before.digest
    assert dict(after.continues.members) == {name: name for name in models}
    assert any(after.member(name).address != before.member(name).address for name in models)
    assert [name for name, text in said.items() if text.startswith("as a new member")] == ["node-8"]
    for name, x_P in models.items():
        assert said[name].startswith(f"with the model of {name} after round ")
        assert said[name].endswith(f"SHA-256 of the model {digest_of(x_P)}")
        assert (model_in(old, name) == x_P).all()
        assert read_run(new / "sites" / name / "state" / "run").summary["rounds"] == 1


def test_a_folder_that_is_no_run_of_daemons_is_not_continued(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no study\.yaml: --continues takes the folder of an earlier run of `p2pfl up`"):
        up(EXPERIMENT, out=tmp_path / "new", continues=tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_resumed_and_continued_at_once(tmp_path):
    refused = CliRunner().invoke(app, ["up", "--resume", str(tmp_path), "--continues", str(tmp_path)])

    assert "--continues begins a new run" in str(refused.exception)
