"""Graphs that gossip runs on: made by name or read from files, weighted, and what their spectrum predicts."""

from __future__ import annotations

from p2pfl.topology.files import load, load_over, transports_over
from p2pfl.topology.generators import SMALL_GRAPHS, TOPOLOGIES, make, option_faults, options_of
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.partitioning import num_crossing, partition
from p2pfl.topology.schedule import SCHEDULES, Schedule, base_spec, has_base, make_schedule, schedule_faults
from p2pfl.topology.spectrum import (
    describe,
    describe_rounds,
    diameter,
    diameter_bounds,
    is_spectrum_quick,
    laplacian_extremes,
    rounds_to,
    spectral_gap,
    steps_from,
)
from p2pfl.topology.weights import WEIGHTS, weighted

__all__ = [
    "SCHEDULES",
    "SMALL_GRAPHS",
    "TOPOLOGIES",
    "WEIGHTS",
    "Schedule",
    "Topology",
    "base_spec",
    "check_connected",
    "describe",
    "describe_rounds",
    "diameter",
    "diameter_bounds",
    "has_base",
    "is_spectrum_quick",
    "laplacian_extremes",
    "load",
    "load_over",
    "make",
    "make_schedule",
    "num_crossing",
    "option_faults",
    "options_of",
    "partition",
    "rounds_to",
    "schedule_faults",
    "spectral_gap",
    "steps_from",
    "transports_over",
    "weighted",
]
