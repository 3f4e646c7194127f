"""Gradients that a mechanism makes of the gradients of single examples.

Shapes: C rows, B examples in a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from p2pfl.draws import Purpose, torch_seed
from p2pfl.privacy import Mechanism

GradientCall = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""A call as that of `gradients.Gradients`."""


def example_gradients(
    gradients: GradientCall,
    mechanism: Mechanism,
    x_NP: Tensor,
    inputs_NB: Tensor,
    targets_NB: Tensor,
    *,
    seed: int,
    nodes_N: Tensor,
    rows_N: Tensor,
    round: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (C, P) of a mechanism and mean losses (C,) of each row on its own batch, and where no example has a gradient.

    Each example goes as a row of its own, with a batch of one.
    """
    shape, draws = targets_NB.shape[:2], count()
    x, nodes, rows = (tensor.repeat_interleave(shape[1], dim=0) for tensor in (x_NP, nodes_N, rows_N))
    inputs, targets = inputs_NB.flatten(0, 1).unsqueeze(1), targets_NB.flatten(0, 1).unsqueeze(1)
    gradient, loss, unused = gradients(x, inputs, targets, seed=seed, nodes_N=nodes, rows_N=rows, round=round, step=step)

    def normal() -> Tensor:
        index = next(draws)
        generator, drawn = torch.Generator(), torch.empty(x_NP.shape, dtype=x_NP.dtype)
        for row, node in enumerate(nodes_N.tolist()):
            generator.manual_seed(torch_seed(seed, Purpose.NOISE, node=node, round=round, step=step) + index)
            drawn[row] = torch.randn(x_NP.shape[1], generator=generator, dtype=x_NP.dtype)
        return drawn.to(x_NP.device)

    made_NP = mechanism.gradient(gradient.reshape(*shape, -1), normal)
    return made_NP, loss.reshape(shape).mean(dim=1), None if unused is None else unused.reshape(*shape, -1).all(dim=1)
