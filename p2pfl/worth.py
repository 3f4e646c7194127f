"""What each site has of the network: its model against what it would have made alone, on the same test rows, and how sure that is.

Shapes: N nodes, P parameters, M test rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from p2pfl.draws import Purpose, torch_seed
from p2pfl.plan import Plan
from p2pfl.records import primary_metric
from p2pfl.tasks import Site
from p2pfl.tasks.calling import figure
from p2pfl.tasks.differences import interval_of_difference
from p2pfl.tasks.intervals import CONFIDENCE, Interval, resampled_interval
from p2pfl.training import Population

MOST_SITES = 100
"""Of a network with more nothing is told: it would take longer than the run of many small nodes."""

MOST_RESAMPLED = 15
"""Sites; of a network with more no metric is computed on resamples, thousands of times at each site."""

Row = dict[str, Any]


def worth(plan: Plan, population: Population, x_NP: Tensor, names: Sequence[str], alone: Population | None) -> list[Row]:
    """The primary metric of each site's own model and of the network's, with a paired interval of their difference.

    Args:
        plan: of the run.
        population: its model evaluates; these sites' rows where they have buffers, else any.
        x_NP: their parameters.
        names: of the sites.
        alone: their models trained alone, its first rows; None: they were not.

    Returns:
        {"site", "metric", "alone", "network", "gain": network minus alone, "low", "high": of the gain, "rows": test rows, "method": of the
        interval, "confidence", "lower_is_better": whether the task says so}; null where undefined. AUROC and accuracy as
        `interval_of_difference` says; other metrics from 1000 resamples of the test rows, the same for both models, drawn by the
        experiment's seed and the node. Empty without test rows, above 100 nodes, and where the network's buffers are elsewhere.
    """
    metric = primary_metric(plan.task.metrics)
    somewhere_else = bool(population.buffers) and len(population.sites) != len(names)
    if metric is None or alone is None or len(plan.names) > MOST_SITES or somewhere_else:
        return []
    alone_NP, found = alone.estimate(), []
    for row, name in enumerate(names):
        site = plan.sites[name]
        if site.test is None or not len(site.test[0]):
            continue
        inputs, targets = site.test
        outputs = population.outputs(x_NP[row], inputs, row if population.buffers else 0, site=name)
        before = alone.outputs(alone_NP[row], inputs, row, site=name)
        network, by_itself = (figure(plan.task, metric, values, targets, site=name) for values in (outputs, before))
        gain = network - by_itself
        interval = _interval(plan, metric, outputs, before, site) if math.isfinite(gain) else None
        found.append(
            {
                "site": name,
                "metric": metric,
                "alone": _defined(by_itself),
                "network": _defined(network),
                "gain": _defined(gain),
                "low": interval and interval.low,
                "high": interval and interval.high,
                "rows": len(inputs),
                "method": interval and interval.method,
                "confidence": CONFIDENCE,
                "lower_is_better": metric in plan.task.losses,
            }
        )
    return found


def _interval(plan: Plan, metric: str, outputs: Tensor, before: Tensor, site: Site) -> Interval | None:
    """Of the gain."""
    assert site.test is not None
    targets, task = site.test[1], plan.task
    known = interval_of_difference(task.metrics[metric], outputs, before, targets)
    if known is not None or len(plan.names) > MOST_RESAMPLED:
        return known

    def gain(rows: np.ndarray) -> float:
        now, then = (figure(task, metric, values[rows], targets[rows], site=site.name) for values in (outputs, before))
        return now - then

    generator = np.random.default_rng(torch_seed(plan.experiment.seed, Purpose.RESAMPLE, node=plan.names.index(site.name)))
    return resampled_interval(gain, len(targets), generator)


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
