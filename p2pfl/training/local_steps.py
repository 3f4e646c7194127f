"""Local steps of some rows: any optimiser and any rule step by step, plain SGD in the backend that is fastest.

How local steps of a population's rows are computed is decided here and nowhere else.

Shapes: N rows of the population, C of a part, K local steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from p2pfl.algorithms import Context, State
from p2pfl.errors import ConfigError
from p2pfl.params import Layout
from p2pfl.tasks import Task
from p2pfl.training.backends.compiled import Compiled
from p2pfl.training.backends.examples import GradientCall, example_gradients
from p2pfl.training.backends.gradients import RETURN_AT_ONCE_BYTES, Gradients, are_finite, returns_parts
from p2pfl.training.optimizers import OptimizerState, StackedOptimizer, clipped
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import Rows, TrainingData

_GROUPED = 32
CACHE_BYTES = 4 * 1024**2
"""Numbers that a core reads again and again."""

PlainSteps = Callable[[Tensor, Tensor, float, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""Takes K steps of plain SGD in place, without a gradient in between; a row that becomes non-finite keeps what it had.

Takes rows (C, P), which are changed, each step's examples (C, K, B), the learning rate, a factor on each row's gradient (None: 1), and a
tensor that is equal to the rows and not changed (None: there is none). Returns the mean loss over the steps (C,), and whether each row has
stayed finite (C,)."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Tensors of some rows that training has changed."""

    state: Mapping[str, Tensor]
    """Parts of the state that have changed, (C, ...)."""
    optimizer_state: Mapping[str, Tensor]
    loss_C: Tensor
    finite_C: Tensor
    """bool; the others are as they were."""


def replace_rows(
    tensors: dict[str, Tensor],
    before: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    rows: Rows | None,
    num_rows: int,
    *,
    in_place: bool,
) -> None:
    """Put what has changed of some rows (None: of all) into tensors that begin as those before, which are copied unless `in_place`."""
    for name, part in changed.items():
        if rows is None:
            tensors[name] = part
            continue
        if name not in tensors:
            tensors[name] = part.new_zeros((num_rows, *part.shape[1:]))
        elif not in_place and tensors[name] is before.get(name):
            tensors[name] = tensors[name].clone()
        tensors[name][rows] = part


