"""A simulated network, in one process or in several that share its rows."""

from __future__ import annotations

from p2pfl.faults.script import FaultScript
from p2pfl.simulator.engine import Simulation
from p2pfl.simulator.start import simulate

__all__ = ["FaultScript", "Simulation", "simulate"]
