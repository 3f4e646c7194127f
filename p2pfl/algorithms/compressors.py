"""Fewer bytes for a vector: what travels in its place, and what the other side makes of it.

A compressor C is an omega-compressor where E ||C(v) - v||**2 <= (1 - omega) ||v||**2. C(v) is `decompress` of what `compress` gives: the
sender takes that as well. The arrays' shapes and dtypes follow from the layout and the model's dtype alone, so that an update's size is
known before it is sent. Whatever bits a neighbour sends for integers, `decompress` gives finite numbers and raises nothing.

Shapes: N rows, P parameters, C chunks, L tensors of the layout, S coordinates that travel; further leading axes are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Final, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Context
from p2pfl.draws import Purpose, philox, sort_keys
from p2pfl.params import Layout, TensorSpec

Parts = dict[str, Tensor]
"""What travels in a vector's place, by name; each tensor has the vector's leading axes first."""

PART_NAMES: Final = ("values", "codes", "scales", "norm", "signs", "places", "factors")
"""Of all compressors; each sends one or two."""

Share = Annotated[float, Field(gt=0, le=1)]

CHUNK: Final = 256
"""Numbers that share a scale in `Int8`."""

_MASK = 0xFFFFFFFF
_MASK_16 = 0xFFFF
_INT8 = 127
_BYTE = 8
_MATRIX_AXES = 2


@runtime_checkable
class Compressor(Protocol):
    """A rule for sending less than a vector. Implementations are immutable objects; both methods are pure."""

    parts: ClassVar[tuple[str, ...]]
    """Names of the arrays that travel, of PART_NAMES."""

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Exactly the arrays that travel for v (..., P), whose first axis is ctx.nodes_N's."""
        ...

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """C(v), (..., P) of the given dtype, from arrays of any leading axes and of any sender."""
        ...

    def omega(self, layout: Layout) -> float:
        """The share of ||v||**2 that C keeps: guaranteed, or expected where the class says so."""
        ...


@dataclass(frozen=True)
class Identity:
    """C(v) = v; omega = 1."""

    parts: ClassVar[tuple[str, ...]] = ("values",)

    def compress(self, v: Tensor, ctx: Context) -> Parts:  # noqa: ARG002
        """The vector."""
        return {"values": v}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """The vector."""
        return parts["values"].to(dtype)

    def omega(self, layout: Layout) -> float:  # noqa: ARG002
        """Nothing is lost."""
        return 1.0