class LocalSteps:
    """The K local steps of a round, with a factor on each row's gradient (None: 1), in the backend that is chosen for the population.

    Gradients that were *chosen* for the model, on the CPU and a batch as large, are taken; else they are chosen on the first rows.

    Raises:
        TaskError: the model or the loss fails on a sample.
        ConfigError: a mechanism needs gradients of single examples, which this model does not give.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        names: Sequence[str],
        recipe: Recipe,
        data: TrainingData,
        scale_N: Tensor | None,
        chosen: Gradients | None = None,
    ) -> None:
        assert task.loss is not None
        self._recipe, self._data, self._scale_N, self._layout = recipe, data, scale_N, Layout.of(model)
        self._is_chosen = chosen is not None and chosen.sample_size == data.sample_size and data.inputs.device.type == "cpu"
        if chosen is not None and self._is_chosen:
            self.gradients = chosen.of_rows(model, names)
        else:
            self.gradients = Gradients(model, task.loss, data.sample(), len(names), task=task.name, sites=names)
        self.step_gradients: GradientCall = self.gradients
        """Gradients of a local step, which a mechanism makes where there is one."""
        if recipe.mechanism is not None:
            if self.gradients.row_by_row is not None:
                raise ConfigError(f"privacy: needs gradients of single examples, and {self.gradients.row_by_row}; take another model")
            self.step_gradients = partial(example_gradients, self.gradients, recipe.mechanism)
        self.compiled: Compiled | None = None

    @property
    def plain_steps(self) -> PlainSteps | None:
        """Takes K steps of plain SGD; None where local steps are more than these, or the model's layers are not known."""
        decay, compiled, batched, batch = self._recipe.optimizer.weight_decay, self.compiled, self.gradients.batched, self._data.batch
        if compiled is not None:
            return lambda x_CP, positions_CKB, lr, *others: compiled.sgd_steps(x_CP, positions_CKB, lr, decay, *others)
        if batched is None or self.gradients.row_by_row is not None or why_not_plain_sgd(self._recipe) is not None:
            return None
        return lambda x_CP, positions_CKB, lr, *others: batched.sgd_steps(x_CP, positions_CKB, batch, lr, decay, *others)

    @property
    def loads_optimizers(self) -> bool:
        """Whether steps are more than plain SGD that is written out here: torch then loads its optimisers, and what they stand on."""
        return self.plain_steps is None

    @property
    def borrows_model(self) -> bool:
        """Whether the model's own module computes, which two threads must not use at once."""
        return self.compiled is None and self.gradients.batched is None

    def compile(self, x_1P: Tensor) -> None:
        """Compile the steps, tried at `x_1P`; they stay as they are where that cannot be done and the recipe does not ask for it.

        Raises:
            ConfigError: the recipe asks for compiled loops, and this model, its rows or this machine cannot have them.
        """
        if self.compiled is not None:
            return
        found: Compiled | str = why_not_plain_sgd(self._recipe) or "the model's gradients cannot be written out"
        if self.plain_steps is not None:
            assert self.gradients.batched is not None
            is_tried = self._is_chosen and self._recipe.compiled  # by the plan, which chose both
            found = Compiled.of(self.gradients.batched, x_1P, self._data.inputs, self._data.targets, is_tried=is_tried)
        if isinstance(found, Compiled):
            self.compiled = found
        elif self._recipe.compiled:
            raise ConfigError(f"compiled = 'on': {found}; take off")

    def train(
        self, rows: Rows, positions_CKB: Tensor, state: State, optimizer_state: OptimizerState, ctx: Context, *, in_place: bool
    ) -> Trained:
        """Train some rows of the population's state: on a copy of them, or where they are if that is allowed."""
        recipe = self._recipe
        state = {name: tensor[rows] for name, tensor in state.items()}
        scale_C = self._scale_N[rows] if self._scale_N is not None else None
        if (steps := self.plain_steps) is not None:
            failures = () if self.compiled is not None else (Exception, SystemExit)  # a loss of the user's own
            with suppress(*failures):  # what comes below finds whose fault it is
                return self._plain(steps, state["x"], positions_CKB, ctx.lr, scale_C, in_place=in_place and isinstance(rows, slice))
        momenta = {name: tensor[rows] for name, tensor in optimizer_state.items()}
        if recipe.algorithm.resets_optimizer:
            momenta = recipe.optimizer.init(state["x"])
        return self._step_by_step(rows, positions_CKB, state, momenta, ctx, scale_C)

    def _plain(
        self, steps: PlainSteps, x_CP: Tensor, positions_CKB: Tensor, lr: float, scale_C: Tensor | None, *, in_place: bool
    ) -> Trained:
        in_place, before_CP = in_place and x_CP.is_contiguous(), None
        if not in_place:
            before_CP, x_CP = x_CP, x_CP.clone(memory_format=torch.contiguous_format)
        loss_C, finite_C = steps(x_CP, positions_CKB, lr, scale_C, before_CP)
        return Trained({} if in_place else {"x": x_CP}, {}, loss_C, finite_C)

    def _step_by_step(
        self, rows: Rows, positions_CKB: Tensor, state: State, momenta: OptimizerState, ctx: Context, scale_C: Tensor | None
    ) -> Trained:
        """Take each step by the rule's corrected gradient and the optimiser."""
        recipe, gradients, x_CP = self._recipe, self.gradients, state["x"]
        numbers = torch.arange(rows.start, rows.stop, device=x_CP.device) if isinstance(rows, slice) else rows
        kept = {name: buffer[rows].clone() for name, buffer in gradients.buffers.items()}
        optimizer = StackedOptimizer(recipe.optimizer, x_CP, momenta, lr=ctx.lr, first_step=ctx.round * recipe.local_steps)
        total_C = torch.zeros(len(x_CP), dtype=x_CP.dtype, device=x_CP.device)
        for k in range(recipe.local_steps):
            moving = {**state, "x": optimizer.x}
            gradient_CP, loss_C, unused_CP = self.step_gradients(
                recipe.algorithm.estimate(moving),
                *self._data.batch(positions_CKB[:, k]),
                seed=recipe.seed,
                nodes_N=ctx.nodes_N,
                rows_N=numbers,
                round=ctx.round,
                step=k,
            )
            if scale_C is not None:
                gradient_CP = gradient_CP * scale_C[:, None]
            if recipe.optimizer.clip_norm is not None:
                gradient_CP = clipped(gradient_CP, recipe.optimizer.clip_norm)
            optimizer.step(recipe.algorithm.correct(moving, gradient_CP, ctx), unused_CP)
            del gradient_CP, unused_CP  # of the next step there is one more
            total_C += loss_C
        adapted = recipe.algorithm.adapt(state, optimizer.x, ctx)
        moved = optimizer.state
        # also the optimiser's own: Adam with an infinite second moment would never move again
        made = [new for name, new in adapted.items() if new is not state.get(name) and new.is_floating_point() and new.numel()]
        finite_C = torch.stack([are_finite(tensor.flatten(1)) for tensor in (optimizer.x, *moved.values(), *made)]).all(dim=0)
        if not finite_C.all():  # a row that became non-finite stays where it was: what it would send is poison to all others
            adapted = {name: torch.where(column(finite_C, new), new, state[name]) for name, new in adapted.items()}
            moved = {name: torch.where(column(finite_C, new), new, momenta[name]) for name, new in moved.items()}
            for name, buffer in gradients.buffers.items():
                buffer[numbers[~finite_C]] = kept[name][~finite_C]
        changed = {name: new for name, new in adapted.items() if new is not state.get(name)}
        return Trained(changed, moved, total_C / recipe.local_steps, finite_C)

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

    def step_bytes(self, x_NP: Tensor, estimate_bytes: int) -> int:
        """Bytes of gradients, and of what the optimiser makes of them, that one local step needs for all rows beside plain SGD's.

        Args:
            x_NP: the rows.
            estimate_bytes: of the parameters at which gradients are taken, which are there until they have been.
        """
        gradients = 1 if self.gradients.batched is not None else 2  # of each tensor, and side by side
        corrected = (
            "gradient" in self._recipe.algorithm.local_changes or bool(self._recipe.optimizer.weight_decay) or self._scale_N is not None
        )
        steps = max(gradients * x_NP.nbytes + estimate_bytes, (gradients + int(corrected)) * x_NP.nbytes)
        if gradients == 2 and returns_parts(x_NP):  # noqa: PLR2004  # what has been put into the whole one is given back
            largest = max(spec.size for spec in self._layout.tensors) * x_NP.element_size()
            steps -= max(0, x_NP.nbytes - RETURN_AT_ONCE_BYTES - largest)
        return max(steps, (1 + int(corrected) + self._recipe.optimizer.step_vectors) * x_NP.nbytes)


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


def column(values_N: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped so that it goes with (N, ...) row by row."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
