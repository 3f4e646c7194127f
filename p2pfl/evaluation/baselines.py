"""What a network is measured against: each site alone, and all data in one place, with the same number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from p2pfl.algorithms import DPSGD
from p2pfl.tasks import Site, Task
from p2pfl.training.population import Population, Recipe

_POOLED_NODE = 2**32 - 1
"""The pooled data stream's key: a number that no node has."""

_SMALL = 10**6  # rows of all sites, times sites: what is drawn for each row is padded to the largest

Metrics = dict[str, float]


def _alone(recipe: Recipe) -> Recipe:
    """The run's steps without its exchanges: whoever is alone just follows the optimiser."""
    return replace(recipe, algorithm=DPSGD())


def trained_alone(task: Task, sites: Sequence[Site], nodes: Sequence[int], model: nn.Module, recipe: Recipe) -> Population:
    """Each site's model after as many steps on its own rows, a row a site; what it evaluates to is the local baseline."""
    population = Population(task, sites, nodes, model, _alone(recipe))
    for round_number in range(recipe.rounds):
        population.train(round_number)
    return population


def both_baselines(
    task: Task, sites: Sequence[Site], nodes: Sequence[int], model: nn.Module, recipe: Recipe
) -> tuple[Population, list[Metrics]]:
    """The sites' models trained alone, as the first rows, and the pooled baseline.

    Trained side by side where the sites are small, which takes half as long.
    """
    num_rows = sum(len(site.train[0]) for site in sites if site.train is not None)
    if num_rows * len(sites) > _SMALL:
        return trained_alone(task, sites, nodes, model, recipe), pooled_baseline(task, sites, model, recipe)
    population = Population(task, [*sites, _everything(sites)], [*nodes, _POOLED_NODE], model, _alone(recipe))
    for round_number in range(recipe.rounds):
        population.train(round_number)
    pooled_P, last = population.estimate()[-1], len(sites)
    return population, [population.metrics(pooled_P, site, last) for site in sites]


def pooled_baseline(task: Task, sites: Sequence[Site], model: nn.Module, recipe: Recipe) -> list[Metrics]:
    """One model trained on all sites' rows together, evaluated on each site's test rows. Needs all data in one place."""
    population = Population(task, [_everything(sites)], [_POOLED_NODE], model, _alone(recipe))
    for round_number in range(recipe.rounds):
        population.train(round_number)
    return [population.metrics(population.estimate()[0], site) for site in sites]


def _everything(sites: Sequence[Site]) -> Site:
    """One site with all sites' training rows."""
    trains = [site.train for site in sites if site.train is not None]
    pooled = None if not trains else (torch.cat([inputs for inputs, _ in trains]), torch.cat([targets for _, targets in trains]))
    return replace(sites[0], name="pooled", train=pooled, test=None, groups={}, start=None)
