"""Rehearsals of real daemons with faults, for tests of tasks, algorithms and studies.

In conftest.py, `pytest_plugins = ["p2pfl.testing.plugin"]` makes the fixture `rehearse` known to pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl.faults.script import Fault, FaultKind, FaultScript
    from p2pfl.testing.rehearsal import Rehearsed, rehearse
    from p2pfl.testing.tcp_proxy import TcpProxy

# on first use: pytest imports the plugin in every process that it starts, and torch takes its time
_HOME = {
    "Fault": "p2pfl.faults.script",
    "FaultKind": "p2pfl.faults.script",
    "FaultScript": "p2pfl.faults.script",
    "Rehearsed": "p2pfl.testing.rehearsal",
    "TcpProxy": "p2pfl.testing.tcp_proxy",
    "rehearse": "p2pfl.testing.rehearsal",
}

__all__ = ["Fault", "FaultKind", "FaultScript", "Rehearsed", "TcpProxy", "rehearse"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'p2pfl.testing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
