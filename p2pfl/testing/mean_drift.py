"""How far faults have moved the mean of all models: what the nodes' local steps added to it, compared with where it is.

Merges are flows over edges and move no mean. Local steps have no history: they are taken again from the models that each node kept of every
round, and what is left of the mean's way is drift.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.errors import P2PFLError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.plan import Plan
from p2pfl.experiment.requirements import matches_flows
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.records import read_run

MOST_BYTES = 2**31
"""Models of all rounds and nodes that are kept for this at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Root mean square, over the coordinates, of the distance between the mean and where it should be."""

    value: float | None
    why: str = ""
    """Why it is not known."""


def why_unknown(plan: Plan) -> str:
    """Why the drift of a run cannot be measured; empty where it can."""
    algorithm, experiment = plan.recipe.algorithm, plan.experiment
    reasons = {
        "nodes at their own pace keep no models of common rounds": not experiment.pace.kind.in_step,
        "the rule's merges are no flows over edges, and keep no mean": not matches_flows(algorithm, plan.topology)
        or not plan.recipe.aggregator.sums_flows,
        "the mean is weighted by the nodes' masses": experiment.weights == "stationary",
    }
    if _trains(plan):
        size_bytes = plan.layout.size_bytes * len(plan.names) * experiment.rounds
        reasons |= {
            "local steps of this rule depend on more than the model": bool(algorithm.local_changes)
            or plan.layout.shared_bytes != plan.layout.size_bytes,
            "noise of private training is in every step": experiment.privacy is not None,
            f"models of every round would take {size_bytes / 2**30:.1f} GiB": size_bytes > MOST_BYTES,
        }
    return next((why for why, holds in reasons.items() if holds), "")


def needs_models(plan: Plan) -> bool:
    """Whether each node has to keep its model of every round for this."""
    return _trains(plan) and not why_unknown(plan)


def measure_drift(plan: Plan, sites: Mapping[str, WatchedNode]) -> Drift:
    """Measure the drift of a run that has ended."""
    if why := why_unknown(plan):
        return Drift(value=None, why=why)
    moved_P = torch.zeros(plan.layout.size, dtype=torch.float64)
    try:
        for name in plan.names:
            moved_P += _unexplained(plan, name, sites[name])
    except (P2PFLError, KeyError) as error:
        return Drift(value=None, why=f"models are missing: {error}")
    return Drift(value=float((moved_P / len(plan.names)).square().mean().sqrt()))


def _trains(plan: Plan) -> bool:
    return plan.task.loss is not None and plan.experiment.rounds > 0 and plan.experiment.algorithm.local_steps > 0


def _unexplained(plan: Plan, name: str, site: WatchedNode) -> Tensor:
    """How far one node's model has moved without its local steps, (P,) float64."""
    population = plan.population([name])
    x_P = population.estimate()[0].clone()
    trained_P, first_P = torch.zeros(plan.layout.size, dtype=torch.float64), x_P.double()
    rows = {int(row["round"]): row for row in read_run(site.run_folder).nodes} if _trains(plan) else {}
    was_there = True
    for number in range(plan.experiment.rounds if rows else 0):
        row = rows.get(number)
        # who jumps away from a round has trained it, and has no row of it
        if row["loss"] is not None if row is not None else was_there:
            population.replace_state({**population.state, "x": x_P[None].clone()})
            population.train(number)
            trained_x_P = population.estimate()[0].clone()
            trained_P += trained_x_P.double() - x_P.double()
            x_P = trained_x_P
        if row is not None:
            x_P = read_models(site.run_folder, number)[name]
        was_there = row is not None
    return read_models(site.run_folder)[name].double() - first_P - trained_P
