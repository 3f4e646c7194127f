"""A task's model, made and tried with its functions on every site here before anything is trained: a misfit shows at once.

Targets are compared with the classes and probabilities that metrics and loss expect on all rows. Functions are called on some: at most
256 test rows and one batch of a site, at up to 1,000 sites that are spread over all (32 of a table of sites; fewer where models are large).
Compiled loops are tried with one step on rows of one site.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from p2pfl.compiled.loader import load_loops, why_no_loops
from p2pfl.draws import Purpose, batch_sizes, torch_seed
from p2pfl.errors import ConfigError, MissingExtraError, TaskError
from p2pfl.params import Layout, parameters_of, sharing_parameters
from p2pfl.tasks import Site, SiteTable, Task
from p2pfl.tasks.broadcasting import pairing_in, watched
from p2pfl.tasks.calling import described, probabilities_of, users_code
from p2pfl.tasks.metrics import CLASSIFICATION, fault_of_classes, unwrapped
from p2pfl.training.backends.compiled import Compiled, tried_on, why_not_compiled
from p2pfl.training.backends.gradients import Gradients, ModelGradients, outputs_of
from p2pfl.training.backends.tracing import chain_or_fault
from p2pfl.training.evaluation import evaluate_metric
from p2pfl.training.local_steps import why_not_plain_sgd
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import MOST_TRIED, of_dtype

_MOST_TEST_ROWS = 256
_MOST_SITES = 1000
_MOST_OF_A_TABLE = 32  # its sites cannot differ in shape
_MOST_PARAMETERS = 2 * 10**9  # of all sites tried; a gradient of so many takes seconds
_MOST_FINDINGS = 10
_IGNORED = -100  # the target that cross entropy leaves out
_OF_CLASSES = (F.cross_entropy, F.nll_loss)
_OF_PROBABILITIES = (F.binary_cross_entropy_with_logits, F.binary_cross_entropy)
_BUILT_IN = frozenset(CLASSIFICATION.values())


def build_model(task: Task, dtype: torch.dtype, seed: int) -> nn.Module:
    """Make the task's model with the start of every node, under the experiment's seed.

    Raises:
        TaskError: it cannot be made, or its parameters are none that can be exchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Purpose.START))
        with users_code(task.name, "model"):
            model: object = task.model()
    fault = None
    if not isinstance(model, nn.Module):
        fault = f"it returned {described(model)}: expected a torch.nn.Module"
    elif any(is_lazy(parameter) for parameter in (*model.parameters(), *model.buffers())):
        fault = "it has lazy layers: expected layers that are told their input's size"
    elif complex_ones := [name for name, parameter in model.named_parameters() if parameter.is_complex()]:
        fault = f"parameter {complex_ones[0]} is complex: expected a floating dtype"
    else:
        model = model.to(dtype)
        try:
            Layout.of(model)
        except ValueError as error:
            fault = str(error)
        else:
            return model
    raise TaskError(fault, task=task.name, function="model")


def dry_run(task: Task, model: nn.Module, batch_size: int | Literal["full"], *, repeating: bool = False) -> Gradients | None:
    """A batch of each site through model, loss and gradient, some of its test rows through model, probabilities and metrics.

    The model, as `build_model` made it, is not changed; a task without rows here passes. Returned is how gradients are computed, which the
    first batch decides; None where nothing trains here.

    Raises:
        ConfigError: a site's start does not fit the model; a function fails, or returns what it must not; targets are none that a metric
            or the loss can take. All findings at once, one sentence for each kind of fault.
    """
    layout = Layout.of(model)
    misfits = [
        f"site {site.name!r}: start has {len(site.start)} parameters, the model has {layout.size}"
        for site in ([] if isinstance(task.sites, SiteTable) else task.sites)
        if site.start is not None and len(site.start) != layout.size
    ]
    if misfits:
        raise ConfigError(_shortened(misfits), f"task {task.name!r}")
    try:
        with users_code(task.name, "copy of the model"):
            model = sharing_parameters(model)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using a target size")  # a finding says it better
            run = _DryRun(task, model, layout, batch_size, repeating=repeating)
            errors = [*run.of_training(), *run.of_evaluation()]
    except TaskError as error:
        errors = [error]
    if errors:
        raise ConfigError(_shortened(_summed_up(errors))) from errors[0].__cause__
    return run.chosen


