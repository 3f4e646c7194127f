"""Plain gossip of all rows in place, a block of columns at a time: neighbours are read from the cache, and nothing is copied whole.

Shapes: N rows, K neighbour slots, P parameters, W columns of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from p2pfl.algorithms import DPSGD
from p2pfl.plan import Plan

_BLOCK_BYTES = 16 * 1024**2  # of all rows' columns: what the last cache holds
_NARROWEST = 512
_PART_BYTES = 512 * 1024  # of some rows' columns: what a core's own cache holds


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

    far_NK: Tensor
    """int64, which of them stands in each slot; -1 where it is here."""

    num_inner: int
    """So many rows, the first ones, need none of them."""

    def post(self, block_NW: Tensor) -> None:
        """Ask for them, and send what others need."""
        ...

    def take(self) -> Tensor:
        """Those of the first block that was not taken yet; waits for them."""
        ...


def is_plain(plan: Plan) -> bool:
    """Whether a plan's rule just averages models, on a graph where nothing of earlier rounds has to be remembered."""
    rule = type(plan.recipe.algorithm)
    plain = rule.phases == 1 and rule.merge is DPSGD.merge and rule.outgoing is DPSGD.outgoing and rule.init is DPSGD.init
    return plain and plan.meetings(plan.names[:1]) is None


def block_columns(num_rows: int, num_columns: int, itemsize: int) -> int:
    """How many columns are mixed at once."""
    return min(num_columns, max(_NARROWEST, _BLOCK_BYTES // (num_rows * itemsize)))


def mix_in_place(  # noqa: C901  # one loop, with what every pass of it needs at hand
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
        index_NK: int64, the row in each slot.
        weights_NK: of x's dtype.
        present_NK: bool; what is not there counts as nothing.
        threads: to compute with.
        active_N: bool, rows that are changed; None: all.
        elsewhere: rows of other processes; None: all are here.
        width: columns of a block; None: what the cache holds.
    """
    num_rows, num_columns = x_NP.shape
    width = width or block_columns(num_rows, num_columns, x_NP.element_size())
    mixed_NW = torch.empty((num_rows, width), dtype=x_NP.dtype)
    squared_N = torch.zeros(num_rows, dtype=torch.float64)
    norms_N, apart_N = torch.zeros_like(squared_N), torch.zeros_like(squared_N)
    rows_at_once = max(1, min(num_rows, _PART_BYTES // (width * x_NP.element_size())))
    everybody = bool(present_NK.all())
    weights_NK = weights_NK if everybody else weights_NK * present_NK

    mean_P = torch.empty(num_columns, dtype=x_NP.dtype)

    def one_part(rows: slice, from_NW: Tensor, mean_W: Tensor, far_GW: Tensor | None = None) -> None:
        own, total = from_NW[rows], mixed_NW[rows, : from_NW.shape[1]]
        norms_N[rows] += _squared_norms(own)
        apart_N[rows] += _squared_norms(own - mean_W)
        total.copy_(own)
        for k in range(index_NK.shape[1]):
            flow = from_NW.index_select(0, index_NK[rows, k])
            if elsewhere is not None and far_GW is not None:
                far_R = elsewhere.far_NK[rows, k]
                away = (far_R >= 0).nonzero().squeeze(-1)
                flow.index_copy_(0, away, far_GW.index_select(0, far_R[away]))
            flow.sub_(own)
            norms = _squared_norms(flow)
            squared_N[rows] += norms if everybody else norms * present_NK[rows, k]
            total.add_(flow.mul_(weights_NK[rows, k, None]))

    inner = num_rows if elsewhere is None else elsewhere.num_inner
    # first the rows that need nobody else's: meanwhile the others' come
    parts = [([slice(first, min(first + rows_at_once, inner)) for first in range(0, inner, rows_at_once)], False)]
    if elsewhere is not None:
        parts.append(([slice(first, min(first + rows_at_once, num_rows)) for first in range(inner, num_rows, rows_at_once)], True))
    with ThreadPoolExecutor(threads, thread_name_prefix="mix") as pool:
        if elsewhere is not None:
            elsewhere.post(x_NP[:, :width])
        for column in range(0, num_columns, width):
            block_NW = x_NP[:, column : column + width]
            mean_P[column : column + width] = mean_W = block_NW.mean(dim=0)
            if elsewhere is not None and column + width < num_columns:
                elsewhere.post(x_NP[:, column + width : column + 2 * width])
            for rows, far in parts:
                far_GW = elsewhere.take() if elsewhere is not None and far else None
                if threads == 1 or len(rows) == 1:
                    for some in rows:
                        one_part(some, block_NW, mean_W, far_GW)
                else:
                    list(pool.map(partial(one_part, from_NW=block_NW, mean_W=mean_W, far_GW=far_GW), rows))
            if active_N is None:
                block_NW.copy_(mixed_NW[:, : block_NW.shape[1]])
            else:
                block_NW[active_N] = mixed_NW[active_N, : block_NW.shape[1]]
    return Mixed(squared_N=squared_N, squared_norms_N=norms_N, apart_N=apart_N, mean_P=mean_P)


def _squared_norms(rows_NW: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(rows_NW, dim=-1)
    return norms_N.double().square()
