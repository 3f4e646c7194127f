"""Plain gossip of all rows in place, a block of columns at a time: neighbours are read from the cache, and nothing is copied whole.

Shapes: N rows, G rows of other ranks, F = N + G, K neighbour slots, P parameters, W columns of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import local
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from p2pfl.compiled.loader import load_loops
from p2pfl.simulator.sharding.halo import BlockedExchange
from p2pfl.training.local_steps import split_evenly

_BLOCK_BYTES = 16 * 1024**2  # of all rows' columns: what the last cache holds
_NARROWEST = 512
_PART_BYTES = 1024**2  # of some rows' columns: what a core's own cache holds
_COMPILED = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Measures of rows before they were mixed."""

    squared_N: Tensor
    """float64, sum_j ||x_i - x_j||**2 over the neighbours that are there."""
    squared_norms_N: Tensor
    """float64, ||x_i||**2."""
    deviation_N: Tensor
    """float64, ||x_i - mean||**2."""
    mean_P: Tensor
    """Mean of all rows, (P,)."""

    @property
    def distance(self) -> float:
        """Root mean square distance from the mean."""
        return float(self.deviation_N.mean().sqrt())


def block_columns(num_rows: int, num_columns: int, itemsize: int) -> int:
    """Number of columns that are mixed at once."""
    return min(num_columns, max(_NARROWEST, _BLOCK_BYTES // (num_rows * itemsize)))


def load_compiled(dtype: torch.dtype) -> bool:
    """Load compiled loops for numbers of a dtype; whether there are any."""
    if load_loops("mixing") is None or dtype not in _COMPILED:
        return False
    nobody = torch.zeros(1, 1, dtype=torch.int64)
    mix_in_place(torch.zeros(1, 1, dtype=dtype), nobody, nobody.to(dtype), nobody.bool(), compiled=True)
    return True


def mix_in_place(
    x_NP: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
    present_NK: Tensor,
    *,
    threads: int = 1,
    active_N: Tensor | None = None,
    halo: BlockedExchange | None = None,
    width: int | None = None,
    compiled: bool = False,
) -> Mixed:
    """Mix rows: x_i <- x_i + sum_k w_ik (x_j(k) - x_i) over the neighbours that are there, the same bits as `Inbox.mix` gives.

    Args:
        x_NP: changed.
        index_NK: int64, the row in each slot; N and more are rows of other processes.
        weights_NK: of x's dtype.
        present_NK: bool; what is not there counts as nothing.
        threads: to compute with.
        active_N: bool, rows that are changed; None: all.
        halo: rows of other ranks; None: all are here.
        width: columns of a block; None: what the cache holds.
        compiled: with a compiled loop, where there is one; the same bits, several times as fast, after a second's loading.
    """
    num_rows, num_columns = x_NP.shape
    width = width or block_columns(num_rows, num_columns, x_NP.element_size())
    loops = load_loops("mixing") if compiled and x_NP.dtype in _COMPILED and x_NP.is_contiguous() else None
    if loops is not None:
        return _mixed_by_loops(loops, x_NP, (index_NK, weights_NK, present_NK), threads, active_N, halo, width)
    num_far, inner = (halo.num_rows, halo.num_inner) if halo is not None else (0, num_rows)
    # what the rows were, those of others below them; the next block's come while this one is mixed
    sources = [x_NP.new_empty((num_rows + num_far) * width) for _ in range(1 if halo is None else 2)]
    mean_P = x_NP.new_empty(num_columns)

    def block_and_source(number: int) -> tuple[Tensor, Tensor]:
        block_NW = x_NP[:, number * width : (number + 1) * width]
        columns = block_NW.shape[1]
        return block_NW, sources[number % len(sources)][: (num_rows + num_far) * columns].view(-1, columns)

    num_blocks = -(-num_columns // width)
    with ThreadPoolExecutor(threads, thread_name_prefix="mix") as pool:
        way = _Slots(index_NK, weights_NK, present_NK, pool, threads)
        for number in range(num_blocks):
            block_NW, from_FW = block_and_source(number)
            if halo is not None:
                for ahead in (0, 1) if number == 0 else (1,):
                    if number + ahead < num_blocks:
                        coming_NW, into_FW = block_and_source(number + ahead)
                        halo.post(coming_NW, into_FW[num_rows:])
            from_FW[:num_rows] = block_NW
            mean_W = from_FW[:num_rows].mean(dim=0)
            mean_P[number * width : (number + 1) * width] = mean_W
            way.mix(block_NW, from_FW, mean_W, range(inner))
            if halo is not None:
                halo.arrived()
                way.mix(block_NW, from_FW, mean_W, range(inner, num_rows))
            if active_N is not None:
                block_NW[~active_N] = from_FW[:num_rows][~active_N]
    squared_N, norms_N, deviation_N = way.measured
    return Mixed(squared_N=squared_N, squared_norms_N=norms_N, deviation_N=deviation_N, mean_P=mean_P)


class _Slots:
    """Mixing by torch, a neighbour slot after the other, some rows at a time."""

    def __init__(self, index_NK: Tensor, weights_NK: Tensor, present_NK: Tensor, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self._threads = pool, threads
        self._everybody, self._present_NK = bool(present_NK.all()), present_NK
        self._weights_NK = weights_NK if self._everybody else weights_NK * present_NK
        self._index_KN = index_NK.t().contiguous()
        self.measured = torch.zeros(3, len(index_NK), dtype=torch.float64)
        """Squares of each row's distances from its neighbours, of its norm, of its distance from the mean, (3, N)."""
        self._kept = local()  # by each thread, as a part's numbers are allocated once and not for every neighbour

    def mix(self, block_NW: Tensor, from_FW: Tensor, mean_W: Tensor, rows: range) -> None:
        """Mix some of the rows of a block of columns, given what they were before and their mean."""
        rows_at_once = max(1, min(len(rows), _PART_BYTES // (from_FW.shape[1] * from_FW.element_size())))
        parts = [slice(start, min(start + rows_at_once, rows.stop)) for start in rows[::rows_at_once]]
        is_small = min(self._threads, len(parts)) == 1  # a thread costs more than a small part
        list((map if is_small else self._pool.map)(lambda part: self._mix(block_NW, from_FW, mean_W, part), parts))

    def _mix(self, block_NW: Tensor, from_FW: Tensor, mean_W: Tensor, rows: slice) -> None:
        squared_N, norms_N, deviation_N = self.measured
        own, total = from_FW[rows], block_NW[rows]
        flow = self._numbers(own)
        norms_N[rows] += _squared_norms(own)
        deviation_N[rows] += _squared_norms(torch.sub(own, mean_W, out=flow))
        for k in range(len(self._index_KN)):
            torch.index_select(from_FW, 0, self._index_KN[k, rows], out=flow).sub_(own)
            norms = _squared_norms(flow)
            squared_N[rows] += norms if self._everybody else norms * self._present_NK[rows, k]
            total.add_(flow.mul_(self._weights_NK[rows, k, None]))

    def _numbers(self, like: Tensor) -> Tensor:
        if not hasattr(self._kept, "numbers") or self._kept.numbers.numel() < like.numel():
            self._kept.numbers = like.new_empty(like.numel())
        numbers: Tensor = self._kept.numbers[: like.numel()].view(like.shape)
        return numbers


def _mixed_by_loops(
    loops: ModuleType,
    x_NP: Tensor,
    neighbours: tuple[Tensor, Tensor, Tensor],
    threads: int,
    active_N: Tensor | None,
    halo: BlockedExchange | None,
    width: int,
) -> Mixed:
    """Mix all slots of a row in one compiled loop; each thread has columns of its own, all at once where all rows are here.

    Columns are mixed once other processes' rows have come, while those of the next block are on their way.
    """
    num_rows, num_columns = x_NP.shape
    width, num_far = (num_columns, 0) if halo is None else (width, halo.num_rows)
    mean_P, measured_TN = x_NP.new_empty(num_columns), np.zeros((threads, 3, num_rows))
    active = active_N.numpy() if active_N is not None else np.ones(num_rows, dtype=np.bool_)
    arrays = x_NP.numpy(), mean_P.numpy(), tuple(tensor.contiguous().numpy() for tensor in neighbours), active
    numbers = [x_NP.new_empty(num_far * width) for _ in range(2)]

    def far(start: int) -> Tensor:
        columns = min(width, num_columns - start)
        return numbers[start // width % 2][: num_far * columns].view(num_far, columns)

    def post(start: int) -> None:
        if halo is not None and start < num_columns:
            halo.post(x_NP[:, start : start + width], far(start))

    with ThreadPoolExecutor(threads, thread_name_prefix="mix") as pool:
        post(0)
        for start in range(0, num_columns, width):
            post(start + width)
            if halo is not None:
                halo.arrived()
            far_GW, stop = far(start).numpy(), min(start + width, num_columns)

            def work(thread: int, columns: tuple[int, int], far_GW: np.ndarray = far_GW, offset: int = start) -> None:
                loops.mix(*arrays, far_GW=far_GW, offset=offset, columns=columns, measured=measured_TN[thread])

            list(pool.map(work, range(threads), pairwise(split_evenly(start, stop, -(-(stop - start) // threads)))))
    squared_N, norms_N, deviation_N = torch.from_numpy(measured_TN.sum(axis=0))
    return Mixed(squared_N=squared_N, squared_norms_N=norms_N, deviation_N=deviation_N, mean_P=mean_P)


def _squared_norms(rows_NW: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(rows_NW, dim=-1)
    return norms_N.double().square()
