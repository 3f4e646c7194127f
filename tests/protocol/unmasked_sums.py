"""Planned sums over sites whose rows are all here: what secure sums between members must give, to the bit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import reduce

from p2pfl.privacy.fixed_point import added
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.led_sums import LedAnalysis
from p2pfl.statistics.sums import Numbers, Result, Rows, SumRequest


def analyse_in_fixed_point(
    analysis: Generator[SumRequest[Rows], Numbers, Result], sites: Sequence[Rows], sums: Sequence[PlannedSum], *, first: int = 0
) -> Result:
    """Lead an analysis over sites whose rows are all here; masks would cancel, so the totals have the bits of secure sums.

    Raises:
        ConfigError: a site's number is beyond its bound, or the analysis asks for what is not planned.
    """
    led = LedAnalysis(analysis, sums, first)
    while led.request is not None:
        planned, form = led.planned, led.planned.number_format
        parts = []
        for rows in sites:
            values = led.numbers(rows)
            form.check(values, planned.bound, len(sites), statistic=planned.statistic)
            parts.append(form.encode(values))
        led.take(reduce(added, parts))
    (result,) = led.results
    return result
