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


def first_fast(cases: Iterable[Any], fast: int = 1, *, alone: bool = False) -> list[Any]:
    """Parameters of a test, all but the first few marked slow; alone: each case is one parameter, though it may be a tuple."""
    return [
        pytest.param(*(case if isinstance(case, tuple) and not alone else (case,)), marks=[pytest.mark.slow] if number >= fast else [])
        for number, case in enumerate(cases)
    ]
