"""Evaluation of a population's models: outputs, and a task's metrics on sites' test rows.

Shapes: N rows, C of them, B examples, P parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby, islice, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.errors import TaskError
from p2pfl.params import Layout
from p2pfl.tasks import Rows as Examples
from p2pfl.tasks import Site, SiteTable, Task
from p2pfl.tasks.calling import described, users_code
from p2pfl.training.backends.gradients import Gradients, outputs_of
from p2pfl.training.local_steps import CACHE_BYTES
from p2pfl.training.training_data import of_dtype


class Evaluation:
    """Measures parameter vectors on test rows, with the buffers that come with the gradients of rows that train."""

    def __init__(
        self, task: Task, sites: Sequence[Site], model: nn.Module, device: torch.device, layout: Layout, gradients: Gradients | None
    ) -> None:
        self._task, self._sites, self._model, self._layout, self._gradients = task, sites, model, layout, gradients
        self._device = device
        self.buffers: dict[str, Tensor] = gradients.buffers if gradients is not None else {}
        """Each row's buffers, (N, ...); they never travel."""

    def of_rows(self, x_NP: Tensor, rows: Sequence[int] | None, round: int | None) -> list[dict[str, float]]:
        """Each row's model on its own site's test rows, by metric; empty for a site without. `rows` None: all."""
        found = list[dict[str, float]]()
        tests = ((row, self._test_of(row)) for row in (range(len(self._sites)) if rows is None else rows))  # each made once
        for shape, alike in groupby(tests, lambda pair: pair[1][0].shape if pair[1] is not None else None):
            together = 1 if shape is None else max(1, CACHE_BYTES // (self._layout.size_bytes + 4 * math.prod(shape)))
            while some := list(islice(alike, together)):
                with_rows = [(row, test) for row, test in some if test is not None]
                found += self._of_equal_sizes(x_NP, with_rows, round) if with_rows else [{} for _ in some]
        return found

    def metrics(self, x_P: Tensor, test: Examples, site: str, row: int, round: int | None) -> dict[str, float]:
        """One parameter vector, with one row's buffers, on one site's test rows."""
        inputs, targets = test
        return self._metrics_of(self.outputs(x_P, inputs, row, round, site=site), targets, site, round)

    def outputs(
        self,
        x_P: Tensor,
        inputs: Tensor,
        row: int,
        round: int | None,
        *,
        site: str | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Outputs of a model in evaluation mode, on the CPU; arguments as of `Population.outputs`."""
        device = self._device
        if buffers is None:
            buffers = {name: stacked[row] for name, stacked in self.buffers.items()}
        buffers = {name: tensor.to(device) for name, tensor in buffers.items()}
        inputs = of_dtype(inputs, self._layout.dtype).to(device)
        with users_code(self._task.name, "model", inputs, site=site, round=round):
            return outputs_of(self._model, x_P, buffers, inputs)

    def _of_equal_sizes(self, x_NP: Tensor, tests: list[tuple[int, Examples]], round: int | None) -> list[dict[str, float]]:
        """Measure rows with as many test rows each, together where the layers are known."""
        batched = self._gradients.batched if self._gradients else None
        if batched is not None and batched.evaluates:
            inputs_CB = torch.stack([of_dtype(inputs, self._layout.dtype) for _, (inputs, _) in tests])
            outputs_CB = None
            with suppress(Exception, SystemExit):  # one by one tells whose fault it is
                outputs_CB = batched.outputs(_some_of(x_NP, [row for row, _ in tests]), inputs_CB.to(self._device)).cpu()
            if outputs_CB is not None:
                return [
                    self._metrics_of(outputs_B, targets, self._name_of(row), round)
                    for outputs_B, (row, (_, targets)) in zip(outputs_CB, tests, strict=True)
                ]
        return [self.metrics(x_NP[row], test, self._name_of(row), row, round) for row, test in tests]

    def _metrics_of(self, outputs: Tensor, targets: Tensor, site: str, round: int | None) -> dict[str, float]:
        return {name: evaluate_metric(self._task, name, outputs, targets, site=site, round=round) for name in self._task.metrics}

    def _test_of(self, row: int) -> Examples | None:
        """A row's own test rows; of a table, which is checked already, without making the site."""
        return self._sites.test_of(row) if isinstance(self._sites, SiteTable) else self._sites[row].test

    def _name_of(self, row: int) -> str:
        return self._sites.names[row] if isinstance(self._sites, SiteTable) else self._sites[row].name


def _some_of(x_NP: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; a view where they lie side by side."""
    side_by_side = rows[-1] - rows[0] == len(rows) - 1 and all(after - before == 1 for before, after in pairwise(rows))
    return x_NP[rows[0] : rows[-1] + 1] if side_by_side else x_NP[list(rows)]


def evaluate_metric(
    task: Task, metric: str, outputs: Tensor, targets: Tensor, *, site: str | None = None, round: int | None = None
) -> float:
    """Evaluate one of the task's metrics on a site's outputs and targets.

    Raises:
        TaskError: it raised something, or returned something else than a number.
    """
    function = f"metric {metric!r}"
    with users_code(task.name, function, outputs, targets, site=site, round=round):
        found: object = task.metrics[metric](outputs, targets)
        number = _one_of(found)
        if isinstance(number, numbers.Real):
            return float(number)
    fault = f"it returned {described(found)}: expected one number; it was given {described(outputs)}, {described(targets)}"
    raise TaskError(fault, task=task.name, function=function, site=site, round=round)


def _one_of(value: object) -> object:
    """The number that a tensor or an array of one holds; anything else as it is."""
    num_values = value.numel() if isinstance(value, Tensor) else value.size if isinstance(value, np.ndarray | np.generic) else 0
    return value.item() if num_values == 1 and isinstance(value, Tensor | np.ndarray | np.generic) else value
