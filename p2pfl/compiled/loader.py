"""The loader of compiled loops: numba is imported only where they are asked for."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal


def load_loops(of: Literal["training", "mixing"]) -> ModuleType | None:
    """Load a module of compiled loops, which takes a second once; None where numba is not there or is switched off."""
    return None if _is_switched_off() else _loaded(f"p2pfl.compiled.{of}_loops")


def why_no_loops() -> str:
    """The reason why there are no compiled loops on this machine."""
    if _is_switched_off():
        return "NUMBA_DISABLE_JIT is set in the environment; unset it"
    return "it needs the extra fast: pip install 'p2pfl-mesh[fast]'"


def _is_switched_off() -> bool:
    return os.environ.get("NUMBA_DISABLE_JIT", "") not in ("", "0")


@cache
def _loaded(module: str) -> ModuleType | None:
    try:
        return import_module(module)
    except (ImportError, RuntimeError):  # not there, too old for this numpy, or without a place for what it compiles
        return None
