"""What the tests of the simulator share: plans with starts of one's own, runs of them, how far apart models are.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from p2pfl.evaluation.results import Run
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation

QUICK = {"baselines": [], "stop": None, "checkpoint_every": 10**6, "evaluate_every": 10**6}
LOGISTIC = {"task": {"name": "synthetic-logistic", "features": 3, "samples": 12, "heterogeneity": 1.0}, "nodes": 4}


def plan_of(raw, **overrides):
    experiment = experiment_from({**QUICK, **raw}, overrides=overrides)
    return make_plan(experiment, load_sites(experiment))


def run_of(plan, place, faults=None):
    folder = RunFolder.create(place, plan.experiment.as_dict(), topology=plan.graph_record(), engine="simulator")
    Simulation(plan, folder, faults=faults).run()
    return Run(Path(place))


def starting_at(plan, x_NP):
    """The plan with other start vectors."""
    sites = {name: replace(plan.sites[name], start=x_P) for name, x_P in zip(plan.names, x_NP, strict=True)}
    return replace(plan, sites=sites)


def stacked(models):
    return torch.stack([models[name] for name in sorted(models)])


def starts_of(plan):
    return torch.stack([plan.sites[name].start for name in plan.names])


def distance(x_NP):
    return float((x_NP - x_NP.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def drift(before_NP, after_NP):
    """How far the mean has moved, relative to the disagreement at the start."""
    return float((after_NP.mean(dim=0) - before_NP.mean(dim=0)).norm()) / distance(before_NP)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
