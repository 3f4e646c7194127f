"""The end of a run as its runtime hands it over, and the content of summary.json, alike for every runtime.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from p2pfl.evaluation.mean_model import consensus_distance
from p2pfl.experiment.plan import Plan
from p2pfl.runs.events import Departure, departure_rows
from p2pfl.runs.stopwatch import peak_rss_bytes
from p2pfl.runs.summary_fields import rows_word, statistics
from p2pfl.runs.text import Row
from p2pfl.training import Population

_NAMED = 5

Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalModels:
    """Models at the end of a run, and what evaluates them."""

    names: Sequence[str]
    """Nodes of the rows."""
    x_NP: Tensor
    buffers: Mapping[str, Tensor]
    """Each row's own, (N, ...)."""
    population: Population
    """Rows of these nodes where models have buffers, else any rows of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Everything that only a runtime knows of the end of its run."""

    scope: Literal["network", "gathered", "node"]
    """network: all nodes were computed here. gathered: nodes have written and measured their own models. node: it is one node's own run."""
    engine: str
    rounds: int
    stop_reason: str
    bytes_sent: int
    """By all nodes of the scope."""
    metrics: Mapping[str, Metrics]
    """By node, where it was measured."""
    models: FinalModels | None
    """None: the run has no result."""
    book: Callable[[str], Mapping[str, float]]
    """Books the seconds since the last call under a part of the run, and gives those of all parts."""
    row_by_row: str | None
    peak_rss_bytes: int = 0
    """Most memory that another process of the run held."""
    has_agreed: bool = False
    """Whether the network has agreed to stop."""
    lost: Sequence[str] = ()
    """Nodes without a result."""
    departures: Sequence[Departure] = ()
    """Departures that no event tells of."""
    started_without: Sequence[str] = ()
    cross_site: Mapping[str, Any] | None = None
    """Figures of a node and of the models that its neighbours have sent it; those of a network are computed here."""
    local: Mapping[str, Metrics] | None = None
    """Metrics of each node trained alone; None: computed here."""
    gains: Sequence[Row] | None = None
    """Gains over local training; None: computed here."""
    simulated_s: float | None = None
    """Seconds on the network's virtual clock, where it has one."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further parts of the summary that the runtime alone knows."""


def summary_of(
    plan: Plan,
    outcome: Outcome,
    *,
    mean_model: Metrics | None = None,
    mean_model_reason: str | None = None,
    test: Mapping[str, Any] | None = None,
    baselines: Mapping[str, Any],
    departures: Sequence[Departure],
) -> dict[str, Any]:
    """Put summary.json together; the last of the run's seconds are booked here.

    *test* are figures on test rows that were set aside, *mean_model* those of the mean of all nodes' models.
    """
    distance = norm = None
    if outcome.models is not None and outcome.scope != "node":
        shared_NS = plan.layout.shared_of(outcome.models.x_NP)
        distance, norm = consensus_distance(shared_NS), float(torch.linalg.vector_norm(shared_NS.mean(dim=0)))
    booked = outcome.book("write")
    working = math.fsum(booked.get(part, 0.0) for part in ("train", "wait", "mix"))
    missing = [part for part in ("setup", "train", "mix", "evaluate") if part not in booked]
    seconds = {**dict.fromkeys(missing, 0.0), **booked, "total": math.fsum(booked.values())}
    own_peak_bytes = 0 if outcome.scope == "gathered" else peak_rss_bytes()
    return {
        "experiment": plan.experiment.name,
        "engine": outcome.engine,
        "nodes": len(plan.names),
        "rounds": outcome.rounds,
        "stop_reason": outcome.stop_reason,
        "departures": departure_rows(departures),
        **({"started_without": list(outcome.started_without)} if outcome.started_without else {}),
        "consensus_distance": distance,
        "relative_consensus": distance / norm if distance is not None and norm else None,
        **({"measured_on": rows_word(plan.experiment.as_dict())} if plan.experiment.validation else {}),
        "metrics": by_metric(plan, outcome.metrics),
        "lower_is_better": sorted(plan.task.lower_is_better & set(plan.task.metrics)),
        "mean_model": dict(mean_model) if mean_model is not None else None,
        **({"mean_model_reason": mean_model_reason} if mean_model_reason is not None else {}),
        **({"test": dict(test)} if test is not None else {}),
        "baselines": dict(baselines),
        "bytes_sent": outcome.bytes_sent,
        "seconds": seconds | ({"simulated": outcome.simulated_s} if outcome.simulated_s is not None else {}),
        "node_rounds_per_second": len(plan.names) * outcome.rounds / working if working > 0 else None,
        "peak_rss_bytes": max(outcome.peak_rss_bytes, own_peak_bytes),
        "row_by_row": outcome.row_by_row,
        "compiled": plan.experiment.compiled,
        **outcome.more,
    }


def non_finite_models(names: Sequence[str], x_NP: Tensor) -> list[Departure]:
    """Departure for final models with numbers that are not finite; none where all are finite."""
    if not len(x_NP) or bool(x_NP.sum().isfinite()):
        return []
    bad = [names[row] for row in (~x_NP.isfinite().all(dim=1)).nonzero().flatten().tolist()]
    if not bad:  # large numbers, whose sum alone is too large
        return []
    more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return [Departure(kind="non_finite", detail=f"the final model of {', '.join(bad[:_NAMED])}{more} holds numbers that are not finite")]


def by_metric(plan: Plan, per_node: Mapping[str, Metrics]) -> dict[str, Any]:
    """Summarise each metric over the nodes: mean, least, largest and every node's."""
    return {name: statistics({node: values.get(name) for node, values in per_node.items()}) for name in plan.task.metrics}
