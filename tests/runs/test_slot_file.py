"""A file of two slots gives the newest whole content, whatever a crash left of the other one."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
from safetensors import SafetensorError, safe_open

from p2pfl.errors import DiskFull, StoreError
from p2pfl.runs import checkpoint as checkpoints
from p2pfl.runs import slot_file
from p2pfl.runs.checkpoint import CheckpointFile, read_checkpoint, read_metadata, write_checkpoint
from p2pfl.runs.slot_file import CONTENT_AT_MOST_BYTES, HEAD_BYTES, SlotFile, read_slots

SECTOR_BYTES = 512


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


@pytest.fixture
def file(path):
    return SlotFile(path, lambda temporary: temporary.open("wb"))


@pytest.fixture
def done(monkeypatch):
    """What is done with the disk, in its order."""
    order = []
    for name in ("fsync", "fdatasync", "replace", "pwrite"):
        found = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, found=found: (order.append(name), found(*arguments))[1])
    return order


def test_the_newest_content_is_read_and_only_the_first_write_makes_a_file(file, path, done):
    path.write_bytes(b"something else")
    file.write(b"first")
    made, inode = list(done), path.stat().st_ino
    done.clear()
    for number in range(5):
        file.write(b"x" * number)

        assert read_slots(path) == b"x" * number
    assert made.count("fsync") == 2  # of the file, and of its folder
    assert done == ["pwrite", "fdatasync"] * 5
    assert path.stat().st_ino == inode
    assert [each.name for each in path.parent.iterdir()] == ["checkpoint"]


def test_content_that_has_no_room_gets_a_new_file(file, path):
    for size_bytes in (10, 20_000, 100, 200_000, CONTENT_AT_MOST_BYTES):
        content = random.Random(size_bytes).randbytes(size_bytes)
        file.write(content)

        assert read_slots(path) == content
    with pytest.raises(ValueError, match="slots hold at most"):
        file.write(bytes(CONTENT_AT_MOST_BYTES + 1))


def test_a_write_that_is_torn_anywhere_leaves_the_content_before_it(file, path):
    chance = random.Random(7)
    torn, contents = path.with_name("torn"), [chance.randbytes(size_bytes) for size_bytes in (3000, 2500, 3100, 1, 4000)]
    file.write(contents[0])
    for old, new in pairwise(contents):
        before = path.read_bytes()
        file.write(new)
        after = path.read_bytes()
        changed = [at for at in range(0, len(after), SECTOR_BYTES) if after[at : at + SECTOR_BYTES] != before[at : at + SECTOR_BYTES]]
        for _ in range(40):  # a disk writes sectors in any order
            mixed, written = bytearray(before), chance.sample(changed, chance.randrange(len(changed)))
            for at in written:
                mixed[at : at + SECTOR_BYTES] = after[at : at + SECTOR_BYTES]
            torn.write_bytes(mixed)

            assert read_slots(torn) == old
        for end in (HEAD_BYTES + 5, *range(HEAD_BYTES, len(after), 997)):  # or only so far
            torn.write_bytes(after[:end] + before[end:])

            assert read_slots(torn) in (old, new)


def test_where_neither_slot_is_whole_it_is_said(file, path):
    file.write(b"first")
    file.write(b"second")
    damaged = bytearray(path.read_bytes())
    for at in (damaged.index(b"first"), damaged.index(b"second")):
        damaged[at] ^= 1
    path.write_bytes(damaged)

    with pytest.raises(StoreError, match=r"not a readable checkpoint: neither of its two slots is whole; restore it from a backup"):
        read_checkpoint(path)
    path.write_bytes(damaged[: HEAD_BYTES + 20])
    with pytest.raises(StoreError, match="neither of its two slots is whole"):
        read_metadata(path)


@pytest.mark.parametrize("change", ["removed", "replaced", "linked", "cut"])
def test_a_file_that_somebody_has_touched_is_made_anew(change, file, path):
    file.write(b"first")
    aside = path.with_name("aside")
    if change == "removed":
        path.unlink()
    elif change == "replaced":
        write_checkpoint(path, {}, {"round": 1})
    elif change == "linked":
        os.link(path, aside)  # as some backups do
    else:
        os.truncate(path, HEAD_BYTES)
    inode = path.stat().st_ino if path.exists() else None
    file.write(b"second")

    assert read_slots(path) == b"second"
    assert path.stat().st_ino != inode
    assert not aside.exists() or read_slots(aside) == b"first"


@pytest.mark.parametrize("step", ["pwrite", "fdatasync"])
def test_a_disk_that_refuses_is_told_and_the_next_write_makes_a_new_file(step, file, path, monkeypatch):
    file.write(b"first")
    inode = path.stat().st_ino

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(DiskFull, match=r"checkpoint: cannot be written: No space left"):
            file.write(b"second")

    assert read_slots(path) in (b"first", b"second")
    file.write(b"third")
    assert read_slots(path) == b"third"
    assert path.stat().st_ino != inode


def test_a_write_that_breaks_off_is_no_write(file, path, monkeypatch):
    file.write(b"first")
    whole = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, data[:-3], at))
        with pytest.raises(DiskFull):
            file.write(b"second")

    assert read_slots(path) == b"first"


def test_a_version_without_slots_refuses_the_file_and_says_what_to_do(file, path):
    file.write(b"first")

    with pytest.raises(SafetensorError, match="two slots, by a newer version of p2pfl: go on with that version"):
        safe_open(path, framework="pt")


def test_who_reads_while_it_is_written_gets_a_whole_content(file, path):
    file.write(b"0" * 3000)
    is_over = threading.Event()

    def write():
        number = 0
        while not is_over.is_set():
            number += 1
            file.write(str(number % 10).encode() * 3000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [read_slots(path) for _ in range(300)]
    finally:
        is_over.set()
        writer.join(60)

    assert all(len(content) == 3000 and len(set(content)) == 1 for content in found)


WRITES = """
import sys
from pathlib import Path
from p2pfl.runs.slot_file import SlotFile
file = SlotFile(Path(sys.argv[1]), lambda path: path.open("wb"))
number = 0
while True:
    number += 1
    file.write(str(number).encode() * 500)
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_what_it_has_said(path):
    for lines in (1, 2, 7):
        writer = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True)
        said = [int(writer.stdout.readline()) for _ in range(lines)]
        os.kill(writer.pid, signal.SIGKILL)
        said += [int(line) for line in writer.stdout]
        writer.wait(60)
        writer.stdout.close()
        content = read_slots(path).decode()

        assert content in (str(said[-1]) * 500, str(said[-1] + 1) * 500)


