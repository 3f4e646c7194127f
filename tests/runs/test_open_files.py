"""A process that has no more file descriptors: its records are written all the same, and unknown peers pay for it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from p2pfl.errors import StoreError
from p2pfl.runs import open_files
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.open_files import replace_file, sync_file

STARVED = """
import os, resource, sys
from pathlib import Path
from p2pfl.runs import open_files
from p2pfl.runs.open_files import replace_file

place = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))
open_files.raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for number in range(20):
    replace_file(place, str(number))
print(place.read_text(), len(taken) > 40)
"""


def test_records_are_written_when_a_process_has_used_up_its_files(tmp_path):
    ran = subprocess.run([sys.executable, "-c", STARVED, tmp_path / "record"], capture_output=True, text=True, timeout=60, check=False)

    assert ran.stdout.splitlines() == ["(64, 64)", "19 True"], ran.stderr


@pytest.fixture
def starved(monkeypatch):
    """Opening a file fails so many times."""

    def starve(times, number=errno.EMFILE):
        refused = iter(range(times))
        opened = os.open

        def refuse(*arguments, **options):
            if next(refused, None) is not None:
                raise OSError(number, os.strerror(number))
            return opened(*arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(open_files, "RETRY_S", 0.0)

    return starve


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_checkpoint_waits_for_a_descriptor(tmp_path, starved, monkeypatch, number):
    asked = []
    monkeypatch.setattr(open_files, "when_out_of_files", [lambda: asked.append(number)])
    starved(3, number)

    write_checkpoint(tmp_path / "checkpoint", {"x": torch.ones(2)}, {"round": 1})

    assert read_checkpoint(tmp_path / "checkpoint")[1] == {"round": 1}
    assert asked == [number] * 3


def test_who_finds_no_descriptor_for_long_says_so(tmp_path, starved, monkeypatch):
    monkeypatch.setattr(open_files, "PATIENCE_S", 0.0)
    starved(1000)

    with pytest.raises(StoreError, match="record: cannot be written: Too many open files"):
        replace_file(tmp_path / "record", "text")


def test_another_fault_of_a_disk_is_not_waited_for(tmp_path, starved):
    starved(1, errno.ENOSPC)

    with pytest.raises(StoreError, match="No space left on device"):
        write_checkpoint(tmp_path / "checkpoint", {}, {})


def test_a_file_of_a_killed_process_is_synced_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").write_bytes(b"left")
    fsync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    sync_file(tmp_path / "checkpoint")

    assert synced == [(tmp_path / "checkpoint").stat().st_ino, tmp_path.stat().st_ino]


def test_a_disk_that_cannot_be_synced_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"checkpoint: cannot be written: No such file"):
        sync_file(tmp_path / "checkpoint")
