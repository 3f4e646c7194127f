"""Zeros and ones as bytes, eight in each."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BYTE: Final = 8


def packed(bits: Tensor) -> Tensor:
    """Zeros and ones (..., M) uint8, eight in a byte (..., ceil(M / 8)), the first the least significant."""
    padded = F.pad(bits, (0, -bits.shape[-1] % BYTE)).reshape(*bits.shape[:-1], -1, BYTE)
    return (padded << torch.arange(BYTE, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpacked(packed: Tensor, size: int) -> Tensor:
    """The first M zeros and ones."""
    bits = (packed[..., None] >> torch.arange(BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :size]
