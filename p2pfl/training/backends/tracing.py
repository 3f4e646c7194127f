"""Chains of known layers, found by tracing a model.

A model counts as a chain when each step takes what the one before gave and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from p2pfl.params import TensorSpec
from p2pfl.training.backends.layers import (
    RELU,
    SIGMOID,
    TANH,
    AvgPool2d,
    Conv2d,
    Embedding,
    Layer,
    LayerNorm,
    Linear,
    MaxPool2d,
    Pointwise,
    Reshape,
)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _flattened(start: int, end: int, shape: torch.Size) -> tuple[int, ...]:
    """Shape that torch.flatten gives one row's batch."""
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], -1, *shape[end + 1 :])


def _conv2d(module: nn.Conv2d, places: dict[str, slice]) -> Layer | None:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    shape = tuple(module.weight.shape)
    return Conv2d(places["weight"], shape, places.get("bias"), _pair(module.stride), _pair(module.padding), _pair(module.dilation))


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
    nn.Linear: lambda module, places: Linear(places["weight"], tuple(module.weight.shape), places.get("bias")),
    nn.Conv2d: _conv2d,
    nn.LayerNorm: lambda module, places: LayerNorm(tuple(module.normalized_shape), module.eps, places.get("weight"), places.get("bias")),
    nn.Embedding: _embedding,
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.ReLU: lambda _module, _: RELU,
    nn.Tanh: lambda _module, _: TANH,
    nn.Sigmoid: lambda _module, _: SIGMOID,
    nn.Flatten: lambda module, _: Reshape(partial(_flattened, module.start_dim, module.end_dim)),
}
"""Makes the layer of a module, by its type; None where one of its options is not done here."""

FUNCTIONS: dict[Any, Layer] = {
    **dict.fromkeys([F.relu, torch.relu, "relu"], RELU),
    **dict.fromkeys([torch.tanh, "tanh"], TANH),
    **dict.fromkeys([torch.sigmoid, "sigmoid"], SIGMOID),
}


def chain_or_fault(model: nn.Module, slices: Iterable[tuple[TensorSpec, slice]]) -> list[Layer] | str:  # noqa: PLR0911
    """The layers of a model in training mode, in their order, or what in it is no known one; *slices* are those of its layout.

    One with parameters that do not lie in the flat vector, or that are used in several places, is no chain.
    """
    places = {spec.name: place for spec, place in slices}
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
    """Layer of a step that calls a function or a method."""
    arguments = dict(enumerate(node.args))
    second = arguments.get(1)
    layer: Layer | None = None
    if node.target in (torch.flatten, "flatten"):
        start, end = node.kwargs.get("start_dim", arguments.get(1, 0)), node.kwargs.get("end_dim", arguments.get(2, -1))
        if isinstance(start, int) and isinstance(end, int) and start >= 1:
            layer = Reshape(partial(_flattened, start, end))
    elif node.target in _DTYPES and len(node.args) == 1 and not node.kwargs:
        layer = Pointwise(partial(_as_dtype, _DTYPES[node.target]), _as_before)
    elif len(node.args) == 1 and not (node.kwargs.keys() - {"inplace"}):
        layer = FUNCTIONS.get(node.target)
    elif node.target == "to" and isinstance(second, torch.dtype):
        layer = Pointwise(partial(_as_dtype, second), _as_before)
    elif (sign := _SIGNS.get(node.target, node.target)) in ARITHMETIC and isinstance(second, int | float) and not node.kwargs:
        layer = Pointwise(partial(_with_number, sign, second), partial(_slope_with_number, sign, second))
    return layer


def _as_dtype(dtype: torch.dtype, inputs: Tensor) -> Tensor:
    return inputs.to(dtype)


def _as_before(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient.to(before.dtype)


def _with_number(operation: Callable[..., Tensor], number: float, inputs: Tensor) -> Tensor:
    return operation(inputs, number)


def _slope_with_number(operation: Callable[..., Tensor], number: float, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return gradient if operation in (operator.add, operator.sub) else operation(gradient, number)


ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)
"""Operations with a number, in the order in which compiled loops number them."""

_SIGNS: dict[Any, Any] = {
    **dict.fromkeys(["add", torch.add], operator.add),
    **dict.fromkeys(["sub", "subtract", torch.sub, torch.subtract], operator.sub),
    **dict.fromkeys(["mul", "multiply", torch.mul, torch.multiply], operator.mul),
    **dict.fromkeys(["div", "divide", "true_divide", torch.div, torch.divide, torch.true_divide], operator.truediv),
}
"""Operators of methods and functions of tensors; with alpha or a rounding mode they are another thing."""

_DTYPES: dict[Any, torch.dtype] = {"float": torch.float32, "double": torch.float64}
