"""Losses and gradients of many rows of a model whose layers are known.

Shapes: C rows of a chunk, B examples of each, K classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from p2pfl.params import Layout, parameters_of
from p2pfl.training.backends.layers import GradientUse, Layer, SgdStep, StoreGradient
from p2pfl.training.backends.tracing import chain_or_fault

Loss = Callable[[Tensor, Tensor], Tensor]
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From outputs and targets (C, B, ...) to the losses (C,) and their gradients at the outputs."""


def _cross_entropy(outputs_CBK: Tensor, targets_CB: Tensor) -> tuple[Tensor, Tensor]:
    log_p = outputs_CBK.log_softmax(dim=-1)
    chosen = targets_CB.unsqueeze(-1)
    loss_C = -log_p.gather(-1, chosen).mean(dim=(1, 2))
    gradient = log_p.exp_()
    gradient.scatter_add_(-1, chosen, gradient.new_tensor(-1.0).expand(chosen.shape))
    return loss_C, gradient.div_(targets_CB.shape[1])


def _binary_cross_entropy(outputs_CB: Tensor, targets_CB: Tensor) -> tuple[Tensor, Tensor]:
    loss_C = F.binary_cross_entropy_with_logits(outputs_CB, targets_CB, reduction="none").flatten(1).mean(dim=1)
    return loss_C, (outputs_CB.sigmoid() - targets_CB).div_(outputs_CB[0].numel())


def _mean_squared_error(outputs_CB: Tensor, targets_CB: Tensor) -> tuple[Tensor, Tensor]:
    difference = outputs_CB - targets_CB
    return difference.square().flatten(1).mean(dim=1), difference * (2 / outputs_CB[0].numel())


HEADS: dict[Any, Head] = {
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    F.mse_loss: _mean_squared_error,
}
"""Losses with their derivatives written out."""


def _head_of(loss: Loss, outputs_B: Tensor, targets_B: Tensor) -> Head:
    """The loss with its derivative, written out where that is known for outputs and targets like these."""
    of_classes = outputs_B.dim() == 2 and targets_B.dim() == 1 and not targets_B.is_floating_point()  # noqa: PLR2004
    of_numbers = outputs_B.shape == targets_B.shape and targets_B.is_floating_point()
    known = of_classes if loss is F.cross_entropy else of_numbers
    if known and loss in HEADS:
        return HEADS[loss]
    each = vmap(grad_and_value(loss))

    def head(outputs_CB: Tensor, targets_CB: Tensor) -> tuple[Tensor, Tensor]:
        gradient_CB, loss_C = each(outputs_CB, targets_CB)
        return loss_C, gradient_CB

    return head


