"""Plan of a run: an experiment made ready, its task loaded, with rows, graph, model and rule, the same for every runtime."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.algorithms import AGGREGATORS, ALGORITHMS, COMPRESSORS, Algorithm, Guard, PartlyShared
from p2pfl.algorithms.stopping import StopRule, TimeVaryingBound
from p2pfl.errors import ConfigError, ConflictError, TaskError
from p2pfl.experiment.graph import agreeing_on, build_schedule, extremes_for_bounds, record_of, stop_rule
from p2pfl.experiment.requirements import faults_of_batches, unmet_requirements
from p2pfl.experiment.spec import Experiment
from p2pfl.experiment.table_files import faults_of_own_arguments
from p2pfl.params import Layout, digest_of
from p2pfl.privacy import MECHANISMS
from p2pfl.runs.rows import BoundRule
from p2pfl.tasks import TABLE, Site, SitesByName, SiteTable, Task, find_task, hold_out_everywhere, make_task, partition
from p2pfl.topology import Schedule, Topology
from p2pfl.training import Population, Recipe, build_model, dry_run
from p2pfl.training.backends.gradients import Gradients
from p2pfl.training.dry_run import why_no_compiled_steps
from p2pfl.yaml_files import check


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The common start of every runtime: nodes, rows, graph, model and rule."""

    experiment: Experiment
    task: Task
    names: tuple[str, ...]
    """Names of all nodes, sorted: row i of the population is names[i]."""
    sites: Mapping[str, Site]
    """Sites whose data are here, by name."""
    topology: Topology
    """The union of all rounds' graphs: the graph itself where it stays as it is."""
    schedule: Schedule
    """The graph of each round."""
    model: nn.Module
    """The model in the population's dtype, with the start that all share."""
    layout: Layout
    """The model's flat parameter vector, with digests of the frozen values."""
    recipe: Recipe
    gradients: Gradients | None
    """How gradients are computed, as the dry run has decided; None where nothing trains here."""
    stop_rule: StopRule | None
    bound_rule: BoundRule
    """The rule for when a round's numbers bound the network's disagreement."""
    samples: Mapping[str, int] | None
    """Training rows of every node, for `weighting: samples`; None: uniform."""
    first_buffers: Mapping[str, Tensor] | None = None
    """Buffers of the model at the start that all share, where this site's own have taken their place; None: the model's."""

    @cached_property
    def start_digest(self) -> str:
        """SHA-256 of the parameters that all nodes start from, computed once: a large model takes seconds."""
        return digest_of(*(p for p in self.model.parameters() if p.requires_grad))

    @cached_property
    def undirected(self) -> Topology:
        """The graph of who ever exchanges with whom, each edge in both directions."""
        return self.topology.undirected()

    @cached_property
    def guard(self) -> Guard:
        """The bound that every node puts on the norms of its neighbours' updates."""
        start = (p for p in self.model.parameters() if p.requires_grad)
        return Guard.of(self.recipe.algorithm, self.layout, start, len(self.names))

    def neighbours(self, name: str) -> list[str]:
        """Names of all nodes that a node ever sends to or receives from, sorted."""
        return [self.names[j] for j in self.undirected.neighbours(self.names.index(name))]

    def weights_by_age(self, weights: Mapping[str, float], ages: Mapping[str, int]) -> dict[str, float]:
        """Weights w_ij by neighbour of messages that have been merged so often before; running sums and differences do not age."""
        if any(channel.missing != "own" for channel in self.recipe.algorithm.channels.values()):
            return dict(weights)
        staleness = self.experiment.pace.staleness
        return {name: weights[name] * float((1 + age) ** -staleness) for name, age in ages.items()}

    def time_varying_bound(self, names: Sequence[str]) -> TimeVaryingBound | None:
        """The bound that the stop rule needs at some nodes where the graph changes; None where it stays as it is."""
        if self.stop_rule is None or self.schedule.is_steady:
            return None
        num_neighbours_N = np.array([len(self.neighbours(name)) for name in names])
        return TimeVaryingBound(window=self.stop_rule.window, num_neighbours_N=num_neighbours_N)

    def population(self, names: Sequence[str], device: torch.device | str = "cpu") -> Population:
        """Make the population of some nodes, its rows in the order given."""
        return self.rows(names)(device=device)

    def rows(self, names: Sequence[str], *, all_slots: bool = False) -> Callable[..., Population]:
        """Lay out the population of some nodes, to be made on a device; *all_slots*: as many fixed slots as any node has at most."""
        total = sum(self.samples.values()) if self.samples else 0
        scale = [len(self.names) * self.samples[name] / total for name in names] if self.samples else None
        everybody = tuple(names) == self.names
        number_of = {name: number for number, name in enumerate(self.names)} if len(names) > 1 else {}
        numbers = range(len(names)) if everybody else [number_of.get(name, -1) if number_of else self.names.index(name) for name in names]
        sites: Sequence[Site]
        if isinstance(self.sites, SitesByName) and len(names) > 1 and self.sites.table.names == self.names:
            sites = self.sites.table if everybody else self.sites.table.take(numbers)
        else:
            sites = [self.sites[name] for name in names]
        how = self.model, self.recipe, self.gradients
        return partial(Population, self.task, sites, numbers, *how, loss_scale=scale, slots_NK=self.slots(numbers, all_slots=all_slots))

    def slots(self, numbers: Sequence[int], *, all_slots: bool = False) -> Tensor | None:
        """Neighbours of some nodes for a rule that requires fixed slots; see Context."""
        if "fixed slots" not in self.recipe.algorithm.requires:
            return None
        index_NK, _, linked_NK = self.undirected.with_weights(0.0).padded()
        index_NK, linked_NK = index_NK[list(numbers)], linked_NK[list(numbers)]
        # one node's own slots have no padding for others' neighbours
        most = linked_NK.shape[1] if all_slots else int(linked_NK.sum(axis=1).max())
        return torch.from_numpy(np.where(linked_NK, index_NK, -1)[:, :most])

    def graph_record(self) -> dict[str, Any]:
        """Describe the graph as the run folder's topology.json holds it."""
        return record_of(self.topology, self.names)


