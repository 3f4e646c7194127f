"""Whoever waits for something to come is woken by it, or by the end of his time, and leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from p2pfl.transports.arrivals import Arrivals

DEADLINE_S = 20


def finish(test):
    return asyncio.run(asyncio.wait_for(test, DEADLINE_S))


def test_all_who_wait_are_woken_by_what_comes():
    async def main():
        arrivals = Arrivals()
        waiting = [asyncio.create_task(arrivals.wait(10 * DEADLINE_S)) for _ in range(3)]
        await asyncio.sleep(0)
        arrivals.tell()
        arrivals.tell()
        await asyncio.gather(*waiting)
        return arrivals

    assert not finish(main())._waiting


def test_nobody_waits_longer_than_his_time():
    async def main():
        arrivals = Arrivals()
        arrivals.tell()  # to nobody: what came before is not waited for
        await arrivals.wait(0.001)
        return arrivals

    assert not finish(main())._waiting


def test_whoever_is_cancelled_waits_no_more():
    async def main():
        arrivals = Arrivals()
        waiting = asyncio.create_task(arrivals.wait(10 * DEADLINE_S))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        arrivals.tell()
        return arrivals

    assert not finish(main())._waiting
