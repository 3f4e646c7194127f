"""Compressors that send all of each number, or fewer bits of it: rounding, stochastic rounding and signs.

Shapes: N rows, P parameters, C chunks, L tensors of the layout; further leading axes are free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Context, Parts
from p2pfl.draws import Purpose, philox
from p2pfl.params import Layout

PART_NAMES: Final = ("values", "codes", "scales", "norm", "signs", "places", "factors")
"""Names of the arrays that compressors send; each sends one or two."""

CHUNK: Final = 256
"""Numbers that have one scale in `Int8`."""

BYTE: Final = 8
MASK: Final = 0xFFFFFFFF
_INT8 = 127


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


@dataclass(frozen=True)
class Float16:
    """C(v) = v rounded to IEEE 754 binary16, saturated at 65504; 2 bytes a number, to 11 bits from 6e-5 on.

    omega = 1 - 2**-22 for numbers from 6e-5 to 65504; what is smaller is rounded to multiples of 6e-8.
    """

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Round to float16, saturated."""
        return {"values": _saturated(v, torch.float16)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """In the model's dtype."""
        return parts["values"].to(dtype)

    def omega(self, layout: Layout) -> float:
        """Half a unit in the last place of 11 bits."""
        return 1 - 2.0**-22


@dataclass(frozen=True)
class BFloat16:
    """C(v) = v rounded to bfloat16, the first 16 bits of a float32; travels as int16, 2 bytes a number, to 8 bits.

    omega = 1 - 2**-16 but for subnormal numbers.
    """

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Round to bfloat16, as bits."""
        return {"codes": _saturated(v, torch.bfloat16).view(torch.int16)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """In the model's dtype; bits that are no number count as 0."""
        # codes are not checked for finiteness where they come in, as floats are
        return parts["codes"].contiguous().view(torch.bfloat16).to(dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def omega(self, layout: Layout) -> float:
        """Half a unit in the last place of 8 bits."""
        return 1 - 2.0**-16


@dataclass(frozen=True)
class Int8:
    """Stochastic rounding to 8 bits in chunks of 256: s = max |v| / 127 in a chunk, C(v) = floor(v / s + u) s, u uniform in [0, 1).

    Unbiased up to the rounding of s to float32. omega = 1 - 255 / (4 127**2): a coordinate's variance is at most s**2 / 4, and the largest
    of a chunk has none. 3.94 times fewer bytes than float32.

    Source: Alistarh et al., "QSGD", NeurIPS 2017 (arXiv:1610.02132), section 3.3's buckets with the maximum for norm.
    """

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Codes int8 (..., P) and scales float32 (..., C)."""
        chunks = _chunks(v)  # (..., C, 256)
        scales = (chunks.abs().amax(dim=-1) / _INT8).clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
        divisor = scales.to(v.dtype)[..., None]
        ratio = torch.where(divisor > 0, chunks / divisor, 0).flatten(-2)[..., : v.shape[-1]]
        codes = (ratio + _uniform(v, ctx)).floor().nan_to_num(nan=0.0).clamp(-_INT8, _INT8)  # s itself is rounded: 127.00001 is possible
        return {"codes": codes.to(torch.int8), "scales": scales}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Codes times their chunk's scale."""
        codes = parts["codes"]
        values = _chunks(codes.to(dtype)) * parts["scales"].to(dtype)[..., None]
        return values.flatten(-2)[..., : codes.shape[-1]]

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, guaranteed in expectation."""
        return 1 - (min(layout.size, CHUNK) - 1) / (4 * _INT8**2)


@dataclass(frozen=True)
class QSGD:
    """Stochastic rounding to s levels of |v| / ||v||, made an omega-compressor: C(v) = ||v|| sign(v) xi / (s (1 + beta)).

    xi = floor(s |v| / ||v|| + u), u uniform in [0, 1); beta = min(P / s**2, sqrt(P) / s) bounds the relative variance of the unbiased
    (1 + beta) C, so that omega = 1 / (1 + beta). sign(v) xi + s is packed into as few bits as 2 s needs, and one float32 norm travels.

    Source: Alistarh et al., "QSGD", NeurIPS 2017 (arXiv:1610.02132), definition 3.1 and lemma 3.1; the factor is that of Koloskova, Stich &
    Jaggi 2019 (arXiv:1902.00340), section 3.5. Packed instead of Elias coded: what travels has a size that does not depend on the data.
    """

    levels: Annotated[int, Field(ge=1, le=127)] = 16
    """s"""

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Codes, packed uint8, and norm float32 (..., 1)."""
        norm = _norm(v, 2)
        divisor = norm.to(v.dtype)
        ratio = torch.where(divisor > 0, v.abs() / divisor, 0).nan_to_num(nan=0.0)
        xi = (ratio * self.levels + _uniform(v, ctx)).floor().clamp(max=self.levels)
        codes = (xi * v.sign().nan_to_num(nan=0.0) + self.levels).to(torch.uint8)
        bits = (codes[..., None] >> torch.arange(self._width, dtype=torch.uint8, device=v.device)) & 1
        return {"codes": packed(bits.flatten(-2)), "norm": norm}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Levels times the norm."""
        size = ctx.layout.size
        bits = unpacked(parts["codes"], size * self._width)
        bits = bits.reshape(*bits.shape[:-1], size, self._width)
        weights = 1 << torch.arange(self._width, dtype=torch.uint8, device=bits.device)
        codes = (bits * weights).sum(dim=-1, dtype=torch.uint8)
        xi = (codes.to(dtype) - self.levels).clamp(max=self.levels)
        return xi * (parts["norm"].to(dtype) * (self.omega(ctx.layout) / self.levels))

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, guaranteed in expectation."""
        return 1 / (1 + min(layout.size / self.levels**2, math.sqrt(layout.size) / self.levels))

    @property
    def _width(self) -> int:
        """Bits of a code."""
        return (2 * self.levels).bit_length()


@dataclass(frozen=True)
class Sign:
    """Scaled sign: C(v) = (||v||_1 / P) sign(v), sign(0) = 1, for each tensor of the layout or the whole vector; some 32 times fewer bytes.

    Guaranteed is only that it keeps ||v||_1**2 / (P ||v||**2) >= 1 / P; omega is what it keeps of Gaussian vectors in expectation, 2 / pi.

    Source: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019 (arXiv:1901.09847), lemma 8.
    """

    scale: Literal["tensor", "vector"] = "tensor"
    """Numbers that have one scale in common."""

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Signs, packed uint8, and scales float32 (..., L) or (..., 1)."""
        scales = torch.cat([_norm(v[..., place], 1) / (place.stop - place.start) for place in self._places(ctx.layout)], dim=-1)
        return {"signs": packed((v >= 0).to(torch.uint8)), "scales": scales}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Plus or minus the scale."""
        signs = unpacked(parts["signs"], ctx.layout.size).to(dtype) * 2 - 1
        scales = parts["scales"].to(dtype)
        return torch.cat([signs[..., place] * scales[..., i, None] for i, place in enumerate(self._places(ctx.layout))], dim=-1)

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, expected for Gaussian vectors."""
        return 2 / math.pi

    def _places(self, layout: Layout) -> list[slice]:
        places = [place for _, place in layout.slices() if place.stop > place.start]
        return places if self.scale == "tensor" else [slice(0, layout.size)]


def _saturated(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, what is too large to the largest finite number."""
    largest = torch.finfo(dtype).max
    return v.clamp(-largest, largest).to(dtype)


def _norm(v: Tensor, order: int) -> Tensor:
    """Along the last axis, kept; float32, from a float64 sum whose order of summation then hardly ever shows."""
    norm: Tensor = torch.linalg.vector_norm(v, ord=order, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)


def _chunks(v: Tensor) -> Tensor:
    """(..., P) as (..., C, 256), zeros behind."""
    return F.pad(v, (0, -v.shape[-1] % CHUNK)).reshape(*v.shape[:-1], -1, CHUNK)


def _uniform(v: Tensor, ctx: Context) -> Tensor:
    """For each number of v (N, ..., P) one of [0, 1), a multiple of 2**-24, keyed by the row's node, the round and its place in the row."""
    rows = v.shape[: ctx.nodes_N.dim()]
    size = math.prod(v.shape[len(rows) :])
    index = torch.arange(-(-size // 4), device=v.device)
    node = ctx.nodes_N.to(v.device)[..., None]
    zeros = torch.zeros_like(index)
    words = torch.cat(philox((index, zeros, zeros + ctx.round, node), (ctx.seed & MASK, int(Purpose.COMPRESSION))), dim=-1)
    return (words[..., :size] >> 8).to(v.dtype).mul(2.0**-24).reshape(v.shape)


def packed(bits: Tensor) -> Tensor:
    """Zeros and ones (..., M) uint8, eight in a byte (..., ceil(M / 8)), the first the least significant."""
    padded = F.pad(bits, (0, -bits.shape[-1] % BYTE)).reshape(*bits.shape[:-1], -1, BYTE)
    return (padded << torch.arange(BYTE, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpacked(packed: Tensor, size: int) -> Tensor:
    """The first M zeros and ones."""
    bits = (packed[..., None] >> torch.arange(BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :size]
