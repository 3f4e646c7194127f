"""A sweep ranks its cells on validation rows; test rows stand beside and choose nothing."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import yaml

import p2pfl
from p2pfl.cli import main
from p2pfl.cli.sweep import _of_choice
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from, load_experiment
from p2pfl.sweeps import Sweep, make_grid, read_sweep
from p2pfl.sweeps.folder import write_grid
from p2pfl.sweeps.grid import checked
from p2pfl.sweeps.table import choice_of, is_lower_better, over_seeds, with_choice
from p2pfl.sweeps.work import Job, run_one

LOGISTIC = {
    "name": "logistic",
    "task": {"name": "synthetic-logistic", "features": 3, "samples": 25},
    "nodes": 3,
    "algorithm": {"local_steps": 1},
    "rounds": 2,
    "stop": None,
    "baselines": [],
}
VARY = {"optimizer.lr": [0.01, 0.1]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return sweep_here(LOGISTIC, 2, tmp_path_factory.mktemp("choice") / "sweep")


def sweep_here(raw, seeds, place):
    """A sweep whose runs are computed in this process, as its workers compute them."""
    grid = checked(make_grid(raw, VARY, seeds))
    place.mkdir()
    write_grid(place, grid)
    for cell, seed in grid.runs:
        assert run_one(place, Job(cell.number, seed)) is None
    return p2pfl.sweep(raw, vary=VARY, seeds=seeds, out=place, jobs=1)


@pytest.fixture
def inspect_(capsys, monkeypatch):
    """Runs `p2pfl inspect` in this process; what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def inspect_(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2pfl", "inspect", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        return said.out

    return inspect_


def ended(cell, seed, **figures):
    return {"cell": cell, "seed": seed, "status": "done", "direction": "higher is better", "rounds_run": 2, **figures}


def rows_of(grid, validation, test, metric="auroc", **more):
    """Rows of ended runs, whose validation and test figures are given by cell."""
    return [
        ended(cell.name, seed, **{f"validation.mean.{metric}": validation[number], f"mean.{metric}": test[number]}, **more)
        for number, cell in enumerate(grid.cells)
        for seed in grid.seeds
    ]


# ---- validation rows by default


@pytest.mark.parametrize(
    ("experiment", "vary", "overrides", "expected"),
    [
        ({}, VARY, {}, 0.2),
        ({}, {}, {}, None),  # seeds alone: nothing is chosen
        ({}, {"rounds": [3]}, {}, None),
        ({"validation": 0.1}, VARY, {}, None),
        ({"validation": 0}, VARY, {}, None),
        ({}, VARY, {"validation": 0.3}, None),
        ({}, {"validation": [0.1, 0.3]}, {}, None),
    ],
)
def test_validation_rows_are_made_by_default_where_more_than_seeds_varies(experiment, vary, overrides, expected):
    assert make_grid({**LOGISTIC, **experiment}, vary, 2, overrides).validation == expected


def test_a_resolved_experiment_has_its_default_written_out_and_asks_for_nothing():
    for share, expected in ((0.0, 0.2), (0.25, None)):
        assert make_grid(experiment_from({**LOGISTIC, "validation": share}), VARY, 1).validation == expected


def test_the_share_is_resolved_into_each_cell_and_a_cell_can_be_run_again_alone(swept, tmp_path):
    for run in swept.runs():
        assert load_experiment(run.path / "experiment.yaml").validation == 0.2
    inside = p2pfl.Run(swept.path / "1-0.1" / "seed-1")
    alone = p2pfl.simulate(inside.path / "experiment.yaml", out=tmp_path / "alone")

    assert {name: x.tolist() for name, x in alone.models.items()} == {name: x.tolist() for name, x in inside.models.items()}
    for key in ("metrics", "mean_model", "test"):
        assert alone.summary[key] == inside.summary[key]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "quadratic"}, "site 'node-0': one training row: validation = 0.2 needs at least two"),
        ({"name": "averaging"}, "task averaging has no metric"),
    ],
)
def test_a_task_that_has_no_validation_rows_is_swept_without_and_no_cell_is_best(task, words):
    grid = checked(make_grid({**LOGISTIC, "task": task}, {"topology.name": ["ring", "star"]}, 1))

    assert (grid.validation, grid.no_validation) == (None, words)
    assert choice_of(grid, []).no_best == f"there are no validation rows: {words}"


