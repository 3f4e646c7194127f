"""The outbox of a node in secure sums: a neighbour that takes nothing costs no more than one copy of what there is to say."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from links import MemoryLinks
from p2pfl.node import sum_outbox
from p2pfl.node.sum_outbox import SumOutbox
from p2pfl.wire.secure_messages import LastSignedRequest, Total
from p2pfl.wire.sum_link import SumLink
from sum_samples import OPENING, SIGNED
from virtual_time import run_virtually


def outbox_of(link):
    transport = MemoryLinks(32).member("a", ["b"])
    return SumOutbox(transport, {1: link}, {1: "b"}, done=lambda: b"", repeat_after_s=0.0)


def test_what_waits_already_is_not_put_there_again():
    outbox, limbs = outbox_of(SumLink(1, 64)), np.ones((3, 2), dtype=np.uint64)
    total = {"transcript": b"\xbb" * 32, "sum_id": "cc" * 32, "position": 0}
    for _ in range(100):
        for message in (OPENING, SIGNED, LastSignedRequest(member=0), Total(**total, limbs=limbs)):
            outbox.post(1, message)
        outbox.say_presence(1)
    assert outbox._waiting[1].qsize() == 4 + 2
    outbox.post(1, Total(**total, limbs=limbs + np.uint64(1)))
    outbox.post(1, replace(OPENING, session=9))

    assert outbox._waiting[1].qsize() == 6 + 2


def test_what_has_been_handed_over_is_put_there_again():
    outbox = outbox_of(SumLink(1, 64))

    async def sends():
        task = asyncio.ensure_future(outbox.send_to(1))
        outbox.post(1, OPENING)
        await outbox.flush()
        outbox.post(1, OPENING)
        waiting = outbox._waiting[1].qsize()
        task.cancel()
        return waiting

    assert run_virtually(sends(), seed=0, at_most_s=60.0) == 1


def test_beyond_the_most_that_may_wait_a_message_counts_as_lost(monkeypatch):
    monkeypatch.setattr(sum_outbox, "MOST_WAITING", 3)
    link = SumLink(1, 64)
    outbox = outbox_of(link)
    for session in range(1, 11):
        outbox.post(1, replace(OPENING, session=session))

    assert outbox._waiting[1].qsize() == 3
    assert link.presence(b"").sent == outbox.counters["messages_dropped"] == 7
