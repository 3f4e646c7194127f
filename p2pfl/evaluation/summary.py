"""What a run's records and its summary.json hold, computed the same way for every runtime.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfl.evaluation.baselines import both_baselines, pooled_baseline, trained_alone
from p2pfl.experiment.plan import Plan
from p2pfl.runs.departures import Departure, departure_rows
from p2pfl.runs.summary_fields import NOT_FOR_CHOOSING, rows_word, statistics
from p2pfl.tasks import SitesByName
from p2pfl.tasks.calling import figure
from p2pfl.training import Population
from p2pfl.training.population import of_dtype
from p2pfl.training.running_statistics import recalibrated

Metrics = Mapping[str, float]

_NAMED = 5
_BLOCK = 2**19  # numbers
_LEAST_WIDTH = 16  # columns that are worth a pass


def consensus_distance(x_NP: Tensor) -> float:
    """sqrt(mean_i ||x_i - mean||**2) of rows."""
    return float(squared_distances_from_mean(x_NP).mean().sqrt())


def squared_distances_from_mean(x_NP: Tensor, mean_P: Tensor | None = None) -> Tensor:
    """||x_i - mean||**2 of rows, (N,) float64 on the CPU; a block after the other, so that no second population is held.

    Args:
        x_NP: the rows.
        mean_P: what they are measured from; None: their own mean.
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


def asks_for(plan: Plan, baseline: str) -> bool:
    """Whether a baseline is wanted, and there is anything to learn."""
    return baseline in plan.experiment.baselines and plan.task.loss is not None and plan.experiment.rounds > 0


def baselines_summary(plan: Plan, local: Mapping[str, Metrics] | None = None) -> tuple[dict[str, Any], Population | None]:
    """What the network is measured against, as the experiment's `baselines` ask for.

    Args:
        plan: of the run.
        local: what each node has computed of itself; None: compute it here.

    Returns:
        The summary's part, null for "pooled" where not all data are here; and the models of `plan.names` trained alone, the first rows of a
        population, where they were trained here.
    """
    result: dict[str, Any] = {}
    if not any(asks_for(plan, baseline) for baseline in ("local", "pooled")):
        return result, None
    everybody = [plan.sites[name] for name in plan.names] if set(plan.sites) == set(plan.names) else None
    together = models = None
    if local is None and everybody is not None and asks_for(plan, "local") and asks_for(plan, "pooled"):
        models, together = both_baselines(plan.task, everybody, range(len(plan.names)), plan.model, plan.recipe)
    if asks_for(plan, "local"):
        if local is None and models is None and everybody is not None:
            models = trained_alone(plan.task, everybody, range(len(plan.names)), plan.model, plan.recipe)
        if models is not None:
            local = dict(zip(plan.names, models.evaluate(range(len(plan.names))), strict=True))
        result["local"] = by_metric(plan, local) if local is not None else None
    if asks_for(plan, "pooled"):
        if together is None and everybody is not None:
            together = pooled_baseline(plan.task, everybody, plan.model, plan.recipe)
        result["pooled"] = by_metric(plan, dict(zip(plan.names, together, strict=True))) if together is not None else None
    return result, models


