"""Sweeps: grids of real runs, in processes of their own, gone on with, put into one table."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import p2pfl
from commands import start_command
from p2pfl.cli import main
from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.sweeps import engine
from p2pfl.sweeps.drawing import Course, band_of, metric_course
from p2pfl.sweeps.folder import held, read_grid
from p2pfl.sweeps.table import statistics_of

DEADLINE_S = 120.0
AVERAGING = {"name": "mean", "task": {"name": "averaging", "dimension": 3}, "nodes": 4, "rounds": 3, "stop": None, "baselines": []}
QUADRATIC = {
    "name": "bowl",
    "task": {"name": "quadratic", "dimension": 2},
    "nodes": 4,
    "optimizer": {"lr": 0.1},
    "algorithm": {"local_steps": 1},
    "rounds": 4,
    "stop": None,
    "evaluate_every": 2,
    "baselines": [],
}
PNG = b"\x89PNG\r\n\x1a\n"


def rows_of(table):
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def p2pfl_(capfd, monkeypatch):
    """Runs a command in this process; its exit code, what it printed, and what it said on standard error."""
    monkeypatch.setenv("COLUMNS", "80")

    def p2pfl_(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return end.value.code, said.out, said.err

    return p2pfl_


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bowl.yaml").write_text(json.dumps(QUADRATIC))
    (tmp_path / "mean.yaml").write_text(json.dumps(AVERAGING))
    return tmp_path


def wait_for(condition):
    last_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < last_s
        time.sleep(0.02)


# ---- what is varied


def test_misspelt_values_are_refused_all_at_once_and_nothing_is_started(folder, p2pfl_):
    code, out, err = p2pfl_("sweep", "bowl.yaml", "--vary", "topology.name=ring,torsu", "--vary", "rounds=3,-1", "--vary", "colour=red")

    assert (code, out) == (2, "")
    head, *findings = err.splitlines()
    assert head == "p2pfl: bowl.yaml:"
    assert len(findings) == 3
    assert "colour = 'red': unknown key" in err
    assert "rounds = -1: must be >= 0" in err
    assert "topology.name = 'torsu': did you mean torus?" in err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.yaml", "--vary", "rounds=1"], "missing.yaml: no such file"),
        (["bowl.yaml"], "there is nothing to vary"),
        (["bowl.yaml", "--vary", "topology.name="], "topology.name: no values"),
        (["bowl.yaml", "--vary", "rounds=1", "--vary", "rounds=2"], "rounds is given twice"),
        (["bowl.yaml", "--vary", "topology.file=none.yaml"], "none.yaml: no such file"),
        (["bowl.yaml", "--vary", "rounds.x=1"], "rounds = 4 is not a mapping"),
        (["bowl.yaml", "--seeds", "0"], "seeds = 0: must be >= 1"),
        (["bowl.yaml", "--seeds", "2", "--jobs", "0"], "--jobs 0: must be >= 1"),
        (["bowl.yaml", "--seeds", "2", "--executor", "abacus"], "--executor abacus: expected processes or ray"),
        (["bowl.yaml", "--seeds", "2", "--set", "seed=-1"], "seed = -1: must be >= 0"),
        (["bowl.yaml", "--seeds", "2", "--set", "seed=first"], "seed = 'first': expected a whole number"),
        (["bowl.yaml", "--seeds", "2", "--out", "."], "holds no sweep.yaml: choose another --out"),
        (["bowl.yaml", "--seeds", "2", "--out", "bowl.yaml"], "is a file: choose another --out"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_a_readable_line(arguments, words, folder, p2pfl_):
    code, out, err = p2pfl_("sweep", *arguments)

    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not (folder / "runs").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(folder, p2pfl_):
    options = ["--vary", "topology.name=ring,complete", "--vary", "algorithm.name=dpsgd,allreduce", "--seeds", 2, "--dry-run"]
    before = sorted(folder.rglob("*"))
    code, out, err = p2pfl_("sweep", "bowl.yaml", *options)

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "ring, dpsgd",
        "ring, allreduce: left out: topology.name = 'ring': algorithm allreduce needs complete",
        "complete, dpsgd",
        "complete, allreduce",
        "4 cells, 1 left out; 2 seeds: 6 runs",
        "No cell will be called best: there are no validation rows: site 'node-0': one training row: validation = 0.2 needs at least two",
    ]
    document = json.loads(p2pfl_("sweep", "bowl.yaml", *options, "--json")[1])
    assert (document["runs"], [cell["left_out"] is None for cell in document["cells"]]) == (6, [True, False, True, True])
    assert sorted(folder.rglob("*")) == before


# ---- the whole way


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three graphs with two seeds, one of the cells impossible."""
    place = tmp_path_factory.mktemp("swept") / "sweep"
    vary = {"topology.name": ["ring", "complete"], "algorithm.name": ["dpsgd", "allreduce"]}
    return p2pfl.sweep(QUADRATIC, vary=vary, seeds=2, out=place, jobs=1)


