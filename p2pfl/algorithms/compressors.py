"""Compressors, which send fewer bytes than a vector has: the registry, and the one that sends all.

A compressor C is an omega-compressor where E ||C(v) - v||**2 <= (1 - omega) ||v||**2. C(v) is `decompress` of what `compress` gives: the
sender takes that as well. The arrays' shapes and dtypes follow from the layout and the model's dtype alone, so that an update's size is
known before it is sent. Whatever bits a neighbour sends for integers, `decompress` gives finite numbers and raises nothing.

Shapes: P parameters; further leading axes are free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from p2pfl.algorithms.base import Compressor, Context, Parts
from p2pfl.algorithms.quantizers import QSGD, BFloat16, Float16, Int8, Sign
from p2pfl.algorithms.sparsifiers import LowRank, RandomK, TopK
from p2pfl.params import Layout

PART_NAMES: Final = ("values", "codes", "scales", "norm", "signs", "places", "factors")
"""Names of the arrays that compressors send; each sends one or two."""


@dataclass(frozen=True)
class Identity:
    """C(v) = v; omega = 1."""

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Send the vector itself."""
        return {"values": v}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Take the vector itself."""
        return parts["values"].to(dtype)

    def omega(self, layout: Layout) -> float:
        """All of the vector is kept."""
        return 1.0


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "none": Identity,
    "fp16": Float16,
    "bf16": BFloat16,
    "int8": Int8,
    "qsgd": QSGD,
    "sign": Sign,
    "top-k": TopK,
    "random-k": RandomK,
    "low-rank": LowRank,
}
