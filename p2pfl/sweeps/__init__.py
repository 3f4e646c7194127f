"""Grids of experiments: run in parallel, gone on with where they stopped, one table of all."""

from __future__ import annotations

from p2pfl.sweeps.engine import Sweep, read_sweep, sweep
from p2pfl.sweeps.grid import Cell, Grid, make_grid, parse_variations

__all__ = ["Cell", "Grid", "Sweep", "make_grid", "parse_variations", "read_sweep", "sweep"]
