"""Local steps of some rows: any optimiser and any rule step by step, plain SGD in the backend that is fastest.

Shapes: C rows of a part, K local steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.algorithms import Context, State
from p2pfl.training.backends.batched import are_finite
from p2pfl.training.backends.choice import Backends, PlainSteps
from p2pfl.training.optimizers import OptimizerState, StackedOptimizer, clipped
from p2pfl.training.recipe import Recipe
from p2pfl.training.training_data import Rows, TrainingData


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
    """The K local steps of a round, with a factor on each row's gradient (None: 1)."""

    def __init__(self, recipe: Recipe, backends: Backends, data: TrainingData, scale_N: Tensor | None) -> None:
        self._recipe, self._backends, self._data, self._scale_N = recipe, backends, data, scale_N

    def train(
        self, rows: Rows, positions_CKB: Tensor, state: State, optimizer_state: OptimizerState, ctx: Context, *, in_place: bool
    ) -> Trained:
        """Train some rows of the population's state: on a copy of them, or where they are if that is allowed."""
        recipe = self._recipe
        state = {name: tensor[rows] for name, tensor in state.items()}
        scale_C = self._scale_N[rows] if self._scale_N is not None else None
        if (steps := self._backends.plain_steps) is not None:
            failures = () if self._backends.compiled is not None else (Exception, SystemExit)  # a loss of the user's own
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
        recipe, gradients, x_CP = self._recipe, self._backends.gradients, state["x"]
        numbers = torch.arange(rows.start, rows.stop, device=x_CP.device) if isinstance(rows, slice) else rows
        kept = {name: buffer[rows].clone() for name, buffer in gradients.buffers.items()}
        optimizer = StackedOptimizer(recipe.optimizer, x_CP, momenta, lr=ctx.lr, first_step=ctx.round * recipe.local_steps)
        total_C = torch.zeros(len(x_CP), dtype=x_CP.dtype, device=x_CP.device)
        for k in range(recipe.local_steps):
            moving = {**state, "x": optimizer.x}
            gradient_CP, loss_C, unused_CP = self._backends.step_gradients(
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


def column(values_N: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped so that it goes with (N, ...) row by row."""
    return values_N.reshape(-1, *[1] * (like.dim() - 1))
