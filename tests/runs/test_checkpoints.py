"""A checkpoint is the old one or the new one, and never something between."""

from __future__ import annotations

import errno
import os
import resource
import stat
import tracemalloc

import pytest
import torch

from p2pfl.errors import StoreError
from p2pfl.runs import checkpoint as checkpoints
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint


def test_tensors_and_story_come_back_bit_for_bit(tmp_path):
    tensors = {"x": torch.randn(3, 4, dtype=torch.float64), "count": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    metadata = {"round": 3, "stop_round": [None, 2**63 - 1], "seconds": {"train": 0.1}, "name": "São Paulo"}
    write_checkpoint(tmp_path / "deep" / "checkpoint", tensors, metadata)
    found = read_checkpoint(tmp_path / "deep" / "checkpoint")

    assert found is not None
    assert metadata == found[1]
    assert set(tensors) == set(found[0])
    assert all(torch.equal(tensor, found[0][name]) and tensor.dtype == found[0][name].dtype for name, tensor in tensors.items())


def test_tensors_that_share_memory_or_are_views_are_written_whole(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    write_checkpoint(tmp_path / "c", {"x": x, "same": x, "row": x[1], "turned": x.T, "wide": x[:1].expand(4, 3)}, {})
    tensors, _ = read_checkpoint(tmp_path / "c")

    assert [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] == tensors["x"].tolist() == tensors["same"].tolist()
    assert tensors["row"].tolist() == [3.0, 4.0, 5.0]
    assert tensors["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert tensors["wide"].tolist() == [[0.0, 1.0, 2.0]] * 4


def test_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "state" / "checkpoint"
    path.parent.mkdir(mode=0o755)
    (path.parent / "checkpoint.tmp").write_bytes(b"left by a killed process")
    write_checkpoint(path, {"x": torch.zeros(3)}, {})
    write_checkpoint(tmp_path / "new" / "checkpoint", {"x": torch.zeros(3)}, {})

    assert [stat.S_IMODE(place.stat().st_mode) for place in (path, tmp_path / "new")] == [0o600, 0o700]


def test_writing_copies_no_tensor(tmp_path):
    tensors = {f"x{i}": torch.ones(4, 250_000) for i in range(8)}
    write_checkpoint(tmp_path / "c", {"x": torch.zeros(1)}, {})
    tracemalloc.start()
    before = peak_memory()
    write_checkpoint(tmp_path / "c", tensors, {})
    copied_bytes = max(tracemalloc.get_traced_memory()[1], peak_memory() - before)
    tracemalloc.stop()

    assert copied_bytes < sum(tensor.nbytes for tensor in tensors.values()) / 8


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("dtype", list(checkpoints._DTYPES), ids=str)
def test_the_library_reads_every_dtype_and_shape(dtype, tmp_path):
    tensors = {
        "flat": torch.arange(5).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one": torch.tensor(1).to(dtype),
        "é/b": torch.ones(1),
    }
    write_checkpoint(tmp_path / "c", tensors, {"round": 1})
    found, metadata = read_checkpoint(tmp_path / "c")

    assert metadata == {"round": 1}
    assert all(torch.equal(tensor, found[name]) and tensor.dtype == found[name].dtype for name, tensor in tensors.items())


def test_where_there_is_none_there_is_none(tmp_path):
    assert read_checkpoint(tmp_path / "nothing") is None


def test_the_new_one_takes_the_place_of_the_old_one_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, {"x": torch.zeros(1000)}, {"round": 1})
    write_checkpoint(path, {"x": torch.ones(2)}, {"round": 2})

    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    assert read_checkpoint(path)[1] == {"round": 2}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_one(step, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, {"x": torch.zeros(2)}, {"round": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (checkpoints.os, "fsync") if step == "fsync" else (type(path), "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(StoreError, match=r"checkpoint: cannot be written: .*No space left"):
            write_checkpoint(path, {"x": torch.ones(2)}, {"round": 2})

    assert read_checkpoint(path)[1] == {"round": 1}


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / "checkpoint", []
    fsync, replace = os.fsync, type(path).replace
    monkeypatch.setattr(checkpoints.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(type(path), "replace", lambda self, target: (order.append("replace"), replace(self, target)))
    write_checkpoint(path, {"x": torch.zeros(2)}, {})

    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "folder"])
def test_one_that_cannot_be_read_is_said_to_be_so(damage, tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(path, {"x": torch.zeros(100)}, {"round": 1})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, path)
    else:
        path.unlink()
        path.mkdir()

    with pytest.raises(StoreError, match=r"not a readable checkpoint: .*; restore it from a backup, or remove it to start again"):
        read_checkpoint(path)
