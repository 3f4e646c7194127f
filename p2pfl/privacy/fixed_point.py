"""Real numbers as integers modulo 2^B, in which sums are exact and do not depend on their order.

A number is rounded to a multiple of 2^-f and kept as a whole number of these, modulo 2^64 or 2^128. The last axis of an array holds its
limbs of 64 bits, the lowest first. S numbers of at most A each can be added as long as S A 2^f < 2^(B-1).

Shapes: L limbs, 1 or 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from p2pfl.errors import ConfigError

Reals = NDArray[np.float64]
Limbs = NDArray[np.uint64]
"""(..., L), little-endian: limb 0 counts ones, limb 1 counts 2^64."""

_LIMB_BITS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """A format of numbers in a sum: how many bits there are, and how many of them are behind the point."""

    bits: int
    """B, 64 or 128."""
    fraction_bits: int
    """f; a number is wrong by at most 2^-(f+1)."""

    def __post_init__(self) -> None:
        if self.bits not in (_LIMB_BITS, 2 * _LIMB_BITS) or not 0 <= self.fraction_bits < self.bits:
            raise ValueError(f"{self.bits} bits with {self.fraction_bits} behind the point: 64 or 128, and fewer behind it")

    @property
    def num_limbs(self) -> int:
        """Words of 64 bits that hold one number."""
        return self.bits // _LIMB_BITS

    def largest(self, num_summands: int) -> float:
        """Bound on the numbers of which so many can be added: they must be smaller than this."""
        return float(2.0 ** (self.bits - 1 - self.fraction_bits) / num_summands)

    def check(self, values: ArrayLike, bound: float, num_summands: int, *, statistic: str) -> None:
        """Refuse numbers that a sum cannot hold, before anything of it is sent.

        Args:
            values: of this site, any shape.
            bound: A, that no site's number may exceed in magnitude.
            num_summands: S, how many sites there are.
            statistic: its name, for the error.

        Raises:
            ConfigError: a number is not finite or larger than the bound, or the bound is too large for the format.
        """
        if not bound < self.largest(num_summands):
            raise ConfigError(f"{statistic}: numbers up to {bound:g} from {num_summands} sites do not fit in {self._named()}")
        numbers = np.abs(np.asarray(values, dtype=np.float64))
        if not np.isfinite(numbers).all():
            raise ConfigError(f"{statistic}: a number of this site is not finite")
        if (numbers > bound).any():
            raise ConfigError(f"{statistic}: a number of this site is beyond the agreed bound of {bound:g}")

    def encode(self, values: ArrayLike) -> Limbs:
        """Round numbers, ties to even, and write them as limbs; (...) float64 -> (..., L). They must have passed `check`."""
        reals = np.asarray(values, dtype=np.float64)
        wholes = np.rint(np.ldexp(np.abs(reals), self.fraction_bits))
        high = np.floor(np.ldexp(wholes, -_LIMB_BITS))
        low = wholes - np.ldexp(high, _LIMB_BITS)  # exact: some of the same 53 bits
        magnitudes = np.stack([low, high], axis=-1)[..., : self.num_limbs].astype(np.uint64)
        return np.where(np.signbit(reals)[..., None], negated(magnitudes), magnitudes)

    def decode(self, total: Limbs) -> Reals:
        """Read limbs as numbers, each rounded once to the nearest; (..., L) -> (...) float64."""
        if total.shape[-1:] != (self.num_limbs,):
            raise ValueError(f"an array of shape {total.shape} has not {self.num_limbs} limbs")
        is_negative = (total[..., -1] >> np.uint64(_LIMB_BITS - 1)).astype(bool)
        magnitudes = np.where(is_negative[..., None], negated(total), total)
        if self.num_limbs == 1:
            found = np.ldexp(magnitudes[..., 0].astype(np.float64), -self.fraction_bits)
        else:  # the first 63 bits, the last of them set where bits are left out: two limbs added as floats would be rounded twice
            low, high = magnitudes[..., 0], magnitudes[..., 1]
            exponents = np.frexp(high.astype(np.float64))[1]
            shift, rest = exponents.astype(np.uint64), (_LIMB_BITS - exponents).astype(np.uint64)
            tops = (high << rest) | (low >> shift) | ((low << rest) != 0)
            found = np.ldexp(tops.astype(np.float64), exponents - self.fraction_bits)
        return np.where(is_negative, -found, found)

    def _named(self) -> str:
        return f"{self.bits} bits with {self.fraction_bits} behind the point"


def added(a: Limbs, b: Limbs) -> Limbs:
    """Sum of two arrays of limbs, modulo 2^64 or 2^128; (..., L) each."""
    total = a + b  # whole numbers of 64 bits wrap around
    if total.shape[-1] > 1:
        total[..., 1] += total[..., 0] < a[..., 0]  # the carry
    return total


def negated(a: Limbs) -> Limbs:
    """An array of limbs times -1, modulo 2^64 or 2^128; (..., L)."""
    flipped = ~a
    one = np.zeros_like(flipped)
    one[..., 0] = 1
    return added(flipped, one)


def subtracted(a: Limbs, b: Limbs) -> Limbs:
    """Difference a - b of two arrays of limbs, modulo 2^64 or 2^128; (..., L) each."""
    total = a - b
    if total.shape[-1] > 1:
        total[..., 1] -= a[..., 0] < b[..., 0]  # the borrow
    return total