def why_no_compiled_steps(task: Task, model: nn.Module, recipe: Recipe, gradients: Gradients | None, *, is_asked: bool) -> str | None:
    """Try a recipe's local steps in compiled loops on the rows that are here; returns why they cannot be had, None where they can.

    Args:
        task: rows that are not here cannot qualify.
        model: as `build_model` made it.
        recipe: of the local steps.
        gradients: from `dry_run`; None: chosen here.
        is_asked: whether somebody asks for compiled loops, also without rows.

    Raises:
        MissingExtraError: somebody asks for them, and they are not installed.
    """
    site = next((site for site in task.sites if site.train is not None), None)
    reason = why_not_plain_sgd(recipe) or _why_not_by_layers(task, model, gradients)
    if reason is None and site is None and not is_asked:
        reason = "there are no rows here"
    if reason is None and load_loops("training") is None:
        if is_asked:
            raise MissingExtraError(f"compiled = 'on': {why_no_loops()}")
        reason = why_no_loops()
    if reason is None and site is not None and recipe.local_steps:
        reason = _why_not_on_rows(task, site, model, recipe, gradients)
    return reason


def _why_not_by_layers(task: Task, model: nn.Module, gradients: Gradients | None) -> str | None:
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


def _why_not_on_rows(task: Task, site: Site, model: nn.Module, recipe: Recipe, gradients: Gradients | None) -> str | None:
    """Try a step of compiled loops on a site's rows; returns why they cannot be had."""
    assert task.loss is not None
    assert site.train is not None
    x_1P = parameters_of(model)[None]
    inputs, targets = (of_dtype(part, x_1P.dtype) for part in site.train)
    if gradients is None:
        most = MOST_TRIED if recipe.batch_size == "full" else recipe.batch_size
        gradients = Gradients(model, task.loss, (inputs[:most], targets[:most]), 1, task=task.name, sites=[site.name])
    if gradients.batched is None:
        return "the model's gradients cannot be written out"
    gradient_P, loss, _ = gradients.by_torch.alone(x_1P[0], *tried_on(inputs, targets), {}, site=site.name)
    found = Compiled.of(gradients.batched, x_1P, inputs, targets, expected=(gradient_P, loss))
    return found if isinstance(found, str) else None


def _shortened(findings: Sequence[str]) -> list[str]:
    left = len(findings) - _MOST_FINDINGS
    return [*findings[:_MOST_FINDINGS], *([f"and {left:,} more findings"] if left > 0 else [])]


def _summed_up(errors: Sequence[TaskError]) -> list[str]:
    """One sentence for each function and fault, with the first site and the number of the others."""
    alike: defaultdict[tuple[str | None, str], list[TaskError]] = defaultdict(list)
    for error in errors:
        alike[error.function, error.fault.partition("; it was given")[0]].append(error)
    findings = []
    for some in alike.values():
        others = len({error.site for error in some}) - 1
        more = f"; and {others:,} more site{'s' if others > 1 else ''}" if others else ""
        findings.append(f"{some[0]} (tried before the first round{more})")
    return findings


