"""Layers of N models at once as matrix products written out, and losses: what vectorising a gradient would do, with less in between.

Whatever else a model does is left to torch.func.

Shapes: C rows of a chunk, B examples of each, K classes, P parameters; D, H, W, L sizes of one example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

Saved = tuple[Any, ...]

_MANY_PATCHES = 2**16  # numbers in one row's patches


@dataclass(frozen=True, slots=True)
class StoreGradient:
    """Stores gradients in a vector (C, P)."""

    out_CP: Tensor

    def matrix(self, place: slice, shape: tuple[int, ...], outer_CBM: Tensor, inner_CBN: Tensor) -> None:
        """Store sum_b outer[c, b, m] inner[c, b, n] for the tensor that lies at `place` as (M, N)."""
        _matrix_at(self.out_CP, place, shape).baddbmm_(outer_CBM.transpose(1, 2), inner_CBN, beta=0)

    def vector(self, place: slice, values_CN: Tensor) -> None:
        """Store the gradient of the parameters at `place`."""
        self.out_CP[:, place] = values_CN


@dataclass(frozen=True, slots=True)
class SgdStep:
    """A plain step of SGD, x <- x - lr (g + decay x), without a gradient in between."""

    x_CP: Tensor
    lr: float
    decay: float

    def matrix(self, place: slice, shape: tuple[int, ...], outer_CBM: Tensor, inner_CBN: Tensor) -> None:
        """Take a step of SGD for the matrix (M, N) at `place`, along sum_b outer[c, b, m] inner[c, b, n]."""
        kept = 1 - self.lr * self.decay
        _matrix_at(self.x_CP, place, shape).baddbmm_(outer_CBM.transpose(1, 2), inner_CBN, beta=kept, alpha=-self.lr)

    def vector(self, place: slice, values_CN: Tensor) -> None:
        """Take a step of SGD for the parameters at `place`, along their gradient."""
        part = self.x_CP[:, place]
        if self.decay:
            part.mul_(1 - self.lr * self.decay)
        part.sub_(values_CN, alpha=self.lr)


GradientUse = StoreGradient | SgdStep
"""The use that is made of the gradients of a chunk."""


def _matrix_at(x_CP: Tensor, place: slice, shape: tuple[int, ...]) -> Tensor:
    return x_CP[:, place].view(x_CP.shape[0], shape[0], -1)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x + b over the last axis."""

    learns: ClassVar[bool] = True
    weight: slice
    shape: tuple[int, ...]
    bias: slice | None

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """Compute the layer's outputs."""
        flat_CBD = inputs_CB.reshape(inputs_CB.shape[0], -1, inputs_CB.shape[-1])
        weight_CDM = _matrix_at(x_CP, self.weight, self.shape).transpose(1, 2)
        if self.bias is None:
            outputs_CBM = torch.bmm(flat_CBD, weight_CDM)
        else:
            outputs_CBM = torch.baddbmm(x_CP[:, None, self.bias], flat_CBD, weight_CDM)
        return outputs_CBM.view(*inputs_CB.shape[:-1], self.shape[0]), (flat_CBD, inputs_CB.shape)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:
        """Multiply by the transposed weights."""
        flat_CBD, shape = saved
        flat_CBM = gradient_CB.reshape(gradient_CB.shape[0], -1, self.shape[0])
        before = None
        if goes_on:  # first: a use may change the weights
            before = torch.bmm(flat_CBM, _matrix_at(x_CP, self.weight, self.shape)).view(shape)
        use.matrix(self.weight, self.shape, flat_CBM, flat_CBD)
        if self.bias is not None:
            use.vector(self.bias, flat_CBM.sum(dim=1))
        return before


