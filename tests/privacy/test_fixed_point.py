"""Sums of real numbers are exact, whatever their order, and wrong by no more than half a unit each."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.errors import ConfigError
from p2pfl.privacy.fixed_point import FixedPoint, added, negated, subtracted

MODELS, STATISTICS = FixedPoint(bits=64, fraction_bits=40), FixedPoint(bits=128, fraction_bits=60)
FORMATS = [MODELS, STATISTICS]
EDGES = [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**126 - 1, 2**126, 2**127 - 1, 2**127, 2**128 - 1]


def limbs_of(number, num_limbs=2):
    return np.array([number % 2**64, number // 2**64 % 2**64][:num_limbs], dtype=np.uint64)


def whole(limbs):
    return sum(int(limb) << 64 * k for k, limb in enumerate(limbs.tolist()))


@given(st.sampled_from(EDGES) | st.integers(0, 2**128 - 1), st.sampled_from(EDGES) | st.integers(0, 2**128 - 1), st.sampled_from([1, 2]))
def test_limbs_are_added_and_subtracted_with_their_carry(a, b, num_limbs):
    most = 2 ** (64 * num_limbs)
    assert whole(added(limbs_of(a, num_limbs), limbs_of(b, num_limbs))) == (a + b) % most
    assert whole(subtracted(limbs_of(a, num_limbs), limbs_of(b, num_limbs))) == (a - b) % most
    assert whole(negated(limbs_of(a, num_limbs))) == -a % most


@pytest.mark.parametrize("numbers", FORMATS, ids=["models", "statistics"])
@given(value=st.floats(-150_000, 150_000))
def test_a_number_is_rounded_to_the_nearest_multiple_ties_to_even(numbers, value):
    found = numbers.encode(value)

    exact = Fraction(value) * 2**numbers.fraction_bits
    assert whole(found) == round(exact) % 2**numbers.bits  # round() takes ties to even
    assert numbers.decode(found) == pytest.approx(value, abs=2.0 ** -(numbers.fraction_bits + 1), rel=0)


@pytest.mark.parametrize("value", [2.0**66 - 2.0**14, -(2.0**66) + 2.0**14, 2.0**-60, -(2.0**-61), -0.0, 3 * 2.0**-61])
def test_statistics_hold_large_and_small_numbers(value):
    found = whole(STATISTICS.encode(value))
    assert found == round(Fraction(value) * 2**60) % 2**128


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.randoms())
def test_a_sum_does_not_depend_on_the_order(values, random):
    def total(several):
        found = np.zeros(2, dtype=np.uint64)
        for value in several:
            found = added(found, STATISTICS.encode(value))
        return found

    shuffled = values.copy()
    random.shuffle(shuffled)

    assert total(values).tolist() == total(shuffled).tolist()
    error = abs(Fraction(float(STATISTICS.decode(total(values)))) - sum(map(Fraction, values)))
    assert error <= Fraction(len(values), 2**61) + Fraction(float(np.spacing(abs(float(STATISTICS.decode(total(values))))))) / 2


def test_arrays_keep_their_shape():
    values = np.linspace(-3, 3, 24).reshape(2, 3, 4)
    assert STATISTICS.encode(values).shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(STATISTICS.decode(STATISTICS.encode(values)), values)


@pytest.mark.parametrize(
    ("values", "bound", "message"),
    [
        pytest.param([1.0, np.nan], 10.0, "age, squares: a number of this site is not finite", id="nan"),
        pytest.param([np.inf], 10.0, "age, squares: a number of this site is not finite", id="infinite"),
        pytest.param([-10.5], 10.0, "age, squares: a number of this site is beyond the agreed bound of 10", id="beyond"),
        pytest.param([1.0], 2.0**23 / 50, "age, squares: numbers up to 167772 from 50 sites do not fit in 64 bits", id="bound"),
        pytest.param([1.0], np.nan, "do not fit", id="no-bound"),
    ],
)
def test_numbers_that_a_sum_cannot_hold_are_refused_by_name(values, bound, message):
    with pytest.raises(ConfigError, match=message):
        MODELS.check(values, bound, 50, statistic="age, squares")


def test_fifty_models_may_have_numbers_up_to_167000():
    MODELS.check([167_000.0, -167_000.0], 167_000.0, 50, statistic="weights")
    total = np.zeros(1, dtype=np.uint64)
    for _ in range(50):
        total = added(total, MODELS.encode(-167_000.0))
    assert MODELS.decode(total) == -50 * 167_000.0


@pytest.mark.parametrize(("bits", "fraction_bits"), [(32, 8), (64, 64), (128, -1)])
def test_a_format_that_is_none_is_refused(bits, fraction_bits):
    with pytest.raises(ValueError, match="64 or 128"):
        FixedPoint(bits=bits, fraction_bits=fraction_bits)


def test_limbs_of_another_format_are_refused():
    with pytest.raises(ValueError, match="has not 2 limbs"):
        STATISTICS.decode(np.zeros((3, 1), dtype=np.uint64))


@given(
    st.lists(
        st.integers(0, 2**127 - 1) | st.builds(lambda a, b, c: (a << b) + c, st.integers(1, 2**54), st.integers(0, 72), st.integers(0, 1))
    )
)
def test_totals_of_two_limbs_are_rounded_once(magnitudes):
    form = FixedPoint(bits=128, fraction_bits=60)
    wholes = [sign * each for each in magnitudes for sign in (1, -1)]
    limbs = np.array([[each & 2**64 - 1, each >> 64 & 2**64 - 1] for each in wholes], dtype=np.uint64).reshape(-1, 2)

    assert form.decode(limbs).tolist() == [each / (1 << 60) for each in wholes]
