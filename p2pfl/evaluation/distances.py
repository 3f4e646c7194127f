"""Distances of models from their mean.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**19  # numbers
_LEAST_WIDTH = 16  # columns that are worth a pass


def consensus_distance(x_NP: Tensor) -> float:
    """Compute sqrt(mean_i ||x_i - mean||**2) of rows x_i."""
    return float(squared_distances_from_mean(x_NP).mean().sqrt())


def squared_distances_from_mean(x_NP: Tensor, mean_P: Tensor | None = None) -> Tensor:
    """Compute ||x_i - mean||**2 of rows from a given or their own mean, (N,) float64 on the CPU.

    It goes block by block, so that no second population is held.
    """
    num_rows, num_columns = x_NP.shape
    total_N = torch.zeros(num_rows, dtype=torch.float64)
    if num_rows <= _BLOCK // _LEAST_WIDTH:  # blocks of columns: the mean and the distances in one pass over the memory
        width = _BLOCK // max(num_rows, 1)
        for first in range(0, num_columns, width):
            block_NW = x_NP[:, first : first + width]
            centre_W = block_NW.mean(dim=0) if mean_P is None else mean_P[first : first + width]
            total_N += torch.linalg.vector_norm(block_NW - centre_W, dim=-1).double().square().cpu()
        return total_N
    centre_P, height = x_NP.mean(dim=0) if mean_P is None else mean_P, max(1, _BLOCK // max(num_columns, 1))
    for first in range(0, num_rows, height):
        off_MP = x_NP[first : first + height] - centre_P
        total_N[first : first + height] = torch.linalg.vector_norm(off_MP, dim=-1).double().square().cpu()
    return total_N
