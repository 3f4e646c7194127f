"""Layers of N models at once as matrix products written out: what vectorising a gradient would do, with less in between.

A model counts as a chain when each step takes what the one before gave and nothing else. Its layers are those below; whatever else a model
does is left to torch.func.

Shapes: C rows of a chunk, B examples of each, P parameters; D, H, W, L sizes of one example.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

Saved = tuple[Any, ...]

_MANY_PATCHES = 2**16  # numbers in one row's patches


class Sink(Protocol):
    """Where the gradients of a chunk go."""

    def matrix(self, place: slice, shape: tuple[int, ...], outer_CBM: Tensor, inner_CBN: Tensor) -> None:
        """sum_b outer[c, b, m] inner[c, b, n] for the tensor that lies at `place` as (M, N)."""
        ...

    def vector(self, place: slice, values_CN: Tensor) -> None:
        """A gradient itself."""
        ...


@dataclass(frozen=True, slots=True)
class Gradient:
    """Writes gradients into a vector (C, P)."""

    out_CP: Tensor

    def matrix(self, place: slice, shape: tuple[int, ...], outer_CBM: Tensor, inner_CBN: Tensor) -> None:
        """Written."""
        _matrix_at(self.out_CP, place, shape).baddbmm_(outer_CBM.transpose(1, 2), inner_CBN, beta=0)

    def vector(self, place: slice, values_CN: Tensor) -> None:
        """Written."""
        self.out_CP[:, place] = values_CN


@dataclass(frozen=True, slots=True)
class Descent:
    """A plain step of SGD, x <- x - lr (g + decay x), without a gradient in between."""

    x_CP: Tensor
    lr: float
    decay: float

    def matrix(self, place: slice, shape: tuple[int, ...], outer_CBM: Tensor, inner_CBN: Tensor) -> None:
        """Taken."""
        kept = 1 - self.lr * self.decay
        _matrix_at(self.x_CP, place, shape).baddbmm_(outer_CBM.transpose(1, 2), inner_CBN, beta=kept, alpha=-self.lr)

    def vector(self, place: slice, values_CN: Tensor) -> None:
        """Taken."""
        part = self.x_CP[:, place]
        if self.decay:
            part.mul_(1 - self.lr * self.decay)
        part.sub_(values_CN, alpha=self.lr)


def _matrix_at(x_CP: Tensor, place: slice, shape: tuple[int, ...]) -> Tensor:
    return x_CP[:, place].view(x_CP.shape[0], shape[0], -1)


class Layer(Protocol):
    """One step of a chain."""

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """What it makes of each row's examples, and what its way back needs."""
        ...

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:
        """The gradient at its inputs, where it `goes_on`; its own parameters' goes into the sink."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x + b over the last axis."""

    weight: slice
    shape: tuple[int, ...]
    bias: slice | None

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """The outputs."""
        flat_CBD = inputs_CB.reshape(inputs_CB.shape[0], -1, inputs_CB.shape[-1])
        weight_CDM = _matrix_at(x_CP, self.weight, self.shape).transpose(1, 2)
        if self.bias is None:
            outputs_CBM = torch.bmm(flat_CBD, weight_CDM)
        else:
            outputs_CBM = torch.baddbmm(x_CP[:, None, self.bias], flat_CBD, weight_CDM)
        return outputs_CBM.view(*inputs_CB.shape[:-1], self.shape[0]), (flat_CBD, inputs_CB.shape)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:
        """Through the transpose."""
        flat_CBD, shape = saved
        flat_CBM = gradient_CB.reshape(gradient_CB.shape[0], -1, self.shape[0])
        before = None
        if goes_on:  # first: a sink may change the weights
            before = torch.bmm(flat_CBM, _matrix_at(x_CP, self.weight, self.shape)).view(shape)
        sink.matrix(self.weight, self.shape, flat_CBM, flat_CBD)
        if self.bias is not None:
            sink.vector(self.bias, flat_CBM.sum(dim=1))
        return before