@pytest.mark.slow
def test_the_table_says_exactly_what_the_runs_themselves_say(swept):
    rows = rows_of(swept.path / "table.csv")

    assert [(row["cell"], row["seed"], row["status"]) for row in rows] == [
        ("0-ring-dpsgd", "0", "done"),
        ("0-ring-dpsgd", "1", "done"),
        ("1-ring-allreduce", "0", "left out"),
        ("1-ring-allreduce", "1", "left out"),
        ("2-complete-dpsgd", "0", "done"),
        ("2-complete-dpsgd", "1", "done"),
        ("3-complete-allreduce", "0", "done"),
        ("3-complete-allreduce", "1", "done"),
    ]
    for row in rows:
        if row["status"] == "left out":
            assert row["reason"] == "topology.name = 'ring': algorithm allreduce needs complete"
            assert row["rounds_run"] == row["run"] == ""
            continue
        summary = p2pfl.Run(swept.path / row["run"]).summary
        assert float(row["mean_model.distance"]) == summary["mean_model"]["distance"]
        assert float(row["worst.distance"]) == summary["metrics"]["distance"]["max"]  # of a distance the largest is the worst
        assert float(row["mean.distance"]) == summary["metrics"]["distance"]["mean"]
        for key in ("consensus_distance", "relative_consensus", "bytes_sent"):
            assert float(row[key]) == summary[key]
        assert float(row["seconds"]) == summary["seconds"]["total"]
        assert (int(row["rounds_run"]), row["stop_reason"], row["reason"]) == (4, "rounds", "")


def test_a_run_of_a_sweep_is_the_run_that_simulate_makes(swept, tmp_path):
    alone = p2pfl.simulate({**QUADRATIC, "topology": {"name": "ring"}, "seed": 1}, out=tmp_path / "alone")
    inside = p2pfl.Run(swept.path / "0-ring-dpsgd" / "seed-1")

    assert inside.experiment == alone.experiment
    assert {name: x.tolist() for name, x in inside.models.items()} == {name: x.tolist() for name, x in alone.models.items()}


def test_cells_have_means_over_the_seeds_and_without_validation_rows_the_grids_order(swept):
    first = swept.cells[0]
    values = [row["mean_model.distance"] for row in swept.rows if row["cell"] == first.cell.name]

    assert [result.cell.name for result in swept.cells] == ["0-ring-dpsgd", "2-complete-dpsgd", "3-complete-allreduce", "1-ring-allreduce"]
    assert first.statistics["mean_model.distance"].mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert (first.done, first.asked, swept.cells[-1].done) == (2, 2, 0)
    assert len(list(swept.runs())) == 6
    assert swept.failed == []


def test_the_picture_is_one(swept):
    content = (swept.path / "plot.png").read_bytes()

    assert swept.plot == swept.path / "plot.png"
    assert content.startswith(PNG)
    assert len(content) > 10_000


def test_asked_again_it_computes_nothing_and_says_the_same(swept):
    stamps = {path: path.stat().st_mtime_ns for path in swept.path.rglob("summary.json")}
    logs = {path: path.stat().st_mtime_ns for path in swept.path.rglob("worker-*.log")}
    again = p2pfl.sweep(QUADRATIC, vary=swept.grid.vary, seeds=2, out=swept.path)

    assert again.rows == swept.rows
    assert {path: path.stat().st_mtime_ns for path in swept.path.rglob("summary.json")} == stamps
    assert {path: path.stat().st_mtime_ns for path in swept.path.rglob("worker-*.log")} == logs