class _DryRun:
    def __init__(self, task: Task, model: nn.Module, layout: Layout, batch_size: int | Literal["full"], *, repeating: bool) -> None:
        self._task, self._model, self._layout = task, model, layout
        self._batch_size, self._repeating = batch_size, repeating
        most = max(1, min(_MOST_OF_A_TABLE if isinstance(task.sites, SiteTable) else _MOST_SITES, _MOST_PARAMETERS // layout.size))
        number = len(task.sites)
        self._places = range(number) if number <= most else sorted({round(at * (number - 1) / max(most - 1, 1)) for at in range(most)})
        self.chosen: Gradients | None = None
        """How gradients are computed, once a batch has gone well."""
        self._num_outputs: int | None = None
        """How many outputs the model has for each row, once it has been called."""
        self._is_broken = False
        """Whether the model has failed on the first batch."""
        self._watched = {name for name, metric in task.metrics.items() if any(metric is each for each in _BUILT_IN)}
        """Metrics that were watched with at least two rows; those of this package never pair rows."""
        self._compared = {name for name, metric in task.metrics.items() if unwrapped(metric) in _BUILT_IN}
        """Metrics whose figure was compared with that for equal shapes; built-in ones need none."""

    def of_training(self) -> Iterator[TaskError]:
        """Faults of batches and training targets."""
        if self._task.loss is None:
            return
        gradients: ModelGradients | None = None
        tried, is_watched = set(), False
        for site in self._some():
            if site.train is None:
                continue
            try:
                batch = self._batch(site.train)
                if gradients is None:
                    gradients = self._gradients(batch, site.name)
                else:
                    gradients.try_on(batch, site.name)
                if not is_watched and len(batch[0]) > 1:  # of one row nothing shows that all pairs are taken
                    is_watched = True
                    if (fault := self._pairing_in_loss(gradients, batch, site.name)) is not None:
                        yield fault
                        return
            except TaskError as error:
                yield error
                tried.add(site.name)
                if gradients is None:  # a model or a loss that does not take these shapes fails at every site
                    self._is_broken = error.function == "model"
                    return
        yield from self._of_targets("train", self._fault_for_loss(), "loss", tried)

    def of_evaluation(self) -> Iterator[TaskError]:
        """Faults of outputs, metrics and test targets."""
        if self._is_broken or (isinstance(self._task.sites, SiteTable) and self._task.sites.test is None):
            return
        tried = set()
        for site in self._some():
            if site.test is not None:
                for error in self._evaluated(site):
                    yield error
                    tried.add(site.name)
            if site.set_aside is not None and site.name not in tried:
                for error in self._evaluated(replace(site, test=site.set_aside, set_aside=None, test_patients=None)):
                    yield error
                    tried.add(site.name)
        classes = [name for name, metric in self._task.metrics.items() if unwrapped(metric) in _BUILT_IN]
        if classes and self._num_outputs is not None:
            number = max(self._num_outputs, 2)
            yield from self._of_targets("test", lambda targets: fault_of_classes(targets, number), f"metric {classes[0]!r}", tried)

    def _some(self) -> Iterator[Site]:
        return (self._task.sites[place] for place in self._places)

    def _batch(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = rows
        # spread over the table, which may be sorted by class
        size = int(batch_sizes(torch.tensor([len(inputs)]), self._batch_size, repeating=self._repeating))
        places_B = torch.linspace(0, len(inputs) - 1, min(len(inputs), size)).long()
        places_B = places_B[torch.arange(size) % len(places_B)]
        return of_dtype(inputs[places_B], self._layout.dtype), of_dtype(targets[places_B], self._layout.dtype)

    def _gradients(self, batch: tuple[Tensor, Tensor], site: str) -> ModelGradients:
        """How gradients are computed, tried on one batch."""
        task = self._task
        assert task.loss is not None
        gradients = ModelGradients(self._model.train(), task.loss, 1, task.name, [site])
        gradients.try_on(batch, site)
        outputs = gradients.outputs_on(batch[0], site)
        if outputs.dim() == 2 or outputs.dim() == 1:  # noqa: PLR2004
            self._num_outputs = outputs.shape[1] if outputs.dim() == 2 else 1  # noqa: PLR2004
        most = MOST_TRIED if self._batch_size == "full" else len(batch[0])
        sample = batch[0][:most], batch[1][:most]
        self.chosen = Gradients(self._model, task.loss, sample, min(len(task.sites), 2), task=task.name, sites=[site])
        return gradients

    def _pairing_in_loss(self, gradients: ModelGradients, batch: tuple[Tensor, Tensor], site: str) -> TaskError | None:
        """Fault of a loss that takes all pairs of rows in a batch of at least two."""
        task = self._task
        assert task.loss is not None
        outputs, targets = gradients.outputs_on(batch[0], site), batch[1]
        with users_code(task.name, "loss", outputs, targets, site=site), watched(outputs, targets) as watch:
            task.loss(outputs, targets)
        return None if watch.fault is None else TaskError(watch.fault, task=task.name, function="loss", site=site)

    def _fault_for_loss(self) -> Callable[[np.ndarray], str | None]:
        """Check for targets that the loss takes and should not, or takes in no batch but one."""
        loss, number = unwrapped(self._task.loss), self._num_outputs
        if loss in _OF_PROBABILITIES or isinstance(loss, nn.BCEWithLogitsLoss | nn.BCELoss):
            return lambda targets: None if targets.min() >= 0 and targets.max() <= 1 else fault_of_classes(targets, 2)
        if (loss in _OF_CLASSES or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)) and number is not None and number > 1:

            def of_classes(targets: np.ndarray) -> str | None:
                return None if targets.dtype.kind == "f" else fault_of_classes(targets[targets != _IGNORED], number)

            return of_classes
        return lambda _: None

    def _of_targets(self, part: str, fault_of: Callable[[np.ndarray], str | None], function: str, tried: set[str]) -> Iterator[TaskError]:
        """Faults of all sites' targets but those of sites that have shown one already."""
        sites = self._task.sites
        if isinstance(sites, SiteTable) and (len(sites.targets) == 0 or fault_of(sites.targets.numpy().reshape(-1)) is None):
            return
        for site in sites:
            rows = site.train if part == "train" else site.test
            if rows is not None and site.name not in tried and (fault := fault_of(rows[1].numpy().reshape(-1))):
                yield TaskError(fault, task=self._task.name, function=function, site=site.name)

    def _evaluated(self, site: Site) -> Iterator[TaskError]:
        """Faults of the metrics on one site's test rows."""
        assert site.test is not None
        task, num_rows = self._task, len(site.test[0])
        rows = torch.linspace(0, num_rows - 1, min(num_rows, _MOST_TEST_ROWS)).long()
        try:
            outputs, targets = self._outputs(site.name, site.test[0][rows]), site.test[1][rows]
        except TaskError as error:
            yield error
            return
        for name in task.metrics:
            try:
                with watched(outputs, targets) if name not in self._watched else nullcontext() as watch:
                    evaluate_metric(task, name, outputs, targets, site=site.name)
                if len(rows) > 1:  # of one row nothing shows that all pairs are taken
                    self._watched.add(name)
                fault = watch.fault if watch is not None else None
                if fault is None and name not in self._compared and bool((targets != targets.reshape(-1)[:1]).any()):
                    self._compared.add(name)
                    fault = pairing_in(partial(evaluate_metric, task, name, site=site.name), outputs, targets)
                if fault is not None:
                    yield TaskError(fault, task=task.name, function=f"metric {name!r}", site=site.name)
            except TaskError as error:
                if len(rows) == num_rows:
                    yield error
                    continue
                try:  # few rows may lack a class; what is wrong with all of them is wrong
                    evaluate_metric(task, name, self._outputs(site.name, site.test[0]), site.test[1], site=site.name)
                except TaskError as also:
                    yield also

    def _outputs(self, site: str, inputs: Tensor) -> Tensor:
        """In evaluation mode, one row for each row of the inputs."""
        task, inputs = self._task, of_dtype(inputs, self._layout.dtype)
        with users_code(task.name, "model", inputs, site=site):
            outputs = outputs_of(self._model, parameters_of(self._model), {}, inputs)
        if outputs.dim() == 0 or len(outputs) != len(inputs):
            fault = f"it returned {described(outputs)} for {described(inputs)}: expected as many rows"
            raise TaskError(fault, task=task.name, function="model", site=site)
        if task.probabilities is not None:
            probabilities_of(task, outputs, site=site)
        if self._num_outputs is None:
            self._num_outputs = outputs.shape[1] if outputs.dim() == 2 else 1  # noqa: PLR2004
        return outputs
