"""Another account of the same machine: it reads nothing of a node's state, and cannot keep the node from its work."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from networks import Institutions, averaging, plan_of, wait_until
from p2pfl.errors import ConfigError
from p2pfl.launcher.founding import found_network
from p2pfl.node.state_folder import held_state
from p2pfl.runs.checkpoint import write_checkpoint

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


@pytest.fixture
def place():
    """A folder that every account may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def as_nobody(work, group=NOBODY):
    """What another account gets from some work: its text, or the name of the error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        answer = "it failed"
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(NOBODY)
            answer = work()
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return answer


def made_in(state, group=None):
    """Write into a held state folder all that a node writes; their modes."""
    with held_state(state, group):
        (state / "run").mkdir(exist_ok=True)
        (state / "run" / "nodes.jsonl").write_text("{}\n")
        write_checkpoint(state / "checkpoint.safetensors", {}, {})
    return [mode(state / name) & 0o777 for name in (".", "run", "run/nodes.jsonl", "checkpoint.safetensors", "lock")]


def test_all_that_a_node_writes_is_its_owners_alone(place):
    before = os.umask(0o022)
    try:
        assert made_in(place / "new" / "state") == [0o700, 0o700, 0o600, 0o600, 0o600]
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_group_that_is_named_reads_all_but_the_lock_and_writes_nothing(place):
    assert made_in(place / "state", os.getgid()) == [0o750, 0o750, 0o640, 0o640, 0o600]
    assert made_in(place / "state", os.getgid()) == [0o750, 0o750, 0o640, 0o640, 0o600]


@pytest.mark.parametrize("permissions", [0o755, 0o750, 0o711, 0o701, 0o770])
def test_a_folder_that_others_may_enter_is_refused_and_what_it_says_to_run_mends_it(place, permissions):
    state = place / "its state"
    (state / "run").mkdir(parents=True)
    (state / "run" / "nodes.jsonl").touch(0o644)
    state.chmod(permissions)
    with pytest.raises(ConfigError, match=f"mode {permissions:04o}, other accounts may enter.*; run: ") as caught:
        made_in(state)
    assert caught.value.place == str(state)
    assert mode(state) == permissions
    command = str(caught.value).partition("run: ")[2].partition(" (state_group")[0]
    subprocess.run(["sh", "-c", command], check=True)

    assert made_in(state) == [0o700, 0o700, 0o600, 0o600, 0o600]


@pytest.mark.parametrize("permissions", [0o755, 0o2770, 0o757])
def test_with_a_group_the_folder_is_still_closed_to_all_others_and_the_command_shares_it(place, permissions):
    state = place / "state"
    (state / "run").mkdir(parents=True)
    state.chmod(permissions)
    with pytest.raises(ConfigError, match=f"mode {permissions:04o}.*; run: ") as caught:
        made_in(state, os.getgid())
    subprocess.run(["sh", "-c", str(caught.value).partition("run: ")[2]], check=True)

    assert made_in(state, os.getgid()) == [0o750, 0o750, 0o640, 0o640, 0o600]


def test_a_group_that_is_not_there_is_named(place):
    with pytest.raises(ConfigError, match="state_group = 'no-such-group': this machine has no such group"):
        made_in(place / "state", "no-such-group")


@needs_root
def test_a_folder_of_another_account_is_refused_though_nobody_else_may_enter(place):
    state = place / "state"
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY, NOBODY)

    with pytest.raises(ConfigError, match=f"belongs to account {NOBODY}.*run: chown -R 0 "):
        made_in(state)


def test_a_folder_above_that_everybody_may_write_to_is_said(place, caplog):
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    made_in(place / "open" / "state")
    assert f"every account may write to {place / 'open'}" in caplog.text
    caplog.clear()
    (place / "open").chmod(0o1777)
    made_in(place / "open" / "state")

    assert caplog.text == ""


def test_a_second_node_is_told_which_process_holds_the_state(place):
    with held_state(place / "state"), pytest.raises(ConfigError, match=r"another node is running on this state folder") as caught:
        made_in(place / "state")
    if Path("/proc/locks").exists():
        assert f"(process {os.getpid()})" in str(caught.value) or "(process" not in str(caught.value)


def test_a_look_at_the_lock_does_not_keep_a_node_from_starting(place):
    made_in(place / "state")
    looking = (place / "state" / "lock").open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    ends = threading.Timer(0.1, looking.close)
    ends.start()
    try:
        made_in(place / "state")
    finally:
        ends.join()
        looking.close()


def test_what_up_makes_for_its_sites_is_behind_one_closed_folder(place):
    with ExitStack() as held:
        found_network(averaging({"name": "path"}, 2), place, held, {})

    assert mode(place / "sites") == 0o700
    assert (place / "sites" / "node-0" / "site.yaml").exists()


def holds(lock):
    """Take a lock and never let go, as far as that is allowed."""
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "held"


@needs_root
def test_not_even_a_reading_group_can_hold_the_lock(place):
    state = place / "state"
    made_in(state, NOBODY)

    assert as_nobody((state / "run" / "nodes.jsonl").read_text) == "{}\n"
    assert as_nobody(lambda: holds(state / "lock")) == "EACCES"
    assert as_nobody(lambda: str((state / "x").touch())) == "EACCES"


@needs_root
@pytest.mark.slow
def test_another_account_reads_nothing_of_a_node_at_work_and_cannot_hold_its_lock(place):
    plan = plan_of(task={"name": "breast-cancer"}, nodes=2, topology={"name": "path"}, rounds=1000, stop=None)
    with Institutions(plan, place, round_at_least_s=1.0) as institutions:
        institutions.start()
        wait_until(lambda: institutions.round(plan.names[0]) >= 1)
        state = institutions.state(plan.names[0])
        found = [path for path in state.rglob("*") if not path.name.endswith(".tmp")]  # others come and go
        read = {path.name: as_nobody(path.read_text) for path in found if path.is_file()}
        lock = as_nobody(lambda: holds(state / "lock"))
        entered = as_nobody(lambda: str(list(state.iterdir())))
        modes = {str(path.relative_to(state)): mode(path) for path in found}

    assert {"checkpoint.safetensors", "nodes.jsonl", "lock", "status.token", "status.url"} <= read.keys()
    assert set(read.values()) == {"EACCES"}
    assert (entered, lock) == ("EACCES", "EACCES")
    assert mode(state) == 0o700
    assert {name: found for name, found in modes.items() if found & 0o077} == {}
