"""K local steps for N rows, evaluation and baselines: used by the daemon with one row and by the simulator with all of them."""

from __future__ import annotations

from p2pfl.training.baselines import both_baselines, pooled_baseline, trained_alone
from p2pfl.training.optimizers import OptimizerSpec, StackedOptimizer, clipped
from p2pfl.training.population import Population, Recipe, build_model
from p2pfl.training.trial import try_out

__all__ = [
    "OptimizerSpec",
    "Population",
    "Recipe",
    "StackedOptimizer",
    "both_baselines",
    "build_model",
    "clipped",
    "pooled_baseline",
    "trained_alone",
    "try_out",
]
