"""Training by compiled loops: which models and rows they can do, and how they are called. numba is loaded only where it is asked for.

Shapes: C rows, K steps, B examples of a batch, P parameters, L layers, M examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn import functional as F

from p2pfl.compiled.loader import load_loops, why_no_loops
from p2pfl.tasks import Rows
from p2pfl.training.backends.gradients import Batched
from p2pfl.training.backends.layers import RELU, SIGMOID, TANH, Layer, Linear, Pointwise, Reshape
from p2pfl.training.backends.tracing import ARITHMETIC

_DTYPES = (torch.float32, torch.float64)
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ACTIVATIONS = {RELU: 1, TANH: 2, SIGMOID: 3}
_LOSSES: dict[Any, int] = {F.cross_entropy: 0, F.binary_cross_entropy_with_logits: 1, F.mse_loss: 2}
_OF_CLASSES = _LOSSES[F.cross_entropy]
_COMPARED = 2**16  # numbers at once, so that comparing takes no copies of a large model


Chain = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A model as the loops take it: its layers, what is done to each input first, and with which numbers (float64)."""


def _chain_of(layers: Sequence[Layer], dtype: torch.dtype, inputs_dtype: torch.dtype) -> Chain | str:
    """Arrays of the loops for layers with parameters of a dtype, or why they are not compiled."""
    number = next((n for n, layer in enumerate(layers) if not _comes_first(layer)), len(layers))
    first = _first_of(layers[:number], dtype, inputs_dtype)
    rows = _linear_layers(layers[number:])
    if isinstance(first, str) or isinstance(rows, str):
        return first if isinstance(first, str) else f"{_ONLY_CHAINS}, and {rows}"
    kinds, operands = [kind for kind, _ in first], [operand for _, operand in first]
    return np.array(rows, dtype=np.int64), np.array(kinds, dtype=np.int64), np.array(operands, dtype=np.float64)


def _comes_first(layer: Layer) -> bool:
    """Whether a layer only prepares its inputs: gives them another shape or dtype, or computes each with a number."""
    return isinstance(layer, Reshape) or (isinstance(layer, Pointwise) and isinstance(layer.function, partial))


def _first_of(layers: Sequence[Layer], dtype: torch.dtype, inputs_dtype: torch.dtype) -> list[tuple[int, float]] | str:
    """Operations on each input, with their numbers; or why these are not compiled."""
    found: list[tuple[int, float]] = []
    is_real = inputs_dtype == dtype
    for function in (layer.function for layer in layers if isinstance(layer, Pointwise)):
        assert isinstance(function, partial)
        *operation, given = function.args
        if operation and not is_real:
            return "the model computes with whole numbers before it makes real ones of them"
        if operation:
            found.append((ARITHMETIC.index(operation[0]), float(given)))
        elif given != dtype:
            return f"the model makes {given} of its inputs, and its parameters are {dtype}".replace("torch.", "")
        is_real = True
    return found if is_real else f"inputs are {inputs_dtype} where the first layer takes {dtype}".replace("torch.", "")


def _linear_layers(layers: Sequence[Layer]) -> list[list[int]] | str:
    """The layers' sizes and places, or what is none of those that are compiled."""
    last = max((n for n, layer in enumerate(layers) if not isinstance(layer, Reshape)), default=-1)
    rows: list[list[int]] = []
    for layer in layers[: last + 1]:
        if isinstance(layer, Linear):
            num_out, num_in = layer.shape
            rows.append([num_in, num_out, layer.weight.start, layer.bias.start if layer.bias is not None else -1, 0])
        elif isinstance(layer, Pointwise) and layer in _ACTIVATIONS and rows and rows[-1][-1] == 0:
            rows[-1][-1] = _ACTIVATIONS[layer]
        else:
            found = {Pointwise: "a function stands where a linear layer should", Reshape: "values get another shape between layers"}
            return found.get(type(layer), f"{type(layer).__name__} is none of them")
    fits = all(before[1] == after[0] for before, after in pairwise(rows))
    return rows if rows and fits else "the layers' sizes do not fit each other"