def finish_summary(
    plan: Plan,
    *,
    engine: str,
    rounds: int,
    stop_reason: str,
    x_NP: Tensor | None,
    metrics: Mapping[str, Metrics],
    mean_model: Metrics | None,
    mean_model_reason: str | None = None,
    test: Mapping[str, Any] | None = None,
    baselines: Mapping[str, Any],
    bytes_sent: int,
    seconds: Mapping[str, float],
    row_by_row: str | None,
    peak_rss_bytes: int,
    departures: Sequence[Departure] = (),
    started_without: Sequence[str] = (),
) -> dict[str, Any]:
    """summary.json of any runtime."""
    distance = norm = None
    if x_NP is not None:
        shared_NS = plan.layout.shared_of(x_NP)
        mean_P = shared_NS.mean(dim=0)
        distance = consensus_distance(shared_NS)
        norm = float(torch.linalg.vector_norm(mean_P))
    working = math.fsum(seconds.get(part, 0.0) for part in ("train", "wait", "mix"))
    return {
        "experiment": plan.experiment.name,
        "engine": engine,
        "nodes": len(plan.names),
        "rounds": rounds,
        "stop_reason": stop_reason,
        "departures": departure_rows(departures),
        **({"started_without": list(started_without)} if started_without else {}),
        "consensus_distance": distance,
        "relative_consensus": distance / norm if distance is not None and norm else None,
        **({"measured_on": rows_word(plan.experiment.as_dict())} if plan.experiment.validation else {}),
        "metrics": by_metric(plan, metrics),
        "lower_is_better": sorted(plan.task.lower_is_better & set(plan.task.metrics)),
        "mean_model": dict(mean_model) if mean_model is not None else None,
        **({"mean_model_reason": reason} if (reason := mean_model_reason or why_no_mean_model(plan)) is not None else {}),
        **({"test": dict(test)} if test is not None else {}),
        "baselines": dict(baselines),
        "bytes_sent": bytes_sent,
        "seconds": seconds_spent(seconds),
        "node_rounds_per_second": len(plan.names) * rounds / working if working > 0 else None,
        "peak_rss_bytes": peak_rss_bytes,
        "row_by_row": row_by_row,
        "compiled": plan.experiment.compiled,
    }


def non_finite_models(names: Sequence[str], x_NP: Tensor) -> list[Departure]:
    """The departure that some final models hold numbers that are not finite; none where all are finite."""
    if not len(x_NP) or bool(x_NP.sum().isfinite()):
        return []
    bad = [names[row] for row in (~x_NP.isfinite().all(dim=1)).nonzero().flatten().tolist()]
    if not bad:  # large numbers, whose sum alone is too large
        return []
    more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return [Departure(kind="non_finite", detail=f"the final model of {', '.join(bad[:_NAMED])}{more} holds numbers that are not finite")]


def test_figures(
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
            per_node[name] = {metric: figure(plan.task, metric, outputs, targets, site=name) for metric in metrics}
    of_mean = None
    if not isinstance(mean, str):
        inputs, targets = (torch.cat(tensors) for tensors in zip(*aside.values(), strict=True))
        outputs = population.outputs(mean.x_P, inputs, buffers=mean.buffers)
        of_mean = {metric: figure(plan.task, metric, outputs, targets) for metric in metrics}
    return {"use": NOT_FOR_CHOOSING, "metrics": by_metric(plan, per_node), "mean_model": of_mean}


def seconds_spent(parts: Mapping[str, float]) -> dict[str, float]:
    """The summary's `seconds`: every part in the order of time, those that all runs have among them, and their total."""
    missing = [name for name in ("setup", "train", "mix", "evaluate") if name not in parts]
    return {**dict.fromkeys(missing, 0.0), **parts, "total": math.fsum(parts.values())}


def by_metric(plan: Plan, per_node: Mapping[str, Metrics]) -> dict[str, Any]:
    """Each metric's mean, least and largest over the nodes, and every node's."""
    return {name: statistics({node: values.get(name) for node, values in per_node.items()}) for name in plan.task.metrics}


def rss_bytes() -> int:
    """The memory that this process holds now; the most that it ever held where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory this process ever held, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process that this one was forked from held
        line = next(line for line in status.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def why_no_mean_model(plan: Plan) -> str | None:
    """The reason why the mean of all nodes' models is no model; None where it is one."""
    personal = plan.layout.personal
    if not personal:
        return None
    return f"{len(personal)} tensors are personal ({personal[0]}{', ...' if len(personal) > 1 else ''}): no node has a mean of them"


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanModel:
    """The mean of all nodes' models, complete."""

    x_P: Tensor
    """Parameters."""

    buffers: Mapping[str, Tensor]
    """Its own: running statistics are computed for it, never a node's."""


def mean_model_of(plan: Plan, x_NP: Tensor, buffers: Mapping[str, Tensor]) -> MeanModel | str:
    """Make the mean of all nodes' models a model, with running statistics that belong to it.

    Args:
        plan: of the run.
        x_NP: every node's parameters.
        buffers: every node's own, (N, ...); empty where the model has none.

    Returns:
        The model, or the reason why there is none.
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
    """Metrics of the mean model on all sites' test rows pooled; None where there is no such model."""
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
    return {name: figure(plan.task, name, outputs, targets) for name in plan.task.metrics}
