"""Plain gossip of all rows in place, a block of columns at a time: neighbours are read from the cache, and nothing is copied whole.

Shapes: N rows, G rows of other processes, F = N + G, K neighbour slots, P parameters, W columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Protocol

import torch
from torch import Tensor

from p2pfl.algorithms import DPSGD
from p2pfl.plan import Plan

_BLOCK_BYTES = 16 * 1024**2  # of all rows' columns: what the last cache holds
_NARROWEST = 512
_PART_BYTES = 1024**2  # of some rows' columns: what a core's own cache holds


@dataclass(frozen=True, slots=True)
class Mixed:
    """What the rows were before they were mixed."""

    squared_N: Tensor
    """float64, sum_j ||x_i - x_j||**2 over the neighbours that are there."""

    squared_norms_N: Tensor
    """float64, ||x_i||**2."""

    apart_N: Tensor
    """float64, ||x_i - mean||**2."""

    mean_P: Tensor
    """Of the rows."""

    @property
    def distance(self) -> float:
        """sqrt(mean_i ||x_i - mean||**2)."""
        return float(self.apart_N.mean().sqrt())


class Elsewhere(Protocol):
    """Neighbours' rows that come from other processes, a block of columns at a time."""

    num_rows: int
    """G"""

    num_inner: int
    """So many rows here, the first ones, need none of them."""

    def post(self, block_NW: Tensor, into_GW: Tensor) -> None:
        """Ask for them, and send what others need."""
        ...

    def arrived(self) -> None:
        """Wait for those of the first block that was not waited for yet."""
        ...


def is_plain(plan: Plan) -> bool:
    """Whether a plan's rule just averages models, on a graph where nothing of earlier rounds has to be remembered."""
    rule = type(plan.recipe.algorithm)
    plain = rule.phases == 1 and rule.merge is DPSGD.merge and rule.outgoing is DPSGD.outgoing and rule.init is DPSGD.init
    return plain and plan.meetings(plan.names[:1]) is None


def block_columns(num_rows: int, num_columns: int, itemsize: int) -> int:
    """How many columns are mixed at once."""
    return min(num_columns, max(_NARROWEST, _BLOCK_BYTES // (num_rows * itemsize)))


def mix_in_place(  # noqa: C901  # one loop with what it needs at hand
    x_NP: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
    present_NK: Tensor,
    *,
    threads: int = 1,
    active_N: Tensor | None = None,
    elsewhere: Elsewhere | None = None,
    width: int | None = None,
) -> Mixed:
    """x_i <- x_i + sum_k w_ik (x_j(k) - x_i) over the neighbours that are there, the same bits as `SlotInbox.mix` gives.

    Args:
        x_NP: changed.
        index_NK: int64, the row in each slot; N and more are rows of other processes.
        weights_NK: of x's dtype.
        present_NK: bool; what is not there counts as nothing.
        threads: to compute with.
        active_N: bool, rows that are changed; None: all.
        elsewhere: rows of other processes; None: all are here.
        width: columns of a block; None: what the cache holds.
    """
    num_rows, num_columns = x_NP.shape
    width = width or block_columns(num_rows, num_columns, x_NP.element_size())
    num_far, inner = (elsewhere.num_rows, elsewhere.num_inner) if elsewhere is not None else (0, num_rows)
    # what the rows were, those of others below them; the next block's come while this one is mixed
    sources = [x_NP.new_empty((num_rows + num_far) * width) for _ in range(1 if elsewhere is None else 2)]
    mean_P = x_NP.new_empty(num_columns)
    squared_N = torch.zeros(num_rows, dtype=torch.float64)
    norms_N, apart_N = torch.zeros_like(squared_N), torch.zeros_like(squared_N)
    rows_at_once = max(1, min(num_rows, _PART_BYTES // (width * x_NP.element_size())))
    everybody = bool(present_NK.all())
    weights_NK = weights_NK if everybody else weights_NK * present_NK
    index_KN = index_NK.t().contiguous()
    kept = local()  # by each thread, as a part's numbers are allocated once and not for every neighbour

    def one_part(rows: slice, block_NW: Tensor, from_FW: Tensor, mean_W: Tensor) -> None:
        if not hasattr(kept, "numbers"):
            kept.numbers = x_NP.new_empty(rows_at_once * width)
        own, total = from_FW[rows], block_NW[rows]
        flow = kept.numbers[: own.numel()].view(own.shape)
        norms_N[rows] += _squared_norms(own)
        apart_N[rows] += _squared_norms(torch.sub(own, mean_W, out=flow))
        for k in range(len(index_KN)):
            torch.index_select(from_FW, 0, index_KN[k, rows], out=flow).sub_(own)
            norms = _squared_norms(flow)
            squared_N[rows] += norms if everybody else norms * present_NK[rows, k]
            total.add_(flow.mul_(weights_NK[rows, k, None]))

    def parts(first: int, last: int) -> list[slice]:
        return [slice(start, min(start + rows_at_once, last)) for start in range(first, last, rows_at_once)]

    def block_and_source(number: int) -> tuple[Tensor, Tensor]:
        block_NW = x_NP[:, number * width : (number + 1) * width]
        columns = block_NW.shape[1]
        return block_NW, sources[number % len(sources)][: (num_rows + num_far) * columns].view(-1, columns)

    num_blocks = -(-num_columns // width)
    with ThreadPoolExecutor(threads, thread_name_prefix="mix") as pool:

        def mix(some: list[slice], work: Callable[[slice], None]) -> None:
            list(map(work, some) if min(threads, len(some)) == 1 else pool.map(work, some))  # a thread costs more than a small part

        for number in range(num_blocks):
            block_NW, from_FW = block_and_source(number)
            if elsewhere is not None:
                for ahead in (0, 1) if number == 0 else (1,):
                    if number + ahead < num_blocks:
                        coming_NW, into_FW = block_and_source(number + ahead)
                        elsewhere.post(coming_NW, into_FW[num_rows:])
            from_FW[:num_rows] = block_NW
            mean_W = from_FW[:num_rows].mean(dim=0)
            mean_P[number * width : (number + 1) * width] = mean_W
            work = partial(one_part, block_NW=block_NW, from_FW=from_FW, mean_W=mean_W)
            mix(parts(0, inner), work)
            if elsewhere is not None:
                elsewhere.arrived()
                mix(parts(inner, num_rows), work)
            if active_N is not None:
                block_NW[~active_N] = from_FW[:num_rows][~active_N]
    return Mixed(squared_N=squared_N, squared_norms_N=norms_N, apart_N=apart_N, mean_P=mean_P)


def _squared_norms(rows_NW: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(rows_NW, dim=-1)
    return norms_N.double().square()
