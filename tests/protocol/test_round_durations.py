from __future__ import annotations

import pytest

from p2pfl.protocol.deadlines import RoundDurations


def pace_after(durations_s, *, factor=3.0, floor_s=1.0, window=100):
    pace = RoundDurations(factor=factor, floor_s=floor_s, window=window)
    for duration_s in durations_s:
        pace.record(duration_s)
    return pace.allowance_s()


def test_before_the_first_round_there_is_the_floor():
    assert pace_after([]) == 1.0


def test_the_floor_holds_where_rounds_are_fast():
    assert pace_after([0.1] * 10) == 1.0


@pytest.mark.parametrize(("num_rounds", "q95"), [(1, 1), (2, 2), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_the_allowance_is_the_multiple_of_the_95th_percentile_by_nearest_rank(num_rounds, q95):
    assert 3.0 * q95 == pace_after(range(num_rounds, 0, -1))


def test_one_slow_round_in_twenty_does_not_stretch_the_deadline():
    assert pace_after([2.0] * 19 + [500.0]) == 6.0


def test_what_is_older_than_the_window_is_forgotten():
    assert pace_after([500.0] * 5 + [2.0] * 20, window=20) == 6.0


@pytest.mark.parametrize("wrong", [{"factor": 0.9}, {"floor_s": 0.0}, {"window": 0}])
def test_a_pace_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="expected at least 1, above 0, at least 1"):
        pace_after([], **wrong)
