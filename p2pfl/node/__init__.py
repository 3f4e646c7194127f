"""The daemon of one institution: keys, links, rounds, checkpoints, status; and a whole network of them on one machine."""

from __future__ import annotations

from typing import Any

__all__ = ["up"]


def __getattr__(name: str) -> Any:
    # on first use: an identity needs no torch
    if name == "up":
        from p2pfl.node.network import up

        return up
    raise AttributeError(f"module 'p2pfl.node' has no attribute {name!r}")