@pytest.mark.parametrize(
    ("changed", "vary", "seeds", "words"),
    [
        ({"rounds": 5}, {}, 2, "experiment.rounds = 4, asked: 5"),
        ({"weighting": "samples"}, {}, 2, "experiment.weighting = nothing, asked: 'samples'"),
        ({}, {"topology.name": ["ring", "star"]}, 2, "--vary topology.name = ['ring', 'complete'], asked: ['ring', 'star']"),
        ({}, {}, 3, "seeds 0 to 1, asked: 0 to 2"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(changed, vary, seeds, words, swept):
    before = (swept.path / "table.csv").read_bytes()
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        p2pfl.sweep({**QUADRATIC, **changed}, vary={**swept.grid.vary, **vary}, seeds=seeds, out=swept.path)

    assert "choose another --out" in str(refused.value)
    assert (swept.path / "table.csv").read_bytes() == before


def test_two_sweeps_are_never_at_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.sweeps.folder._ORPHANS_END_S", 0.0)
    with held(tmp_path / "sweep"), pytest.raises(ConfigError, match="another sweep is at work here"):
        p2pfl.sweep(AVERAGING, vary={"rounds": [1]}, out=tmp_path / "sweep")


@pytest.mark.slow
def test_the_command_prints_a_page_of_80_columns_without_escapes(folder, p2pfl_):
    code, out, err = p2pfl_("sweep", "bowl.yaml", "--vary", "topology.name=ring,complete", "--vary", "optimizer.lr=0.1,0.01", "--jobs", 1)

    assert code == 0
    assert "\x1b" not in out + err
    assert max(map(len, (out + err).splitlines())) <= 80
    assert out.splitlines()[0].split() == ["relative"]
    assert out.splitlines()[1].split() == ["optimizer.", "consensus"]
    assert out.splitlines()[2].split() == ["topology", "lr", "distance", "worst", "site", "rounds", "distance", "MB"]
    assert "4 of 4 runs done; all of them in runs/bowl-sweep/table.csv and plot.png" in out
    assert [line.split()[0] for line in err.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    assert "1/4 0-ring-0.1, seed 0: 4 rounds" in err


def test_json_is_all_that_is_printed(folder, p2pfl_):
    code, out, err = p2pfl_("sweep", "mean.yaml", "--seeds", 3, "--jobs", 1, "--json")
    document = json.loads(out)

    assert (code, err) == (0, "")
    assert (document["path"], document["seeds"]) == ("runs/mean-sweep", [0, 1, 2])
    figure = document["cells"][0]["figures"]["consensus_distance"]
    values = [row["consensus_distance"] for row in document["rows"]]
    assert figure["mean"] == pytest.approx(statistics.mean(values), rel=1e-12)
    assert figure["deviation"] == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert document["plot"] == "runs/mean-sweep/plot.png"


@pytest.mark.slow
def test_without_matplotlib_there_is_a_table_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = p2pfl.sweep(AVERAGING, vary={"rounds": [1]}, out=tmp_path / "sweep")

    assert done.plot is None
    assert "pip install 'p2pfl-mesh[plot]'" in done.no_plot
    assert len(rows_of(tmp_path / "sweep" / "table.csv")) == 1


# ---- what goes wrong


@pytest.mark.slow
def test_a_cell_that_diverges_costs_that_cell(folder, p2pfl_):
    raw = {"task": {"name": "synthetic-logistic"}, "nodes": 3, "optimizer": {"weight_decay": 1e3}, "rounds": 2, "baselines": []}
    (folder / "steep.yaml").write_text(json.dumps(raw))
    code, out, err = p2pfl_("sweep", "steep.yaml", "--vary", "optimizer.lr=1e-4,1e6", "--set", "algorithm.local_steps=10")
    rows = rows_of(folder / "runs" / "steep-sweep" / "table.csv")

    assert code == 3
    assert [(row["optimizer.lr"], row["status"]) for row in rows] == [("0.0001", "done"), ("1000000.0", "diverged")]
    assert [bool(row["departures"]) for row in rows] == [False, True]
    assert "p2pfl: not as agreed: cell " in err
    assert "lower optimizer.lr" in rows[1]["reason"]
    assert "diverged: 1000000.0, seed 0" in out
    assert "p2pfl: 1 of 2 runs have no result; runs/steep-sweep/table.csv says why" in err
    assert "Traceback" not in err


FRAGILE = """\
import os, signal
from pathlib import Path

import torch
from torch import nn

from p2pfl.tasks import Site, Task, task


@task
def fragile(fault: str = "", home: str = "") -> Task:
    print("not an answer of the worker's", flush=True)

    def metric(outputs, targets):
        if fault == "raises" and (Path(home) / "broken").exists():
            raise ValueError("no such patient")
        if fault == "killed" and (Path(home) / "broken").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exits" and (Path(home) / "broken").exists():
            os._exit(3)
        return 0.5

    rows = torch.zeros(5, 1), torch.zeros(5, 1)
    sites = [Site(name=name, train=rows, test=rows) for name in "ab"]
    return Task(name="fragile", model=lambda: nn.Linear(1, 1), loss=nn.functional.mse_loss, metrics={"luck": metric}, sites=sites)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", "no such patient"),
        ("killed", "its process was killed by signal 9"),
        ("exits", "its process ended with exit code 3: not an answer"),
    ],
)
def test_a_run_that_fails_is_named_with_its_reason_and_tried_again(fault, words, folder, p2pfl_, monkeypatch):
    (folder / "fragile.py").write_text(FRAGILE)
    raw = {"task": {"name": "fragile:fragile", "home": str(folder)}, "rounds": 1, "stop": None, "baselines": []}
    (folder / "fragile.yaml").write_text(json.dumps(raw))
    command = ["sweep", "fragile.yaml", "--vary", f"task.fault='',{fault},none", "--jobs", 1, "--allow-task", "fragile:fragile"]
    table = folder / "runs" / "fragile-sweep" / "table.csv"
    # it breaks once the cells have been checked: what they are checked with is whole
    real = engine.write_grid
    monkeypatch.setattr(engine, "write_grid", lambda *given: [real(*given), (folder / "broken").touch()])
    code, out, _ = p2pfl_(*command)

    assert code == 1
    assert [row["status"] for row in rows_of(table)] == ["done", "failed", "done"]
    assert words in rows_of(table)[1]["reason"]
    assert f"failed: {fault}, seed 0: " in out
    assert out.count("not an answer") == (fault == "exits")
    (folder / "broken").unlink()
    code, _, err = p2pfl_(*command)

    assert code == 0
    assert [row["status"] for row in rows_of(table)] == ["done", "done", "done"]
    assert [line.split()[0] for line in err.splitlines()] == ["3/3"]


LONG = {**AVERAGING, "rounds": 6000, "topology": {"name": "complete"}}


def workers_of(folder):
    """Processes that work for a sweep in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"p2pfl.sweeps.worker" in command and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_it_keeps_what_has_ended_and_goes_on_from_checkpoints(ending, folder, p2pfl_):
    (folder / "long.yaml").write_text(json.dumps(LONG))
    command = ["sweep", "long.yaml", "--vary", "rounds=2,6000", "--jobs", 1, "--out", "sweep"]
    short, long = folder / "sweep" / "0-2" / "seed-0", folder / "sweep" / "1-6000" / "seed-0"
    running = start_command(*command, cwd=folder)
    try:
        wait_for((long / "checkpoint.safetensors").exists)
    finally:
        running.send_signal(ending)
    _, err = running.communicate(timeout=DEADLINE_S)
    wait_for(lambda: not workers_of(folder))
    ended = (short / "summary.json").read_bytes()
    saved = read_checkpoint(long / "checkpoint.safetensors")[1]["round"]
    before = (long / "rounds.jsonl").read_text().splitlines()[:saved]

    if ending is signal.SIGINT:
        assert running.returncode == 0
        assert err.splitlines()[-1] == "p2pfl: paused by SIGINT; the same command goes on where it stopped"
    assert not (long / "summary.json").exists()
    assert [row["status"] for row in rows_of(folder / "sweep" / "table.csv")] == ["done", "unfinished"]
    code, _, err = p2pfl_(*command)

    assert code == 0
    assert err.splitlines() == ["2/2 1-6000, seed 0: 6,000 rounds"]
    assert (short / "summary.json").read_bytes() == ended
    after = (long / "rounds.jsonl").read_text().splitlines()
    assert len(after) == 6000
    assert 0 < saved < 6000
    assert after[:saved] == before  # with their seconds: they were not computed again
    assert [row["status"] for row in rows_of(folder / "sweep" / "table.csv")] == ["done", "done"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_round_begins_again(tmp_path):
    place = tmp_path / "sweep"
    p2pfl.sweep(AVERAGING, vary={"rounds": [1]}, out=place)
    (place / "0-1" / "seed-0" / "summary.json").unlink()
    (place / "0-1" / "seed-0" / "rounds.jsonl").unlink()
    (place / "0-1" / "seed-0" / "experiment.yaml").unlink()

    assert [row["status"] for row in p2pfl.sweep(AVERAGING, vary={"rounds": [1]}, out=place).rows] == ["done"]


def test_what_was_left_out_is_remembered(swept):
    assert read_grid(swept.path) == swept.grid
    assert list(swept.grid.left_out) == ["1-ring-allreduce"]


# ---- figures


def test_mean_and_deviation_are_of_the_defined_values():
    assert statistics_of([1.0, None, 2.0, 6.0]).mean == 3.0
    assert statistics_of([1.0, None, 2.0, 6.0]).deviation == math.sqrt(7)
    assert statistics_of([1.0, None, 2.0, 6.0]).number == 3
    assert (statistics_of([4.0]).deviation, statistics_of([]).mean) == (None, None)


def test_bands_are_students_and_a_run_that_has_stopped_stays_where_it_is():
    courses = [Course(rounds=[1, 2, 3], values=[0.0, 1.0, 2.0]), Course(rounds=[1, 2], values=[2.0, 3.0])]
    band = band_of(courses)

    assert band.rounds_R.tolist() == [1, 2, 3]
    assert band.mean_R.tolist() == [1.0, 2.0, 2.5]
    # t of one degree of freedom, 12.706205: times a standard deviation of sqrt(2), over sqrt(2)
    assert (band.high_R - band.mean_R)[:2] == pytest.approx([12.706204736, 12.706204736], rel=1e-9)
    assert band.mean_R - band.low_R == pytest.approx(band.high_R - band.mean_R, rel=1e-12)


def test_bands_of_logarithms_are_around_the_geometric_mean_and_above_zero():
    courses = [Course(rounds=[1], values=[value]) for value in (1e-6, 1e-4, 1e-2)]
    band = band_of(courses, logarithmic=True)
    half = 4.302652730 * math.log(100) / math.sqrt(3)  # t of two degrees of freedom

    assert band.mean_R == pytest.approx([1e-4], rel=1e-12)
    assert band.low_R == pytest.approx([1e-4 * math.exp(-half)], rel=1e-8)
    assert band.high_R == pytest.approx([1e-4 * math.exp(half)], rel=1e-8)


def test_one_run_has_a_curve_and_no_band_and_nothing_has_neither():
    band = band_of([Course(rounds=[1, 2], values=[3.0, 4.0]), Course(rounds=[], values=[])])

    assert band.mean_R.tolist() == [3.0, 4.0]
    assert np.isnan(band.low_R).all()
    assert band_of([Course(rounds=[], values=[])]) is None


def test_a_metrics_course_is_its_mean_over_the_sites(swept):
    run = swept.path / "0-ring-dpsgd" / "seed-0"
    course = metric_course(run, "distance")
    rows = [row for row in p2pfl.Run(run).node_records if "metrics" in row]

    assert course.rounds == [2, 4]
    assert course.values == pytest.approx(
        [statistics.mean(row["metrics"]["distance"] for row in rows if row["round"] == number - 1) for number in (2, 4)], rel=1e-12
    )


# ---- Ray


def test_without_ray_the_remedy_is_named_and_nothing_is_started(folder, p2pfl_, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = p2pfl_("sweep", "mean.yaml", "--seeds", 2, "--executor", "ray")

    assert (code, out) == (2, "")
    assert err == ("p2pfl: --executor ray needs ray: pip install 'p2pfl-mesh[ray]'; --executor processes uses the cores of this machine\n")
    assert not (folder / "runs").exists()
    with pytest.raises(MissingExtraError):
        p2pfl.sweep(AVERAGING, vary={"rounds": [1]}, executor="ray", out=folder / "sweep")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'p2pfl-mesh[ray]'")
def test_on_ray_a_sweep_has_the_same_table(swept, tmp_path):
    command = ["-m", "p2pfl", "sweep", "bowl.yaml", "--seeds", "2", "--executor", "ray", "--out", "sweep"]
    (tmp_path / "bowl.yaml").write_text(json.dumps(QUADRATIC))
    vary = ["--vary", "topology.name=ring,complete", "--vary", "algorithm.name=dpsgd,allreduce"]
    done = subprocess.run([sys.executable, *command, *vary], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    there = rows_of(tmp_path / "sweep" / "table.csv")
    assert [{**row, "seconds": ""} for row in there] == [{**row, "seconds": ""} for row in rows_of(swept.path / "table.csv")]
