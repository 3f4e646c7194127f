"""The network in one process."""

from __future__ import annotations

from p2pfl.simulator.engine import Simulation, simulate
from p2pfl.simulator.faults import Faults

__all__ = ["Faults", "Simulation", "simulate"]
