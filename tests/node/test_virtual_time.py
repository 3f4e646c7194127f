"""Virtual time itself: what stands still, what is a hang, and whose clock is off."""

from __future__ import annotations

import asyncio
import time

import pytest

from virtual_time import EPOCH_S, HangError, VirtualProcess, run_virtually


def test_hours_pass_at_once_and_every_clock_says_so():
    async def wait():
        began_s, wall_s = time.monotonic(), time.time()
        await asyncio.sleep(3600)
        return time.monotonic() - began_s, time.time() - wall_s

    assert run_virtually(wait(), seed=0) == pytest.approx((3600, 3600))


def test_a_wait_that_returns_without_time_moving_is_a_hang_with_the_names_of_the_tasks():
    async def spin():
        while True:  # noqa: ASYNC110 - that is the fault
            await asyncio.sleep(0)

    async def run():
        VirtualProcess("basel").start(spin())
        await asyncio.sleep(1)

    with pytest.raises(HangError, match=r"time stands still at 0\.000 s, while these run: basel: basel \(\d+ times\)"):
        run_virtually(run(), seed=0)


def test_a_wait_for_nothing_is_a_hang():
    async def wait_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(HangError, match="nobody will ever go on at 0"):
        run_virtually(wait_for_ever(), seed=0)


def test_a_test_without_end_is_a_hang():
    async def wait_for_ever():
        while True:  # noqa: ASYNC110 - it waits for nothing
            await asyncio.sleep(1)

    with pytest.raises(HangError, match=r"no end within 100 virtual seconds: .*test in wait_for_ever"):
        run_virtually(wait_for_ever(), seed=0, at_most_s=100)


def test_a_stopped_process_does_nothing_and_then_all_that_it_has_missed():
    ticks = []

    async def tick():
        while True:
            await asyncio.sleep(1)
            ticks.append(time.monotonic())

    async def run():
        process = VirtualProcess("basel")
        process.start(tick())
        await asyncio.sleep(2.5)
        process.stop()
        await asyncio.sleep(10)
        process.go_on()
        await asyncio.sleep(1.2)
        await process.kill()
        await asyncio.sleep(10)

    run_virtually(run(), seed=0)

    assert ticks == pytest.approx([1, 2, 12.5, 13.5])


def test_work_in_threads_takes_virtual_seconds_and_dies_with_its_process():
    done = []

    async def work():
        await asyncio.to_thread(done.append, "first")
        await asyncio.to_thread(done.append, "second")

    async def run():
        process = VirtualProcess("basel")
        process.start(work())
        await asyncio.sleep(1.5)
        await process.kill()
        await asyncio.sleep(10)

    run_virtually(run(), seed=0, work_s=(1.0, 1.0))

    assert done == ["first"]


def test_a_process_has_a_wall_clock_of_its_own():
    async def look():
        return time.time()

    async def run():
        return await VirtualProcess("basel", clock_offset_s=3600).start(look()), time.time()

    assert run_virtually(run(), seed=0) == pytest.approx((EPOCH_S + 3600, EPOCH_S))
