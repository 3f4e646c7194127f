"""K local steps for N rows, evaluation and baselines: used by the daemon with one row and by the simulator with all of them."""

from __future__ import annotations

from p2pfl.training.optimizers import OptimizerSpec, StackedOptimizer, clipped
from p2pfl.training.population import Population
from p2pfl.training.recipe import Recipe, build_model
from p2pfl.training.trial import try_out

__all__ = [
    "OptimizerSpec",
    "Population",
    "Recipe",
    "StackedOptimizer",
    "build_model",
    "clipped",
    "try_out",
]
