"""The mean of all nodes' models: how far they are from it, and how it measures as a model of its own.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.experiment.plan import Plan
from p2pfl.tasks import SitesByName
from p2pfl.training import Population
from p2pfl.training.evaluation import evaluate_metric
from p2pfl.training.running_statistics import recalibrated
from p2pfl.training.training_data import of_dtype

_BLOCK = 2**19  # numbers
_LEAST_WIDTH = 16  # columns that are worth a pass


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanModel:
    """Mean of all nodes' models, complete with its buffers."""

    x_P: Tensor
    """Parameters."""

    buffers: Mapping[str, Tensor]
    """Its own: running statistics are computed for it, never a node's."""


def consensus_distance(x_NP: Tensor) -> float:
    """Compute sqrt(mean_i ||x_i - mean||**2) of rows x_i."""
    return float(squared_distances_from_mean(x_NP).mean().sqrt())


def squared_distances_from_mean(x_NP: Tensor, mean_P: Tensor | None = None) -> Tensor:
    """Compute ||x_i - mean||**2 of rows from a given or their own mean, (N,) float64 on the CPU.

    It goes block by block, so that no second population is held.
    """
    num_rows, num_columns = x_NP.shape
    total_N = torch.zeros(num_rows, dtype=torch.float64)
    if num_rows <= _BLOCK // _LEAST_WIDTH:  # blocks of columns: the mean and the distances in one pass over the memory
        width = _BLOCK // max(num_rows, 1)
        for first in range(0, num_columns, width):
            block_NW = x_NP[:, first : first + width]
            centre_W = block_NW.mean(dim=0) if mean_P is None else mean_P[first : first + width]
            total_N += torch.linalg.vector_norm(block_NW - centre_W, dim=-1).double().square().cpu()
        return total_N
    centre_P, height = x_NP.mean(dim=0) if mean_P is None else mean_P, max(1, _BLOCK // max(num_columns, 1))
    for first in range(0, num_rows, height):
        off_MP = x_NP[first : first + height] - centre_P
        total_N[first : first + height] = torch.linalg.vector_norm(off_MP, dim=-1).double().square().cpu()
    return total_N


def mean_model_of(plan: Plan, x_NP: Tensor, buffers: Mapping[str, Tensor]) -> MeanModel | str:
    """Average all nodes' models, and recompute running statistics for the mean; the reason where there is no such model.

    *buffers* are every node's own, (N, ...); empty where the model has none.
    """
    if (reason := why_no_mean_model(plan)) is not None:
        return reason
    mean_P = x_NP.mean(dim=0)
    if not buffers:
        return MeanModel(x_P=mean_P, buffers={})
    if len(plan.sites) != len(plan.names):
        return "its running statistics need all nodes' training rows, which are not here"
    if isinstance(plan.sites, SitesByName):
        sites = plan.sites.table
        places = slice(int(sites.train.starts[0]), int(sites.train.starts[-1]))
        inputs_M = sites.inputs[places if sites.train.rows is None else sites.train.rows[places].long()]
    else:
        trains = [site.train[0] for site in plan.sites.values() if site.train is not None]
        inputs_M = torch.cat(trains) if trains else torch.zeros(0)
    found = recalibrated(plan.task, plan.model, mean_P, buffers, of_dtype(inputs_M, plan.layout.dtype), plan.experiment.seed)
    return found if isinstance(found, str) else MeanModel(x_P=mean_P, buffers=found)


def mean_model_metrics(plan: Plan, mean: MeanModel | str, population: Population) -> dict[str, float] | None:
    """Measure the mean model on all sites' test rows pooled; None where there is no such model."""
    if isinstance(mean, str):
        return None
    if isinstance(plan.sites, SitesByName):
        pooled = plan.sites.table.tests()
    else:
        tests = [site.test for site in plan.sites.values() if site.test is not None]
        pooled = (torch.cat([inputs for inputs, _ in tests]), torch.cat([targets for _, targets in tests])) if tests else None
    if pooled is None or not plan.task.metrics:
        return {}
    outputs, targets = population.outputs(mean.x_P, pooled[0], buffers=mean.buffers), pooled[1]
    return {name: evaluate_metric(plan.task, name, outputs, targets) for name in plan.task.metrics}


def why_no_mean_model(plan: Plan) -> str | None:
    """Reason why the mean of all nodes' models is no model; None where it is one."""
    personal = plan.layout.personal
    if not personal:
        return None
    return f"{len(personal)} tensors are personal ({personal[0]}{', ...' if len(personal) > 1 else ''}): no node has a mean of them"
