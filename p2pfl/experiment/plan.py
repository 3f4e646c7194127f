"""An experiment made ready to run: task, rows, graph, model and rule, the same for every runtime."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from p2pfl.algorithms import DPSGD, Algorithm, Guard, PartlyShared
from p2pfl.algorithms.stopping import Meetings, StopRule
from p2pfl.errors import ConfigError, ConflictError, MissingExtraError, TaskError, TopologyError, some
from p2pfl.experiment.loading import Experiment, news_rounds
from p2pfl.params import Layout, digest_of
from p2pfl.runs.rows import BoundRule
from p2pfl.tasks import Site, SitesByName, SiteTable, Task, find_task, hold_out_everywhere, make_task, partition
from p2pfl.topology import Schedule, Topology, check_connected, describe, is_spectrum_quick, laplacian_extremes
from p2pfl.training import Population, Recipe, build_model, try_out
from p2pfl.training.backends.compiled import LOOPS, compiled_loops, why_no_loops, why_not_compiled

_EDGES_LISTED_UP_TO = 1000  # nodes; a larger graph is made again from the experiment where somebody needs it

_ROUNDING = 1e-12


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
    """Everybody who ever exchanges with whom: the graph itself where it stays as it is."""
    schedule: Schedule
    """The graph of each round."""
    model: nn.Module
    """Of the population's dtype, with the start that all share."""
    recipe: Recipe
    stop_rule: StopRule | None
    samples: Mapping[str, int] | None
    """Training rows of every node, for `weighting: samples`; None: uniform."""

    @cached_property
    def layout(self) -> Layout:
        """Describe the flat parameter vector, with digests of the frozen values."""
        return Layout.of(self.model, personal=self.experiment.personal, with_values=True)

    @cached_property
    def bound_rule(self) -> BoundRule:
        """When a round's numbers bound the network's disagreement."""
        return BoundRule.of(
            self.topology,
            sends_models=any(channel.model for channel in self.recipe.algorithm.channels.values()),
            in_step=self.experiment.pace.name == "synchronous",
            is_constant=self.schedule.period == 1,
        )

    @property
    def start_digest(self) -> str:
        """SHA-256 of the common start."""
        return digest_of(*(p for p in self.model.parameters() if p.requires_grad))

    @cached_property
    def guard(self) -> Guard:
        """What every node bounds the norms of its neighbours' updates by."""
        start = (p for p in self.model.parameters() if p.requires_grad)
        return Guard.of(self.recipe.algorithm, self.layout, start, len(self.names))

    def neighbours(self, name: str) -> list[str]:
        """Everybody whom a node ever sends to or hears from, sorted."""
        links = links_between(self.topology)
        return [self.names[j] for j in links.neighbours(self.names.index(name))]

    def weights_by_age(self, weights: Mapping[str, float], ages: Mapping[str, int]) -> dict[str, float]:
        """w_ij by neighbour, of messages that have been merged so often before; running sums and differences do not age."""
        if any(channel.missing != "own" for channel in self.recipe.algorithm.channels.values()):
            return dict(weights)
        return {name: weights[name] * self.experiment.pace.share(age) for name, age in ages.items()}

    def meetings(self, names: Sequence[str]) -> Meetings | None:
        """What the stop rule has to remember for some nodes; None where the graph stays as it is."""
        if self.stop_rule is None or (self.schedule.period == 1 and not self.schedule.directed):
            return None
        links_N = np.array([len(self.neighbours(name)) for name in names])
        return Meetings(window=self.stop_rule.window, links_N=links_N)

    def population(self, names: Sequence[str], device: torch.device | str = "cpu", *, all_slots: bool = False) -> Population:
        """The rows of some nodes, in the order given.

        Args:
            names: of the nodes.
            device: where they are computed.
            all_slots: fixed slots are as many as the network's nodes have at most, and not these nodes.
        """
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
        slots_NK = None
        if "fixed slots" in self.recipe.algorithm.requires:
            index_NK, _, linked_NK = links_between(self.topology).with_weights(0.0).padded()
            index_NK, linked_NK = index_NK[list(numbers)], linked_NK[list(numbers)]
            most = (
                linked_NK.shape[1] if all_slots else int(linked_NK.sum(axis=1).max())
            )  # one node's own slots have no padding for others' neighbours
            slots_NK = torch.from_numpy(np.where(linked_NK, index_NK, -1)[:, :most])
        return Population(self.task, sites, numbers, self.model, self.recipe, loss_scale=scale, device=device, slots_NK=slots_NK)

    def graph_record(self) -> dict[str, Any]:
        """What the run folder's topology.json holds."""
        quick = is_spectrum_quick(self.topology)
        lambda_2, lambda_max = laplacian_extremes(self.topology) if quick else (None, None)
        spectrum = describe(self.topology) if quick else {"lambda_2": None, "lambda_min": None}
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
            "laplacian_lambda_2": lambda_2,
            "laplacian_lambda_max": lambda_max,
            "diameter": news_rounds(self.topology) if quick else None,
        }