def test_validation_rows_that_are_asked_for_and_cannot_be_are_refused():
    raw = {**LOGISTIC, "task": {"name": "quadratic"}, "validation": 0.2}
    with pytest.raises(ConfigError, match=r"one training row: validation = 0\.2 needs at least two"):
        checked(make_grid(raw, {"topology.name": ["ring", "star"]}, 1))


# ---- which cell is best


def test_the_best_cell_is_best_on_validation_rows_whatever_its_test_rows_say():
    grid = make_grid(LOGISTIC, VARY, 2)
    rows = rows_of(grid, validation=(0.8, 0.7), test=(0.6, 0.9))
    choice = choice_of(grid, rows)

    assert (choice.best, choice.column, choice.no_best) == ("0-0.01", "validation.mean.auroc", None)
    assert [result.cell.name for result in over_seeds(grid, rows)] == ["0-0.01", "1-0.1"]
    assert choice_of(grid, rows_of(grid, validation=(0.7, 0.8), test=(0.6, 0.9))).best == "1-0.1"
    lower = rows_of(grid, validation=(0.8, 0.7), test=(0.6, 0.9), metric="log_loss", direction="lower is better")
    assert choice_of(grid, lower).best == "1-0.1"


def test_cells_that_are_exactly_tied_are_said_to_be(tmp_path):
    grid = make_grid(LOGISTIC, {"optimizer.lr": [0.01, 0.1, 0.5]}, 1)
    rows = rows_of(grid, validation=(0.8, 0.8, 0.7), test=(0.6, 0.9, 0.5))
    rows[0]["rounds_run"] = 9
    choice = choice_of(grid, rows)

    assert (choice.best, choice.tied) == ("1-0.1", 1)
    said = _of_choice(Sweep(path=tmp_path, grid=grid, rows=rows, plot=None))[-1]
    assert said == "Best on validation rows: 0.1 (auroc 0.800); tied with 1 more; fewer rounds, then closer models, decided."
    alone = rows_of(grid, validation=(0.8, 0.7, 0.7), test=(0.6, 0.9, 0.5))
    assert choice_of(grid, alone).tied == 0
    assert _of_choice(Sweep(path=tmp_path, grid=grid, rows=alone, plot=None))[-1] == "Best on validation rows: 0.01 (auroc 0.800)."


def test_whether_less_is_better_is_what_the_task_says_and_not_what_a_name_sounds_like():
    assert is_lower_better("mae", frozenset({"mae"}))
    assert not is_lower_better("lossless", frozenset())
    assert is_lower_better("log_loss", None)  # a run of an earlier version


def test_table_rows_say_the_rank_and_which_figures_choose_nothing():
    grid = make_grid(LOGISTIC, VARY, 1)
    first, second = with_choice(grid, rows_of(grid, validation=(0.7, 0.8), test=(0.9, 0.6)))

    assert (first["rank"], second["rank"]) == (2, 1)
    assert first["chosen_by"] == "highest validation.mean.auroc"
    assert first["not_used_for_choosing"] == "mean.auroc"
    assert first["no_best"] is None


def test_a_cell_without_a_result_of_every_seed_has_no_rank():
    grid = make_grid(LOGISTIC, VARY, 2)
    rows = rows_of(grid, validation=(0.7, 0.8), test=(0.5, 0.5))
    rows[3] = {"cell": "1-0.1", "seed": 1, "status": "diverged", "reason": "left the numbers"}

    assert choice_of(grid, rows).ranks == {"0-0.01": 1}
    lost = [{**row, "status": "diverged"} for row in rows]
    assert choice_of(grid, lost).no_best == "no cell has a result of every seed on validation rows"


def test_no_cell_is_best_before_all_runs_have_ended():
    grid = make_grid(LOGISTIC, VARY, 1)
    rows = rows_of(grid, validation=(0.7, 0.8), test=(0.5, 0.5))
    rows[1] = {"cell": "1-0.1", "seed": 0, "status": "unfinished"}

    assert (choice_of(grid, rows).best, choice_of(grid, rows).no_best) == (None, "runs are unfinished")


