"""A node's work is done in a thread, and in the loop itself once it has mostly been short."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from p2pfl.node.workplace import SHORT_S, WATCHED, Workplace


@pytest.fixture
def clock(monkeypatch):
    """The time, which work moves on."""
    now_s = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    return now_s


def places_of(clock, kinds_and_seconds):
    """Whether each piece of work was done in the loop's own thread."""
    workplace = Workplace()

    def work(took_s):
        clock[0] += took_s
        return threading.current_thread() is threading.main_thread()

    async def main():
        return [await workplace.do(kind, work, took_s) for kind, took_s in kinds_and_seconds]

    return asyncio.run(main())


def test_short_work_is_done_in_the_loop_once_enough_of_it_was_short(clock):
    assert places_of(clock, [("train", SHORT_S / 2)] * (WATCHED + 3)) == [False] * WATCHED + [True] * 3


def test_long_work_stays_in_a_thread(clock):
    assert places_of(clock, [("train", SHORT_S)] * (2 * WATCHED)) == [False] * (2 * WATCHED)


def test_work_that_becomes_long_goes_back_into_a_thread(clock):
    places = places_of(clock, [("train", 0.0)] * WATCHED + [("train", 1.0)] * WATCHED)

    assert places[WATCHED] is True
    assert places[-1] is False


def test_each_kind_of_work_has_its_own_place(clock):
    places = places_of(clock, [("train", 1.0), ("pack", 0.0)] * (WATCHED + 1))

    assert places[-2:] == [False, True]


def test_work_that_raises_is_no_measure_and_its_error_is_the_callers(clock):
    workplace = Workplace()

    async def main():
        for _ in range(2 * WATCHED):
            with pytest.raises(ZeroDivisionError):
                await workplace.do("train", lambda: 1 / 0)
        return await workplace.do("train", threading.current_thread)

    assert asyncio.run(main()) is not threading.main_thread()