class Batched:
    """A chain of known layers from the inputs on, its loss, and that with its derivative, for any number of rows at once."""

    def __init__(self, layers: list[Layer], loss: Loss, head: Head) -> None:
        self.layers, self.loss, self._head = tuple(layers), loss, head
        learning = [number for number, layer in enumerate(layers) if layer.learns]
        self._first = min(learning, default=0)  # nothing before it needs a gradient
        self.saved_bytes = 0
        """Bytes that one row of the sample keeps for the way back."""
        self.evaluates = False
        """Whether the model says the same when it is not training."""

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, sample: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], x_P: Tensor | None = None
    ) -> Batched | None:
        """Match a model's layers and loss; None where they are not known.

        Args:
            model: in training mode.
            loss: (outputs, targets) -> mean over the batch.
            sample: inputs and targets of one small batch.
            expected: gradient (P,) and loss on the sample at the model's own parameters; a chain that gives others is none.
            x_P: these parameters, where somebody has them as a vector already.
        """
        layers = chain_or_fault(model, Layout.of(model).slices())
        if isinstance(layers, str):
            return None
        inputs_B, targets_B = sample
        x_1P = (parameters_of(model) if x_P is None else x_P).unsqueeze(0)
        try:
            with torch.no_grad():
                outputs_1B, saved = inputs_B.unsqueeze(0), []
                for layer in layers:
                    outputs_1B, kept = layer.forward(x_1P, outputs_1B)
                    saved.append(kept)
            batched = cls(layers, loss, _head_of(loss, outputs_1B[0], targets_B))
            batched.saved_bytes = sum(value.nbytes for kept in saved for value in kept if isinstance(value, Tensor))
            gradient_1P, loss_1 = batched.gradients(x_1P, inputs_B.unsqueeze(0), targets_B.unsqueeze(0))
        except (Exception, SystemExit):  # noqa: BLE001  # whatever these layers cannot do, torch.func can or says why
            return None
        gradient_P, loss_value = expected
        eps = torch.finfo(x_1P.dtype).eps
        scale = float(torch.linalg.vector_norm(gradient_P, torch.inf)) + eps
        furthest = torch.linalg.vector_norm(gradient_1P[0].sub_(gradient_P), torch.inf)
        as_expected = furthest <= eps**0.5 * scale and (loss_1[0] - loss_value).abs() <= eps**0.5 * (1 + loss_value.abs())
        batched.evaluates = _close(_evaluated(model, inputs_B), outputs_1B[0])
        return batched if bool(as_expected) else None

    def outputs(self, x_CP: Tensor, inputs_CB: Tensor) -> Tensor:
        """Outputs of each row's model on its own inputs, (C, B, ...)."""
        with torch.no_grad():
            for layer in self.layers:
                inputs_CB, _ = layer.forward(x_CP, inputs_CB)
        return inputs_CB

    def gradients(self, x_CP: Tensor, inputs_CB: Tensor, targets_CB: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (C, P) and losses (C,)."""
        out_CP = torch.empty_like(x_CP)
        return out_CP, self.run(x_CP, inputs_CB, targets_CB, StoreGradient(out_CP))

    def run(self, x_CP: Tensor, inputs_CB: Tensor, targets_CB: Tensor, use: GradientUse, scale_C: Tensor | None = None) -> Tensor:
        """Losses (C,); the gradients, times the scale, go to the use, which may move x_CP itself."""
        with torch.no_grad():
            saved = []
            for layer in self.layers:
                inputs_CB, kept = layer.forward(x_CP, inputs_CB)
                saved.append(kept)
        loss_C, gradient = self._head(inputs_CB, targets_CB)
        with torch.no_grad():
            if scale_C is not None:
                gradient = gradient * scale_C.view(-1, *[1] * (gradient.dim() - 1))
            after: Tensor | None = gradient
            for number in range(len(self.layers) - 1, self._first - 1, -1):
                assert after is not None
                after = self.layers[number].backward(x_CP, saved[number], after, use, goes_on=number > self._first)
        return loss_C.detach()

    def sgd_steps(
        self,
        x_CP: Tensor,
        positions_CKB: Tensor,
        batch: Callable[[Tensor], tuple[Tensor, Tensor]],
        lr: float,
        decay: float,
        scale_C: Tensor | None,
        before_CP: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Take K steps of plain SGD in place, as `local_steps.PlainSteps` says; `batch` gives inputs and targets at some positions."""
        is_only_copy = before_CP is None
        before_CP = x_CP.clone(memory_format=torch.contiguous_format) if before_CP is None else before_CP
        total_C, step = torch.zeros(len(x_CP), dtype=x_CP.dtype, device=x_CP.device), SgdStep(x_CP, lr, decay)
        try:
            for positions_CB in positions_CKB.unbind(1):
                total_C += self.run(x_CP, *batch(positions_CB), step, scale_C)
        except BaseException:  # an interruption, too, leaves rows as they were
            if is_only_copy:
                x_CP.copy_(before_CP)
            raise
        finite_C = are_finite(x_CP)
        if not finite_C.all():
            x_CP.copy_(torch.where(finite_C[:, None], x_CP, before_CP))
        return total_C / positions_CKB.shape[1], finite_C


def are_finite(rows_CP: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, (C,); a finite sum says so many times as fast as looking at each number does."""
    finite_C = rows_CP.sum(dim=-1).isfinite()
    if not finite_C.all():  # or the sum was too large
        finite_C = rows_CP.amin(dim=-1).isfinite() & rows_CP.amax(dim=-1).isfinite()
    return finite_C


def _evaluated(model: nn.Module, inputs_B: Tensor) -> object:
    """Outputs in evaluation mode of a model that is in training mode."""
    model.eval()
    try:
        with torch.no_grad():
            return model(inputs_B)
    except (Exception, SystemExit):  # noqa: BLE001  # row by row tells whose fault it is
        return None
    finally:
        model.train()


def _close(found: object, expected: Tensor) -> bool:
    eps = torch.finfo(expected.dtype).eps
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=eps**0.5, atol=eps**0.5)
