"""A site's memory of its sums on the disk: there after a restart, found out where it is damaged, and never half an entry."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pfl.errors import ConfigError, DiskFull, StoreError
from p2pfl.node.sum_store import SumFolder
from p2pfl.protocol.sent_sums import HeardSet, SentSum
from sum_samples import OPENING, SIGNED

STUDY, OTHER = "5a" * 32, "bc" * 32
SENT = SentSum(sum_id="cc" * 32, statistic_id="dd" * 32, participants=frozenset({"aa", "bb"}), plan="ee" * 32, integers=b"\x07" * 32)
HEARD = HeardSet(question_id="0f" * 32, participants=frozenset({"aa", "cc"}))
TOTAL = np.array([[1, 2], [2**64 - 1, 3]], dtype=np.uint64)


def filled(folder):
    with SumFolder(folder) as store:
        store.append_session(STUDY, 1)
        store.append_sent(SENT)
        store.append_heard(HEARD)
        store.append_session(STUDY, 4)
        store.append_block(STUDY, 2)
        store.keep_total(STUDY, SENT.sum_id, TOTAL)
        store.keep_signed(STUDY, [OPENING, SIGNED])
        return store.key


def test_all_is_there_after_a_restart(tmp_path):
    key = filled(tmp_path / "sums")
    with SumFolder(tmp_path / "sums") as store:
        assert store.key == key
        assert (store.sent(), store.heard()) == ([SENT], [HEARD])
        assert (store.last_session(STUDY), store.blocked_until(STUDY)) == (4, 2)
        assert (store.last_session(OTHER), store.blocked_until(OTHER)) == (0, -1)
        assert [*store.totals(STUDY)] == [SENT.sum_id]
        assert store.totals(STUDY)[SENT.sum_id].tolist() == TOTAL.tolist()
        assert (store.totals(OTHER), store.signed(OTHER)) == ({}, [])
        assert store.signed(STUDY) == [OPENING, SIGNED]


def test_nobody_else_may_read_the_files(tmp_path):
    filled(tmp_path / "sums")
    files = [path for path in (tmp_path / "sums").rglob("*") if path.is_file()]

    assert sorted(path.name for path in files) == sorted(["key", "log.jsonl", SENT.sum_id, STUDY])
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_two_processes_of_a_site_do_not_share_the_folder(tmp_path):
    with SumFolder(tmp_path), pytest.raises(ConfigError, match="another process"), SumFolder(tmp_path):
        pass


def changed_byte(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def without_a_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))


@pytest.mark.parametrize("damage", [changed_byte, without_a_line])
def test_a_damaged_log_is_named(tmp_path, damage):
    filled(tmp_path)
    damage(tmp_path / "log.jsonl")
    with pytest.raises(StoreError, match=r"log\.jsonl: line \d is damaged"), SumFolder(tmp_path):
        pass


@pytest.mark.parametrize("name", ["totals", "signed"])
def test_a_damaged_copy_is_named(tmp_path, name):
    filled(tmp_path)
    (path,) = [each for each in (tmp_path / name).rglob("*") if each.is_file()]
    changed_byte(path, -1)
    with SumFolder(tmp_path) as store, pytest.raises(StoreError, match=f"{path.name}: is damaged; remove the file"):
        _ = store.totals(STUDY), store.signed(STUDY)


def test_every_beginning_of_a_total_is_left_out_and_zeros_are(tmp_path):
    filled(tmp_path)
    path = tmp_path / "totals" / STUDY / SENT.sum_id
    whole = path.read_bytes()
    for left in [*(whole[:size_bytes] for size_bytes in range(len(whole))), bytes(len(whole))]:
        path.write_bytes(left)
        with SumFolder(tmp_path) as store:
            assert store.totals(STUDY) == {}
            assert store.sent() == [SENT]
    with SumFolder(tmp_path) as store:
        store.keep_total(STUDY, SENT.sum_id, TOTAL)
    with SumFolder(tmp_path) as store:
        assert store.totals(STUDY)[SENT.sum_id].tolist() == TOTAL.tolist()


def test_a_sum_waits_for_its_entry_alone_and_the_folder_for_totals_when_it_is_closed(tmp_path, monkeypatch):
    filled(tmp_path / "sums")
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle)))
    total = tmp_path / "sums" / "totals" / STUDY / ("ab" * 32)
    with SumFolder(tmp_path / "sums") as store:
        synced.clear()
        store.append_sent(replace(SENT, sum_id="ab" * 32))
        store.keep_total(STUDY, "ab" * 32, TOTAL)
        assert synced == [str(tmp_path / "sums" / "log.jsonl")]
        synced.clear()

    assert synced == [str(total), str(total.parent), str(total.parent.parent)]


def test_a_total_under_anothers_name_is_damage(tmp_path):
    filled(tmp_path)
    folder = tmp_path / "totals" / STUDY
    (folder / SENT.sum_id).rename(folder / ("ab" * 32))
    with SumFolder(tmp_path) as store, pytest.raises(StoreError, match="is damaged"):
        store.totals(STUDY)


@pytest.mark.parametrize("key", [None, b"short"])
def test_a_log_without_its_key_is_not_begun_anew(tmp_path, key):
    filled(tmp_path)
    (tmp_path / "key").unlink()
    if key:
        (tmp_path / "key").touch(mode=0o600)
        (tmp_path / "key").write_bytes(key)
    with pytest.raises(StoreError, match="key: "), SumFolder(tmp_path):
        pass


def test_half_an_entry_of_a_killed_process_is_cut_off(tmp_path):
    filled(tmp_path)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole + whole[:40])
    with SumFolder(tmp_path) as store:
        store.append_session(OTHER, 9)
    with SumFolder(tmp_path) as store:
        assert (store.sent(), store.last_session(OTHER)) == ([SENT], 9)


def test_every_beginning_of_an_entry_is_cut_off(tmp_path):
    with SumFolder(tmp_path) as store:
        store.append_session(STUDY, 1)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    for size_bytes in range(len(whole) - 1):
        log.write_bytes(whole[:size_bytes])
        with SumFolder(tmp_path) as store:
            assert store.last_session(STUDY) == 0
        assert log.read_bytes() == b""


def test_an_entry_that_lacks_only_its_end_counts(tmp_path):
    filled(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    with SumFolder(tmp_path) as store:
        assert store.blocked_until(STUDY) == 2
    assert log.read_bytes() == whole
    with SumFolder(tmp_path) as store:
        store.append_block(STUDY, 3)
    with SumFolder(tmp_path) as store:
        assert store.blocked_until(STUDY) == 3


def last_end_changed(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def last_end_changed_and_more_behind(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x" + b"garbage" * 50)


def all_ends_zeroed(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\0"))


def first_line_damaged_and_all_ends_zeroed(path):
    changed = bytearray(path.read_bytes().replace(b"\n", b"\0"))
    changed[3] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize(
    "damage", [last_end_changed, last_end_changed_and_more_behind, all_ends_zeroed, first_line_damaged_and_all_ends_zeroed]
)
def test_an_entry_that_was_whole_is_not_taken_for_half_a_one(tmp_path, damage):
    filled(tmp_path)
    damage(tmp_path / "log.jsonl")
    before = (tmp_path / "log.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"log\.jsonl: line \d has been written whole, and is damaged; restore"), SumFolder(tmp_path):
            pass

    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(("damage", "said"), [("deleted", "no such file, but its key is there"), ("emptied", "is empty, but sums")])
def test_a_log_that_was_taken_away_is_not_begun_anew(tmp_path, damage, said):
    filled(tmp_path)
    log = tmp_path / "log.jsonl"
    if damage == "deleted":
        log.unlink()
    else:
        log.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"log\.jsonl: {said}.*; restore the folder"), SumFolder(tmp_path):
            pass


def test_a_folder_that_was_opened_and_never_used_opens_again(tmp_path):
    for _ in range(2):
        with SumFolder(tmp_path) as store:
            assert store.last_session(STUDY) == 0


@pytest.mark.parametrize(("name", "mode", "said"), [("key", 0o640, "chmod 600 .*key"), (".", 0o777, "others may use .*; run: chmod 700")])
def test_files_that_others_may_use_are_refused(tmp_path, name, mode, said):
    filled(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigError, match=said), SumFolder(tmp_path):
        pass
    (tmp_path / name).chmod(0o600 if name == "key" else 0o700)
    with SumFolder(tmp_path) as store:
        assert store.last_session(STUDY) == 4


def test_an_entry_that_the_disk_has_no_room_for_leaves_nothing(tmp_path, monkeypatch):
    filled(tmp_path)
    before, write = (tmp_path / "log.jsonl").read_bytes(), os.write

    def full(descriptor, content):
        if len(content) > 40:
            return write(descriptor, content[:40])
        raise OSError(errno.ENOSPC, "no space")

    with SumFolder(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DiskFull, match=r"log\.jsonl"):
                store.append_session(OTHER, 1)
        assert store.last_session(OTHER) == 0
        assert (tmp_path / "log.jsonl").read_bytes() == before
        store.append_session(OTHER, 2)
    with SumFolder(tmp_path) as store:
        assert store.last_session(OTHER) == 2


def test_after_a_failed_wait_for_the_disk_nothing_more_is_written(tmp_path, monkeypatch):
    def fails(_descriptor):
        raise OSError(errno.EIO, "input/output error")

    with SumFolder(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(StoreError, match="input/output error"):
                store.append_sent(SENT)
        assert store.sent() == []
        with pytest.raises(StoreError, match="start again"):
            store.append_sent(SENT)


def test_a_restored_copy_is_an_earlier_state_and_nothing_else(tmp_path):
    with SumFolder(tmp_path / "sums") as store:
        store.append_session(STUDY, 1)
    shutil.copytree(tmp_path / "sums", tmp_path / "backup")
    filled_later = tmp_path / "sums"
    with SumFolder(filled_later) as store:
        store.append_sent(SENT)
    with SumFolder(tmp_path / "backup") as store:
        assert (store.sent(), store.last_session(STUDY)) == ([], 1)
