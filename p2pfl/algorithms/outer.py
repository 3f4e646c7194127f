"""Algorithms with an optimiser around the optimiser: many local steps count as one step of an outer one.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Context, LocalChange, Requirement, State
from p2pfl.algorithms.gossip import ModelAveraging


@dataclass(frozen=True)
class DiLoCo(ModelAveraging):
    """DiLoCo with gossip for its all-reduce: delta = x - trained;  v+ = momentum v + delta;  x+ = W (x - lr (momentum v+ + delta)).

    On the complete graph it is DiLoCo itself: the mean of the outer steps is the outer step of the mean. v is never sent.

    In rounds without local steps x <- W x and v stays.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", Algorithm 1 (arXiv:2311.08105), with the
    Nesterov momentum and the constants that its authors found best.
    """

    outer_lr: Annotated[float, Field(gt=0, le=10)] = 0.7
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    requires: ClassVar[frozenset[Requirement]] = frozenset({"fixed mean"})
    local_changes: ClassVar[frozenset[LocalChange]] = frozenset({"state"})

    def init(self, x_NP: Tensor, ctx: Context) -> State:
        """Start with a momentum of zero."""
        return {"x": x_NP, "momentum": torch.zeros_like(x_NP)}

    def adapt(self, state: State, trained_NP: Tensor, ctx: Context) -> State:
        """Take one outer step."""
        delta_NP = state["x"] - trained_NP
        momentum_NP = self.outer_momentum * state["momentum"] + delta_NP
        return {"x": state["x"] - self.outer_lr * (self.outer_momentum * momentum_NP + delta_NP), "momentum": momentum_NP}
