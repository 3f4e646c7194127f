"""The inner loop of plain gossip, compiled: one pass over what the cache holds where torch takes a dozen. Needs numba (extra `fast`).

Shapes: N rows here, G of other processes, F = N + G, K neighbour slots, P parameters, W columns of a block.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_SOURCE_BYTES = 1024**2  # of all rows' columns: what a core reads again and again
_NARROWEST, _WIDEST = 256, 2048


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _sum_of_squares(numbers: Any) -> Any:
    """Free to add up in any order, which is what lets it do several at once."""
    total = numbers[0] * 0
    for c in range(len(numbers)):
        total += numbers[c] * numbers[c]
    return total


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy(rows_NP: Any, start: Any, into_NW: Any, width: Any) -> None:
    """Some columns; a slice assigned to a slice would compile for seconds."""
    for i in range(len(rows_NP)):
        numbers, into = rows_NP[i, start : start + width], into_NW[i]
        for c in range(width):
            into[c] = numbers[c]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mean(rows_NW: Any, mean_W: Any) -> None:
    for c in range(len(mean_W)):
        mean_W[c] = 0
    for i in range(len(rows_NW)):
        for c in range(len(mean_W)):
            mean_W[c] += rows_NW[i, c]
    for c in range(len(mean_W)):
        mean_W[c] /= len(rows_NW)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mix_some(x_NP: Any, start: Any, from_FW: Any, mean_W: Any, mixing_rows: Any, flow_W: Any, measured: Any) -> None:
    """Columns so few that all rows' stay in the cache."""
    index_NK, weights_NK, present_NK = mixing_rows
    width = len(mean_W)
    flow = flow_W[:width]
    for i in range(len(x_NP)):
        own, total = from_FW[i, :width], x_NP[i, start : start + width]
        measured[1, i] += _sum_of_squares(own)
        for c in range(width):
            flow[c] = own[c] - mean_W[c]
        measured[2, i] += _sum_of_squares(flow)
        for k in range(index_NK.shape[1]):
            if present_NK[i, k]:
                other, weight = from_FW[index_NK[i, k], :width], weights_NK[i, k]
                for c in range(width):
                    flow[c] = other[c] - own[c]
                measured[0, i] += _sum_of_squares(flow)
                for c in range(width):
                    total[c] += flow[c] * weight  # rounded in between, as torch does it


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mix(
    x_NP: Any, mean_P: Any, mixing_rows: Any, active_N: Any, far_GW: Any, offset: Any, columns: Any, width: Any, measured: Any
) -> None:
    num_rows, num_far = len(x_NP), len(far_GW)
    flow_W, from_FW = np.empty(width, dtype=x_NP.dtype), np.empty((num_rows + num_far, width), dtype=x_NP.dtype)
    for start in range(columns[0], columns[1], width):
        stop = min(start + width, columns[1])
        mean = mean_P[start:stop]
        _copy(x_NP, start, from_FW[:num_rows], len(mean))
        _copy(far_GW, start - offset, from_FW[num_rows:], len(mean))
        _mean(from_FW[:num_rows], mean)
        _mix_some(x_NP, start, from_FW, mean, mixing_rows, flow_W, measured)
        for i in range(num_rows):
            if not active_N[i]:
                for c in range(len(mean)):
                    x_NP[i, start + c] = from_FW[i, c]


def mix(
    x_NP: np.ndarray,
    mean_P: np.ndarray,
    mixing_rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    active_N: np.ndarray,
    *,
    far_GW: np.ndarray,
    offset: int,
    columns: tuple[int, int],
    measured: np.ndarray,
) -> None:
    """Average some columns of all rows in place, and add up how far each is from its neighbours, from zero and from the mean.

    Args:
        x_NP: float32 or float64, in C order; changed.
        mean_P: of its dtype; filled with the rows' mean.
        mixing_rows: index_NK, int64, rows of x and then of `far_GW`; weights_NK, of x's dtype; present_NK, bool: others are left out.
        active_N: bool; others stay as they are.
        far_GW: a block of columns of other processes' rows, in C order.
        offset: where in x that block begins.
        columns: the first, and the one after the last; in the block.
        measured: float64 (3, N), added to: squares of distances from neighbours, of norms, of distances from the mean.
    """
    width = min(max(_SOURCE_BYTES // ((len(x_NP) + len(far_GW)) * x_NP.itemsize), _NARROWEST), _WIDEST)
    _mix(x_NP, mean_P, mixing_rows, active_N, far_GW, offset, columns, width, measured)
