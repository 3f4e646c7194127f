"""A process that stood still: what others sent in the meantime is heard before it takes up the round of the others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from networks import finish
from p2pfl.node.daemon import BACKLOG_TURNS, Daemon
from p2pfl.protocol.protocol import RETURN_REACH

STILL_S = 1.5


class Backlog:
    """What a daemon asks while messages of others come one at a time, each of which tells of a later exchange."""

    def __init__(self, num_messages: float, *, turns_each: int = 1) -> None:
        self.furthest_heard, self.left, self.turns_each = 0, num_messages, turns_each
        self.still_s, self.now_s = STILL_S, 0.0
        self.clock = SimpleNamespace(now_s=self._now_s)
        deadlines = SimpleNamespace(backlog_s=lambda _: self.still_s, note_backlog_heard=self._forget)
        self.protocol = SimpleNamespace(claims=SimpleNamespace(furthest=lambda: self.furthest_heard), deadlines=deadlines)

    def _now_s(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def _forget(self) -> None:
        self.still_s = 0.0

    async def come(self) -> None:
        while self.left > 0:
            for _ in range(self.turns_each):
                await asyncio.sleep(0)
            self.furthest_heard, self.left = self.furthest_heard + 1, self.left - 1


async def hear(backlog: Backlog) -> None:
    comes = asyncio.create_task(backlog.come())
    await Daemon._hear_backlog(backlog)
    comes.cancel()


@pytest.mark.parametrize("turns_each", [1, 5])
def test_a_node_that_stood_still_hears_all_that_waits_before_it_jumps(turns_each):
    assert BACKLOG_TURNS // 5 > RETURN_REACH
    backlog = Backlog(500, turns_each=turns_each)
    finish(hear(backlog))

    assert backlog.furthest_heard == 500
    assert backlog.still_s == 0.0  # once after a standstill


def test_it_listens_no_longer_than_it_stood_still_where_the_others_never_stop():
    backlog = Backlog(float("inf"))
    finish(hear(backlog))

    assert backlog.now_s >= STILL_S
    assert backlog.still_s == 0.0


def test_a_node_that_did_not_stand_still_listens_to_nobody():
    backlog = Backlog(500)
    backlog.still_s = 0.0
    finish(hear(backlog))

    assert backlog.furthest_heard == 0