# ---- as a checkpoint


def headed(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        (2**63).to_bytes(8, "little") + b"{}",
        headed([]),
        headed({}),
        headed({"__metadata__": {"another": "1"}}),
        headed({"__metadata__": {"p2pfl": "1"}}),
        headed({"__metadata__": {"p2pfl": "{"}}),
        headed({"__metadata__": {"p2pfl": "{}"}, "x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        headed({"__metadata__": {"p2pfl": "{}"}, "x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        headed({"__metadata__": {"p2pfl": "{}"}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
    ],
    ids=range(11),
)
def test_a_whole_slot_with_something_else_in_it_is_said_to_be_no_checkpoint(content, file, path):
    file.write(content)

    with pytest.raises(StoreError, match=r"not a readable checkpoint: "):
        read_checkpoint(path)


@pytest.mark.parametrize("said", [b"0", b"-1", b"9" * 5000, "²".encode(), b"4096", b""])
def test_a_head_that_names_another_size_is_said_to_be_no_checkpoint(said, file, path):
    file.write(b"first")
    path.write_bytes(path.read_bytes().replace(b'"16384"', b'"' + said + b'"'))

    with pytest.raises(StoreError, match=r"not a readable checkpoint: "):
        read_checkpoint(path)


def test_small_checkpoints_come_back_bit_for_bit_and_in_the_order_of_a_plain_file(path):
    tensors = {f"{name}/{number}": torch.arange(5).to(dtype) for number, dtype in enumerate(checkpoints._DTYPES) for name in "zba"}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(1).to(torch.bfloat16), "é/b": torch.ones(2, 3).T}
    metadata = {"round": 3, "stop_round": [None, 2**63 - 1], "name": "São Paulo"}
    CheckpointFile(path).writing(tensors, metadata)()
    write_checkpoint(path.with_name("plain"), tensors, metadata)
    found, plain = read_checkpoint(path), read_checkpoint(path.with_name("plain"))

    assert read_slots(path) is not None
    assert metadata == found[1] == plain[1] == read_metadata(path)
    assert list(found[0]) == list(plain[0])
    assert all(torch.equal(tensor, found[0][name]) and tensor.dtype == found[0][name].dtype for name, tensor in tensors.items())


def test_a_small_checkpoint_has_been_taken_before_it_is_written(path):
    x = torch.zeros(3)
    write = CheckpointFile(path).writing({"x": x}, {})
    x += 1
    write()

    assert read_checkpoint(path)[0]["x"].tolist() == [0.0, 0.0, 0.0]


def test_checkpoints_that_grow_large_and_small_again_are_all_read(path):
    file = CheckpointFile(path)
    for number, size in enumerate((3, 4, CONTENT_AT_MOST_BYTES, 5, 6)):
        file.writing({"x": torch.full((size,), number, dtype=torch.float32)}, {"round": number})()
        found = read_checkpoint(path)

        assert found[1] == {"round": number}
        assert found[0]["x"].tolist() == [number] * size
        assert (read_slots(path) is None) == (size > 100)


def test_a_small_checkpoint_is_its_owners_alone(path):
    (path.parent / "checkpoint.tmp").write_bytes(b"left by a killed process")
    file = CheckpointFile(path.parent / "new" / "checkpoint")
    CheckpointFile(path).writing({}, {})()
    file.writing({}, {})()

    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent / "new", file.path)] == [0o600, 0o700, 0o600]


def test_a_system_without_fdatasync_syncs_the_file(file, path, done, monkeypatch):
    file.write(b"first")
    monkeypatch.delattr(slot_file.os, "fdatasync")
    done.clear()
    file.write(b"second")

    assert done == ["pwrite", "fsync"]
