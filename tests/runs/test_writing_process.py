"""Whether the process that writes a folder lives, told by what it has left there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from networks import wait_until
from p2pfl.runs import writing_process
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.writing_process import MARK, mark_process, process_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
DEADLINE_S = 30.0


@contextmanager
def writer(folder):
    """A process that has marked the folder, and waits."""
    code = "import sys, pathlib; from p2pfl.runs.writing_process import mark_process; mark_process(pathlib.Path(sys.argv[1])); input()"
    running = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: (folder / MARK).exists() or running.poll() is not None, DEADLINE_S)
        yield running
    finally:
        running.kill()
        running.wait(DEADLINE_S)
        running.stdin.close()


def test_a_process_is_alive_stopped_and_gone(tmp_path):
    with writer(tmp_path) as running:
        wait_until(lambda: process_state(tmp_path) == "alive", DEADLINE_S)
        running.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(tmp_path) == "stopped", DEADLINE_S)
        running.send_signal(signal.SIGCONT)
        running.kill()
        wait_until(lambda: process_state(tmp_path) == "gone", DEADLINE_S)  # nobody has waited for it: a zombie is gone as well
        running.wait(DEADLINE_S)
        assert process_state(tmp_path) == "gone"


def changed(folder, **values):
    mark = json.loads((folder / MARK).read_text())
    assert mark.keys() >= values.keys()
    (folder / MARK).write_text(json.dumps(mark | values))


def test_a_number_that_is_used_again_is_not_the_process(tmp_path):
    mark_process(tmp_path)
    assert process_state(tmp_path) == "alive"
    changed(tmp_path, began="1")

    assert process_state(tmp_path) == "gone"


@pytest.mark.parametrize("other", [{"boot": "11111111-2222-3333-4444-555555555555"}, {"container": "pid:[1]"}])
def test_of_another_machine_boot_or_container_nothing_is_known(tmp_path, other):
    mark_process(tmp_path)
    changed(tmp_path, began="1", **other)

    assert process_state(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "began": "1"}'])
def test_half_a_mark_says_nothing(tmp_path, content):
    (tmp_path / MARK).write_text(content)

    assert process_state(tmp_path) is None


def test_without_proc_nothing_is_known_and_an_old_mark_goes(tmp_path, monkeypatch):
    mark_process(tmp_path)
    monkeypatch.setattr(writing_process, "_PROC", tmp_path / "nowhere")

    assert process_state(tmp_path) is None
    mark_process(tmp_path)
    assert not (tmp_path / MARK).exists()


def test_a_process_that_proc_hides_is_not_called_gone(tmp_path, monkeypatch):
    mark_process(tmp_path)
    monkeypatch.setattr(writing_process, "_stat", lambda pid: None)

    assert process_state(tmp_path) is None  # this process is there, so the number is somebody's


def test_a_run_folder_has_the_mark_while_it_is_written(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"name": "x"})
    assert json.loads((folder.path / MARK).read_text())["pid"] == os.getpid()
    assert read_run(folder.path).process == "alive"
    folder.write_summary({"stop_reason": "rounds"})
    assert not (folder.path / MARK).exists()
    assert read_run(folder.path).process is None
    RunFolder.open(folder.path).truncate(0)
    assert read_run(folder.path).process == "alive"
