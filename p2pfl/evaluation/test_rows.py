"""Figures on test rows that were set aside, while choices are made on validation rows.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.evaluation.mean_model import MeanModel
from p2pfl.evaluation.outcome import Metrics
from p2pfl.evaluation.summary import by_metric
from p2pfl.experiment.plan import Plan
from p2pfl.runs.summary_fields import NOT_FOR_CHOOSING
from p2pfl.tasks import SitesByName
from p2pfl.tasks.calling import evaluate_metric
from p2pfl.training import Population


def metrics_on_test_rows(
    plan: Plan, population: Population, x_NP: Tensor, buffers: Mapping[str, Tensor], rows: Mapping[str, int], mean: MeanModel | str
) -> dict[str, Any] | None:
    """Measure final models on the test rows that were set aside while validation rows stood in their place.

    Args:
        plan: of the run.
        population: any rows of the run; its model evaluates.
        x_NP: parameters.
        buffers: each row's own, (N, ...).
        rows: of the nodes to measure, each at its own site.
        mean: of all nodes' models.

    Returns:
        The summary's part "test"; None where no test rows were set aside.
    """
    if isinstance(plan.sites, SitesByName) and plan.sites.table.set_aside is None:
        return None
    aside = {name: site.set_aside for name, site in plan.sites.items() if site.set_aside is not None}
    if not aside:
        return None
    metrics = plan.task.metrics
    per_node: dict[str, Metrics] = {}
    for name, row in rows.items():
        if name in aside:
            inputs, targets = aside[name]
            outputs = population.outputs(x_NP[row], inputs, site=name, buffers={key: own[row] for key, own in buffers.items()})
            per_node[name] = {metric: evaluate_metric(plan.task, metric, outputs, targets, site=name) for metric in metrics}
    of_mean = None
    if not isinstance(mean, str):
        inputs, targets = (torch.cat(tensors) for tensors in zip(*aside.values(), strict=True))
        outputs = population.outputs(mean.x_P, inputs, buffers=mean.buffers)
        of_mean = {metric: evaluate_metric(plan.task, metric, outputs, targets) for metric in metrics}
    return {"use": NOT_FOR_CHOOSING, "metrics": by_metric(plan, per_node), "mean_model": of_mean}