def load_sites(experiment: Experiment, overrides: Mapping[str, Any] | None = None, *, allow_tasks: Collection[str] = ()) -> Task:
    """The experiment's task with the sites whose data are here, partitioned and held out as the experiment says, sorted by name.

    Args:
        experiment: what to train on.
        overrides: a site's own arguments of the task, such as paths.
        allow_tasks: tasks that may run here beside the built-in ones, as distribution:entry or module:function.

    Raises:
        TaskNotAllowed: the task is not among them; nothing of it has been imported.
        ConfigError: the task is unknown or refuses its arguments.
    """
    arguments = {**experiment.task.options, **(overrides or {})}
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
    if len(every_name) < 2:  # noqa: PLR2004
        raise ConfigError(f"nodes = {len(every_name)}: a network needs at least 2")
    here = task.sites.by_name() if isinstance(task.sites, SiteTable) else {site.name: site for site in task.sites}
    counts = samples if samples is not None else counts_of(task.sites)
    schedule = experiment.build_schedule(every_name, topology, counts)
    experiment = experiment.agreeing_on(schedule)
    graph = schedule.union()
    algorithm = experiment.build_algorithm()
    conflicts = _conflicts(experiment, algorithm, schedule)
    known = f"one of {some(every_name)}"
    faults = experiment.require.faults(len(every_name))
    if (clock := experiment.clock) is not None:
        strangers = sorted(clock.speeds.keys() - set(every_name))
        faults += [f"clock.speeds.{name} = {clock.speeds[name]}: no node of that name; {known}" for name in strangers]
        if experiment.pace.name == "synchronous" and not matches_flows(algorithm, graph):
            conflicts += [
                f"clock.{drop}: on a directed graph nobody can match what did not come; take an undirected one" for drop in clock.drops
            ]
    if experiment.rounds and task.loss is not None and experiment.algorithm.local_steps and not any(site.train for site in task.sites):
        faults.append(f"task {task.name}: none of its sites here has training rows")
    if experiment.weighting == "samples" and not sum(counts.values()):
        faults.append("weighting = 'samples': none of the sites has training rows; take uniform")
    if faults:
        raise ConfigError([*conflicts, *faults])
    if conflicts:
        raise ConflictError(conflicts)
    dtype = getattr(torch, experiment.dtype or task.dtype)
    try:
        model = build_model(task, dtype, experiment.seed)
        layout = _layout(model, experiment)
    except TaskError as error:
        raise ConfigError(f"{error} (tried before the first round)") from error.__cause__
    try_out(task, model, experiment.algorithm.batch_size, repeating=experiment.schema == 1)
    recipe = settled_recipe(experiment, algorithm, task, model, layout)
    experiment = settled(experiment, recipe)
    return Plan(
        experiment=experiment,
        task=task,
        names=every_name,
        sites=here,
        topology=graph,
        schedule=schedule,
        model=model,
        recipe=recipe,
        stop_rule=experiment.stop_rule(schedule),
        samples=counts if experiment.weighting == "samples" else None,
    )


def settled(experiment: Experiment, recipe: Recipe) -> Experiment:
    """The experiment with on or off where it says `compiled: auto`; what earlier versions resolved stays as it is."""
    if experiment.schema == 1 and experiment.compiled == "auto":
        return experiment
    return replace(experiment, compiled="on" if recipe.compiled else "off")


def settled_recipe(experiment: Experiment, algorithm: Algorithm, task: Task, model: nn.Module, layout: Layout) -> Recipe:
    """How an experiment's nodes learn, with the answer to `compiled: auto`; rows that are not here cannot qualify.

    Raises:
        ConfigError: `compiled: on` asks for what this model, these rows or this machine cannot have.
    """
    recipe = Recipe(
        algorithm=PartlyShared(algorithm, layout) if layout.personal else algorithm,
        optimizer=experiment.optimizer,
        batch_size=experiment.algorithm.batch_size,
        repeats_rows=experiment.schema == 1,
        rounds=experiment.rounds,
        local_steps=experiment.algorithm.local_steps,
        seed=experiment.seed,
    )
    if experiment.compiled == "off" or (experiment.compiled == "auto" and experiment.schema == 1):
        return recipe
    site = next((site for site in task.sites if site.train is not None), None)
    reason = recipe.why_not_compiled or _why_not_compiled(task, model)
    if reason is None and site is None and experiment.compiled == "auto":
        reason = "there are no rows here"
    if reason is None and compiled_loops(LOOPS) is None:
        if experiment.compiled == "on":
            raise MissingExtraError(f"compiled = 'on': {why_no_loops()}")
        reason = why_no_loops()
    compiled = replace(recipe, compiled=True)
    if reason is None and site is not None and recipe.local_steps:
        try:
            Population(task, [site], [0], model, replace(compiled, algorithm=DPSGD())).compile()
        except ConfigError as error:
            reason = error.findings[0].removeprefix("compiled = 'on': ").removesuffix("; take off")
    if reason is None:
        return compiled
    if experiment.compiled == "on":
        raise ConfigError(f"compiled = 'on': {reason}; take off, or auto")
    return recipe


