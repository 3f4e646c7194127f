"""Compressors that send fewer numbers: some coordinates, or the factors of matrices.

Shapes: N rows, P parameters, S coordinates that travel; further leading axes are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from p2pfl.algorithms.base import Context, Parts
from p2pfl.algorithms.quantizers import BYTE, MASK, packed, unpacked
from p2pfl.draws import Purpose, philox, sort_keys
from p2pfl.params import Layout, TensorSpec

Fraction = Annotated[float, Field(gt=0, le=1)]

_MASK_16 = 0xFFFF
_MATRIX_AXES = 2


@dataclass(frozen=True)
class TopK:
    """The k = fraction P (at least 1) coordinates of largest magnitude, equal ones by their place; omega = k / P, guaranteed.

    Values travel in the model's dtype. Which they are travels as indices, of 16 bits where P is at most 2**16 and of 32 above, or as a
    bitmap of P bits where that is smaller, which is above 1 in 16 or 1 in 32: a rule of P and k alone.

    Source: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory", NeurIPS 2018 (arXiv:1809.07599), definition 2.2.
    """

    share: Fraction = 0.1

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Keep the largest values (..., S) in the order of their places; these are int16 or int32 (..., S), or a bitmap as uint8."""
        size, kept = ctx.layout.size, _kept(self.share, ctx.layout)
        # a rank by magnitude and place, not topk's own choice among equals: that depends on device and shape
        magnitude = v.abs().nan_to_num(nan=math.inf)
        least = _least_of_largest(magnitude, kept)
        larger, equal = magnitude > least, magnitude == least
        room = kept - larger.sum(dim=-1, keepdim=True)
        if bool((equal.sum(dim=-1, keepdim=True) > room).any()):
            equal &= equal.cumsum(dim=-1) <= room
        chosen = larger.logical_or_(equal)
        del magnitude, equal
        indices = chosen.nonzero()[:, -1].reshape(*v.shape[:-1], kept)
        values = v.gather(-1, indices)
        if _is_bitmap(size, kept):
            return {"places": packed(chosen.to(torch.uint8)), "values": values}
        return {"places": indices.to(_index_dtype(size)), "values": values}  # from 2**15 on int16 holds them minus 2**16

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """The values in their places, zero elsewhere; places that do not exist are left out."""
        size, values = ctx.layout.size, parts["values"].to(dtype)
        kept = values.shape[-1]
        if _is_bitmap(size, kept):
            return _placed(unpacked(parts["places"], size), values)
        indices = parts["places"].long()
        if _index_dtype(size) is torch.int16:
            indices = indices & _MASK_16
        exists = (indices >= 0) & (indices < size)
        empty = values.new_zeros((*values.shape[:-1], size))
        return empty.scatter_add(-1, indices.where(exists, 0), values.where(exists, 0))

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, guaranteed."""
        return _kept(self.share, layout) / layout.size


@dataclass(frozen=True)
class RandomK:
    """k = fraction P (at least 1) coordinates drawn anew in each round, the same for all nodes; omega = k / P in expectation.

    Which they are is a function of seed and round, so that only values travel, in the model's dtype. They are not scaled by P / k.

    Source: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory", NeurIPS 2018 (arXiv:1809.07599), definition 2.2.
    """

    share: Fraction = 0.1

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Values (..., S) in the order of their places."""
        return {"values": v[..., self.places(ctx)]}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """The values in their places, zero elsewhere."""
        values = parts["values"].to(dtype)
        empty = values.new_zeros((*values.shape[:-1], ctx.layout.size))
        return empty.index_copy(-1, self.places(ctx), values)

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, guaranteed in expectation."""
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

    def compress(self, v: Tensor, ctx: Context) -> Parts:
        """Factors A, V^T A or the tensor itself, one after the other, in the model's dtype."""
        rows = [torch.cat(list(self._factors(row, ctx))) for row in v.reshape(-1, v.shape[-1])]  # row by row: the same bits for any number
        return {"factors": torch.stack(rows).reshape(*v.shape[:-1], -1)}

    def decompress(self, parts: Parts, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Multiply the factors of each matrix."""
        factors = parts["factors"].to(dtype)
        rows = [torch.cat(list(self._products(row, ctx.layout))) for row in factors.reshape(-1, factors.shape[-1])]
        return torch.stack(rows).reshape(*factors.shape[:-1], -1)

    def omega(self, layout: Layout) -> float:
        """Fraction of ||v||**2 kept, expected."""
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


def _kept(fraction: float, layout: Layout) -> int:
    """Count k of coordinates, of at least one coordinate."""
    return min(max(round(fraction * layout.size), 1), layout.size)


def _least_of_largest(magnitude: Tensor, kept: int) -> Tensor:
    """The smallest of the so many largest numbers, none of them NaN, along the last axis, which stays; (..., P) -> (..., 1)."""
    if magnitude.device.type != "cpu" or magnitude.dtype not in (torch.float32, torch.float64):
        return magnitude.topk(kept, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    parted, place = magnitude.clone(memory_format=torch.contiguous_format), magnitude.shape[-1] - kept
    parted.numpy().partition(place, axis=-1)  # in place, where topk takes 16 bytes more for each number
    return parted[..., place : place + 1].clone()


def _placed(chosen: Tensor, values: Tensor) -> Tensor:
    """Values (..., S) in the first S chosen places, in their order, and zeros elsewhere; chosen (..., P) holds zeros and ones."""
    flat, rows = chosen.reshape(-1, chosen.shape[-1]), values.reshape(-1, values.shape[-1])
    row, place = flat.nonzero().unbind(-1)
    number = flat.count_nonzero(dim=-1)
    rank = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    exists = rank < rows.shape[-1]
    row, place, rank = row[exists], place[exists], rank[exists]
    placed = rows.new_zeros(flat.shape)
    placed[row, place] = rows[row, rank]
    return placed.reshape(chosen.shape)


def _index_dtype(size: int) -> torch.dtype:
    """The smallest that distinguishes `size` places; of 16 bits the one that torch can index and gather."""
    return torch.int16 if size <= 1 << 16 else torch.int32


def _is_bitmap(size: int, kept: int) -> bool:
    return math.ceil(size / BYTE) < kept * _index_dtype(size).itemsize


@lru_cache(maxsize=2)  # the same for every message of a round
def _drawn_places(seed: int, round: int, size: int, kept: int, device: torch.device) -> Tensor:
    """Draw `kept` of `size` places, ascending."""
    index_P = torch.arange(size, device=device)
    zeros = torch.zeros_like(index_P)
    keys_P = sort_keys(seed, Purpose.COMPRESSION, node=zeros, round=zeros + round, step=zeros, index=index_P)
    return keys_P.argsort(stable=True)[:kept].sort().values


def gaussian_columns(size: int, number: int, ctx: Context) -> Tensor:
    """(size,) float64 on the CPU, the same for all nodes of a round; number distinguishes draws of one round."""
    index = torch.arange(size)
    zeros = torch.zeros_like(index)
    word_0, word_1, _, _ = philox((index, zeros + number, zeros + ctx.round, zeros), (ctx.seed & MASK, int(Purpose.COMPRESSION)))
    radius = (-2 * torch.log((word_0.double() + 1) * 2.0**-32)).sqrt()  # Box & Muller
    return radius * torch.cos(word_1.double() * (2 * math.pi * 2.0**-32))
