"""Conclude a run: its models, figures and summary, written in one place for every runtime.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.evaluation.baselines import baselines_of, baselines_of_node
from p2pfl.evaluation.cross_site import cross_site
from p2pfl.evaluation.gain_over_local import gains_over_local
from p2pfl.evaluation.mean_model import MeanModel, mean_model_metrics, mean_model_of, why_no_mean_model
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.subgroups import subgroups
from p2pfl.evaluation.summary import FinalModels, Metrics, Outcome, by_metric, non_finite_models, summary_of
from p2pfl.experiment.plan import Plan
from p2pfl.params import frozen_of
from p2pfl.runs.events import Departure, departure_rows, departures_of_events
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.summary_fields import NOT_FOR_CHOOSING
from p2pfl.tasks import SitesByName
from p2pfl.training import Population
from p2pfl.training.evaluation import evaluate_metric


def conclude(plan: Plan, folder: RunFolder, outcome: Outcome) -> None:
    """Write what a finished run leaves behind, its summary last.

    Raises:
        StoreError: the disk refuses.
        TaskError: the task's own functions fail.
    """
    outcome.book("evaluate")
    parts: dict[str, Any] = {"baselines": {}, "mean_model_reason": why_no_mean_model(plan)}
    if outcome.models is not None:
        parts = _measured(plan, folder, outcome, outcome.models)
    folder.write_summary(summary_of(plan, outcome, departures=_departures(plan, folder, outcome), **parts))


def note_late_departures(plan: Plan, folder: RunFolder, outcome: Outcome) -> None:
    """Write the departures of events that came after the conclusion into its summary."""
    folder.update_summary({"departures": departure_rows(_departures(plan, folder, outcome))})


def _measured(plan: Plan, folder: RunFolder, outcome: Outcome, models: FinalModels) -> dict[str, Any]:
    """Write models and figures, and give the parts of the summary that are computed from them."""
    names, population, x_NP = models.names, models.population, models.x_NP
    if outcome.scope != "gathered":
        write_models(folder.path, tuple(names), x_NP, plan.layout, models.buffers, frozen=frozen_of(plan.model))
    outcome.book("write")
    mean: MeanModel | str = "this node has one model"
    if outcome.scope != "node":
        mean = f"{', '.join(outcome.lost)} did not finish" if outcome.lost else mean_model_of(plan, x_NP, models.buffers)
    reason = mean if isinstance(mean, str) and outcome.scope != "node" else None
    parts = {"mean_model": mean_model_metrics(plan, mean, population), "mean_model_reason": reason or why_no_mean_model(plan)}
    rows = {name: row for row, name in enumerate(names) if name in outcome.metrics}
    parts["test"] = _on_test_rows(plan, population, x_NP, models.buffers, rows, mean)
    has_all = outcome.scope != "node" and not outcome.lost
    folder.write_found("cross_site", cross_site(plan, population, x_NP) if has_all else outcome.cross_site)
    if len(population.sites) == len(names) or not population.buffers:
        folder.write_found("subgroups", subgroups(plan, population, x_NP, names, mean))
    outcome.book("evaluate")
    if outcome.scope == "node":
        baselines, alone = baselines_of_node(plan, names[0], trains=population.trains)
    else:
        baselines, alone = baselines_of(plan, outcome.local)
    folder.write_found("worth", outcome.gains if outcome.gains is not None else gains_over_local(plan, population, x_NP, names, alone))
    outcome.book("baselines")
    return {**parts, "baselines": baselines}


def _on_test_rows(
    plan: Plan, population: Population, x_NP: Tensor, buffers: Mapping[str, Tensor], rows: Mapping[str, int], mean: MeanModel | str
) -> dict[str, Any] | None:
    """Measure final models on the test rows that were set aside while validation rows stood in their place; None where none were.

    *rows* are the places in *x_NP* of the nodes to measure, each at its own site.
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


def _departures(plan: Plan, folder: RunFolder, outcome: Outcome) -> list[Departure]:
    if outcome.stop_reason == "members_missing":
        return list(outcome.departures)  # of this start only: a later one waits anew
    agreed_from = plan.experiment.rounds if outcome.has_agreed else None
    found = departures_of_events(folder.events(), simulated=outcome.scope == "network", agreed_from=agreed_from)
    models = outcome.models
    return [*outcome.departures, *found, *(non_finite_models(models.names, models.x_NP) if models is not None else ())]
