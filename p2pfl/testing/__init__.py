"""Rehearsals of real daemons with faults, for tests of tasks, algorithms and studies.

In conftest.py, `pytest_plugins = ["p2pfl.testing.plugin"]` makes the fixture `rehearse` known to pytest.
"""

from __future__ import annotations

from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.testing.rehearsal import Rehearsed, rehearse
from p2pfl.testing.tcp_proxy import TcpProxy

__all__ = ["Fault", "FaultKind", "FaultScript", "Rehearsed", "TcpProxy", "rehearse"]
