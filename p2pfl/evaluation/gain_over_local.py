"""Compare each site's model with the one it would have trained alone, on the same test rows, with an interval of the difference.

Shapes: N nodes, P parameters, M test rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from p2pfl.draws import Purpose, torch_seed
from p2pfl.evaluation.progress import logged
from p2pfl.experiment.plan import Plan
from p2pfl.runs.summary_fields import primary_metric
from p2pfl.runs.text import Row
from p2pfl.tasks import Site
from p2pfl.tasks.intervals import CONFIDENCE, UNDEFINED, Interval, clipped, interval_of_difference, left_out_interval, why_not_left_out
from p2pfl.tasks.metrics import kind_of
from p2pfl.training import Population
from p2pfl.training.evaluation import evaluate_metric

MOST_SITES = 100
"""In a network with more no gain is told: it would take longer than the run of many small nodes."""


def gains_over_local(plan: Plan, population: Population, x_NP: Tensor, names: Sequence[str], alone: Population | None) -> list[Row]:
    """Compute each site's gain in the primary metric over local training, with a paired interval.

    *population* holds the rows of these sites where they have buffers, else any; the first rows of *alone* are their models trained alone.

    Returns:
        {"site", "metric", "alone", "network", "gain": network minus alone, "low", "high": of the gain, "rows": test rows, "method": of the
        interval, "confidence", "lower_is_better": whether the task says so, "no_interval": why there is none}; null where undefined.
        As `interval_of_difference` says by the metric's kind; other metrics as `left_out_interval` does, the same groups of rows for both
        models, drawn by the experiment's seed and the node, as long as all sites together take 1,000 calls of the metric at most.
        Empty without test rows, above 100 nodes, and where the network's buffers are elsewhere.
    """
    metric = primary_metric(plan.task.metrics)
    somewhere_else = bool(population.buffers) and len(population.sites) != len(names)
    if metric is None or alone is None or len(plan.names) > MOST_SITES or somewhere_else:
        return []
    alone_NP, found = alone.estimate(), []
    sizes = [len(site.test[0]) for site in plan.sites.values() if site.test is not None]
    too_many = why_not_left_out(2 * len(sizes), 2 * sum(sizes))  # a node knows its own rows alone, and the others' number of sites
    for row, name in enumerate(logged("the gain of each site over local training", names)):
        site = plan.sites[name]
        if site.test is None or not len(site.test[0]):
            continue
        inputs, targets = site.test
        outputs = population.outputs(x_NP[row], inputs, row if population.buffers else 0, site=name)
        before = alone.outputs(alone_NP[row], inputs, row, site=name)
        network, by_itself = (evaluate_metric(plan.task, metric, values, targets, site=name) for values in (outputs, before))
        gain = network - by_itself
        judged = _interval(plan, metric, outputs, before, site, (network, by_itself), too_many) if math.isfinite(gain) else UNDEFINED
        interval, why = (judged, None) if isinstance(judged, Interval) else (None, judged)
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
                "lower_is_better": metric in plan.task.lower_is_better,
                "no_interval": why,
            }
        )
    return found


def _interval(
    plan: Plan, metric: str, outputs: Tensor, before: Tensor, site: Site, values: tuple[float, float], too_many: str | None
) -> Interval | str:
    assert site.test is not None
    targets, task = site.test[1], plan.task
    known = interval_of_difference(task.metrics[metric], outputs, before, targets, values=values)
    if known is not None or too_many is not None:
        return known or str(too_many)

    def gain(rows: np.ndarray) -> float:
        now, then = (evaluate_metric(task, metric, tensor[rows], targets[rows], site=site.name) for tensor in (outputs, before))
        return now - then

    generator = np.random.default_rng(torch_seed(plan.experiment.seed, Purpose.RESAMPLE, node=plan.names.index(site.name)))
    found = left_out_interval(gain, len(targets), generator, values[0] - values[1])
    return clipped(found, kind_of(task.metrics[metric]), least=-1.0) if isinstance(found, Interval) else found


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
