"""Local steps, evaluation and dry run of a population: the daemon's has one row, the simulator's one for every node."""

from __future__ import annotations

from p2pfl.training.dry_run import build_model, dry_run
from p2pfl.training.optimizers import OptimizerSpec, StackedOptimizer, clipped
from p2pfl.training.population import Population
from p2pfl.training.recipe import Recipe

__all__ = ["OptimizerSpec", "Population", "Recipe", "StackedOptimizer", "build_model", "clipped", "dry_run"]