@dataclass(frozen=True, slots=True)
class Conv2d:
    """A convolution with zero padding.

    Where patches are few it is one product with them, else all rows' channels are groups of one convolution.
    """

    weight: slice
    shape: tuple[int, ...]
    """(channels out, channels in, height, width)."""
    bias: slice | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """The outputs."""
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

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:
        """The patches' gradients, added up where patches overlap."""
        num_rows, batch = gradient_CB.shape[:2]
        if len(saved) == 1:
            return self._back_from_groups(x_CP, saved[0], gradient_CB, sink, goes_on=goes_on)
        patches_CBD, shape = saved
        flat_CBM = gradient_CB.flatten(3).transpose(2, 3).reshape(num_rows, -1, self.shape[0])
        before = None
        if goes_on:
            patches = torch.bmm(flat_CBM, _matrix_at(x_CP, self.weight, self.shape))
            patches = patches.view(num_rows * batch, -1, patches.shape[-1]).transpose(1, 2)
            before = F.fold(patches, shape[3:], self.shape[2:], self.dilation, self.padding, self.stride).view(shape)
        sink.matrix(self.weight, self.shape, flat_CBM, patches_CBD)
        if self.bias is not None:
            sink.vector(self.bias, flat_CBM.sum(dim=1))
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

    def _back_from_groups(self, x_CP: Tensor, grouped: Tensor, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:
        num_rows, batch = gradient_CB.shape[:2]
        flat = gradient_CB.transpose(0, 1).reshape(batch, -1, *gradient_CB.shape[3:])
        wanted, geometry = [goes_on, True, False], (self.stride, self.padding, self.dilation)
        back = torch.ops.aten.convolution_backward
        before, weight, _ = back(flat, grouped, self._weights(x_CP), None, *geometry, False, [0, 0], num_rows, wanted)
        sink.vector(self.weight, weight.view(num_rows, -1))
        if self.bias is not None:
            sink.vector(self.bias, gradient_CB.sum(dim=(1, 3, 4)))
        return before.view(batch, num_rows, self.shape[1], *before.shape[2:]).transpose(0, 1) if goes_on else None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) over the last axes, then w x + b."""

    sizes: tuple[int, ...]
    eps: float
    weight: slice | None
    bias: slice | None

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """The outputs."""
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

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:
        """Without what shifts or scales the whole."""
        normal, inverse = saved
        flat = gradient_CB.reshape(normal.shape)
        scaled = flat * _to_rows(x_CP[:, self.weight], flat) if self.weight is not None else flat
        before = None
        if goes_on:
            along = normal * (scaled * normal).mean(dim=-1, keepdim=True)
            before = ((scaled - scaled.mean(dim=-1, keepdim=True) - along) * inverse).view(gradient_CB.shape)
        if self.weight is not None:
            sink.vector(self.weight, (flat * normal).flatten(1, -2).sum(dim=1))
        if self.bias is not None:
            sink.vector(self.bias, flat.flatten(1, -2).sum(dim=1))
        return before


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row of a table for each whole number."""

    weight: slice
    shape: tuple[int, ...]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:
        """The rows."""
        table = x_CP[:, self.weight].view(x_CP.shape[0], *self.shape)
        flat_CB = inputs_CB.flatten(1)
        rows = table.gather(1, flat_CB[..., None].expand(-1, -1, self.shape[1]))
        return rows.view(*inputs_CB.shape, self.shape[1]), (flat_CB,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Nothing goes on: whole numbers have no gradient."""
        (flat_CB,) = saved
        table = gradient_CB.new_zeros(x_CP.shape[0], *self.shape)
        table.scatter_add_(1, flat_CB[..., None].expand(-1, -1, self.shape[1]), gradient_CB.reshape(*flat_CB.shape, -1))
        sink.vector(self.weight, table.flatten(1))
        return None


@dataclass(frozen=True, slots=True)
class Pointwise:
    """A function of each number."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The gradient before it, from that behind it, its inputs and its outputs."""

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """The outputs."""
        outputs_CB = self.function(inputs_CB)
        return outputs_CB, (inputs_CB, outputs_CB)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Through the derivative."""
        return self.slope(gradient_CB, *saved) if goes_on else None


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """The largest of each window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """The outputs."""
        flat = inputs_CB.flatten(0, 1)
        outputs, where = F.max_pool2d_with_indices(flat, list(self.kernel), list(self.stride), list(self.padding))
        return outputs.view(*inputs_CB.shape[:2], *outputs.shape[1:]), (where, inputs_CB.shape)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """To the largest."""
        if not goes_on:
            return None
        where, shape = saved
        before = gradient_CB.new_zeros(shape[0] * shape[1], shape[2], shape[3] * shape[4])
        before.scatter_add_(2, where.flatten(2), gradient_CB.reshape(*where.shape).flatten(2))
        return before.view(shape)


@dataclass(frozen=True, slots=True)
class AvgPool2d:
    """The mean of each window; no padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """The outputs."""
        outputs = F.avg_pool2d(inputs_CB.flatten(0, 1), self.kernel, self.stride)
        return outputs.view(*inputs_CB.shape[:2], *outputs.shape[1:]), (inputs_CB.shape,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """Shared out evenly."""
        if not goes_on:
            return None
        (shape,) = saved
        size = self.kernel[0] * self.kernel[1]
        flat = gradient_CB.flatten(0, 1) / size
        patches = flat.flatten(2)[:, :, None, :].expand(-1, -1, size, -1).flatten(1, 2)
        return F.fold(patches, shape[3:], self.kernel, stride=self.stride).view(shape)


@dataclass(frozen=True, slots=True)
class Reshape:
    """Another shape of each example."""

    shape_of: Callable[[torch.Size], tuple[int, ...]]
    """From that of one row's batch (B, ...)."""

    def forward(self, x_CP: Tensor, inputs_CB: Tensor) -> tuple[Tensor, Saved]:  # noqa: ARG002
        """The same numbers."""
        return inputs_CB.reshape(inputs_CB.shape[0], *self.shape_of(inputs_CB.shape[1:])), (inputs_CB.shape,)

    def backward(self, x_CP: Tensor, saved: Saved, gradient_CB: Tensor, sink: Sink, *, goes_on: bool) -> Tensor | None:  # noqa: ARG002
        """The same numbers."""
        return gradient_CB.reshape(saved[0]) if goes_on else None


def _to_rows(values_CN: Tensor, like: Tensor) -> Tensor:
    """(C, N) so that it goes with (C, ..., N)."""
    return values_CN.view(values_CN.shape[0], *[1] * (like.dim() - 2), -1)


RELU = Pointwise(torch.relu, lambda gradient, before, _: gradient.masked_fill(before <= 0, 0))
TANH = Pointwise(torch.tanh, lambda gradient, _, after: gradient * (1 - after.square()))
SIGMOID = Pointwise(torch.sigmoid, lambda gradient, _, after: gradient * after * (1 - after))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _flattened(start: int, end: int, shape: torch.Size) -> tuple[int, ...]:
    """Of torch.flatten over one row's batch."""
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], -1, *shape[end + 1 :])


