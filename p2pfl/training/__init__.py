"""K local steps for N rows, evaluation and baselines: used by the daemon with one row and by the simulator with all of them."""

from __future__ import annotations

from p2pfl.training.dry_run import dry_run
from p2pfl.training.optimizers import OptimizerSpec, StackedOptimizer, clipped
from p2pfl.training.population import Population
from p2pfl.training.recipe import Recipe, build_model

__all__ = ["OptimizerSpec", "Population", "Recipe", "StackedOptimizer", "build_model", "clipped", "dry_run"]
