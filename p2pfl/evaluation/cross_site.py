"""Measure every site's model, and the mean model, on every site's test rows, with intervals.

Where data of one site alone are at hand, the models that its neighbours have sent it on its own test rows.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.draws import Purpose, torch_seed
from p2pfl.errors import TaskError
from p2pfl.evaluation.progress import logged
from p2pfl.experiment.plan import Plan
from p2pfl.runs.events import EventKind
from p2pfl.runs.summary_fields import primary_metric
from p2pfl.tasks import Site
from p2pfl.tasks.intervals import CONFIDENCE, UNDEFINED, Interval, clipped, interval_of, left_out_interval, why_not_left_out
from p2pfl.tasks.metrics import kind_of
from p2pfl.training import Population
from p2pfl.training.evaluation import evaluate_metric

MOST_SITES = 32
"""Above this many nodes no matrix is made: its size is their square."""

MEAN_MODEL = "mean model"
_MOST_CLASSES = 20

Cell = tuple[float, Interval | str]
"""A figure with its interval, or with why there is none."""


def cross_site(plan: Plan, population: Population, x_NP: Tensor) -> dict[str, Any] | None:
    """Compute the matrix of the primary metric, models by sites, with intervals, where all sites' data are here.

    Intervals are `interval_of`'s by the metric's kind. Other metrics are computed without one group of a site's test rows after the other
    (`left_out_interval`), the groups drawn by the experiment's seed and the site, the same for every model: in all cells where that takes
    at most 1,000 calls of the metric, else in those of each site's own model and of the mean model, else in none.

    Returns:
        {"metric", "confidence", "method": of the intervals or null, "models": names, "sites": [{"name", "rows", "support": rows by class,
        or null}], "value", "low", "high": [model][site], null where undefined, "no_interval": [model][site], why there is none,
        "lower_is_better": whether the task says so}. None where there is nothing to measure, above 32 nodes, and where models have buffers,
        which stay at their node.
    """
    metric = primary_metric(plan.task.metrics)
    if metric is None or not 1 < len(plan.names) <= MOST_SITES or population.buffers or set(plan.sites) != set(plan.names):
        return None
    sites = [plan.sites[name] for name in plan.names]
    has_mean = not plan.layout.personal
    models = tuple((*x_NP, x_NP.mean(dim=0)) if has_mean else x_NP)
    sizes = [len(site.test[0]) if site.test is not None else 0 for site in sites]
    in_all, in_some = (why_not_left_out(some * len(sites), some * sum(sizes)) for some in (len(models), 2 if has_mean else 1))
    cells = [
        [
            _cell(plan, population, metric, x_P, site, too_many=in_some if model in (place, len(sites)) else in_all)
            for place, site in enumerate(sites)
        ]
        for model, x_P in enumerate(logged("every model at every site", models))
    ]
    return _matrix(plan, metric, [*plan.names, *([MEAN_MODEL] if has_mean else [])], sites, cells)


def measures_neighbours(plan: Plan, population: Population) -> bool:
    """Tell whether a node measures its neighbours' last models at its end, so that it must keep them."""
    return primary_metric(plan.task.metrics) is not None and not population.buffers and not plan.layout.personal


def at_one_site(
    plan: Plan, population: Population, me: str, neighbours: Mapping[str, Tensor], event: Callable[[EventKind, str], None]
) -> dict[str, Any] | None:
    """Measure a node's own model and those of its neighbours, (P,) each, at its own site, where the others' data are elsewhere.

    What a neighbour has sent must not end this node: a model whose outputs are not finite, or on which the task fails, has no figure, and
    *event* is told. The answer is as `cross_site` gives it, with one site and no mean model.
    """
    metric = primary_metric(plan.task.metrics)
    if metric is None or not neighbours or not measures_neighbours(plan, population):
        return None
    models, site = {me: population.estimate()[0], **neighbours}, plan.sites[me]
    too_many = why_not_left_out(len(models), len(models) * (len(site.test[0]) if site.test is not None else 0))
    cells: list[list[Cell]] = []
    for name, x_P in logged("the models that neighbours have sent", list(models.items())):
        try:
            cells.append([_cell(plan, population, metric, x_P, site, too_many=too_many)])
        except TaskError as error:
            event(EventKind.UNMEASURED, f"the model of {name}: {error}")
            cells.append([(math.nan, UNDEFINED)])
    return _matrix(plan, metric, list(models), [site], cells)


def _matrix(plan: Plan, metric: str, models: Sequence[str], sites: Sequence[Site], cells: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    methods = {interval.method for row in cells for _, interval in row if isinstance(interval, Interval)}
    return {
        "metric": metric,
        "confidence": CONFIDENCE,
        "method": ", ".join(sorted(methods)) or None,
        "models": list(models),
        "sites": [{"name": site.name, "rows": len(site.test[0]) if site.test else 0, "support": _support(site)} for site in sites],
        "value": [[None if math.isnan(value) else value for value, _ in row] for row in cells],
        "low": [[interval.low if isinstance(interval, Interval) else None for _, interval in row] for row in cells],
        "high": [[interval.high if isinstance(interval, Interval) else None for _, interval in row] for row in cells],
        "no_interval": [[None if isinstance(interval, Interval) else interval for _, interval in row] for row in cells],
        "lower_is_better": metric in plan.task.lower_is_better,
    }


def _cell(plan: Plan, population: Population, metric: str, x_P: Tensor, site: Site, *, too_many: str | None) -> Cell:
    if site.test is None or not len(site.test[0]):
        return math.nan, "there are no test rows"
    outputs, targets = population.outputs(x_P, site.test[0], site=site.name), site.test[1]
    if not bool(outputs.isfinite().all()):
        return math.nan, UNDEFINED
    value = evaluate_metric(plan.task, metric, outputs, targets, site=site.name)
    if not math.isfinite(value):
        return value, UNDEFINED
    known = interval_of(plan.task.metrics[metric], outputs, targets, value=value)
    if known is not None or too_many is not None:
        return value, known or str(too_many)

    def again(rows: np.ndarray) -> float:
        return evaluate_metric(plan.task, metric, outputs[rows], targets[rows], site=site.name)

    generator = np.random.default_rng(torch_seed(plan.experiment.seed, Purpose.RESAMPLE, node=plan.names.index(site.name)))
    found = left_out_interval(again, len(targets), generator, value)
    return value, clipped(found, kind_of(plan.task.metrics[metric])) if isinstance(found, Interval) else found


def _support(site: Site) -> dict[str, int] | None:
    """Count test rows of each class; None where targets are no classes."""
    if site.test is None:
        return None
    targets = site.test[1].reshape(-1)
    if len(targets) != len(site.test[0]) or not bool((targets == targets.round()).all()):
        return None
    classes, counts = torch.unique(targets.long(), return_counts=True)
    if len(classes) > _MOST_CLASSES:
        return None
    return {str(label): count for label, count in zip(classes.tolist(), counts.tolist(), strict=True)}
