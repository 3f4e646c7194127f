"""Every site's model, and the mean model, on every site's test rows: is a model good only at home, and how sure is that?

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from p2pfl.plan import Plan
from p2pfl.records import primary_metric
from p2pfl.tasks import Site
from p2pfl.tasks.calling import figure
from p2pfl.tasks.intervals import CONFIDENCE, Interval, interval_of
from p2pfl.training import Population

MOST_SITES = 32
"""Of more nodes than this no matrix is made: it has a square of them."""

MEAN_MODEL = "mean model"
_MOST_CLASSES = 20


def cross_site(plan: Plan, population: Population, x_NP: Tensor) -> dict[str, Any] | None:
    """The matrix of the primary metric, models by sites, with intervals.

    Args:
        plan: of the run; all its sites' data are here.
        population: any rows of the run; its model evaluates.
        x_NP: every node's parameters.

    Returns:
        {"metric", "confidence", "method": of the intervals or null, "models": names, "sites": [{"name", "rows", "support": rows of each
        class or null}], "value", "low", "high": [model][site], null where undefined}. None where there is nothing to measure, where there
        are more than 32 nodes, and where models have buffers, which stay at their node.
    """
    metric = primary_metric(plan.task.metrics)
    if metric is None or not 1 < len(plan.names) <= MOST_SITES or population.buffers or set(plan.sites) != set(plan.names):
        return None
    sites = [plan.sites[name] for name in plan.names]
    cells = [[_cell(plan, population, metric, x_P, site) for site in sites] for x_P in (*x_NP, x_NP.mean(dim=0))]
    methods = {interval.method for row in cells for _, interval in row if interval is not None}
    return {
        "metric": metric,
        "confidence": CONFIDENCE,
        "method": ", ".join(sorted(methods)) or None,
        "models": [*plan.names, MEAN_MODEL],
        "sites": [{"name": site.name, "rows": len(site.test[0]) if site.test else 0, "support": _support(site)} for site in sites],
        "value": [[None if math.isnan(value) else value for value, _ in row] for row in cells],
        "low": [[interval and interval.low for _, interval in row] for row in cells],
        "high": [[interval and interval.high for _, interval in row] for row in cells],
    }


def _cell(plan: Plan, population: Population, metric: str, x_P: Tensor, site: Site) -> tuple[float, Interval | None]:
    if site.test is None or not len(site.test[0]):
        return math.nan, None
    outputs, targets = population.outputs(x_P, site.test[0], site=site.name), site.test[1]
    return figure(plan.task, metric, outputs, targets, site=site.name), interval_of(plan.task.metrics[metric], outputs, targets)


def _support(site: Site) -> dict[str, int] | None:
    """Test rows of each class; None where targets are no classes."""
    if site.test is None:
        return None
    targets = site.test[1].reshape(-1)
    if len(targets) != len(site.test[0]) or not bool((targets == targets.round()).all()):
        return None
    classes, counts = torch.unique(targets.long(), return_counts=True)
    if len(classes) > _MOST_CLASSES:
        return None
    return {str(label): count for label, count in zip(classes.tolist(), counts.tolist(), strict=True)}
