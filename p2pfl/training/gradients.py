"""Losses and gradients of N models at once, each on its own batch.

Shapes: N rows, B examples in a batch, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from p2pfl.draws import Purpose, torch_seed
from p2pfl.params import Layout

Loss = Callable[[Tensor, Tensor], Tensor]


class Gradients:
    """Gradients of one model's loss for N parameter vectors.

    All rows go through one vectorised call where the model allows it. A model that draws random numbers (dropout), changes its buffers
    (BatchNorm) or cannot be vectorised goes row by row, each row under its own key and with its own buffers.

    Args:
        model: the architecture; its own parameters are not used and not changed.
        loss: (outputs, targets) -> mean over the batch.
        sample: inputs and targets of one small batch, to try the model on.
        num_rows: N.
    """

    def __init__(self, model: nn.Module, loss: Loss, sample: tuple[Tensor, Tensor], num_rows: int) -> None:
        self._model = model.train()
        self._loss = loss
        self._layout = Layout.of(model)
        self.buffers: dict[str, Tensor] = {
            name: buffer.detach().unsqueeze(0).expand(num_rows, *buffer.shape).clone() for name, buffer in model.named_buffers()
        }
        """Each row's own buffers, (N, ...): BatchNorm's statistics stay at the node that computed them."""
        self.row_by_row: str | None = self._why_row_by_row(sample)
        """Why the model cannot be vectorised over rows; None where it can."""

    def __call__(
        self,
        x_NP: Tensor,
        inputs_NB: Tensor,
        targets_NB: Tensor,
        *,
        seed: int,
        nodes_N: Tensor,
        rows_N: Tensor,
        round: int,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Gradients (N, P) and losses (N,) of each row on its own batch.

        Args:
            x_NP: where the gradients are taken.
            inputs_NB: each row's batch.
            targets_NB: likewise.
            seed: of the experiment.
            nodes_N: the rows' numbers in the roster, for their keys.
            rows_N: which of the population's rows these are, for their buffers.
            round: with `step` the key of what the model draws.
            step: within the round.
        """
        if self.row_by_row is None:
            gradient_NP, loss_N = vmap(grad_and_value(self._row_loss), randomness="error")(x_NP, inputs_NB, targets_NB)
            return gradient_NP.detach(), loss_N.detach()
        gradients, losses = [], []
        for i, (row, node) in enumerate(zip(rows_N.tolist(), nodes_N.tolist(), strict=True)):
            with torch.random.fork_rng(devices=[x_NP.device] if x_NP.is_cuda else []):
                torch.manual_seed(torch_seed(seed, Purpose.MODEL, node=node, round=round, step=step))
                x_P = x_NP[i].detach().requires_grad_()
                buffers = {name: stacked[row] for name, stacked in self.buffers.items()}
                loss = self._loss_of(x_P, inputs_NB[i], targets_NB[i], buffers)
                (gradient_P,) = torch.autograd.grad(loss, x_P)
            gradients.append(gradient_P)
            losses.append(loss.detach())
        return torch.stack(gradients), torch.stack(losses)

    def _row_loss(self, x_P: Tensor, inputs_B: Tensor, targets_B: Tensor) -> Tensor:
        return self._loss_of(x_P, inputs_B, targets_B, {})

    def _loss_of(self, x_P: Tensor, inputs_B: Tensor, targets_B: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        outputs = functional_call(self._model, {**self._layout.views(x_P), **buffers}, (inputs_B,))
        return self._loss(outputs, targets_B)

    def _why_row_by_row(self, sample: tuple[Tensor, Tensor]) -> str | None:
        inputs_B, targets_B = sample
        trial = copy.deepcopy(self._model)
        before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial(inputs_B)
        changed = [name for name, buffer in trial.named_buffers() if not torch.equal(before[name], buffer)]
        if changed:
            return f"the model changes its buffers while it trains ({changed[0]}); they stay at each node"
        x_2P = self._layout.flatten({name: p.detach() for name, p in self._model.named_parameters()}).expand(2, -1)
        try:
            vmap(grad_and_value(self._row_loss), randomness="error")(
                x_2P, inputs_B.expand(2, *inputs_B.shape), targets_B.expand(2, *targets_B.shape)
            )
        except RuntimeError as error:
            if "random" in str(error):
                return "the model draws random numbers while it trains"
            return f"the model cannot be vectorised: {str(error).splitlines()[0]}"
        return None


def outputs_of(model: nn.Module, x_P: Tensor, buffers: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """What one row's model says in evaluation mode, on the CPU."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            result = functional_call(model, {**Layout.of(model).views(x_P), **buffers}, (inputs,))
    finally:
        model.train(was_training)
    assert isinstance(result, Tensor)
    return result.cpu()
