"""Cases of which `make test` runs the first and the slow tests the rest, and tests that `make soak` runs for longer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

LONG = "P2PFL_SOAK" in os.environ
"""Whether tests of attacks run in full; otherwise they attack in the same way, for a shorter time."""

T = TypeVar("T")


def long_or_short(long: T, short: T) -> T:
    """The first where tests run in full (`make soak`), else the second."""
    return long if LONG else short


def first_fast(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """Parameters of a test, all but the first few marked slow."""
    return [
        case if number < fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
