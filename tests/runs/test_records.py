"""Run folders: what is written is what is read, also after a crash and while the run goes on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from p2pfl.errors import ConfigError, StoreError
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.summary_fields import statistics

EXPERIMENT = {"name": "ring", "rounds": 3, "optimizer": {"lr": 1e-6}, "baselines": ("local", "pooled"), "privacy": None}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(
        tmp_path / "runs" / "ring", EXPERIMENT, topology={"nodes": ["a", "b"], "edges": [[0, 1, 0.5]]}, engine="simulator"
    )


def round_row(number, **others):
    return {"round": number, "kind": "train", **others}


def test_a_run_folder_gives_back_what_was_written(folder):
    folder.append_round(round_row(0, loss=0.5, seconds={"train": 0.1}))
    folder.append_node({"round": 0, "node": "a", "kind": "train"}, {"round": 0, "node": "b", "kind": "train", "skipped": ["a"]})
    folder.append_event({"round": 0, "node": "b", "event": "skipped", "detail": "a: late"})
    folder.write_summary({"rounds": 1, "stop_reason": "rounds"})

    run = read_run(folder.path)

    assert run.experiment == {**EXPERIMENT, "baselines": ["local", "pooled"]}
    assert run.topology == {"nodes": ["a", "b"], "edges": [[0, 1, 0.5]]}
    assert run.rounds == [{"round": 0, "kind": "train", "loss": 0.5, "seconds": {"train": 0.1}}]
    assert [row["node"] for row in run.nodes] == ["a", "b"]
    assert run.events[0]["detail"] == "a: late"
    assert run.summary == {"rounds": 1, "stop_reason": "rounds"}


def test_times_are_iso_8601_in_utc(folder):
    folder.append_event({"round": 0, "node": "a", "event": "started"})
    folder.append_event({"time": "2026-01-02T03:04:05.006Z", "round": 0, "node": "b", "event": "started"})

    run = read_run(folder.path)

    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(pattern, run.environment["started"])
    assert re.fullmatch(pattern, run.events[0]["time"])
    assert run.events[1]["time"] == "2026-01-02T03:04:05.006Z"


def test_the_environment_names_versions_and_neither_machine_nor_user(folder):
    environment = read_run(folder.path).environment

    assert set(environment) == {"engine", "started", "python", "platform", "cpu_count", "versions"}
    assert environment["engine"] == "simulator"
    assert environment["versions"]["numpy"] == np.__version__
    assert len(environment["platform"].split()) == 2


def test_an_existing_folder_is_refused(folder):
    with pytest.raises(ConfigError, match=r"exists already.*--out.*--resume"):
        RunFolder.create(folder.path, EXPERIMENT)


@pytest.mark.parametrize("read", [read_run, RunFolder.open])
def test_a_folder_without_a_run_is_refused_with_the_remedy(tmp_path, read):
    with pytest.raises(ConfigError, match=r"no such folder: give the folder of a run"):
        read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no experiment.yaml"):
        read(tmp_path)


def test_a_run_without_a_round_yet_is_empty(tmp_path):
    run = read_run(RunFolder.create(tmp_path / "new", EXPERIMENT).path)

    assert (run.rounds, run.nodes, run.events, run.summary, run.topology) == ([], [], [], None, None)


def test_what_is_not_finite_becomes_null_and_numbers_become_plain(folder):
    folder.append_round(
        round_row(np.int64(4), loss=math.nan, disagreement=np.float32(0.5), bound_low=-math.inf, seconds={"mix": np.array([1.0, np.inf])})
    )

    line = (folder.path / "rounds.jsonl").read_text()

    assert line == '{"round":4,"kind":"train","loss":null,"disagreement":0.5,"bound_low":null,"seconds":{"mix":[1.0,null]}}\n'


@pytest.mark.parametrize("row", [{"round": 0, "kind": "train", "consensus": 1.0}, {"round": 0}])
def test_a_row_with_an_unknown_or_missing_key_is_refused_and_not_written(folder, row):
    with pytest.raises(ValueError, match=r"consensus|kind"):
        folder.append_round(row)

    assert read_run(folder.path).rounds == []


def test_a_torn_last_line_is_not_a_row_yet(folder):
    folder.append_round(round_row(0))
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 1, "ki')

    assert [row["round"] for row in read_run(folder.path).rounds] == [0]


def test_writing_after_a_crash_does_not_join_the_torn_line(folder):
    folder.append_round(round_row(0))
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 1, "ki')

    RunFolder.open(folder.path).append_round(round_row(1))

    assert [row["round"] for row in read_run(folder.path).rounds] == [0, 1]


@pytest.mark.parametrize("damage", ['{"round": 1, "ki', "[1, 2]", "\x00\x00"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_file_and_line(folder, damage):
    folder.append_round(round_row(0))
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write(damage + "\n")
    folder.append_round(round_row(2))

    with pytest.raises(StoreError, match=r"rounds\.jsonl, line 2"):
        read_run(folder.path)


def test_a_damaged_summary_is_an_error_that_names_the_file(folder):
    (folder.path / "summary.json").write_text('{"rounds"')

    with pytest.raises(StoreError, match=r"summary\.json: not JSON"):
        read_run(folder.path)


def test_truncating_lets_a_resumed_run_continue_exactly(folder):
    for number in range(5):
        folder.append_round(round_row(number))
        folder.append_node({"round": number, "node": "a", "kind": "train"})
        folder.append_event({"round": number, "node": "a", "event": "skipped"})
    rounds, nodes = ((folder.path / name).read_bytes() for name in ("rounds.jsonl", "nodes.jsonl"))
    folder.write_summary({"rounds": 5})

    resumed = RunFolder.open(folder.path)
    resumed.truncate(3)

    run = read_run(folder.path)
    assert [row["round"] for row in run.rounds] == [row["round"] for row in run.nodes] == [0, 1, 2]
    assert len(run.events) == 5
    assert run.summary is None

    for number in (3, 4):
        resumed.append_round(round_row(number))
        resumed.append_node({"round": number, "node": "a", "kind": "train"})

    assert (folder.path / "rounds.jsonl").read_bytes() == rounds
    assert (folder.path / "nodes.jsonl").read_bytes() == nodes


def test_a_summary_that_cannot_be_written_leaves_the_old_one_and_no_other_file(folder):
    folder.write_summary({"rounds": 1})
    before = sorted(path.name for path in folder.path.iterdir())

    with pytest.raises(TypeError, match="cannot be recorded"):
        folder.write_summary({"rounds": object()})

    assert json.loads((folder.path / "summary.json").read_text()) == {"rounds": 1}
    assert sorted(path.name for path in folder.path.iterdir()) == before


def test_a_folder_that_is_gone_is_the_disks_fault(folder, tmp_path):
    folder.path.rename(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match=r"rounds\.jsonl: cannot be written"):
        folder.append_round(round_row(0))
    with pytest.raises(StoreError, match=r"summary\.json: cannot be written"):
        folder.write_summary({})


def test_undefined_figures_are_counted_and_left_out():
    short = statistics({"c": 0.5, "a": math.nan, "b": 1.0, "d": None})

    assert short == {"mean": 0.75, "min": 0.5, "max": 1.0, "n_defined": 2, "per_node": {"a": None, "b": 1.0, "c": 0.5, "d": None}}
    assert list(short["per_node"]) == ["a", "b", "c", "d"]


def test_figures_that_are_nowhere_defined_have_no_mean():
    assert statistics({"a": None}) == {"mean": None, "min": None, "max": None, "n_defined": 0, "per_node": {"a": None}}


def test_above_a_thousand_nodes_quantiles_stand_for_the_nodes():
    at_the_limit = statistics({f"{i:04d}": float(i) for i in range(1000)})
    above = statistics({f"{i:04d}": float(i) for i in range(1001)})

    assert len(at_the_limit["per_node"]) == 1000
    assert above == {
        "mean": 500.0,
        "min": 0.0,
        "max": 1000.0,
        "n_defined": 1001,
        "quantiles": {"0.05": 50.0, "0.25": 250.0, "0.5": 500.0, "0.75": 750.0, "0.95": 950.0},
    }


def test_records_and_inspector_leave_torch_out():
    code = "import sys, p2pfl.runs.records, p2pfl.inspector.convergence, p2pfl.inspector.terminal; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_threads_that_write_rows_at_once_lose_none_and_write_none_twice(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    folder.waits_for_room = True

    def write(thread):
        for number in range(50):
            folder.append_event({"round": number, "node": f"node-{thread}", "event": "skipped", "detail": ""})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))

    assert sorted((row["node"], row["round"]) for row in folder.events()) == [
        (f"node-{thread}", n) for thread in range(4) for n in range(50)
    ]
