"""What of a training can be done by compiled loops, and how they are called. They are loaded only when a run is long enough.

Shapes: C rows, K steps, B examples of a batch, P parameters, L layers, M examples.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn import functional as F

from p2pfl.training.batched import Batched
from p2pfl.training.layers import RELU, SIGMOID, TANH, Linear, Pointwise, Reshape

_DTYPES = (torch.float32, torch.float64)
_ACTIVATIONS = {RELU: 1, TANH: 2, SIGMOID: 3}
_LOSSES = {F.cross_entropy: 0, F.binary_cross_entropy_with_logits: 1, F.mse_loss: 2}


class Compiled:
    """Steps of plain SGD on a chain of linear layers.

    Args:
        loops: `p2pfl.training.fused`.
        layers: int64 (L, 5), as there.
        head: the loss, as there.
        inputs: of all examples, (M, ...).
        targets: likewise.
    """

    def __init__(self, loops: ModuleType, layers: np.ndarray, head: int, inputs: Tensor, targets: Tensor) -> None:
        self._loops, self._layers, self._head = loops, layers, head
        self._inputs = inputs.flatten(1).contiguous().numpy()
        of_classes = head == _LOSSES[F.cross_entropy]
        self._classes = targets.long().numpy() if of_classes else np.zeros(0, dtype=np.int64)
        self._wanted = np.zeros((0, 0), dtype=self._inputs.dtype) if of_classes else targets.flatten(1).contiguous().numpy()

    @classmethod
    def of(cls, batched: Batched, x_1P: Tensor, inputs: Tensor, targets: Tensor) -> Compiled | None:
        """The same as a batched chain does, None where that cannot be done or numba is not there.

        Args:
            batched: the chain with its loss.
            x_1P: parameters to try it with.
            inputs: of all examples, (M, ...), of the population's dtype.
            targets: likewise.
        """
        layers, head = _described(batched), _LOSSES.get(batched.loss)
        wanted = (not targets.is_floating_point() and targets.dim() == 1) if head == 0 else targets.dtype == inputs.dtype
        if layers is None or head is None or not wanted or inputs.dtype not in _DTYPES or inputs.device.type != "cpu":
            return None
        if (loops := compiled_loops("p2pfl.training.fused")) is None:
            return None
        compiled = cls(loops, layers, head, inputs, targets)
        if inputs[0].numel() != layers[0, 0] or (head and targets[0].numel() != layers[-1, 1]):
            return None
        return compiled if compiled._does_as(batched, x_1P, inputs, targets) else None

    def _does_as(self, batched: Batched, x_1P: Tensor, inputs: Tensor, targets: Tensor) -> bool:
        """Whether a step is that of the chain; loads the loops."""
        few = torch.arange(2).remainder(len(inputs))
        gradient_1P, expected_1 = batched.gradients(x_1P, inputs[few].unsqueeze(0), targets[few].unsqueeze(0))
        moved_1P = x_1P.clone(memory_format=torch.contiguous_format)
        with one_blas_thread():
            loss_1, _ = self.descend(moved_1P, few.view(1, 1, -1), 1.0, 0.0, None)
        eps = torch.finfo(x_1P.dtype).eps ** 0.5
        return torch.allclose(moved_1P, x_1P - gradient_1P, rtol=eps, atol=eps) and torch.allclose(loss_1, expected_1, rtol=eps, atol=eps)

    def descend(self, x_CP: Tensor, positions_CKB: Tensor, lr: float, decay: float, scale_C: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows are changed; the mean loss over the steps (C,), and whether each row has stayed finite (C,): it is as it was otherwise."""
        x, positions = x_CP.numpy(), positions_CKB.contiguous().numpy()
        kind, loss_C, finite_C = x.dtype.type, np.empty(len(x)), np.empty(len(x), dtype=np.bool_)
        scale = scale_C.numpy() if scale_C is not None else np.ones(len(x), dtype=x.dtype)
        data = self._inputs, self._classes, self._wanted
        self._loops.descend(
            x, *data, positions, self._layers, self._head, kind(lr), kind(1 - lr * decay), np.ascontiguousarray(scale), loss_C, finite_C
        )
        return torch.from_numpy(loss_C).to(x_CP.dtype), torch.from_numpy(finite_C)


def one_blas_thread() -> AbstractContextManager[object]:
    """A context in which a matrix product keeps to the thread that asked for it: rows are shared out already."""
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def compiled_loops(module: str) -> ModuleType | None:
    """A module of compiled loops, by its full name; None where numba is not there."""
    try:
        return import_module(module)  # a second to load
    except (ImportError, RuntimeError):  # not there, too old for this numpy, or without a place for what it compiles
        return None


def _described(batched: Batched) -> np.ndarray | None:
    """The layers' sizes and places, None where one is none of those that are compiled."""
    layers = list(batched.layers)
    while layers and isinstance(layers[0], Reshape):
        layers.pop(0)
    while layers and isinstance(layers[-1], Reshape):
        layers.pop()
    rows: list[list[int]] = []
    for layer in layers:
        if isinstance(layer, Linear):
            num_out, num_in = layer.shape
            rows.append([num_in, num_out, layer.weight.start, layer.bias.start if layer.bias is not None else -1, 0])
        elif isinstance(layer, Pointwise) and layer in _ACTIVATIONS and rows and rows[-1][-1] == 0:
            rows[-1][-1] = _ACTIVATIONS[layer]
        else:
            return None
    fits = all(before[1] == after[0] for before, after in pairwise(rows))
    return np.array(rows, dtype=np.int64) if rows and fits else None
