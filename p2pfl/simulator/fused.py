"""The inner loop of plain gossip, compiled: one pass over what the cache holds where torch takes a dozen. Needs numba (extra `fast`).

Shapes: N rows here, F rows in all, K neighbour slots, W columns of a block.
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
def _mix_some(x_NP: Any, offset: Any, from_FW: Any, mean_W: Any, links: Any, rows: Any, columns: Any, flow_W: Any, measured: Any) -> None:
    """Columns so few that all rows' stay in the cache."""
    index_NK, weights_NK, present_NK = links
    start, stop = columns
    flow, mean = flow_W[: stop - start], mean_W[start:stop]
    for i in range(rows[0], rows[1]):
        own, total = from_FW[i, start:stop], x_NP[i, offset + start : offset + stop]
        measured[1, i] += _sum_of_squares(own)
        for c in range(len(flow)):
            flow[c] = own[c] - mean[c]
        measured[2, i] += _sum_of_squares(flow)
        for k in range(index_NK.shape[1]):
            if present_NK[i, k]:
                other, weight = from_FW[index_NK[i, k], start:stop], weights_NK[i, k]
                for c in range(len(flow)):
                    flow[c] = other[c] - own[c]
                measured[0, i] += _sum_of_squares(flow)
                for c in range(len(flow)):
                    total[c] += flow[c] * weight  # rounded in between, as torch does it


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mix_kept(x_NP: Any, offset: Any, from_FW: Any, mean_W: Any, links: Any, rows: Any, columns: Any, width: Any, measured: Any) -> None:
    flow_W = np.empty(width, dtype=x_NP.dtype)
    for start in range(columns[0], columns[1], width):
        some = (start, min(start + width, columns[1]))
        _mix_some(x_NP, offset, from_FW, mean_W, links, rows, some, flow_W, measured)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mix_all(x_NP: Any, mean_P: Any, links: Any, active_N: Any, columns: Any, width: Any, measured: Any) -> None:
    num_rows = len(x_NP)
    flow_W, from_NW = np.empty(width, dtype=x_NP.dtype), np.empty((num_rows, width), dtype=x_NP.dtype)
    for start in range(columns[0], columns[1], width):
        stop = min(start + width, columns[1])
        mean = mean_P[start:stop]
        for c in range(len(mean)):
            mean[c] = 0
        for i in range(num_rows):
            own, kept = x_NP[i, start:stop], from_NW[i]
            for c in range(len(mean)):
                kept[c] = own[c]
                mean[c] += own[c]
        for c in range(len(mean)):
            mean[c] /= num_rows
        _mix_some(x_NP, start, from_NW, mean, links, (0, num_rows), (0, stop - start), flow_W, measured)
        for i in range(num_rows):
            if not active_N[i]:
                for c in range(len(mean)):  # a slice assigned to a slice compiles for seconds
                    x_NP[i, start + c] = from_NW[i, c]


Links = tuple[np.ndarray, np.ndarray, np.ndarray]
"""index_NK, int64; weights_NK, of x's dtype; present_NK, bool: others are left out."""


def mix_all(
    x_NP: np.ndarray, mean_P: np.ndarray, links: Links, *, active_N: np.ndarray, columns: tuple[int, int], measured: np.ndarray
) -> None:
    """Average some columns of all rows in place, and add up how far each is from its neighbours, from zero and from the mean.

    Args:
        x_NP: float32 or float64, in C order; changed.
        mean_P: of its dtype; filled with the rows' mean.
        links: of all rows.
        active_N: bool; others stay as they are.
        columns: the first, and the one after the last.
        measured: float64 (3, N), added to: squares of distances from neighbours, of norms, of distances from the mean.
    """
    _mix_all(x_NP, mean_P, links, active_N, columns, _width(len(x_NP), x_NP.itemsize), measured)


def mix_kept(
    x_NP: np.ndarray,
    offset: int,
    from_FW: np.ndarray,
    mean_W: np.ndarray,
    links: Links,
    *,
    rows: tuple[int, int],
    columns: tuple[int, int],
    measured: np.ndarray,
) -> None:
    """The same of some rows, where what all were is kept elsewhere.

    Args:
        x_NP: as of `mix_all`.
        offset: where in x the columns begin that are kept.
        from_FW: these, of x's dtype and order; the links' rows are rows of it.
        mean_W: of the rows here.
        links: of the rows here.
        rows: the first, and the one after the last.
        columns: likewise, of `from_FW`.
        measured: as of `mix_all`.
    """
    _mix_kept(x_NP, offset, from_FW, mean_W, links, rows, columns, _width(len(from_FW), x_NP.itemsize), measured)


def _width(num_rows: int, itemsize: int) -> int:
    return min(max(_SOURCE_BYTES // (num_rows * itemsize), _NARROWEST), _WIDEST)