@dataclass(frozen=True)
class Float16:
    """C(v) = v rounded to IEEE 754 binary16, saturated at 65504; 2 bytes a number, to 11 bits from 6e-5 on.

    omega = 1 - 2**-22 for numbers from 6e-5 to 65504; what is smaller is rounded to multiples of 6e-8.
    """

    parts: ClassVar[tuple[str, ...]] = ("values",)

    def compress(self, v: Tensor, ctx: Context) -> Parts:  # noqa: ARG002
        """Rounded."""
        return {"values": _saturated(v, torch.float16)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """In the model's dtype."""
        return parts["values"].to(dtype)

    def omega(self, layout: Layout) -> float:  # noqa: ARG002
        """Half a unit in the last place of 11 bits."""
        return 1 - 2.0**-22


@dataclass(frozen=True)
class BFloat16:
    """C(v) = v rounded to bfloat16, the first 16 bits of a float32; travels as int16, 2 bytes a number, to 8 bits.

    omega = 1 - 2**-16 but for subnormal numbers.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes",)

    def compress(self, v: Tensor, ctx: Context) -> Parts:  # noqa: ARG002
        """The bits."""
        return {"codes": _saturated(v, torch.bfloat16).view(torch.int16)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """In the model's dtype; bits that are no number count as 0."""
        # codes are not checked for finiteness where they come in, as floats are
        return parts["codes"].contiguous().view(torch.bfloat16).to(dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def omega(self, layout: Layout) -> float:  # noqa: ARG002
        """Half a unit in the last place of 8 bits."""
        return 1 - 2.0**-16


@dataclass(frozen=True)
class Int8:
    """Stochastic rounding to 8 bits in chunks of 256: s = max |v| / 127 in a chunk, C(v) = floor(v / s + u) s, u uniform in [0, 1).

    Unbiased up to the rounding of s to float32. omega = 1 - 255 / (4 127**2): a coordinate's variance is at most s**2 / 4, and the largest
    of a chunk has none. 3.94 times fewer bytes than float32.

    Source: Alistarh et al., "QSGD", NeurIPS 2017 (arXiv:1610.02132), section 3.3's buckets with the maximum for norm.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Codes int8 (..., P) and scales float32 (..., C)."""
        chunks = _chunks(v)  # (..., C, 256)
        scales = (chunks.abs().amax(dim=-1) / _INT8).clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
        divisor = scales.to(v.dtype)[..., None]
        ratio = torch.where(divisor > 0, chunks / divisor, 0).flatten(-2)[..., : v.shape[-1]]
        codes = (ratio + _uniform(v, ctx)).floor().nan_to_num(nan=0.0).clamp(-_INT8, _INT8)  # s itself is rounded: 127.00001 is possible
        return {"codes": codes.to(torch.int8), "scales": scales}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Codes times their chunk's scale."""
        codes = parts["codes"]
        values = _chunks(codes.to(dtype)) * parts["scales"].to(dtype)[..., None]
        return values.flatten(-2)[..., : codes.shape[-1]]

    def omega(self, layout: Layout) -> float:
        """Guaranteed in expectation."""
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

    parts: ClassVar[tuple[str, ...]] = ("codes", "norm")

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Codes, packed uint8, and norm float32 (..., 1)."""
        norm = _norm(v, 2)
        divisor = norm.to(v.dtype)
        ratio = torch.where(divisor > 0, v.abs() / divisor, 0).nan_to_num(nan=0.0)
        xi = (ratio * self.levels + _uniform(v, ctx)).floor().clamp(max=self.levels)
        codes = (xi * v.sign().nan_to_num(nan=0.0) + self.levels).to(torch.uint8)
        bits = (codes[..., None] >> torch.arange(self._width, dtype=torch.uint8, device=v.device)) & 1
        return {"codes": _packed(bits.flatten(-2)), "norm": norm}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Levels times the norm."""
        size = ctx.layout.size
        bits = _unpacked(parts["codes"], size * self._width)
        bits = bits.reshape(*bits.shape[:-1], size, self._width)
        weights = 1 << torch.arange(self._width, dtype=torch.uint8, device=bits.device)
        codes = (bits * weights).sum(dim=-1, dtype=torch.uint8)
        xi = (codes.to(dtype) - self.levels).clamp(max=self.levels)
        return xi * (parts["norm"].to(dtype) * (self.omega(ctx.layout) / self.levels))

    def omega(self, layout: Layout) -> float:
        """Guaranteed in expectation."""
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
    """What shares a scale."""

    parts: ClassVar[tuple[str, ...]] = ("signs", "scales")

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Signs, packed uint8, and scales float32 (..., L) or (..., 1)."""
        scales = torch.cat([_norm(v[..., place], 1) / (place.stop - place.start) for place in self._places(ctx.layout)], dim=-1)
        return {"signs": _packed((v >= 0).to(torch.uint8)), "scales": scales}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Plus or minus the scale."""
        signs = _unpacked(parts["signs"], ctx.layout.size).to(dtype) * 2 - 1
        scales = parts["scales"].to(dtype)
        return torch.cat([signs[..., place] * scales[..., i, None] for i, place in enumerate(self._places(ctx.layout))], dim=-1)

    def omega(self, layout: Layout) -> float:  # noqa: ARG002
        """Expected, for Gaussian vectors."""
        return 2 / math.pi

    def _places(self, layout: Layout) -> list[slice]:
        places = [place for _, place in layout.slices() if place.stop > place.start]
        return places if self.scale == "tensor" else [slice(0, layout.size)]


@dataclass(frozen=True)
class TopK:
    """The k = share P (at least 1) coordinates of largest magnitude, equal ones by their place; omega = k / P, guaranteed.

    Values travel in the model's dtype. Which they are travels as indices, of 16 bits where P is at most 2**16 and of 32 above, or as a
    bitmap of P bits where that is smaller, which is above 1 in 16 or 1 in 32: a rule of P and k alone.

    Source: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory", NeurIPS 2018 (arXiv:1809.07599), definition 2.2.
    """

    share: Share = 0.1

    parts: ClassVar[tuple[str, ...]] = ("places", "values")

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Values (..., S) in the order of their places, and these as int16 or int32 (..., S) or as bits, packed uint8."""
        size, kept = ctx.layout.size, _kept(self.share, ctx.layout)
        # a rank by magnitude and place, not topk's own choice among equals: that depends on device and shape
        magnitude = v.abs().nan_to_num(nan=math.inf)
        least = magnitude.topk(kept, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        larger, equal = magnitude > least, magnitude == least
        room = kept - larger.sum(dim=-1, keepdim=True)
        chosen = larger | (equal & (equal.cumsum(dim=-1) <= room))
        indices = chosen.nonzero()[:, -1].reshape(*v.shape[:-1], kept)
        values = v.gather(-1, indices)
        if _is_bitmap(size, kept):
            return {"places": _packed(chosen.to(torch.uint8)), "values": values}
        return {"places": indices.to(_index_dtype(size)), "values": values}  # from 2**15 on int16 holds them minus 2**16

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """The values in their places, zero elsewhere; places that do not exist are left out."""
        size, values = ctx.layout.size, parts["values"].to(dtype)
        kept = values.shape[-1]
        if _is_bitmap(size, kept):
            chosen = _unpacked(parts["places"], size)
            rank = chosen.cumsum(dim=-1) - 1
            return torch.where((chosen > 0) & (rank < kept), values.gather(-1, rank.clamp(0, kept - 1)), 0)
        indices = parts["places"].long()
        if _index_dtype(size) is torch.int16:
            indices = indices & _MASK_16
        exists = (indices >= 0) & (indices < size)
        empty = values.new_zeros((*values.shape[:-1], size))
        return empty.scatter_add(-1, indices.where(exists, 0), values.where(exists, 0))

    def omega(self, layout: Layout) -> float:
        """Guaranteed."""
        return _kept(self.share, layout) / layout.size


@dataclass(frozen=True)
class RandomK:
    """k = share P (at least 1) coordinates drawn anew in each round, the same for all nodes; omega = k / P in expectation.

    Which they are is a function of seed and round, so that only values travel, in the model's dtype. They are not scaled by P / k.

    Source: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory", NeurIPS 2018 (arXiv:1809.07599), definition 2.2.
    """

    share: Share = 0.1

    parts: ClassVar[tuple[str, ...]] = ("values",)

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Values (..., S) in the order of their places."""
        return {"values": v[..., self.places(ctx)]}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """The values in their places, zero elsewhere."""
        values = parts["values"].to(dtype)
        empty = values.new_zeros((*values.shape[:-1], ctx.layout.size))
        return empty.index_copy(-1, self.places(ctx), values)

    def omega(self, layout: Layout) -> float:
        """Guaranteed in expectation."""
        return _kept(self.share, layout) / layout.size

    def places(self, ctx: Context) -> Tensor:
        """The round's coordinates, (S,) int64, ascending."""
        return _drawn_places(ctx.seed, ctx.round, ctx.layout.size, _kept(self.share, ctx.layout), ctx.nodes_N.device)


@dataclass(frozen=True)
class LowRank:
    """Rank r of each matrix of the layout by one step of subspace iteration: A = orth(V G), C(V) = A (V^T A)^T; the rest as it is.

    V (m, n) is a tensor of at least two axes with all but the first as one; G (n, r) is Gaussian, drawn from seed and round for all nodes
    alike. Tensors of one axis, and matrices for which r (m + n) >= m n, travel whole. C is an orthogonal projection, so it never lengthens;
    omega = min r / min(m, n) is what a random V keeps at least in expectation, and not guaranteed.

    Source: Vogels, Karimireddy & Jaggi, "PowerSGD", NeurIPS 2019 (arXiv:1905.13727), algorithm 1 without its warm start; the range
    finder of Halko, Martinsson & Tropp 2011.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 1
    """r"""

    parts: ClassVar[tuple[str, ...]] = ("factors",)

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Factors A, V^T A or the tensor itself, one after the other, in the model's dtype."""
        rows = [torch.cat(list(self._factors(row, ctx))) for row in v.reshape(-1, v.shape[-1])]  # row by row: the same bits for any number
        return {"factors": torch.stack(rows).reshape(*v.shape[:-1], -1)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """The products."""
        factors = parts["factors"].to(dtype)
        rows = [torch.cat(list(self._products(row, ctx.layout))) for row in factors.reshape(-1, factors.shape[-1])]
        return torch.stack(rows).reshape(*factors.shape[:-1], -1)

    def omega(self, layout: Layout) -> float:
        """Expected."""
        sides = [self._sides(spec) for spec in layout.tensors]
        return min([1.0, *(self.rank / min(side) for side in sides if side)])

    def _factors(self, row_P: Tensor, ctx: Context) -> Iterator[Tensor]:
        for number, (spec, place) in enumerate(ctx.layout.slices()):
            sides = self._sides(spec)
            if sides is None:
                yield row_P[place]
                continue
            matrix_mn = row_P[place].reshape(sides)
            start_nr = gaussian_columns(sides[1] * self.rank, number, ctx).to(row_P).reshape(sides[1], self.rank)
            left_mr = torch.linalg.qr(matrix_mn @ start_nr).Q
            yield left_mr.reshape(-1)
            yield (matrix_mn.T @ left_mr).reshape(-1)

    def _products(self, row_M: Tensor, layout: Layout) -> Iterator[Tensor]:
        start = 0
        for spec in layout.tensors:
            sides = self._sides(spec)
            if sides is None:
                yield row_M[start : start + spec.size]
                start += spec.size
                continue
            middle, end = start + sides[0] * self.rank, start + sum(sides) * self.rank
            left_mr, right_nr = row_M[start:middle].reshape(sides[0], -1), row_M[middle:end].reshape(sides[1], -1)
            # column by column: a matrix product's last bits depend on where its factors lie, and both ends must hold the same
            product_mn = row_M.new_zeros(sides)
            for column in range(self.rank):
                product_mn += left_mr[:, column, None] * right_nr[None, :, column]
            yield product_mn.reshape(-1)
            start = end

    def _sides(self, spec: TensorSpec) -> tuple[int, int] | None:
        """(m, n) of a tensor that is sent as factors; None for the others."""
        if len(spec.shape) < _MATRIX_AXES or not spec.size:
            return None
        m, n = spec.shape[0], spec.size // spec.shape[0]
        return (m, n) if self.rank * (m + n) < m * n else None


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


def size_bytes(parts: Parts, num_leading: int = 1) -> int:
    """What the arrays of one vector take on the wire, headers apart; they have that many leading axes."""
    return sum(math.prod(part.shape[num_leading:]) * part.dtype.itemsize for part in parts.values())


def _saturated(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, what is too large to the largest finite number."""
    largest = torch.finfo(dtype).max
    return v.clamp(-largest, largest).to(dtype)


def _kept(share: float, layout: Layout) -> int:
    """k, of at least one coordinate."""
    return min(max(round(share * layout.size), 1), layout.size)


def _index_dtype(size: int) -> torch.dtype:
    """The smallest that tells `size` places apart; of 16 bits the one that torch can index and gather."""
    return torch.int16 if size <= 1 << 16 else torch.int32


def _is_bitmap(size: int, kept: int) -> bool:
    return math.ceil(size / _BYTE) < kept * _index_dtype(size).itemsize


@lru_cache(maxsize=2)  # the same for every message of a round
def _drawn_places(seed: int, round: int, size: int, kept: int, device: torch.device) -> Tensor:
    """Of `size` places `kept`, ascending."""
    index_P = torch.arange(size, device=device)
    nought = torch.zeros_like(index_P)
    keys_P = sort_keys(seed, Purpose.COMPRESSION, node=nought, round=nought + round, step=nought, index=index_P)
    return keys_P.argsort(stable=True)[:kept].sort().values


def _norm(v: Tensor, order: int) -> Tensor:
    """Along the last axis, kept; float32, from a float64 sum whose order of summation then hardly ever shows."""
    norm: Tensor = torch.linalg.vector_norm(v, ord=order, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)


def _chunks(v: Tensor) -> Tensor:
    """(..., P) as (..., C, 256), zeros behind."""
    return F.pad(v, (0, -v.shape[-1] % CHUNK)).reshape(*v.shape[:-1], -1, CHUNK)


def _packed(bits: Tensor) -> Tensor:
    """Zeros and ones (..., M) uint8, eight in a byte (..., ceil(M / 8)), the first the least significant."""
    padded = F.pad(bits, (0, -bits.shape[-1] % _BYTE)).reshape(*bits.shape[:-1], -1, _BYTE)
    return (padded << torch.arange(_BYTE, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The first M zeros and ones."""
    bits = (packed[..., None] >> torch.arange(_BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :size]


def _uniform(v: Tensor, ctx: Context) -> Tensor:
    """For each number of v (N, ..., P) one of [0, 1), a multiple of 2**-24, keyed by the row's node, the round and its place in the row."""
    rows = v.shape[: ctx.nodes_N.dim()]
    size = math.prod(v.shape[len(rows) :])
    index = torch.arange(-(-size // 4), device=v.device)
    node = ctx.nodes_N.to(v.device)[..., None]
    nought = torch.zeros_like(index)
    words = torch.cat(philox((index, nought, nought + ctx.round, node), (ctx.seed & _MASK, int(Purpose.COMPRESSION))), dim=-1)
    return (words[..., :size] >> 8).to(v.dtype).mul(2.0**-24).reshape(v.shape)


def gaussian_columns(size: int, number: int, ctx: Context) -> Tensor:
    """(size,) float64 on the CPU, the same for all nodes of a round; number tells draws of one round apart."""
    index = torch.arange(size)
    nought = torch.zeros_like(index)
    word_0, word_1, _, _ = philox((index, nought + number, nought + ctx.round, nought), (ctx.seed & _MASK, int(Purpose.COMPRESSION)))
    radius = (-2 * torch.log((word_0.double() + 1) * 2.0**-32)).sqrt()  # Box & Muller
    return radius * torch.cos(word_1.double() * (2 * math.pi * 2.0**-32))
