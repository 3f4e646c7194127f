"""Analyses led by a plan: each sum has its place, and its parameters are the totals before it."""

from __future__ import annotations

import numpy as np
import pytest
from secure_members import STATISTICS
from unmasked_sums import analyse_in_fixed_point

from p2pfl.errors import ConfigError
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.led_sums import LedAnalysis
from p2pfl.statistics.sums import SumRequest


def planned(*names, shape=(1,), **more):
    return [PlannedSum(statistic=f"age: {name}", shape=shape, number_format=STATISTICS, bound=100.0, **more) for name in names]


def moments():
    (total,) = yield SumRequest(statistic="mean", shape=(1,), contribution=lambda rows: np.array([rows.sum()]))
    (squares,) = yield SumRequest(statistic="squares", shape=(1,), contribution=lambda rows: np.array([(rows**2).sum() - total]))
    return total, squares


SITES = [np.array([1.0, 2.5]), np.array([0.1]), np.array([3.0])]


def test_sums_of_fixed_point_numbers_lead_to_the_result():
    assert analyse_in_fixed_point(moments(), SITES, planned("mean", "squares")) == (pytest.approx(6.6), pytest.approx(16.26 - 3 * 6.6))


def parameters_after(total):
    led = LedAnalysis(moments(), planned("other", "mean", "squares"), 1)
    assert (led.position, led.parameters) == (1, [])
    led.take(STATISTICS.encode(np.array([total])))
    assert led.position == 2
    return led.parameters


def test_the_totals_before_stand_for_what_a_sum_depends_on():
    assert parameters_after(6.6) == parameters_after(6.6)
    assert parameters_after(6.6) != parameters_after(6.6 + 2**-50)


def test_planned_sums_that_an_analysis_leaves_out_change_nothing():
    plain = analyse_in_fixed_point(moments(), SITES, planned("mean", "squares"))

    assert analyse_in_fixed_point(moments(), SITES, planned("cells", "mean", "cubes", "roots", "squares", "more")) == plain


def test_fewer_numbers_than_planned_are_given_with_zeros_at_their_end():
    sums = planned("mean", "squares", shape=(3,), may_be_shorter=True)
    led = LedAnalysis(moments(), sums)

    assert led.numbers(SITES[0]).tolist() == [3.5, 0.0, 0.0]
    assert analyse_in_fixed_point(moments(), SITES, sums) == analyse_in_fixed_point(moments(), SITES, planned("mean", "squares"))


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (planned("mean", shape=(0,), may_be_shorter=True), r"numbers of shape \(1,\), planned are \(0,\)"),
        (planned("mean", shape=(2, 1), may_be_shorter=True), r"numbers of shape \(1,\), planned are \(2, 1\)"),
        (planned("mean"), "the plan has 1 sums, and the analysis needs one more"),
        (planned("mean", "cubes"), "sum 2 of the plan is 'age: cubes'"),
        (planned("mean", shape=(2,)), r"numbers of shape \(1,\), planned are \(2,\)"),
    ],
)
def test_what_is_not_planned_is_refused(sums, said):
    with pytest.raises(ConfigError, match=said):
        analyse_in_fixed_point(moments(), SITES, sums)


def test_a_number_beyond_its_bound_is_refused_here_as_well():
    with pytest.raises(ConfigError, match="beyond the agreed bound"):
        analyse_in_fixed_point(moments(), [np.array([101.0]), *SITES], planned("mean", "squares"))


def test_numbers_of_another_shape_are_the_analysis_fault():
    led = LedAnalysis(moments(), planned("mean", "squares"))
    led.request = SumRequest(statistic="mean", shape=(1,), contribution=lambda rows: rows)
    with pytest.raises(ValueError, match=r"shape \(2,\) where \(1,\)"):
        led.numbers(SITES[0])
