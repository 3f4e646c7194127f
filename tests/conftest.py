"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from functools import cache

import pytest
import typer.main
from hypothesis import settings

pytest_plugins = ["p2pfl.testing.plugin"]

TRACED_CASES = 2
"""Cases of a test that are traced for coverage: the others run the same lines, and being traced takes a third longer."""

# no test is a matter of time, also where the machine is busy
settings.register_profile("p2pfl", deadline=None)
settings.load_profile("p2pfl")

# the loops of the extra `fast` take a second to load in each process; tests of them ask for the fixture `numba`
os.environ["NUMBA_DISABLE_JIT"] = "1"

# a process of p2pfl makes its commands once, and so do all the calls of a test process together
typer.main.get_command = cache(typer.main.get_command)

# under nohup, and in a shell's background, they are ignored, here and in every process that a test starts
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# what is imported and collected stays to the end: it is not searched for garbage again and again
gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # most objects of a test live as long as the test


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    cases = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if cases[test] > TRACED_CASES:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def _disk_that_never_waits(request, monkeypatch):
    """In fast tests no power fails, and a process that is killed loses nothing that it has written: nothing waits for the disk."""
    if request.node.get_closest_marker("slow") is None:
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda handle: os.fstat(handle) and None, raising=False)  # what is no open file is refused


@pytest.fixture
def numba(no_cover, monkeypatch):  # its compiler is written in Python
    """numba at work, in this process and in those that it starts."""
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    if (config := sys.modules.get("numba.core.config")) is not None:
        monkeypatch.setattr(config, "DISABLE_JIT", 0)
    return pytest.importorskip("numba")
