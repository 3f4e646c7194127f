"""What a simulation will take is known before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from networks import plan_of
from p2pfl.cli import app
from p2pfl.errors import ConfigError
from p2pfl.simulator import forecast, simulate
from p2pfl.simulator.forecast import forecast_memory, forecast_seconds

DEADLINE_S = 240
MIB = 2**20

MEASURE = """
import json, sys
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import make_plan
from p2pfl.experiment.plan import load_sites
from p2pfl.simulator import simulate
from p2pfl.simulator.forecast import forecast_memory

experiment, out = json.loads(sys.argv[1]), sys.argv[2]
resolved = experiment_from(experiment)
predicted = forecast_memory(make_plan(resolved, load_sites(resolved))).peak_bytes
print(json.dumps([predicted, simulate(experiment, out=out).summary["peak_rss_bytes"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"algorithm": {"name": "dpsgd"}}, id="plain"),
        pytest.param({"algorithm": {"name": "choco", "gamma": 1.0}, "compressor": {"name": "fp16"}}, id="choco"),
    ],
)
def test_the_most_memory_is_at_most_what_was_said_and_not_far_below(changes, tmp_path):
    experiment = {
        "task": {"name": "averaging", "dimension": 200_000},
        "nodes": 64,
        "topology": {"name": "torus"},
        "dtype": "float32",
        "rounds": 3,
        "stop": None,
        "checkpoint_every": 1000,
        **changes,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(experiment), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    predicted, measured = json.loads(done.stdout)

    assert measured <= predicted <= measured + 400 * MIB


def test_the_parts_are_counted():
    plan = plan_of(task={"name": "digits"}, nodes=20, optimizer={"name": "adam"}, topology={"name": "ring"})
    found = forecast_memory(plan)
    model_bytes = plan.layout.size_bytes

    assert found.state_bytes == 20 * model_bytes
    assert found.optimizer_bytes == 2 * 20 * model_bytes
    assert found.working_bytes == 20 * model_bytes  # few columns: all of them at once
    assert found.data_bytes == sum(rows.nbytes for site in plan.sites.values() for rows in site.train)
    assert forecast_seconds(plan, threads=1) > 0


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "_available_bytes", lambda: 64 * MIB)
    with pytest.raises(ConfigError) as caught:
        simulate({"task": {"name": "averaging", "dimension": 10**6}, "nodes": 16, "rounds": 0}, out=tmp_path / "run")

    (finding,) = caught.value.findings
    assert finding.startswith("nodes = 16: ")
    assert "GiB would be needed" in finding
    assert "dtype: float32 halves that; fewer nodes, or several machines: torchrun -m p2pfl simulate" in finding
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_both(tmp_path):
    (tmp_path / "trial.yaml").write_text("task: {name: averaging}\nnodes: 4\nrounds: 3\nstop: null\n")
    done = CliRunner().invoke(app, ["simulate", str(tmp_path / "trial.yaml"), "--dry-run"])

    assert done.exit_code == 0
    assert " s of training and mixing, " in done.stdout.splitlines()[-1]
    assert " of memory" in done.stdout.splitlines()[-1]