_ONLY_CHAINS = "only chains of linear layers with ReLU, tanh or sigmoid are compiled"


def why_not_compiled(
    layers: Sequence[Layer] | str, loss: Any, dtype: torch.dtype, rows: Sequence[Rows], inputs_dtype: torch.dtype | None = None
) -> str | None:
    """Why a model is not trained in compiled loops on some rows; None where it can be.

    Args:
        layers: of the model, or why they are no chain.
        loss: (outputs, targets) -> mean over the batch.
        dtype: of the parameters.
        rows: inputs and targets of each site; none: the model alone is looked at.
        inputs_dtype: of the rows as they are trained on; None: real numbers.
    """
    if isinstance(layers, str):
        return f"{_ONLY_CHAINS}, and {layers}"
    if dtype not in _DTYPES:
        return f"parameters are {dtype}".replace("torch.", "")
    chain = _chain_of(layers, dtype, inputs_dtype or dtype)
    if isinstance(chain, str):
        return chain
    return next((fault for inputs, targets in rows if (fault := _fault_of_rows(chain, loss, inputs, targets))), _fault_of_loss(loss))


def _fault_of_loss(loss: Any) -> str | None:
    names = ", ".join(function.__name__ for function in _LOSSES)
    return None if loss in _LOSSES else f"of all losses only {names} of torch.nn.functional are compiled"


def _fault_of_rows(chain: Chain, loss: Any, inputs: Tensor, targets: Tensor) -> str | None:
    """Why a model is not trained in compiled loops on these rows."""
    if (fault := _fault_of_loss(loss)) is not None:
        return fault
    num_in, num_out = int(chain[0][0, 0]), int(chain[0][-1, 1])
    if not inputs.dtype.is_floating_point and inputs.dtype not in _WHOLE_NUMBERS:
        return f"inputs are {inputs.dtype}".replace("torch.", "")
    if inputs[0].numel() != num_in:
        return f"a row has {inputs[0].numel()} inputs, and the first layer takes {num_in}"
    return _fault_of_targets(targets, num_out, of_classes=_LOSSES[loss] == _OF_CLASSES)


def _fault_of_targets(targets: Tensor, num_out: int, *, of_classes: bool) -> str | None:
    if not of_classes:
        fits = targets.is_floating_point() and targets[0].numel() == num_out
        return None if fits else f"targets are not {num_out} real numbers for each row"
    if targets.is_floating_point() or targets.dim() != 1:
        return "targets are not one class for each row"
    return None if 0 <= int(targets.min()) <= int(targets.max()) < num_out else f"targets are not all classes from 0 to {num_out - 1}"