def _linear(module: nn.Linear, places: dict[str, slice]) -> Layer:
    return Linear(places["weight"], tuple(module.weight.shape), places.get("bias"))


def _conv2d(module: nn.Conv2d, places: dict[str, slice]) -> Layer | None:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    shape = tuple(module.weight.shape)
    return Conv2d(places["weight"], shape, places.get("bias"), _pair(module.stride), _pair(module.padding), _pair(module.dilation))


def _layer_norm(module: nn.LayerNorm, places: dict[str, slice]) -> Layer:
    return LayerNorm(tuple(module.normalized_shape), module.eps, places.get("weight"), places.get("bias"))


def _embedding(module: nn.Embedding, places: dict[str, slice]) -> Layer | None:
    plain = module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    return Embedding(places["weight"], tuple(module.weight.shape)) if plain else None


def _max_pool2d(module: nn.MaxPool2d, _: dict[str, slice]) -> Layer | None:
    if _pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
        return None
    return MaxPool2d(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding))


def _avg_pool2d(module: nn.AvgPool2d, _: dict[str, slice]) -> Layer | None:
    if _pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override is not None:
        return None
    return AvgPool2d(_pair(module.kernel_size), _pair(module.stride))


MODULES: dict[type[nn.Module], Callable[[Any, dict[str, slice]], Layer | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.ReLU: lambda _module, _: RELU,
    nn.Tanh: lambda _module, _: TANH,
    nn.Sigmoid: lambda _module, _: SIGMOID,
    nn.Flatten: lambda module, _: Reshape(partial(_flattened, module.start_dim, module.end_dim)),
}
"""What a module becomes; None where one of its options is not done here."""

FUNCTIONS: dict[Any, Layer] = {
    F.relu: RELU,
    torch.relu: RELU,
    "relu": RELU,
    torch.tanh: TANH,
    "tanh": TANH,
    torch.sigmoid: SIGMOID,
    "sigmoid": SIGMOID,
}


def chain_of(model: nn.Module, places: dict[str, slice]) -> list[Layer] | None:
    """A model's layers in their order, None where it is no chain of known ones.

    Args:
        model: in training mode.
        places: as in `chain_or_fault`.
    """
    found = chain_or_fault(model, places)
    return None if isinstance(found, str) else found


def chain_or_fault(model: nn.Module, places: dict[str, slice]) -> list[Layer] | str:  # noqa: PLR0911
    """A model's layers in their order, or what in it is no known one.

    Args:
        model: in training mode.
        places: where each parameter lies in the flat vector; a model with parameters that do not, or that are used in several places, is
            no chain.
    """
    if any(True for _ in model.buffers()):
        return "the model has buffers"
    if any(name not in places for name, _ in model.named_parameters(remove_duplicate=False)):
        return "the model has parameters that are frozen or shared by layers"
    if (make := MODULES.get(type(model))) is not None:
        layer = make(model, places)
        return f"{type(model).__name__} is none of them here" if layer is None else [layer]
    try:
        graph = fx.symbolic_trace(model).graph
    except (Exception, SystemExit):  # noqa: BLE001  # a model may do anything while it is traced; torch.func will show what
        return "what the model does depends on its inputs"
    first, *steps, last = graph.nodes
    if first.op != "placeholder" or last.op != "output":
        return "the model takes or returns more than one tensor"
    called = [str(node.target) for node in steps if node.op == "call_module"]
    used = [name for module in called for name, _ in model.get_submodule(module).named_parameters(prefix=module)]
    layers = []
    for before, node in pairwise([first, *steps]):
        found = _layer(node, model, places) if node.args and node.args[0] is before else None
        if found is None:
            return f"the step {_step(node, model)} is none of them, or takes more than the step before it gives"
        layers += [found] if found is not _NOTHING else []
    if last.args != ((steps or [first])[-1],):
        return "the model returns more than its last step gives"
    if sorted(used) != sorted(places):  # each once: a layer sets its own part of the gradient and adds to no other's
        return "the model uses some parameters never, twice, or outside of layers"
    return layers or "the model has no layers"


def _step(node: fx.Node, model: nn.Module) -> str:
    """The name of what a step calls."""
    if node.op == "call_module":
        return f"{node.target} ({type(model.get_submodule(str(node.target))).__name__})"
    if node.op == "call_method":
        return f".{node.target}()"
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


_NOTHING = Reshape(tuple)
"""Does nothing, as nn.Identity."""


def _layer(node: fx.Node, model: nn.Module, places: dict[str, slice]) -> Layer | None:
    if node.op == "call_module":
        name = str(node.target)
        module = model.get_submodule(name)
        if type(module) is nn.Identity:
            return _NOTHING
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): place for key, place in places.items() if key.startswith(prefix)}
        make = MODULES.get(type(module))
        return make(module, own) if make is not None and len(node.args) == 1 and not node.kwargs else None
    return _function(node)


