"""An experiment made ready to run: task, rows, graph, model and rule, the same for every runtime."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from p2pfl.errors import ConfigError, TaskError
from p2pfl.experiment import Experiment, news_rounds
from p2pfl.params import Layout, digest_of, parameters_of
from p2pfl.stopping import StopRule
from p2pfl.tasks import Site, Task, find_task, hold_out, load_task, partition
from p2pfl.topology import Topology, describe, laplacian_extremes
from p2pfl.training import Population, Recipe, build_model, try_out

_EDGES_LISTED_UP_TO = 1000  # nodes; a larger graph is made again from the experiment where somebody needs it


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What every runtime starts from."""

    experiment: Experiment
    task: Task
    names: tuple[str, ...]
    """Of all nodes, sorted: row i of the population is names[i]."""
    sites: Mapping[str, Site]
    """Those whose data are here."""
    topology: Topology
    model: nn.Module
    """Of the population's dtype, with the start that all share."""
    recipe: Recipe
    stop_rule: StopRule | None
    samples: Mapping[str, int] | None
    """Training rows of every node, for `weighting: samples`; None: uniform."""

    @property
    def layout(self) -> Layout:
        """Of the flat parameter vector."""
        return Layout.of(self.model)

    @property
    def start_digest(self) -> str:
        """SHA-256 of the common start."""
        return digest_of(parameters_of(self.model))

    def population(self, names: Sequence[str], device: torch.device | str = "cpu") -> Population:
        """The rows of some nodes, in the order given."""
        total = sum(self.samples.values()) if self.samples else 0
        scale = [len(self.names) * self.samples[name] / total for name in names] if self.samples else None
        sites = [self.sites[name] for name in names]
        numbers = [self.names.index(name) for name in names]
        return Population(self.task, sites, numbers, self.model, self.recipe, loss_scale=scale, device=device)

    def graph_record(self) -> dict[str, Any]:
        """What the run folder's topology.json holds."""
        lambda_2, lambda_max = laplacian_extremes(self.topology)
        spectrum = describe(self.topology)
        weights = self.topology.weights
        assert weights is not None
        edges = None
        if len(self.names) <= _EDGES_LISTED_UP_TO:
            edges = [[int(i), int(j), float(w)] for i, j, w in zip(self.topology.senders, self.topology.receivers, weights, strict=True)]
        return {
            "nodes": list(self.names),
            "edges": edges,
            "lambda_2": spectrum["lambda_2"],
            "lambda_min": spectrum["lambda_min"],
            "laplacian_lambda_2": float(lambda_2),
            "laplacian_lambda_max": float(lambda_max),
            "diameter": news_rounds(self.topology),
        }


def load_sites(experiment: Experiment, overrides: Mapping[str, Any] | None = None) -> Task:
    """The experiment's task with the sites whose data are here, partitioned and held out as the experiment says, sorted by name.

    Args:
        experiment: what to train on.
        overrides: a site's own arguments of the task, such as paths.

    Raises:
        ConfigError: the task is unknown or refuses its arguments.
    """
    arguments = {**experiment.task.options, **(overrides or {})}
    accepted = inspect.signature(find_task(experiment.task.name)).parameters
    split = {"name": experiment.partition.name, **experiment.partition.options}
    from_experiment: dict[str, Any] = {"seed": experiment.seed, "nodes": experiment.nodes, "partition": split}
    for key, value in from_experiment.items():
        if key in accepted and key not in arguments and value is not None:
            arguments[key] = value
    task = load_task(experiment.task.name, **arguments)
    if experiment.nodes is not None and "nodes" not in accepted:
        task = partition(task, experiment.nodes, split, experiment.seed)
    sites = [hold_out(site, experiment.validation, experiment.seed) if experiment.validation else site for site in task.sites]
    return replace(task, sites=sorted(sites, key=lambda site: site.name))


def make_plan(
    experiment: Experiment,
    task: Task,
    *,
    names: Sequence[str] | None = None,
    topology: Topology | None = None,
    samples: Mapping[str, int] | None = None,
) -> Plan:
    """Check that an experiment can run on a task's sites, and build what it runs on.

    Args:
        experiment: as the file says.
        task: from `load_sites`.
        names: all nodes, where not all data are here; None: the task's sites.
        topology: the study's graph; None: the experiment's.
        samples: training rows of all nodes, where not all data are here.

    Raises:
        ConfigError: all that cannot be, at once; or what the task's functions fail at, tried on a batch.
    """
    every_name = tuple(sorted(names)) if names is not None else tuple(site.name for site in task.sites)
    if len(every_name) < 2:  # noqa: PLR2004
        raise ConfigError(f"nodes = {len(every_name)}: a network needs at least 2")
    graph = topology if topology is not None else experiment.build_topology(every_name)
    algorithm = experiment.algorithm.build()
    faults = []
    if graph.directed and (experiment.stop is not None):
        faults.append("topology: a directed graph; agreeing to stop needs an undirected one, or stop: null")
    if graph.directed and "symmetric" in algorithm.requires:
        faults.append(f"topology: a directed graph; algorithm {experiment.algorithm.name} needs a symmetric one")
    if experiment.rounds and task.loss is not None and experiment.algorithm.local_steps and not any(site.train for site in task.sites):
        faults.append(f"task {task.name}: none of its sites here has training rows")
    if faults:
        raise ConfigError(faults)
    here = {site.name: site for site in task.sites}
    if experiment.weighting == "samples" and samples is None:
        samples = {name: len(site.train[0]) if site.train else 0 for name, site in here.items()}
    dtype = getattr(torch, experiment.dtype or task.dtype)
    try:
        model = build_model(task, dtype, experiment.seed)
        try_out(task, model, experiment.algorithm.batch_size)
    except TaskError as error:
        raise ConfigError(f"{error} (tried before the first round)") from error.__cause__
    return Plan(
        experiment=experiment,
        task=task,
        names=every_name,
        sites=here,
        topology=graph,
        model=model,
        recipe=Recipe(
            algorithm=algorithm,
            optimizer=experiment.optimizer,
            batch_size=experiment.algorithm.batch_size,
            rounds=experiment.rounds,
            local_steps=experiment.algorithm.local_steps,
            seed=experiment.seed,
        ),
        stop_rule=experiment.stop_rule(graph) if experiment.stop else None,
        samples=samples if experiment.weighting == "samples" else None,
    )
