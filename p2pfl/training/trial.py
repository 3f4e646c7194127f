"""A task's functions tried once before anything is trained, so that a misfit shows at once and not in the first evaluation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from p2pfl.errors import ConfigError, TaskError
from p2pfl.params import Layout, parameters_of
from p2pfl.tasks import SiteTable, Task
from p2pfl.tasks.calling import described, figure, probabilities_of, users_code
from p2pfl.training.gradients import Gradients, outputs_of
from p2pfl.training.population import of_dtype

_MOST_TEST_ROWS = 256


def try_out(task: Task, model: nn.Module, batch_size: int) -> None:
    """One batch of the first site through model, loss and gradient, some of its test rows through model, probabilities and metrics.

    Args:
        task: what to try; a task without rows here passes.
        model: as `build_model` made it; not changed.
        batch_size: of training.

    Raises:
        ConfigError: a site's start does not fit the model.
        TaskError: a function fails, or returns what it must not.
    """
    layout = Layout.of(model)
    misfits = [
        f"site {site.name!r}: start has {len(site.start)} parameters, the model has {layout.size}"
        for site in ([] if isinstance(task.sites, SiteTable) else task.sites)
        if site.start is not None and len(site.start) != layout.size
    ]
    if misfits:
        raise ConfigError(misfits, f"task {task.name!r}")
    with users_code(task.name, "copy of the model"):
        model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        _try_training(task, model, layout, batch_size)
        _try_evaluation(task, model, layout)


def _try_training(task: Task, model: nn.Module, layout: Layout, batch_size: int) -> None:
    site = next((site for site in task.sites if site.train is not None), None)
    if site is None or site.train is None or task.loss is None:
        return
    inputs, targets = site.train
    rows_B = torch.arange(batch_size) % len(inputs)
    batch = of_dtype(inputs[rows_B], layout.dtype), of_dtype(targets[rows_B], layout.dtype)
    Gradients(model, task.loss, batch, 1, task=task.name, sites=[site.name])


def _try_evaluation(task: Task, model: nn.Module, layout: Layout) -> None:
    if isinstance(task.sites, SiteTable) and task.sites.test is None:
        return
    site = next((site for site in task.sites if site.test is not None), None)
    if site is None or site.test is None:
        return
    num_rows = len(site.test[0])
    # spread over the table, which may be sorted by class
    rows = torch.linspace(0, num_rows - 1, min(num_rows, _MOST_TEST_ROWS)).long()
    outputs, targets = _outputs(task, model, layout, site.name, site.test[0][rows]), site.test[1][rows]
    for name in task.metrics:
        try:
            figure(task, name, outputs, targets, site=site.name)
        except TaskError:
            if len(rows) == num_rows:
                raise
            # few rows may lack a class; what is wrong with all of them is wrong
            figure(task, name, _outputs(task, model, layout, site.name, site.test[0]), site.test[1], site=site.name)


def _outputs(task: Task, model: nn.Module, layout: Layout, site: str, inputs: Tensor) -> Tensor:
    """In evaluation mode, one row for each row of the inputs."""
    inputs = of_dtype(inputs, layout.dtype)
    with users_code(task.name, "model", inputs, site=site):
        outputs = outputs_of(model, parameters_of(model), {}, inputs)
    if outputs.dim() == 0 or len(outputs) != len(inputs):
        fault = f"it returned {described(outputs)} for {described(inputs)}: expected as many rows"
        raise TaskError(fault, task=task.name, function="model", site=site)
    if task.probabilities is not None:
        probabilities_of(task, outputs, site=site)
    return outputs
