"""What holds for all tests."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

pytest_plugins = ["p2pfl.testing.plugin"]

# no test is a matter of time, also where the machine is busy
settings.register_profile("p2pfl", deadline=None)
settings.load_profile("p2pfl")

# the loops of the extra `fast` take a second to load in each process; tests of them ask for the fixture `numba`
os.environ["NUMBA_DISABLE_JIT"] = "1"


@pytest.fixture
def numba(monkeypatch):
    """numba at work, in this process and in those that it starts."""
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    if (config := sys.modules.get("numba.core.config")) is not None:
        monkeypatch.setattr(config, "DISABLE_JIT", 0)
    return pytest.importorskip("numba")