def load_sites(
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    allow_tasks: Collection[str] = (),
    site_file: Path | None = None,
) -> Task:
    """Load the experiment's task with the sites whose data are here, partitioned and held out as it says, sorted by name.

    Args:
        experiment: what to train on.
        overrides: a site's own arguments of the task, such as paths.
        allow_tasks: tasks that may run here beside the built-in ones, as distribution:entry or module:function.
        site_file: a node's own site.yaml, whose table a table task reads; None: the files that the experiment names.

    Raises:
        TaskNotAllowed: the task is not among them; nothing of it has been imported.
        ConfigError: the task is unknown or refuses its arguments.
    """
    arguments = {**experiment.task.options, **(overrides or {})}
    if experiment.task.name == TABLE and site_file is not None:
        if faults := list(faults_of_own_arguments(overrides or {})):
            raise ConfigError(faults, str(site_file))
        arguments["site_file"] = str(site_file)
    function = find_task(experiment.task.name, allow_tasks)
    accepted = inspect.signature(function).parameters
    split = {"name": experiment.partition.name, **experiment.partition.options}
    from_experiment: dict[str, Any] = {"seed": experiment.seed, "nodes": experiment.nodes, "partition": split}
    for key, value in from_experiment.items():
        if key in accepted and key not in arguments and value is not None:
            arguments[key] = value
    task = make_task(experiment.task.name, function, arguments)
    if experiment.nodes is not None and "nodes" not in accepted:
        task = partition(task, experiment.nodes, split, experiment.seed)
    sites = hold_out_everywhere(task.sites, experiment.validation, experiment.seed) if experiment.validation else task.sites
    if isinstance(sites, SiteTable):  # sorted, and not to be made one by one
        return task if sites is task.sites else replace(task, sites=sites)
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
        ConflictError: all of it is right by itself, and wrong together.
    """
    every_name = tuple(sorted(names)) if names is not None else names_of(task.sites)
    if not every_name and experiment.task.name == TABLE:
        raise ConfigError("task.sites: required, but missing: the files of the sites to simulate, such as [a/site.yaml, b/site.yaml]")
    if len(every_name) < 2:  # noqa: PLR2004
        raise ConfigError(f"nodes = {len(every_name)}: a network needs at least 2")
    here = task.sites.by_name() if isinstance(task.sites, SiteTable) else {site.name: site for site in task.sites}
    counts = samples if samples is not None else counts_of(task.sites)
    schedule = build_schedule(experiment, every_name, topology, counts)
    experiment = agreeing_on(experiment, schedule)
    rule, endless = None, list[str]()
    try:
        rule = stop_rule(experiment, schedule)
    except ConflictError as error:
        endless += error.findings
    extremes = extremes_for_bounds(experiment, schedule)
    algorithm = build_algorithm(experiment)
    faults, conflicts = unmet_requirements(experiment, algorithm, schedule, every_name)
    faults += faults_of_batches(experiment, task)
    if experiment.rounds and task.loss is not None and experiment.algorithm.local_steps and not any(site.train for site in task.sites):
        faults.append(f"task {task.name}: none of its sites here has training rows")
    if experiment.weighting == "samples" and not sum(counts.values()):
        faults.append("weighting = 'samples': none of the sites has training rows; take uniform")
    conflicts += endless
    if faults:
        raise ConfigError([*conflicts, *faults])
    if conflicts:
        raise ConflictError(conflicts)
    try:
        model = build_model(task, getattr(torch, experiment.dtype or task.dtype), experiment.seed)
    except TaskError as error:
        raise ConfigError(f"{error} (tried before the first round)") from error.__cause__
    gradients = dry_run(task, model, experiment.algorithm.batch_size, repeating=experiment.schema == 1)
    experiment, recipe, layout = resolve_recipe(experiment, algorithm, task, model, gradients)
    graph, sends, in_step = schedule.union(), recipe.algorithm.model_channel is not None, experiment.pace.kind.in_step
    is_constant = schedule.period == 1
    bounds = BoundRule(num_nodes=graph.num_nodes, sends_models=sends, in_step=in_step, is_constant=is_constant, extremes=extremes)
    return Plan(
        experiment=experiment,
        task=task,
        names=every_name,
        sites=here,
        topology=graph,
        schedule=schedule,
        model=model,
        layout=layout,
        recipe=recipe,
        gradients=gradients,
        stop_rule=rule,
        bound_rule=bounds,
        samples=counts if experiment.weighting == "samples" else None,
    )


def build_algorithm(experiment: Experiment) -> Algorithm:
    """Build the algorithm that an experiment names, with the compressor that it takes."""
    make_algorithm: Any = ALGORITHMS[experiment.algorithm.name]
    make_compressor: Any = COMPRESSORS[experiment.compressor.name]
    algorithm: Algorithm = check(make_algorithm, experiment.algorithm.options, "algorithm")
    return algorithm.with_compressor(check(make_compressor, experiment.compressor.options, "compressor")) or algorithm


def resolve_recipe(
    experiment: Experiment, algorithm: Algorithm, task: Task, model: nn.Module, gradients: Gradients | None = None
) -> tuple[Experiment, Recipe, Layout]:
    """Make the recipe and the layout, and write on or off into an experiment that says `compiled: auto`.

    What earlier versions resolved stays as it is. Rows that are not here cannot qualify.

    Raises:
        ConfigError: `compiled: on` asks for what this model, these rows or this machine cannot have; or `personal` names no parameter
            that trains, or all of them.
    """
    try:
        layout = Layout.of(model, personal=experiment.personal, with_values=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    private = experiment.privacy
    recipe = Recipe(
        algorithm=PartlyShared(algorithm, layout) if layout.personal else algorithm,
        optimizer=experiment.optimizer,
        batch_size=experiment.algorithm.batch_size,
        repeats_rows=experiment.schema == 1,
        rounds=experiment.rounds,
        local_steps=experiment.algorithm.local_steps,
        seed=experiment.seed,
        aggregator=check(AGGREGATORS[experiment.aggregator.name], experiment.aggregator.options, "aggregator"),
        mechanism=check(MECHANISMS[private.name], private.options, "privacy") if private is not None else None,
    )
    if experiment.compiled == "off" or (experiment.compiled == "auto" and experiment.schema == 1):
        return experiment, recipe, layout
    reason = why_no_compiled_steps(task, model, recipe, gradients, is_asked=experiment.compiled == "on")
    if reason is None:
        return replace(experiment, compiled="on"), replace(recipe, compiled=True), layout
    if experiment.compiled == "on":
        raise ConfigError(f"compiled = 'on': {reason}; take off, or auto")
    return replace(experiment, compiled="off"), recipe, layout


def names_of(sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of all sites, in their order."""
    return sites.names if isinstance(sites, SiteTable) else tuple(site.name for site in sites)


def counts_of(sites: Sequence[Site]) -> dict[str, int]:
    """Numbers of training rows by site."""
    if isinstance(sites, SiteTable):
        return dict(zip(sites.names, sites.train.starts.diff().tolist(), strict=True))
    return {site.name: len(site.train[0]) if site.train else 0 for site in sites}