def _function(node: fx.Node) -> Layer | None:
    """What is called without a module of its own."""
    arguments = dict(enumerate(node.args))
    second = arguments.get(1)
    layer: Layer | None = None
    if node.target in (torch.flatten, "flatten"):
        start, end = node.kwargs.get("start_dim", arguments.get(1, 0)), node.kwargs.get("end_dim", arguments.get(2, -1))
        if isinstance(start, int) and isinstance(end, int) and start >= 1:
            layer = Reshape(partial(_flattened, start, end))
    elif node.target in _DTYPES and len(node.args) == 1 and not node.kwargs:
        layer = Pointwise(partial(as_dtype, _DTYPES[node.target]), _as_before)
    elif len(node.args) == 1 and not (node.kwargs.keys() - {"inplace"}):
        layer = FUNCTIONS.get(node.target)
    elif node.target == "to" and isinstance(second, torch.dtype):
        layer = Pointwise(partial(as_dtype, second), _as_before)
    elif (sign := _SIGNS.get(node.target, node.target)) in ARITHMETIC and isinstance(second, int | float) and not node.kwargs:
        function, slope = ARITHMETIC[sign]
        layer = Pointwise(partial(function, second), partial(slope, second))
    return layer


def as_dtype(dtype: torch.dtype, inputs: Tensor) -> Tensor:
    """Convert the inputs."""
    return inputs.to(dtype)


def _as_before(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient.to(before.dtype)


def _plus(number: float, inputs: Tensor) -> Tensor:
    return inputs + number


def _minus(number: float, inputs: Tensor) -> Tensor:
    return inputs - number


def _times(number: float, inputs: Tensor) -> Tensor:
    return inputs * number


def _over(number: float, inputs: Tensor) -> Tensor:
    return inputs / number


def _slope_of_sum(number: float, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient


def _slope_of_times(number: float, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient * number


def _slope_of_over(number: float, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient / number


ARITHMETIC: dict[Any, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    operator.add: (_plus, _slope_of_sum),
    operator.sub: (_minus, _slope_of_sum),
    operator.mul: (_times, _slope_of_times),
    operator.truediv: (_over, _slope_of_over),
}
"""With a number on the right."""

_SIGNS: dict[Any, Any] = {
    **dict.fromkeys(["add", torch.add], operator.add),
    **dict.fromkeys(["sub", "subtract", torch.sub, torch.subtract], operator.sub),
    **dict.fromkeys(["mul", "multiply", torch.mul, torch.multiply], operator.mul),
    **dict.fromkeys(["div", "divide", "true_divide", torch.div, torch.divide, torch.true_divide], operator.truediv),
}
"""The same as methods and functions of tensors; with alpha or a rounding mode they are another thing."""

_DTYPES: dict[Any, torch.dtype] = {"float": torch.float32, "double": torch.float64}
