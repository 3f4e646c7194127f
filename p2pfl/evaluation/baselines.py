"""Baselines of a network: each site trained alone, and one model trained on all data in one place, with as many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from p2pfl.algorithms import DPSGD
from p2pfl.evaluation.summary import Metrics, by_metric
from p2pfl.experiment.plan import Plan
from p2pfl.tasks import Site, Task
from p2pfl.training import Population, Recipe

_POOLED_NODE = 2**32 - 1
"""The pooled data stream's key: a number that no node has."""

_SMALL = 10**6  # rows of all sites, times sites: what is drawn for each row is padded to the largest


def trained_alone(task: Task, sites: Sequence[Site], nodes: Sequence[int], model: nn.Module, recipe: Recipe) -> Population:
    """Train each site's model for as many steps on its own rows alone; its metrics are the local baseline."""
    population = Population(task, sites, nodes, model, replace(recipe, algorithm=DPSGD()))  # the local steps without exchanges
    for round_number in range(recipe.rounds):
        population.train(round_number)
    return population


def both_baselines(
    task: Task, sites: Sequence[Site], nodes: Sequence[int], model: nn.Module, recipe: Recipe
) -> tuple[Population, list[Metrics]]:
    """Train the sites' models alone, as the first rows of a population, and the pooled baseline.

    Trained side by side where the sites are small, which takes half as long.
    """
    num_rows = sum(len(site.train[0]) for site in sites if site.train is not None)
    if num_rows * len(sites) > _SMALL:
        return trained_alone(task, sites, nodes, model, recipe), pooled_baseline(task, sites, model, recipe)
    population = trained_alone(task, [*sites, _everything(sites)], [*nodes, _POOLED_NODE], model, recipe)
    pooled_P, last = population.estimate()[-1], len(sites)
    return population, [population.metrics(pooled_P, site, last) for site in sites]


def pooled_baseline(task: Task, sites: Sequence[Site], model: nn.Module, recipe: Recipe) -> list[Metrics]:
    """Train one model on all sites' rows together, and measure it on each site's test rows."""
    population = trained_alone(task, [_everything(sites)], [_POOLED_NODE], model, recipe)
    return [population.metrics(population.estimate()[0], site) for site in sites]


def asks_for(plan: Plan, baseline: str) -> bool:
    """Whether a baseline is wanted, and there is anything to learn."""
    return baseline in plan.experiment.baselines and plan.task.loss is not None and plan.experiment.rounds > 0


def baselines_of(plan: Plan, local: Mapping[str, Metrics] | None = None) -> tuple[dict[str, Any], Population | None]:
    """Compute the baselines that the experiment asks for, the local one unless each node has computed its own.

    Returns:
        The summary's part, null for "pooled" where not all data are here; and the models of `plan.names` trained alone, the first rows of a
        population, where they were trained here.
    """
    asked = [baseline for baseline in ("local", "pooled") if asks_for(plan, baseline)]
    pooled = models = together = None
    if asked and set(plan.sites) == set(plan.names):
        everybody, nodes = [plan.sites[name] for name in plan.names], range(len(plan.names))
        if local is None and len(asked) > 1:
            models, together = both_baselines(plan.task, everybody, nodes, plan.model, plan.recipe)
        elif local is None and "local" in asked:
            models = trained_alone(plan.task, everybody, nodes, plan.model, plan.recipe)
        if models is not None:
            local = dict(zip(plan.names, models.evaluate(nodes), strict=True))
        if "pooled" in asked:
            together = pooled_baseline(plan.task, everybody, plan.model, plan.recipe) if together is None else together
            pooled = dict(zip(plan.names, together, strict=True))
    figures = {"local": local, "pooled": pooled}
    return {name: by_metric(plan, values) if (values := figures[name]) is not None else None for name in asked}, models


def baselines_of_node(plan: Plan, name: str, *, trains: bool) -> tuple[dict[str, Any], Population | None]:
    """Compare one node with itself alone, if it has anything to train on, where the others' data are elsewhere; see `baselines_of`."""
    alone = None
    if trains and asks_for(plan, "local"):
        alone = trained_alone(plan.task, [plan.sites[name]], [plan.names.index(name)], plan.model, plan.recipe)
    local = {name: alone.evaluate()[0]} if alone is not None else {}
    found = baselines_of(plan, local)[0] if set(plan.sites) != set(plan.names) else {}
    return found | ({"local": by_metric(plan, local)} if local else {}), alone


def _everything(sites: Sequence[Site]) -> Site:
    """Pool all sites' training rows in one site."""
    trains = [site.train for site in sites if site.train is not None]
    pooled = None if not trains else (torch.cat([inputs for inputs, _ in trains]), torch.cat([targets for _, targets in trains]))
    return replace(sites[0], name="pooled", train=pooled, test=None, groups={}, start=None, train_patients=None, test_patients=None)