@dataclass(frozen=True, slots=True)
class Conv2d:
    """A convolution with zero padding.

    Where patches are few it is one product with them, else all rows' channels are groups of one convolution.
    """

    learns: ClassVar[bool] = True
    weight: slice
    shape: tuple[int, ...]
    """(channels out, channels in, height, width)."""
    bias: slice | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """Compute the layer's outputs."""
        height, width = (self._length(inputs_CB.shape[axis + 3], axis) for axis in (0, 1))
        patch_numbers = inputs_CB.shape[1] * height * width * math.prod(self.shape[1:])
        if patch_numbers > _MANY_PATCHES:
            return self._as_groups(x_CP, inputs_CB)
        num_rows, batch = inputs_CB.shape[:2]
        patches = F.unfold(inputs_CB.flatten(0, 1), self.shape[2:], self.dilation, self.padding, self.stride)  # (C B, D, L)
        patches_CBD = patches.view(num_rows, batch, *patches.shape[1:]).transpose(2, 3).reshape(num_rows, -1, patches.shape[1])
        weight_CDM = _matrix_at(x_CP, self.weight, self.shape).transpose(1, 2)
        outputs_CBM = torch.bmm(patches_CBD, weight_CDM)
        if self.bias is not None:
            outputs_CBM += x_CP[:, None, self.bias]
        outputs = outputs_CBM.view(num_rows, batch, height * width, self.shape[0]).transpose(2, 3)
        return outputs.reshape(num_rows, batch, self.shape[0], height, width), (patches_CBD, inputs_CB.shape)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:
        """The patches' gradients, added up where patches overlap."""
        num_rows, batch = gradient_CB.shape[:2]
        if len(saved) == 1:
            return self._back_from_groups(x_CP, saved[0], gradient_CB, use, goes_on=goes_on)
        patches_CBD, shape = saved
        flat_CBM = gradient_CB.flatten(3).transpose(2, 3).reshape(num_rows, -1, self.shape[0])
        before = None
        if goes_on:
            patches = torch.bmm(flat_CBM, _matrix_at(x_CP, self.weight, self.shape))
            patches = patches.view(num_rows * batch, -1, patches.shape[-1]).transpose(1, 2)
            before = F.fold(patches, shape[3:], self.shape[2:], self.dilation, self.padding, self.stride).view(shape)
        use.matrix(self.weight, self.shape, flat_CBM, patches_CBD)
        if self.bias is not None:
            use.vector(self.bias, flat_CBM.sum(dim=1))
        return before

    def _length(self, size: int, axis: int) -> int:
        return (size + 2 * self.padding[axis] - self.dilation[axis] * (self.shape[axis + 2] - 1) - 1) // self.stride[axis] + 1

    def _weights(self, x_CP: Tensor) -> Tensor:
        return x_CP[:, self.weight].reshape(-1, *self.shape[1:])

    def _as_groups(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        num_rows, batch = inputs_CB.shape[:2]
        grouped = inputs_CB.transpose(0, 1).reshape(batch, -1, *inputs_CB.shape[3:])
        bias = x_CP[:, self.bias].reshape(-1) if self.bias is not None else None
        outputs = torch.conv2d(grouped, self._weights(x_CP), bias, self.stride, self.padding, self.dilation, num_rows)
        return outputs.view(batch, num_rows, self.shape[0], *outputs.shape[2:]).transpose(0, 1), (grouped,)

    def _back_from_groups(self, x_CP: Tensor, grouped: Tensor, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:
        num_rows, batch = gradient_CB.shape[:2]
        flat = gradient_CB.transpose(0, 1).reshape(batch, -1, *gradient_CB.shape[3:])
        wanted, geometry = [goes_on, True, False], (self.stride, self.padding, self.dilation)
        back = torch.ops.aten.convolution_backward
        before, weight, _ = back(flat, grouped, self._weights(x_CP), None, *geometry, False, [0, 0], num_rows, wanted)
        use.vector(self.weight, weight.view(num_rows, -1))
        if self.bias is not None:
            use.vector(self.bias, gradient_CB.sum(dim=(1, 3, 4)))
        return before.view(batch, num_rows, self.shape[1], *before.shape[2:]).transpose(0, 1) if goes_on else None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) over the last axes, then w x + b."""

    sizes: tuple[int, ...]
    eps: float
    weight: slice | None
    bias: slice | None

    @property
    def learns(self) -> bool:
        """Whether it has a weight or a bias."""
        return self.weight is not None or self.bias is not None

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """Compute the layer's outputs."""
        flat = inputs_CB.reshape(*inputs_CB.shape[: inputs_CB.dim() - len(self.sizes)], -1)
        centred = flat - flat.mean(dim=-1, keepdim=True)
        inverse = (centred.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        normal = centred * inverse
        outputs = normal
        if self.weight is not None:
            outputs = outputs * _to_rows(x_CP[:, self.weight], outputs)
        if self.bias is not None:
            outputs = outputs + _to_rows(x_CP[:, self.bias], outputs)
        return outputs.view(inputs_CB.shape), (normal, inverse)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:
        """Without what shifts or scales the whole."""
        normal, inverse = saved
        flat = gradient_CB.reshape(normal.shape)
        scaled = flat * _to_rows(x_CP[:, self.weight], flat) if self.weight is not None else flat
        before = None
        if goes_on:
            along = normal * (scaled * normal).mean(dim=-1, keepdim=True)
            before = ((scaled - scaled.mean(dim=-1, keepdim=True) - along) * inverse).view(gradient_CB.shape)
        if self.weight is not None:
            use.vector(self.weight, (flat * normal).flatten(1, -2).sum(dim=1))
        if self.bias is not None:
            use.vector(self.bias, flat.flatten(1, -2).sum(dim=1))
        return before


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row of a table for each whole number."""

    learns: ClassVar[bool] = True
    weight: slice
    shape: tuple[int, ...]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """Look the rows up."""
        table = x_CP[:, self.weight].view(x_CP.shape[0], *self.shape)
        flat_CB = inputs_CB.flatten(1)
        rows = table.gather(1, flat_CB[..., None].expand(-1, -1, self.shape[1]))
        return rows.view(*inputs_CB.shape, self.shape[1]), (flat_CB,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Add up each row's gradients; whole numbers have none."""
        (flat_CB,) = saved
        table = gradient_CB.new_zeros(x_CP.shape[0], *self.shape)
        table.scatter_add_(1, flat_CB[..., None].expand(-1, -1, self.shape[1]), gradient_CB.reshape(*flat_CB.shape, -1))
        use.vector(self.weight, table.flatten(1))
        return None


@dataclass(frozen=True, slots=True)
class Pointwise:
    """A function of each number."""

    learns: ClassVar[bool] = False
    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The gradient before it, from that behind it, its inputs and its outputs."""

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """Compute the layer's outputs."""
        outputs_CB = self.function(inputs_CB)
        return outputs_CB, (inputs_CB, outputs_CB)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Multiply by the derivative."""
        return self.slope(gradient_CB, *saved)


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """The largest of each window."""

    learns: ClassVar[bool] = False
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """Compute the layer's outputs."""
        flat = inputs_CB.flatten(0, 1)
        outputs, where = F.max_pool2d_with_indices(flat, list(self.kernel), list(self.stride), list(self.padding))
        return outputs.view(*inputs_CB.shape[:2], *outputs.shape[1:]), (where, inputs_CB.shape)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Give each gradient to its window's largest number."""
        where, shape = saved
        before = gradient_CB.new_zeros(shape[0] * shape[1], shape[2], shape[3] * shape[4])
        before.scatter_add_(2, where.flatten(2), gradient_CB.reshape(*where.shape).flatten(2))
        return before.view(shape)


@dataclass(frozen=True, slots=True)
class AvgPool2d:
    """The mean of each window; no padding."""

    learns: ClassVar[bool] = False
    kernel: tuple[int, int]
    stride: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """Compute the layer's outputs."""
        outputs = F.avg_pool2d(inputs_CB.flatten(0, 1), self.kernel, self.stride)
        return outputs.view(*inputs_CB.shape[:2], *outputs.shape[1:]), (inputs_CB.shape,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Divide each gradient evenly among its window."""
        (shape,) = saved
        size = self.kernel[0] * self.kernel[1]
        flat = gradient_CB.flatten(0, 1) / size
        patches = flat.flatten(2)[:, :, None, :].expand(-1, -1, size, -1).flatten(1, 2)
        return F.fold(patches, shape[3:], self.kernel, stride=self.stride).view(shape)


@dataclass(frozen=True, slots=True)
class Reshape:
    """Another shape of each example."""

    learns: ClassVar[bool] = False
    shape_of: Callable[[torch.Size], tuple[int, ...]]
    """From that of one row's batch (B, ...)."""

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """Give each row's batch its new shape."""
        return inputs_CB.reshape(inputs_CB.shape[0], *self.shape_of(inputs_CB.shape[1:])), (inputs_CB.shape,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, use: GradientUse, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Give the gradient the shape of the inputs."""
        return gradient_CB.reshape(saved[0])


Layer = Linear | Conv2d | LayerNorm | Embedding | Pointwise | MaxPool2d | AvgPool2d | Reshape
"""One step of a chain.

`forward` gives the outputs for each row's examples and what `backward` needs; that gives the gradient at the inputs where it `goes_on`,
and hands the gradient of the step's own parameters, where it `learns`, to the use."""


def _to_rows(values_CN: Tensor, like: Tensor) -> Tensor:
    """(C, N) so that it goes with (C, ..., N)."""
    return values_CN.view(values_CN.shape[0], *[1] * (like.dim() - 2), -1)


RELU = Pointwise(torch.relu, lambda gradient, before, _: gradient.masked_fill(before <= 0, 0))
TANH = Pointwise(torch.tanh, lambda gradient, _, after: gradient * (1 - after.square()))
SIGMOID = Pointwise(torch.sigmoid, lambda gradient, _, after: gradient * after * (1 - after))


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


def head_of(loss: Loss, outputs_B: Tensor, targets_B: Tensor) -> Head:
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