def _why_not_compiled(task: Task, model: nn.Module) -> str | None:
    """Why a task's model is not trained in compiled loops on the rows that are here; None where it can be."""
    if task.loss is None:
        return f"the task {task.name} trains nothing"
    dtype = next(model.parameters()).dtype
    if isinstance(task.sites, SiteTable):
        rows = [(task.sites.inputs, task.sites.targets)]
    else:
        rows = [site.train for site in task.sites if site.train is not None and len(site.train[0])]
    kinds = {inputs.dtype for inputs, _ in rows if not inputs.dtype.is_floating_point} or {dtype}
    if len(kinds) > 1:
        return "some sites have whole numbers as inputs and others none"
    return why_not_compiled(model, task.loss, dtype, rows, kinds.pop())


def _layout(model: nn.Module, experiment: Experiment) -> Layout:
    """The model's layout with what stays at its node.

    Raises:
        ConfigError: the experiment's patterns name no parameter that trains, or all of them.
    """
    try:
        return Layout.of(model, personal=experiment.personal)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _conflicts(experiment: Experiment, algorithm: Algorithm, schedule: Schedule) -> list[str]:
    """What the algorithm and the rest of the experiment ask of each other and do not get."""
    name = experiment.algorithm.name
    found = [f"topology.name = {experiment.topology.name!r}: {fault}" for fault in unmet(algorithm, name, schedule)]
    if not algorithm.uses_weights and experiment.weights != "metropolis":
        found.append(f"weights = {experiment.weights!r}: algorithm {name} uses none; leave it out, or take dpsgd")
    if experiment.stop is not None and algorithm.model_channel is None:
        found.append(f"algorithm {name} sends no models that neighbours could compare; it needs stop: null")
    return found


def names_of(sites: Sequence[Site]) -> tuple[str, ...]:
    """Of all sites, in their order."""
    return sites.names if isinstance(sites, SiteTable) else tuple(site.name for site in sites)


def counts_of(sites: Sequence[Site]) -> dict[str, int]:
    """Training rows by name."""
    if isinstance(sites, SiteTable):
        return dict(zip(sites.names, sites.train.starts.diff().tolist(), strict=True))
    return {site.name: len(site.train[0]) if site.train else 0 for site in sites}


def links_between(topology: Topology) -> Topology:
    """The same edges, each in both directions: who has a link to whom."""
    if not topology.directed:
        return topology
    return Topology.from_edges(topology.name, topology.num_nodes, topology.senders, topology.receivers, names=topology.names)


def unmet(algorithm: Algorithm, name: str, schedule: Schedule) -> list[str]:
    """What an algorithm requires of the graphs and does not get, a sentence each."""
    found = []
    needs = algorithm.requires
    if schedule.weighted_mean and "fixed mean" not in needs:  # its one edge for each direction is no fault of the graph
        return [f"weights = 'stationary' have a weighted mean; algorithm {name} needs a plain one: take metropolis, or dpsgd"]
    if "static" in needs and schedule.period != 1:
        found.append(f"changes from round to round; algorithm {name} needs a graph that stays as it is")
    if "symmetric" in needs and schedule.directed:
        found.append(f"a directed graph; algorithm {name} needs a symmetric one")
    graph = schedule.at(0)
    assert graph.weights is not None
    if "complete" in needs and len(graph.senders) != graph.num_nodes * (graph.num_nodes - 1):
        found.append(f"algorithm {name} needs complete")
    if "tree" in needs and (schedule.directed or graph.num_edges != graph.num_nodes - 1 or not _is_connected(graph)):
        found.append(f"{graph.num_edges} edges between {graph.num_nodes} nodes; algorithm {name} needs a tree, such as path or star")
    given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
    taken_N = 1 - graph.self_weights
    # random graphs that do not keep the mean in each round keep it on average
    keeps_mean = schedule.period is None or schedule.weighted_mean or np.allclose(given_N, taken_N, atol=1e-9)
    if needs & {"doubly stochastic", "fixed mean"} and not keeps_mean:
        found.append(
            f"what a node gives is not what it takes; algorithm {name} needs doubly stochastic weights: on this graph use push-sum"
        )
    if "column stochastic" in needs and given_N.max(initial=0.0) >= 1:
        found.append(f"a node gives away all it has; algorithm {name} needs weights: push-sum")
    if "nonnegative weights" in needs:
        found += negative_weights(schedule, f"algorithm {name}")
    return found


def matches_flows(algorithm: Algorithm, union: Topology) -> bool:
    """Whether each side of every edge can take back what the other did not take in, so that messages may stay out."""
    return not algorithm.splits_mass and len(links_between(union).senders) == len(union.senders)


def negative_weights(schedule: Schedule, who: str) -> list[str]:
    """A sentence where a message, a node's own included, may count negatively; for rules that count, sort or bound single messages.

    Args:
        schedule: of the run.
        who: needs weights of 0 or more, such as "aggregator trimmed-mean".
    """
    least = schedule.least_weight()
    return [f"a message may count {least:.3g}; {who} needs weights of 0 or more: take metropolis"] if least < -_ROUNDING else []


def _is_connected(graph: Topology) -> bool:
    try:
        check_connected(graph)
    except TopologyError:
        return False
    return True
