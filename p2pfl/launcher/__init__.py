"""A whole network of node daemons on this machine, by the path that institutions take."""

from __future__ import annotations

from typing import Any

__all__ = ["up"]


def __getattr__(name: str) -> Any:
    # on first use: a fork server needs no torch in its parent
    if name == "up":
        from p2pfl.launcher.network import up

        return up
    raise AttributeError(f"module 'p2pfl.launcher' has no attribute {name!r}")