@pytest.mark.parametrize(
    ("experiment", "vary", "words"),
    [
        ({"validation": 0}, VARY, "validation = 0"),
        ({}, {"validation": [0.0, 0.2]}, "validation = 0 in cell 0-0.0"),
    ],
)
def test_without_validation_rows_cells_stand_in_their_own_order_and_the_reason_is_said(experiment, vary, words):
    grid = make_grid({**LOGISTIC, **experiment}, vary, 1)
    rows = [ended(cell.name, 0, **{"mean.auroc": figure}) for cell, figure in zip(grid.cells, (0.6, 0.9), strict=True)]

    assert [result.cell.name for result in over_seeds(grid, rows)] == [cell.name for cell in grid.cells]
    assert choice_of(grid, rows).best is None
    assert {row["no_best"] for row in with_choice(grid, rows)} == {f"there are no validation rows: {words}"}
    assert "rank" not in with_choice(grid, rows)[0]


def test_one_cell_with_several_seeds_has_the_rows_that_it_had():
    grid = make_grid(LOGISTIC, {}, 2)
    rows = [ended("0-as-written", seed, **{"mean.auroc": 0.7}) for seed in (0, 1)]

    assert with_choice(grid, rows) == rows
    assert choice_of(grid, rows).no_best is None


# ---- what is shown


def test_the_table_has_validation_and_test_figures_as_the_runs_summaries_have_them(swept):
    with (swept.path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 4
    for row in rows:
        summary = p2pfl.Run(swept.path / row["run"]).summary
        for prefix, figures in (("validation.", summary), ("", summary["test"])):
            assert float(row[f"{prefix}mean_model.auroc"]) == figures["mean_model"]["auroc"]
            assert float(row[f"{prefix}worst.log_loss"]) == figures["metrics"]["log_loss"]["max"]
        assert row["chosen_by"] == "highest validation.mean_model.auroc"
        assert "mean_model.auroc" in row["not_used_for_choosing"].split()
    assert {row["cell"]: int(row["rank"]) for row in rows} == swept.choice.ranks


def test_inspect_shows_a_sweep_with_its_choice_in_80_columns(swept, inspect_):
    out = inspect_(swept.path)
    best = next(cell for cell in swept.grid.cells if cell.name == swept.choice.best)

    assert max(map(len, out.splitlines())) <= 80 + len(str(swept.path))
    assert "on validation rows, which are 20% of each" in out
    assert "test: on test rows, not used for choosing." in out
    assert f"Best on validation rows: {best.values['optimizer.lr']} (auroc" in out
    document = json.loads(inspect_(swept.path, "--json"))
    assert (document["best"], document["chosen_by"]) == (swept.choice.best, "validation.mean_model.auroc")


def test_a_sweep_is_written_as_csv_and_parquet(swept, inspect_, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'p2pfl-mesh[report]'")
    inspect_(swept.path, "--csv", tmp_path, "--parquet", tmp_path)

    cells = parquet.read_table(tmp_path / "cells.parquet").to_pylist()
    assert [cell["rank"] for cell in cells] == [1, 2]
    assert cells[0]["cell"] == swept.choice.best
    assert "mean_model.auroc" in cells[0]["not_used_for_choosing"].split()
    assert len(parquet.read_table(tmp_path / "table.parquet")) == len((tmp_path / "table.csv").read_text().splitlines()) - 1 == 4


def test_a_sweep_of_an_earlier_version_is_read_and_has_no_best_cell(swept, inspect_, tmp_path):
    done = sweep_here({**LOGISTIC, "validation": 0}, 1, tmp_path / "sweep")
    grid = yaml.safe_load((done.path / "sweep.yaml").read_text())
    del grid["validation"], grid["no_validation"], grid["experiment"]["validation"]
    (done.path / "sweep.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    for path in done.path.rglob("summary.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "lower_is_better"}))
    old = read_sweep(done.path)

    assert [row["status"] for row in old.rows] == ["done", "done"]
    assert [row["mean.auroc"] for row in old.rows] == [run.summary["metrics"]["auroc"]["mean"] for run in done.runs()]
    assert old.choice.best is None
    assert "No cell is called best: there are no validation rows: the sweep was made before sweeps took any" in " ".join(
        inspect_(done.path).split()
    )
    again = p2pfl.sweep(LOGISTIC, vary=VARY, out=done.path, jobs=1)
    assert again.rows == old.rows
