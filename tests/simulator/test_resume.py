"""A run that was interrupted goes on to the same bits as one that was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from p2pfl.errors import ConfigError, StoreError
from p2pfl.evaluation.results import Run
from p2pfl.params import Layout
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation, simulate
from simulations import LOGISTIC, plan_of, run_of, without_seconds
from thorough import first_fast


class Interrupted(BaseException):
    """As a kill would end it: nothing of ours may catch it."""


def stop_after(rounds):
    def progress(number, most, row):
        if number == rounds:
            raise Interrupted

    return progress


RESUMABLE = {
    **LOGISTIC,
    "optimizer": {"name": "adam", "lr": 0.01, "schedule": "cosine"},
    "rounds": 6,
    "stop": {"relative_consensus": 0.05, "patience": 1, "settle": 30},
    "evaluate_every": 3,
    "save_models_every": 4,
    "baselines": ["local"],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return simulate(RESUMABLE, out=tmp_path_factory.mktemp("whole") / "run")


def assert_same_run(resumed, whole):
    assert {node: x.tolist() for node, x in resumed.models.items()} == {node: x.tolist() for node, x in whole.models.items()}
    assert without_seconds(resumed.records) == without_seconds(whole.records)
    assert without_seconds(resumed.node_records) == without_seconds(whole.node_records)
    timed = {"seconds", "node_rounds_per_second", "peak_rss_bytes"}
    assert {k: v for k, v in resumed.summary.items() if k not in timed} == {k: v for k, v in whole.summary.items() if k not in timed}


@pytest.mark.parametrize("after", first_fast([6, 1, 9, 2, 3, 5, 7], 3))
def test_a_run_interrupted_at_any_round_goes_on_to_the_same_bits(after, uninterrupted, tmp_path):
    assert uninterrupted.summary["stop_reason"] == "converged"
    assert uninterrupted.summary["rounds"] > 9
    with pytest.raises(Interrupted):
        simulate(RESUMABLE, out=tmp_path / "run", progress=stop_after(after))
    with pytest.raises(ConfigError, match=r"no summary.json: it is still running or was interrupted; continue it with --resume"):
        _ = Run(tmp_path / "run").summary

    assert_same_run(simulate({}, resume=tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("key", ["round", "seconds", "bytes_sent", "diverged"])
def test_a_run_with_a_checkpoint_that_somebody_has_changed_is_not_resumed_and_says_why(key, tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.simulator.engine._CHECKPOINT_S", 0.0)
    with pytest.raises(Interrupted):
        simulate({**RESUMABLE, "checkpoint_every": 1}, out=tmp_path / "run", progress=stop_after(3))
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, metadata = read_checkpoint(path)
    del metadata[key]
    write_checkpoint(path, tensors, metadata)

    with pytest.raises(StoreError, match=f"is not a checkpoint as p2pfl writes it for this run.*'{key}'"):
        simulate({}, resume=tmp_path / "run")


@pytest.mark.slow
def test_checkpoints_may_be_rare_and_interruptions_many(uninterrupted, tmp_path):
    raw = {**RESUMABLE, "checkpoint_every": 4}
    with pytest.raises(Interrupted):
        simulate(raw, out=tmp_path / "run", progress=stop_after(3))  # before the first checkpoint
    for after in (6, 8, 9):
        with pytest.raises(Interrupted):
            simulate(raw, resume=tmp_path / "run", progress=stop_after(after))

    assert_same_run(simulate(raw, resume=tmp_path / "run"), uninterrupted)


def test_a_run_interrupted_at_its_very_end_only_writes_its_summary(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "finish", lambda self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            simulate(RESUMABLE, out=tmp_path / "run")

    assert_same_run(simulate({}, resume=tmp_path / "run"), uninterrupted)


def test_a_run_that_has_ended_is_left_as_it_is(uninterrupted):
    before = (uninterrupted.path / "summary.json").read_bytes()
    again = simulate({}, resume=uninterrupted.path)

    assert again.summary == json.loads(before)
    assert (uninterrupted.path / "summary.json").read_bytes() == before


@pytest.mark.no_cover
def test_chance_and_buffers_of_a_model_survive_an_interruption(tmp_path):
    """Dropout's keys follow from the round, BatchNorm's statistics are in the checkpoint."""

    def plan():
        made = plan_of(LOGISTIC, rounds=4, checkpoint_every=1, evaluate_every=1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        return replace(made, model=model, layout=Layout.of(model), gradients=None)

    whole = run_of(plan(), tmp_path / "whole")
    made = plan()
    folder = RunFolder.create(tmp_path / "run", made.experiment.as_dict(), topology=made.graph_record(), engine="simulator")
    with pytest.raises(Interrupted):
        Simulation(made, folder).run(stop_after(3))
    resumed = Simulation(plan(), RunFolder.open(tmp_path / "run"))
    resumed.restore()
    torch.manual_seed(99)
    resumed.run()

    assert whole.summary["row_by_row"] == "the model changes its buffers while it trains (1.running_mean); they stay at each node"
    assert_same_run(Run(tmp_path / "run"), whole)
    for name in made.names:
        file = Path("models") / f"{name}.safetensors"
        assert (whole.path / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_what_cannot_be_gone_on_with_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        simulate({}, resume=tmp_path)
    with pytest.raises(Interrupted):
        simulate(RESUMABLE, out=tmp_path / "run", progress=stop_after(3))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="not a readable checkpoint"):
        simulate({}, resume=tmp_path / "run")
