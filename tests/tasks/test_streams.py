"""Generators of many nodes at once are NumPy's own, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from p2pfl.tasks.streams import generator_of, generators_of


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 + 5, -1])
@pytest.mark.parametrize("key", [(), (3,), (4, 2**32 - 1), (1, 2, 3, 4)])
def test_generators_made_together_draw_what_each_draws_alone(seed, key):
    numbers = [0, 1, 2, 999_999, 2**32 - 1]

    for number, together in zip(numbers, generators_of(seed, *key, numbers=numbers), strict=True):
        alone = generator_of(seed, *key, number)
        # 32-bit draws leave half a word behind, which the next generator must not begin with
        assert together.integers(0, 9, size=3, dtype=np.int32).tolist() == alone.integers(0, 9, size=3, dtype=np.int32).tolist()
        assert together.standard_normal(5).tolist() == alone.standard_normal(5).tolist()
        assert together.random(3).tolist() == alone.random(3).tolist()
        assert together.permutation(20).tolist() == alone.permutation(20).tolist()


def test_no_numbers_give_no_generators():
    assert list(generators_of(0, 1, numbers=[])) == []


def test_a_number_of_more_than_32_bits_is_refused():
    with pytest.raises(OverflowError):
        list(generators_of(0, 1, numbers=[2**32]))
