"""The choice of a backend: how the local steps of a population's rows are computed is decided here and nowhere else.

Shapes: N rows, C of them, K local steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Protocol

from torch import Tensor, nn

from p2pfl.errors import ConfigError
from p2pfl.params import Layout
from p2pfl.tasks import Task
from p2pfl.training.backends.batched import WrittenOutSteps
from p2pfl.training.backends.compiled import Compiled
from p2pfl.training.backends.examples import ExampleGradients
from p2pfl.training.backends.gradients import RETURN_AT_ONCE_BYTES, Gradients, returns_parts
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import Rows, TrainingData

_GROUPED = 32
CACHE_BYTES = 4 * 1024**2
"""Numbers that a core reads again and again."""


class PlainSGD(Protocol):
    """Steps of plain SGD on x and nothing else, without a gradient in between."""

    may_fail: ClassVar[bool]
    """Whether a loss of the user's own runs in it: where that fails, step by step shows whose fault it is."""

    def sgd_steps(
        self, x_CP: Tensor, positions_CKB: Tensor, lr: float, decay: float, scale_C: Tensor | None, *, before_CP: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take K steps in place; a row that becomes non-finite keeps what it had.

        Args:
            x_CP: changed.
            positions_CKB: examples of each step.
            lr: learning rate.
            decay: weight decay.
            scale_C: factor on each row's gradient; None: 1.
            before_CP: a tensor that is equal to x and not changed; None: there is none.

        Returns:
            The mean loss over the steps (C,), and whether each row has stayed finite (C,).
        """
        ...


class Backends:
    """The backends of one population: gradients row by row, vectorised or written out, and the fast ones for plain SGD.

    Args:
        model: the architecture.
        task: with a loss.
        names: the sites of all rows.
        recipe: how they learn.
        data: their training rows.

    Raises:
        TaskError: the model or the loss fails on a sample.
    """

    def __init__(self, model: nn.Module, task: Task, names: Sequence[str], recipe: Recipe, data: TrainingData) -> None:
        assert task.loss is not None
        self._recipe, self._data, self._layout = recipe, data, Layout.of(model)
        self.gradients = Gradients(model, task.loss, data.sample(), len(names), task=task.name, sites=names)
        self.step_gradients: Gradients | ExampleGradients = self.gradients
        """Gradients of a local step, which a mechanism makes where there is one."""
        if recipe.mechanism is not None:
            if self.gradients.row_by_row is not None:
                raise ConfigError(f"privacy: needs gradients of single examples, and {self.gradients.row_by_row}; take another model")
            self.step_gradients = ExampleGradients(self.gradients, recipe.mechanism)
        self.compiled: Compiled | None = None

    @property
    def plain_sgd(self) -> PlainSGD | None:
        """The fastest backend for plain SGD; None where local steps are more than that, or the model's layers are not known."""
        if self.compiled is not None:
            return self.compiled
        batched = self.gradients.batched
        if batched is None or self.gradients.row_by_row is not None or why_not_plain_sgd(self._recipe) is not None:
            return None
        return WrittenOutSteps(batched, self._data.batch)

    @property
    def vectorises(self) -> bool:
        """Whether torch vectorises the gradients, because they are not written out here."""
        return self.gradients.batched is None and self.gradients.row_by_row is None

    @property
    def borrows_model(self) -> bool:
        """Whether the model's own module computes, which two threads must not use at once."""
        return self.compiled is None and self.gradients.batched is None

    def compile(self, x_1P: Tensor) -> None:
        """Compile the steps; they stay as they are where that cannot be done and the recipe does not ask for it.

        Args:
            x_1P: parameters to try the loops with.

        Raises:
            ConfigError: the recipe asks for compiled loops, and this model, its rows or this machine cannot have them.
        """
        if self.compiled is not None:
            return
        found: Compiled | str = why_not_plain_sgd(self._recipe) or "the model's gradients cannot be written out"
        if self.plain_sgd is not None:
            assert self.gradients.batched is not None
            found = Compiled.of(self.gradients.batched, x_1P, self._data.inputs, self._data.targets)
        if isinstance(found, Compiled):
            self.compiled = found
        elif self._recipe.compiled:
            raise ConfigError(f"compiled = 'on': {found}; take off")

    def groups(self, rows: Tensor, batch_size: int, threads: int) -> list[list[Rows]]:
        """Rows that are trained together, as many as stay in the cache, in groups that compute once what they have in common.

        Slices where they lie side by side.
        """
        together, count = self._rows_together(len(rows), batch_size), len(rows)
        num_groups = threads * -(-count // (threads * _GROUPED))  # each thread gets as many
        grouped = max(together, -(-count // num_groups))
        start, stop = int(rows[0]), int(rows[-1]) + 1
        side_by_side = stop - start == count
        return [
            [
                slice(start + first, start + last) if side_by_side else rows[first:last]
                for first, last in pairwise(split_evenly(begin, min(begin + grouped, count), together))
            ]
            for begin in range(0, count, grouped)
        ]

    def _rows_together(self, num_rows: int, batch_size: int) -> int:
        if self.gradients.row_by_row is not None:
            return num_rows  # its draws are torch's own: one after the other
        batched = self.gradients.batched
        kept = batched.saved_bytes * batch_size // self._data.sample_size if batched else 2 * self._data.example_bytes * batch_size
        gradients = batch_size if self._recipe.mechanism is not None else 1
        together = max(1, min(4096, CACHE_BYTES // (gradients * self._layout.size_bytes + kept)))
        return max(together, _GROUPED) if self.compiled is not None else together

    def step_bytes(self, x_NP: Tensor, *, is_scaled: bool) -> int:
        """Bytes of gradients that one local step needs for all rows, where steps are more than plain SGD."""
        gradients = 1 if self.gradients.batched is not None else 2  # of each tensor, and side by side
        corrected = "gradient" in self._recipe.algorithm.local_changes or bool(self._recipe.optimizer.weight_decay) or is_scaled
        steps = (gradients + int(corrected)) * x_NP.nbytes
        if gradients == 2 and returns_parts(x_NP):  # noqa: PLR2004  # what has been put into the whole one is given back
            largest = max(spec.size for spec in self._layout.tensors) * x_NP.element_size()
            steps -= max(0, x_NP.nbytes - RETURN_AT_ONCE_BYTES - largest)
        return steps


def split_evenly(start: int, stop: int, most: int) -> list[int]:
    """Places where parts of at most so many begin and the last one ends, each about as large."""
    parts = max(1, -(-(stop - start) // most))
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def why_not_plain_sgd(recipe: Recipe) -> str | None:
    """The reason why a recipe's local steps are more than plain SGD on x, which alone is compiled; None where they are not."""
    spec = recipe.optimizer
    if recipe.mechanism is not None:
        return "privacy needs the gradients of single examples: only plain sgd is compiled"
    if spec.name != "sgd":
        return f"optimizer.name = {spec.name!r}: only plain sgd is compiled"
    if spec.momentum:
        return f"optimizer.momentum = {spec.momentum:g}: only plain sgd is compiled"
    if spec.clip_norm is not None:
        return f"optimizer.clip_norm = {spec.clip_norm:g}: only plain sgd is compiled"
    if recipe.algorithm.local_changes:
        return f"the local steps of {type(recipe.algorithm).__name__} are more than plain sgd, which alone is compiled"
    return None
