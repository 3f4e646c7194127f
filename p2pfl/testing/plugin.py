"""The fixture of p2pfl.testing for pytest: `pytest_plugins = ["p2pfl.testing.plugin"]` in conftest.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from p2pfl.testing import rehearsal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[..., rehearsal.Rehearsed]:
    """Run an experiment with real daemons in a folder of the test's own; see `p2pfl.testing.rehearse`."""
    return partial(rehearsal.rehearse, place=tmp_path / "rehearsal")