class Compiled:
    """Steps of plain SGD on a chain of linear layers by `loops`, which number the losses of its `head`, for all examples (M, ...)."""

    def __init__(self, loops: ModuleType, chain: Chain, head: int, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
        self._loops, self._head = loops, head
        self._layers, kinds, operands = chain
        self._inputs = inputs.flatten(1).contiguous().numpy()
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        self._first = kinds, operands.astype(kind)
        of_classes = head == _OF_CLASSES
        self._classes = targets.long().numpy() if of_classes else np.zeros(0, dtype=np.int64)
        self._wanted = np.zeros((0, 0), dtype=kind) if of_classes else targets.flatten(1).contiguous().numpy()

    @classmethod
    def of(
        cls,
        batched: Batched,
        x_1P: Tensor,
        inputs: Tensor,
        targets: Tensor,
        *,
        is_tried: bool = False,
        expected: tuple[Tensor, Tensor] | None = None,
    ) -> Compiled | str:
        """Compile the steps of a batched chain on all examples (M, ...), tried at `x_1P` unless they are; or say why it cannot be done.

        A step on `tried_on` these examples must have the gradient (P,) and the loss that are expected; None: those of the chain.
        """
        if inputs.device.type != "cpu":
            return f"compiled loops run on the CPU, not on {inputs.device.type}"
        chain = _chain_of(batched.layers, x_1P.dtype, inputs.dtype) if x_1P.dtype in _DTYPES else f"parameters are {x_1P.dtype}"
        if isinstance(chain, str):
            return chain
        if (fault := _fault_of_rows(chain, batched.loss, inputs, targets)) is not None:
            return fault
        if (loops := load_loops("training")) is None:
            return why_no_loops()
        compiled = cls(loops, chain, _LOSSES[batched.loss], inputs, targets, x_1P.dtype)
        if is_tried:
            return compiled
        if expected is None:
            few = tried_on(inputs, targets)
            gradient_1P, loss_1 = batched.gradients(x_1P, few[0].unsqueeze(0), few[1].unsqueeze(0))
            expected = gradient_1P[0], loss_1[0]
        return compiled if compiled._makes_step(x_1P, *expected) else "compiled loops give another step here than torch"

    def _makes_step(self, x_1P: Tensor, gradient_P: Tensor, loss: Tensor) -> bool:
        """Whether a step on two examples has this gradient, which is overwritten, and this loss; loads the loops."""
        expected_1P = gradient_P.neg_().add_(x_1P[0]).unsqueeze(0)
        moved_1P = x_1P.clone(memory_format=torch.contiguous_format)
        with one_blas_thread():
            loss_1, _ = self.sgd_steps(moved_1P, _two_of(len(self._inputs)).view(1, 1, -1), 1.0, 0.0, None, x_1P)
        eps = torch.finfo(x_1P.dtype).eps ** 0.5
        parts = zip(torch.split(moved_1P, _COMPARED, dim=1), torch.split(expected_1P, _COMPARED, dim=1), strict=True)
        close = all(torch.allclose(moved, expected, rtol=eps, atol=eps) for moved, expected in parts)
        return close and torch.allclose(loss_1, loss, rtol=eps, atol=eps)

    def sgd_steps(
        self,
        x_CP: Tensor,
        positions_CKB: Tensor,
        lr: float,
        decay: float,
        scale_C: Tensor | None,
        before_CP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take K steps of plain SGD in place, as `local_steps.PlainSteps` says."""
        before = before_CP if before_CP is not None and before_CP.is_contiguous() else x_CP.new_empty((0, x_CP.shape[1]))
        x, positions = x_CP.numpy(), positions_CKB.contiguous().numpy()
        kind, loss_C, finite_C = x.dtype.type, np.empty(len(x)), np.empty(len(x), dtype=np.bool_)
        scale = scale_C.numpy() if scale_C is not None else np.ones(len(x), dtype=x.dtype)
        data = self._inputs, *self._first, self._classes, self._wanted
        self._loops.sgd_steps(
            x,
            before.numpy(),
            *data,
            positions,
            self._layers,
            self._head,
            kind(lr),
            kind(1 - lr * decay),
            np.ascontiguousarray(scale),
            loss_C,
            finite_C,
        )
        return torch.from_numpy(loss_C).to(x_CP.dtype), torch.from_numpy(finite_C)


def tried_on(inputs: Tensor, targets: Tensor) -> Rows:
    """The two examples on which a step is tried; of one example twice the same."""
    few = _two_of(len(inputs))
    return inputs[few], targets[few]


def _two_of(number: int) -> Tensor:
    return torch.arange(2).remainder(number)


def load_for_forks() -> None:
    """Load the loops for models and inputs in float32, for processes that are forked later; nothing where there are no loops."""
    loops = load_loops("training")
    if loops is None:
        return
    one_linear_layer = np.array([[1, 1, 0, 1, 0]], dtype=np.int64)
    chain = one_linear_layer, np.zeros(0, dtype=np.int64), np.zeros(0)
    example, x_CP = torch.zeros(1, 1), torch.zeros(1, 2)
    loaded = Compiled(loops, chain, _LOSSES[F.mse_loss], example, example, x_CP.dtype)
    loaded.sgd_steps(x_CP, torch.zeros(1, 1, 1, dtype=torch.int64), 1.0, 0.0, None, x_CP.clone())


def one_blas_thread() -> AbstractContextManager[object]:
    """A context in which a matrix product keeps to the thread that asked for it: rows are divided among threads already."""
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
