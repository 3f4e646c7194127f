"""Peer-to-peer learning for institutions that cannot pool their data: encrypted gossip between graph neighbours, no server."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# PEP 562: a name is imported when it is first used, so that `import p2pfl` costs nothing
_HOME = {
    "simulate": "p2pfl.simulator",
    "sweep": "p2pfl.sweeps",
    "up": "p2pfl.launcher",
    "load": "p2pfl.evaluation.results",
    "Run": "p2pfl.evaluation.results",
    "Task": "p2pfl.tasks",
    "task": "p2pfl.tasks",
    "Metric": "p2pfl.tasks",
    "Site": "p2pfl.tasks",
    "Topology": "p2pfl.topology",
    "Layout": "p2pfl.params",
}
_MODULES = {"stats": "p2pfl.analyses.stats"}

__all__ = ["Layout", "Metric", "Run", "Site", "Task", "Topology", "__version__", "load", "simulate", "stats", "sweep", "task", "up"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'p2pfl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
