"""The fixture of p2pfl.testing for pytest: `pytest_plugins = ["p2pfl.testing.plugin"]` in conftest.py."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pfl.testing.rehearsal import Rehearsed


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[..., Rehearsed]:
    """Run an experiment with real daemons in a folder of the test's own; see `p2pfl.testing.rehearse`."""
    from p2pfl.testing.rehearsal import rehearse as run  # torch is not imported by every process of pytest

    return partial(run, place=tmp_path / "rehearsal")
