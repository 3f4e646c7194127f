"""What sites show each other to agree on one scale."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from p2pfl.errors import ConfigError
from p2pfl.statistics.moments import Moments
from p2pfl.yaml_files import check

ROWS = np.random.default_rng(0).normal([0.0, 1e6, -3.0], [1.0, 1e-2, 50.0], size=(60, 3))
PARTS = (slice(0, 2), slice(2, 30), slice(30, 60))


def test_merged_moments_are_those_of_all_rows_together():
    merged = Moments.merged(Moments.of(ROWS[part]) for part in PARTS)

    assert merged.samples == 60
    np.testing.assert_allclose(merged.means, ROWS.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.deviations, ROWS.std(axis=0, ddof=1), rtol=1e-7)


def test_the_order_of_the_parts_does_not_matter_in_any_bit():
    parts = [Moments.of(ROWS[part]) for part in PARTS]

    assert Moments.merged(parts) == Moments.merged(reversed(parts))


def test_a_column_that_is_constant_at_every_site_has_no_deviation():
    parts = [Moments.of(np.full((5, 1), 7.0)), Moments.of(np.full((9, 1), 7.0))]

    assert Moments.merged(parts) == Moments(samples=14, means=(7.0,), deviations=(0.0,))


def test_different_columns_cannot_be_merged():
    with pytest.raises(ValueError, match=r"moments of \[2, 3\] columns"):
        Moments.merged([Moments.of(ROWS), Moments.of(ROWS[:, :2])])


def test_a_file_gives_the_same_moments_back():
    moments = Moments.of(ROWS)

    assert check(Moments, moments.as_dict(), "card") == moments


def test_rounding_on_another_machine_makes_no_difference_and_another_row_does():
    moments = Moments.of(ROWS)
    rounded = replace(moments, means=tuple(math.nextafter(mean, math.inf) for mean in moments.means))

    assert moments.is_close(rounded)
    assert not moments.is_close(Moments.of(ROWS[1:]))
    assert not moments.is_close(Moments.of(np.vstack([ROWS[1:], ROWS[:1] + 1])))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"samples": 1}, "samples = 1"),
        ({"means": [0.0]}, "1 means and 3 deviations"),
        ({"means": [0.0, float("nan"), 0.0]}, "means"),
        ({"deviations": [1.0, -1.0, 1.0]}, "deviations"),
    ],
)
def test_what_cannot_be_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        check(Moments, {**Moments.of(ROWS).as_dict(), **wrong}, "card")
