"""The rules that an experiment names, made from their registries, and the recipe of how its nodes learn by them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from p2pfl.algorithms import AGGREGATORS, ALGORITHMS, COMPRESSORS, Aggregator, Algorithm, PartlyShared
from p2pfl.compiled.loader import load_loops, why_no_loops
from p2pfl.errors import ConfigError, ConflictError, MissingExtraError
from p2pfl.experiment.spec import Experiment
from p2pfl.params import Layout, parameters_of
from p2pfl.privacy import MECHANISMS, Mechanism
from p2pfl.tasks import Site, SiteTable, Task
from p2pfl.training import Recipe
from p2pfl.training.backends.compiled import Compiled, why_not_compiled
from p2pfl.training.backends.gradients import Gradients
from p2pfl.training.backends.tracing import chain_or_fault
from p2pfl.training.local_steps import why_not_plain_sgd
from p2pfl.training.training_data import MOST_TRIED, of_dtype
from p2pfl.yaml_files import check


def build_algorithm(experiment: Experiment) -> Algorithm:
    """Build the algorithm that an experiment names, with the compressor that it takes.

    Raises:
        ConfigError: an option has a value that it cannot have.
        ConflictError: an algorithm that sends full models is given a compressor.
    """
    make_algorithm: Any = ALGORITHMS[experiment.algorithm.name]
    algorithm: Algorithm = check(make_algorithm, experiment.algorithm.options, "algorithm")
    name = experiment.compressor.name
    make_compressor: Any = COMPRESSORS[name]
    compressed = algorithm.with_compressor(check(make_compressor, experiment.compressor.options, "compressor"))
    if compressed is None and name != "none":
        raise ConflictError(f"compressor.name = {name!r}: algorithm {experiment.algorithm.name} takes no compressor; choco does")
    return compressed or algorithm


def build_aggregator(experiment: Experiment) -> Aggregator:
    """Build the aggregator that an experiment names; ConfigError where an option has a value that it cannot have."""
    return check(AGGREGATORS[experiment.aggregator.name], experiment.aggregator.options, "aggregator")


def build_mechanism(experiment: Experiment) -> Mechanism | None:
    """Build the mechanism that an experiment names; None where it names none.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """
    named = experiment.privacy
    return check(MECHANISMS[named.name], named.options, "privacy") if named is not None else None


def algorithm_options(name: object) -> set[str]:
    """Names of the options that an algorithm has of its own; none for an unknown one."""
    rule: Any = ALGORITHMS.get(str(name))
    return {f.name for f in fields(rule)} - {"compressor"} if rule else set()


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
    recipe = Recipe(
        algorithm=PartlyShared(algorithm, layout) if layout.personal else algorithm,
        optimizer=experiment.optimizer,
        batch_size=experiment.algorithm.batch_size,
        repeats_rows=experiment.schema == 1,
        rounds=experiment.rounds,
        local_steps=experiment.algorithm.local_steps,
        seed=experiment.seed,
        aggregator=build_aggregator(experiment),
        mechanism=build_mechanism(experiment),
    )
    if experiment.compiled == "off" or (experiment.compiled == "auto" and experiment.schema == 1):
        return experiment, recipe, layout
    site = next((site for site in task.sites if site.train is not None), None)
    reason = why_not_plain_sgd(recipe) or _why_not_compiled(task, model, gradients)
    if reason is None and site is None and experiment.compiled == "auto":
        reason = "there are no rows here"
    if reason is None and load_loops("training") is None:
        if experiment.compiled == "on":
            raise MissingExtraError(f"compiled = 'on': {why_no_loops()}")
        reason = why_no_loops()
    if reason is None and site is not None and recipe.local_steps:
        reason = _why_not_tried(task, site, model, recipe, gradients)
    if reason is None:
        return replace(experiment, compiled="on"), replace(recipe, compiled=True), layout
    if experiment.compiled == "on":
        raise ConfigError(f"compiled = 'on': {reason}; take off, or auto")
    return replace(experiment, compiled="off"), recipe, layout


def _why_not_compiled(task: Task, model: nn.Module, gradients: Gradients | None) -> str | None:
    """Find why a task's model cannot be trained in compiled loops on the rows that are here; None where it can."""
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
    batched = gradients.batched if gradients is not None else None
    layers = batched.layers if batched is not None else chain_or_fault(model, Layout.of(model).slices())
    return why_not_compiled(layers, task.loss, dtype, rows, kinds.pop())


def _why_not_tried(task: Task, site: Site, model: nn.Module, recipe: Recipe, gradients: Gradients | None) -> str | None:
    """Try compiled loops on a site's rows; returns why they cannot be had. Without gradients the model is tried, too."""
    assert task.loss is not None
    assert site.train is not None
    x_1P = parameters_of(model)[None]
    inputs, targets = (of_dtype(part, x_1P.dtype) for part in site.train)
    if gradients is None:
        most = MOST_TRIED if recipe.batch_size == "full" else recipe.batch_size
        gradients = Gradients(model, task.loss, (inputs[:most], targets[:most]), 1, task=task.name, sites=[site.name])
    if gradients.batched is None:
        return "the model's gradients cannot be written out"
    found = Compiled.of(gradients.batched, x_1P, inputs, targets)
    return found if isinstance(found, str) else None
