"""A simulation is a function of its experiment: the same seed gives the same bytes, whatever the machine has besides to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from p2pfl.evaluation.results import Run
from p2pfl.simulator import simulate
from simulations import without_seconds

DEADLINE_S = 240
EXPERIMENT = {
    "task": {"name": "digits"},
    "nodes": 8,
    "topology": {"name": "torus"},
    "algorithm": {"name": "qg-dsgdm", "local_steps": 3},
    "rounds": 6,
    "stop": None,
    "save_models_every": 1,
    "seed": 11,
}
ELSEWHERE = """
import json, sys
import torch
from p2pfl.simulator import simulate

torch.set_num_threads(int(sys.argv[1]))
simulate(json.loads(sys.argv[2]), out=sys.argv[3])
"""


def elsewhere(place, threads):
    """The run, made by a process of its own."""
    command = [sys.executable, "-c", ELSEWHERE, str(threads), json.dumps(EXPERIMENT), str(place)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    return Run(place)


def test_two_runs_write_the_same_bytes(tmp_path):
    one, other = (simulate(EXPERIMENT, out=tmp_path / name) for name in ("one", "other"))
    # a checkpoint is written after so many seconds, and holds them
    models = sorted(path.relative_to(one.path) for path in one.path.rglob("*.safetensors") if path.name != "checkpoint.safetensors")

    assert len(models) >= EXPERIMENT["rounds"]
    assert all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in models)
    assert without_seconds(one.records) == without_seconds(other.records)
    assert without_seconds(one.node_records) == without_seconds(other.node_records)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 1, 3])
def test_a_number_of_threads_changes_nothing_but_roundings(threads, tmp_path):
    here, there = simulate(EXPERIMENT, out=tmp_path / "here"), elsewhere(tmp_path / "there", threads)

    assert here.models.keys() == there.models.keys()
    for name, x_P in here.models.items():
        assert float((there.models[name] - x_P).norm() / x_P.norm()) < 1e-6
    for row, other in zip(here.records, there.records, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
