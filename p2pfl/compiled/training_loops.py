"""Steps of plain SGD on chains of linear layers, compiled: a row stays in a core's own cache from its first step to its last.

Needs numba (extra `fast`). Shapes: C rows, K steps, B examples of a batch, P parameters, L layers, M examples, D and O numbers of each.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import types
from numba.extending import get_cython_function_address, overload

_SMALL = 4096  # products of so few numbers are done sooner than BLAS is called


_IN, _OUT = 0, 1
_RELU, _TANH, _SIGMOID = 1, 2, 3
_CROSS_ENTROPY, _BINARY_CROSS_ENTROPY = 0, 1
_PLUS, _MINUS, _TIMES = 0, 1, 2

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_reordering = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


for _name in ("sgemm", "dgemm"):  # by a name of their own, so that what is compiled can be kept for the next process
    llvmlite.binding.add_symbol(f"p2pfl_{_name}", get_cython_function_address("scipy.linalg.cython_blas", _name))
_SGEMM, _DGEMM = (types.ExternalFunction(name, types.void(*[types.voidptr] * 13)) for name in ("p2pfl_sgemm", "p2pfl_dgemm"))


def _gemm(turned: Any, sizes: Any, factors: Any, a: Any, b: Any, out: Any) -> None:
    """BLAS's product, which takes matrices by columns: to out^T, factors[1] out^T + factors[0] b^T a^T; all of them lie in C order.

    `turned` is uint8, b"N" or b"T" for b and for a; `sizes` int32: columns and rows of out, the length of a sum, then the row lengths of b,
    a and out as they lie.
    """
    raise NotImplementedError  # only in compiled code


@overload(_gemm)  # type: ignore[untyped-decorator]
def _gemm_of_dtype(turned: Any, sizes: Any, factors: Any, a: Any, b: Any, out: Any) -> Any:  # noqa: ARG001
    gemm = _SGEMM if out.dtype == types.float32 else _DGEMM

    def call(turned: Any, sizes: Any, factors: Any, a: Any, b: Any, out: Any) -> None:
        m, n, k, ldb, lda, ldc = sizes[0:], sizes[1:], sizes[2:], sizes[3:], sizes[4:], sizes[5:]
        gemm(
            turned.ctypes,
            turned[1:].ctypes,
            m.ctypes,
            n.ctypes,
            k.ctypes,
            factors.ctypes,
            b.ctypes,
            ldb.ctypes,
            a.ctypes,
            lda.ctypes,
            factors[1:].ctypes,
            out.ctypes,
            ldc.ctypes,
        )

    return call


@_compiled  # type: ignore[untyped-decorator]
def _product(a: Any, a_turned: Any, b: Any, b_turned: Any, factor: Any, kept: Any, out_MN: Any) -> None:
    """To out, kept out + factor a b, either of them turned round or not."""
    turned, sizes, factors = np.empty(2, np.uint8), np.empty(6, np.int32), np.empty(2, out_MN.dtype)
    turned[0], turned[1] = (84 if b_turned else 78), (84 if a_turned else 78)
    sizes[0], sizes[1], sizes[2] = out_MN.shape[1], out_MN.shape[0], (a.shape[0] if a_turned else a.shape[1])
    sizes[3], sizes[4], sizes[5] = b.shape[1], a.shape[1], out_MN.shape[1]
    factors[0], factors[1] = factor, kept
    _gemm(turned, sizes, factors, a, b, out_MN)


@_reordering  # type: ignore[untyped-decorator]
def _times_transposed(a_BD: Any, w_OD: Any, out_BO: Any) -> None:
    """To out, a w^T."""
    if a_BD.size * len(w_OD) > _SMALL:
        _product(a_BD, False, w_OD, True, 1, 0, out_BO)
        return
    for b in range(len(a_BD)):
        for o in range(len(w_OD)):
            total = w_OD[o, 0] * 0
            for d in range(a_BD.shape[1]):
                total += a_BD[b, d] * w_OD[o, d]
            out_BO[b, o] = total


@_reordering  # type: ignore[untyped-decorator]
def _times(a_BO: Any, w_OD: Any, out_BD: Any) -> None:
    """To out, a w."""
    if a_BO.size * w_OD.shape[1] > _SMALL:
        _product(a_BO, False, w_OD, False, 1, 0, out_BD)
        return
    for b in range(len(a_BO)):
        for d in range(w_OD.shape[1]):
            out_BD[b, d] = 0
        for o in range(len(w_OD)):
            factor = a_BO[b, o]
            for d in range(w_OD.shape[1]):
                out_BD[b, d] += factor * w_OD[o, d]


@_reordering  # type: ignore[untyped-decorator]
def _step_down(w_OD: Any, kept: Any, slope_BO: Any, a_BD: Any) -> None:
    """To w, kept w - slope^T a."""
    if slope_BO.size * a_BD.shape[1] > _SMALL:
        _product(slope_BO, True, a_BD, False, -1, kept, w_OD)
        return
    for o in range(len(w_OD)):
        for d in range(w_OD.shape[1]):
            w_OD[o, d] *= kept
        for b in range(len(a_BD)):
            factor = slope_BO[b, o]
            for d in range(w_OD.shape[1]):
                w_OD[o, d] -= factor * a_BD[b, d]


@_reordering  # type: ignore[untyped-decorator]
def _times_nothing(numbers: Any) -> Any:
    """0 if all are finite, else NaN."""
    total = numbers[0] * 0
    for i in range(len(numbers)):
        total += numbers[i] * 0
    return total


@_compiled  # type: ignore[untyped-decorator]
def _copy(numbers: Any, into: Any) -> None:
    for i in range(len(numbers)):  # a slice assigned to a slice compiles for seconds
        into[i] = numbers[i]


@_compiled  # type: ignore[untyped-decorator]
def _prepare(numbers: Any, kinds: Any, operands: Any) -> None:
    for step in range(len(kinds)):
        kind, operand = kinds[step], operands[step]
        if kind == _PLUS:
            for i in range(len(numbers)):
                numbers[i] += operand
        elif kind == _MINUS:
            for i in range(len(numbers)):
                numbers[i] -= operand
        elif kind == _TIMES:
            for i in range(len(numbers)):
                numbers[i] *= operand
        else:
            for i in range(len(numbers)):
                numbers[i] /= operand


@_compiled  # type: ignore[untyped-decorator]
def _activate(numbers: Any, kind: Any) -> None:
    if kind == _RELU:
        for i in range(len(numbers)):
            numbers[i] = max(numbers[i], 0)
    elif kind == _TANH:
        for i in range(len(numbers)):
            numbers[i] = np.tanh(numbers[i])
    elif kind == _SIGMOID:
        for i in range(len(numbers)):
            numbers[i] = 1 / (1 + np.exp(-numbers[i]))


@_compiled  # type: ignore[untyped-decorator]
def _back_through(slope: Any, after: Any, kind: Any) -> None:
    if kind == _RELU:
        for i in range(len(slope)):
            slope[i] = 0 if after[i] <= 0 else slope[i]
    elif kind == _TANH:
        for i in range(len(slope)):
            slope[i] *= 1 - after[i] * after[i]
    elif kind == _SIGMOID:
        for i in range(len(slope)):
            slope[i] *= after[i] * (1 - after[i])


@_compiled  # type: ignore[untyped-decorator]
def _classes(outputs_BO: Any, classes_M: Any, rows_B: Any, slope_BO: Any) -> Any:
    """Cross-entropy, summed; its gradient at the outputs."""
    loss = 0.0
    for b in range(len(rows_B)):
        top, total, chosen = outputs_BO[b, 0], outputs_BO[b, 0] * 0, classes_M[rows_B[b]]
        for o in range(outputs_BO.shape[1]):
            top = max(top, outputs_BO[b, o])
        for o in range(outputs_BO.shape[1]):
            slope_BO[b, o] = np.exp(outputs_BO[b, o] - top)
            total += slope_BO[b, o]
        loss += np.log(total) - (outputs_BO[b, chosen] - top)
        for o in range(outputs_BO.shape[1]):
            slope_BO[b, o] /= total
        slope_BO[b, chosen] -= 1
    return loss / len(rows_B)


@_compiled  # type: ignore[untyped-decorator]
def _numbers(outputs_BO: Any, wanted_MO: Any, rows_B: Any, slope_BO: Any, head: Any) -> Any:
    """Binary cross-entropy with logits or squared error, of each output; its gradient."""
    loss = 0.0
    for b in range(len(rows_B)):
        for o in range(outputs_BO.shape[1]):
            output, wanted = outputs_BO[b, o], wanted_MO[rows_B[b], o]
            if head == _BINARY_CROSS_ENTROPY:
                small = np.exp(-abs(output))
                loss += max(output, 0) - output * wanted + np.log1p(small)
                slope_BO[b, o] = (1 if output >= 0 else small) / (1 + small) - wanted
            else:
                loss += (output - wanted) ** 2
                slope_BO[b, o] = 2 * (output - wanted)
    return loss / slope_BO.size


@_compiled  # type: ignore[untyped-decorator]
def _forward(x_P: Any, layers: Any, flat: Any, ends: Any, batch: Any) -> None:
    """Fill what comes out of each layer; what goes into the first is there."""
    for n in range(len(layers)):
        num_in, num_out, weight, bias, kind = layers[n]
        out = flat[ends[n + 1] : ends[n + 2]]
        out_BO = out.reshape(batch, num_out)
        w_OD = x_P[weight : weight + num_in * num_out].reshape(num_out, num_in)
        _times_transposed(flat[ends[n] : ends[n + 1]].reshape(batch, num_in), w_OD, out_BO)
        if bias >= 0:
            for b in range(batch):
                for o in range(num_out):
                    out_BO[b, o] += x_P[bias + o]
        _activate(out, kind)


@_compiled  # type: ignore[untyped-decorator]
def _backward(x_P: Any, layers: Any, flat: Any, ends: Any, batch: Any, slopes: Any, kept: Any) -> None:
    """Move the parameters; `slopes` (2, S) begins with the learning rate times the gradient at the outputs."""
    turn = 0
    for n in range(len(layers) - 1, -1, -1):
        num_in, num_out, weight, bias, kind = layers[n]
        slope, before = slopes[turn][: batch * num_out], slopes[1 - turn][: batch * num_in]
        _back_through(slope, flat[ends[n + 1] : ends[n + 2]], kind)
        slope_BO = slope.reshape(batch, num_out)
        w_OD = x_P[weight : weight + num_in * num_out].reshape(num_out, num_in)
        if n:
            _times(slope_BO, w_OD, before.reshape(batch, num_in))
        _step_down(w_OD, kept, slope_BO, flat[ends[n] : ends[n + 1]].reshape(batch, num_in))
        if bias >= 0:
            for o in range(num_out):
                total = slope[0] * 0
                for b in range(batch):
                    total += slope_BO[b, o]
                x_P[bias + o] = kept * x_P[bias + o] - total
        turn = 1 - turn


@_compiled  # type: ignore[untyped-decorator]
def sgd_steps(
    x_CP: Any,
    before_CP: Any,
    inputs_MD: Any,
    kinds: Any,
    operands: Any,
    classes_M: Any,
    wanted_MO: Any,
    positions_CKB: Any,
    layers: Any,
    head: Any,
    lr: Any,
    kept: Any,
    scale_C: Any,
    loss_C: Any,
    finite_C: Any,
) -> None:
    """K steps of each row; one that becomes non-finite is as it was.

    Args:
        x_CP: changed.
        before_CP: equal to it and not changed, or without rows: there is no such copy.
        inputs_MD: of its dtype, or whole numbers.
        kinds: int64, what is done to each input first: plus, minus, times, over a number.
        operands: the numbers, of x's dtype.
        classes_M: int64, for cross-entropy.
        wanted_MO: of x's dtype, for the other losses.
        positions_CKB: int64, examples.
        layers: int64 (L, 5): numbers in and out, where weight and bias begin (-1: there is none), what follows.
        head: the loss.
        lr: learning rate, of x's dtype.
        kept: 1 - lr * weight_decay, likewise.
        scale_C: on each row's gradient, likewise.
        loss_C: float64, filled with the mean loss over the steps.
        finite_C: bool, filled.
    """
    num_layers, batch, num_out = len(layers), positions_CKB.shape[2], layers[-1, _OUT]
    ends = np.zeros(num_layers + 2, dtype=np.int64)  # of what goes into each layer, and comes out of the last
    ends[1] = batch * layers[0, _IN]
    for n in range(num_layers):
        ends[n + 2] = ends[n + 1] + batch * layers[n, _OUT]
    flat, slopes = np.empty(ends[-1], dtype=x_CP.dtype), np.empty((2, ends[-1]), dtype=x_CP.dtype)
    slope_BO = slopes[0][: batch * num_out].reshape(batch, num_out)
    first_BD, out_BO = flat[: ends[1]].reshape(batch, layers[0, _IN]), flat[ends[num_layers] :].reshape(batch, num_out)
    is_kept = len(before_CP) > 0
    before_P = np.empty(0 if is_kept else x_CP.shape[1], dtype=x_CP.dtype)
    for i in range(len(x_CP)):
        x_P = x_CP[i]
        if not is_kept:
            _copy(x_P, before_P)
        loss_C[i] = 0
        for k in range(positions_CKB.shape[1]):
            rows_B = positions_CKB[i, k]
            for b in range(batch):
                _copy(inputs_MD[rows_B[b]], first_BD[b])
                _prepare(first_BD[b], kinds, operands)
            _forward(x_P, layers, flat, ends, batch)
            if head == _CROSS_ENTROPY:
                loss_C[i] += _classes(out_BO, classes_M, rows_B, slope_BO)
                factor = lr * scale_C[i] / batch
            else:
                loss_C[i] += _numbers(out_BO, wanted_MO, rows_B, slope_BO, head)
                factor = lr * scale_C[i] / slope_BO.size
            for b in range(batch):
                for o in range(num_out):
                    slope_BO[b, o] *= factor
            _backward(x_P, layers, flat, ends, batch, slopes, kept)
        loss_C[i] /= positions_CKB.shape[1]
        finite_C[i] = _times_nothing(x_P) == 0
        if not finite_C[i]:
            _copy(before_CP[i] if is_kept else before_P, x_P)
