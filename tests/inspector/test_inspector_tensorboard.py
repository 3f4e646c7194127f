"""What TensorBoard reads is what the records hold."""

from __future__ import annotations

import builtins
import json
import math
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest
import typer
from test_inspector_terminal import FIVE, make_run, summary_of
from typer.testing import CliRunner

from p2pfl.cli.inspect import inspect
from p2pfl.errors import MissingExtraError, StoreError
from p2pfl.inspector import read
from p2pfl.inspector.tensorboard import write_events
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

START = "2026-01-02T03:04:05.000Z"
DEADLINE_S = 60


@pytest.fixture
def run(tmp_path):
    """Rounds that train and rounds that settle, metrics in one of them, and a start."""
    make_run(tmp_path / "run", nodes=FIVE, summary=summary_of(), skips=[(3, "bern", "basel")])
    folder = RunFolder.open(tmp_path / "run")
    folder.append_round({"round": 14, "kind": "settle", "loss": 1 / 3, "skipped": 2, "seconds": {"mix": 1.25}})
    folder.append_node({"round": 14, "node": "bern", "kind": "settle", "metrics": {"auroc": 0.9, "log_loss": None}, "agreed_for": 3})
    environment = {**json.loads((folder.path / "environment.json").read_text()), "started": START}
    (folder.path / "environment.json").write_text(json.dumps(environment))
    return folder.path


def events(folder):
    """By tag: (step, value, wall time) of each."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert found.Tags()["scalars"] == []  # tensorboard's own writer writes scalars as tensors
    return {
        tag: [(event.step, event.tensor_proto.float_val[0], event.wall_time) for event in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


def numbers(rows):
    """By tag: (step, value) of each number in a table."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if key != "round" and value is not None and not isinstance(value, str):
                found.setdefault(key.replace(".", "/"), []).append((row["round"], float(np.float32(value))))
    return found


def without_times(found):
    """NaN stands where a line breaks."""
    return {tag: [(step, value) for step, value, _ in points if not math.isnan(value)] for tag, points in found.items()}


def test_every_number_of_every_round_is_there_and_nothing_else(run, tmp_path):
    written = write_events(read_run(run), tmp_path / "events")
    tables = read(run)

    assert [path.parent.relative_to(tmp_path / "events").as_posix() for path in written] == [
        "network",
        *(f"nodes/{node}" for node in FIVE),
    ]
    assert without_times(events(tmp_path / "events" / "network")) == numbers(tables.rounds)
    for node in FIVE:
        of_node = numbers([row for row in tables.nodes if row["node"] == node])
        assert without_times(events(tmp_path / "events" / "nodes" / node)) == of_node
        assert of_node.keys() >= {"disagreement", "norm"}
    assert {"loss", "seconds/train", "bound_low"} < numbers(tables.rounds).keys()


def test_a_rounds_wall_time_is_the_start_and_all_seconds_until_its_end(run, tmp_path):
    write_events(read_run(run), tmp_path / "events")
    began_s = datetime.fromisoformat(START).timestamp()
    losses = events(tmp_path / "events" / "network")["loss"]
    a_round_s = 0.012 + 0.003 + 0.0004 + 1.5

    assert [time - began_s for _, _, time in losses[:8]] == pytest.approx([a_round_s * (number + 1) for number in range(8)], abs=1e-5)
    assert losses[-1][2] - began_s == pytest.approx(14 * a_round_s + 1.25, abs=1e-5)
    assert events(tmp_path / "events" / "nodes" / "bern")["metrics/auroc"] == [(14, float(np.float32(0.9)), losses[-1][2])]


def test_written_again_there_is_still_one_file_and_none_names_the_machine(run, tmp_path):
    for _ in range(2):
        write_events(read_run(run), tmp_path / "events")

    assert {path.name for path in (tmp_path / "events").rglob("*") if path.is_file()} == {"events.out.tfevents.p2pfl"}
    assert len(list((tmp_path / "events").rglob("*.p2pfl"))) == 1 + len(FIVE)


def test_a_strangers_name_leads_nowhere_else(tmp_path):
    nodes = ("../../out", "/etc/out", "..", "a b", "a\x1bb", "a_b")
    make_run(tmp_path / "run", nodes=nodes)
    written = write_events(read_run(tmp_path / "run"), tmp_path / "events")

    assert [path.parent.name for path in written[1:]] == ["_.._out", "_etc_out", "node", "a_b", "a_b~1", "a_b~2"]
    assert {path.parents[2] for path in written[1:]} == {tmp_path / "events"}


def test_the_command_writes_them_and_brings_neither_torch_nor_tensorflow(run, tmp_path):
    app = typer.Typer()
    app.command()(inspect)
    done = CliRunner().invoke(app, [str(run), "--tensorboard", str(tmp_path / "events")])
    code = f"""
import sys
from pathlib import Path
from p2pfl.inspector.tensorboard import write_events
from p2pfl.runs.records import read_run
write_events(read_run({str(run)!r}), Path({str(tmp_path / "again")!r}))
assert "tensorboard" in sys.modules
assert not {{"torch", "tensorflow"}} & sys.modules.keys()
"""
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=DEADLINE_S)

    assert len(done.stdout.split()) == 1 + len(FIVE)
    assert (alone.returncode, alone.stderr) == (0, "")


def test_a_folder_that_cannot_be_made_is_the_disks_fault(run, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="cannot be written"):
        write_events(read_run(run), tmp_path / "file" / "events")


def test_without_tensorboard_the_extra_is_named(run, tmp_path, monkeypatch):
    really = builtins.__import__

    def without(name, *others):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return really(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"p2pfl-mesh\[tensorboard\]"):
        write_events(read_run(run), tmp_path / "events")


def test_a_line_breaks_where_rounds_are_missing_or_a_bound_is_not_known(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"name": "gaps"}, engine="daemons")
    for number in (0, 1, 2, 3, 50, 51, 52, 53):
        folder.append_round({"round": number, "kind": "train", "loss": 0.5, "bound_high": None if number == 52 else 0.1})
    write_events(read_run(folder.path), tmp_path / "events")
    found = events(tmp_path / "events" / "network")

    assert [step for step, value, _ in found["loss"] if math.isnan(value)] == [4]
    assert [step for step, value, _ in found["bound_high"] if math.isnan(value)] == [4, 52]
