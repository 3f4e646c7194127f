"""torch.optim's element-wise optimisers on stacked rows, with their state in plain tensors.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}

OptimizerState = dict[str, Tensor]
"""torch.optim's own names ("momentum_buffer", "exp_avg", ...) to tensors (N, P); no step counts, these follow from the round."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """Optimiser of every node, with its learning rate schedule."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For sgd and rmsprop."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest 2-norm of a node's gradient."""

    def lr_at(self, round: int, rounds: int) -> float:
        """The learning rate of a round: a linear warm-up, then the schedule, which would reach 0 just after the last round."""
        if round < self.warmup_rounds:
            return self.lr * (round + 1) / self.warmup_rounds
        fraction = (round - self.warmup_rounds) / max(rounds - self.warmup_rounds, 1)
        if self.schedule == "linear":
            return self.lr * (1 - fraction)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * fraction)) / 2
        return self.lr

    def state_names(self) -> tuple[str, ...]:
        """The tensors that this optimiser carries from step to step."""
        momentum = ("momentum_buffer",) if self.momentum else ()
        return {
            "sgd": momentum,
            "adam": ("exp_avg", "exp_avg_sq"),
            "adamw": ("exp_avg", "exp_avg_sq"),
            "rmsprop": ("square_avg", *momentum),
            "adagrad": ("sum",),
        }[self.name]

    @property
    def step_vectors(self) -> int:
        """Number of vectors as large as x that torch makes beside the state during one step, one tensor at a time."""
        return {"adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1}.get(self.name, 0)

    def init(self, x_NP: Tensor) -> OptimizerState:
        """The state before the first step: zeros, which is what torch.optim starts from."""
        return {name: torch.zeros_like(x_NP) for name in self.state_names()}


class StackedOptimizer:
    """One round's optimiser over all rows.

    Args:
        x_NP: where the rows start; not changed.
        state: as `OptimizerSpec.init` or the last round's `state` gave it; not changed.
        first_step: round * K, the steps counted before this round.
    """

    def __init__(self, spec: OptimizerSpec, x_NP: Tensor, state: OptimizerState, *, lr: float, first_step: int) -> None:
        self._x = nn.Parameter(x_NP.detach().clone())
        # a one-row population must go the same way as N rows: no fused and no multi-tensor kernels
        common: dict[str, Any] = {"lr": lr, "weight_decay": spec.weight_decay, "foreach": False}
        if spec.name in ("sgd", "rmsprop"):
            common["momentum"] = spec.momentum
        self._optimizer: torch.optim.Optimizer = _OPTIMIZERS[spec.name]([self._x], **common)
        slot = self._optimizer.state[self._x]
        slot.update({name: tensor.clone() for name, tensor in state.items()})
        if spec.name != "sgd":
            slot["step"] = torch.tensor(float(first_step))

    @property
    def x(self) -> Tensor:
        """Parameters of all rows, (N, P)."""
        return self._x.detach()

    @property
    def state(self) -> OptimizerState:
        """Optimiser state that the next round starts from."""
        slot = self._optimizer.state[self._x]
        return {name: tensor for name, tensor in slot.items() if name != "step"}

    def step(self, gradient_NP: Tensor, unused: Tensor | None = None) -> None:
        """Move every row by one step; where `unused`, broadcastable to (N, P), there is no gradient, neither x nor the state changes."""
        before = None if unused is None else (self.x.clone(), {name: tensor.clone() for name, tensor in self.state.items()})
        self._x.grad = gradient_NP
        self._optimizer.step()
        self._x.grad = None
        if before is None or unused is None:
            return
        x_NP, state = before
        with torch.no_grad():
            self._x.copy_(torch.where(unused, x_NP, self._x))
            for name, tensor in self.state.items():
                tensor.copy_(torch.where(unused, state[name] if name in state else torch.zeros_like(tensor), tensor))


def clipped(gradient_NP: Tensor, norm: float) -> Tensor:
    """Each row scaled down to at most the given 2-norm."""
    norms_N = torch.linalg.vector_norm(gradient_NP, dim=-1)
    factors_N: Tensor = norm / norms_N.clamp(min=norm)
    return gradient_NP * factors_N.unsqueeze(-1)
