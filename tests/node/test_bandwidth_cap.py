"""A cap on what a node sends of models: kept by all links together, and never waited for by a short message."""

from __future__ import annotations

import asyncio
import time

import pytest

from networks import Network, finish, plan_of
from p2pfl.node.bandwidth_cap import BandwidthCap
from p2pfl.wire.codec import decode
from p2pfl.wire.messages import Chunk, DoctorAnswer, Goodbye, Update
from p2pfl.wire.negotiation import announcing

MBIT_S = 40.0
BYTES_PER_S = MBIT_S * 1e6 / 8
MODEL = plan_of(
    task={"name": "averaging", "dimension": 400_000},
    nodes=3,
    topology={"name": "complete"},
    rounds=0,
    stop={"relative_consensus": 1e-300, "settle": 2},
)


@pytest.fixture
def handed_out(monkeypatch):
    """When the one node that has a cap asked it for time."""
    asked: list[float] = []

    class Noted(BandwidthCap):
        def __init__(self, mbit_s: float | None) -> None:
            super().__init__(mbit_s)
            self._asked = [] if mbit_s is None else asked

        def reserve(self, size_bytes: int, now_s: float) -> float:
            self._asked.append(now_s)
            return super().reserve(size_bytes, now_s)

    monkeypatch.setattr("p2pfl.node.sending.BandwidthCap", Noted)
    return asked


def kept(sent: list[tuple[float, int]], began_s: float) -> bool:
    """Whether messages, with the times when they had gone, took as long as the cap says from when the first was given its time.

    The last one goes when the time of all those before it has passed; whatever holds the machine up only makes it later.
    """
    times, sizes = zip(*sent, strict=True)
    return times[-1] - began_s >= 0.999 * (sum(sizes) - max(sizes)) / BYTES_PER_S


def test_times_are_handed_out_one_after_the_other():
    cap = BandwidthCap(8.0)

    assert [cap.reserve(10**6, 5.0) for _ in range(3)] == [5.0, 6.0, 7.0]
    assert cap.reserve(10**6, 20.0) == 20.0
    assert [BandwidthCap(None).reserve(10**9, 5.0) for _ in range(2)] == [5.0, 5.0]


@pytest.mark.slow
def test_a_node_sends_no_faster_than_its_cap_and_short_messages_do_not_wait(tmp_path, handed_out):
    first = MODEL.names[0]
    sent: list[tuple[float, int, bool]] = []

    async def main():
        async with Network(MODEL, tmp_path) as network:
            for name in MODEL.names:
                network.start(name, send_mbit_s=MBIT_S if name == first else None)
            transport = network.nodes[first].line
            send = transport.send

            async def noted(peer, frames, timeout_s):
                await send(peer, frames, timeout_s)
                is_bulk = isinstance(decode([memoryview(frame) for frame in frames])[0], Update | Chunk)
                sent.append((time.monotonic(), sum(memoryview(frame).nbytes for frame in frames), is_bulk))

            transport.send = noted
            await network.ended()

    finish(main())

    bulk = [(at_s, size) for at_s, size, is_bulk in sent if is_bulk]
    assert sum(size for _, size in bulk) > 4 * 400_000 * 8
    assert kept(bulk, handed_out[0])
    begun, ended = bulk[0][0], bulk[-1][0]
    assert any(begun < at_s < ended for at_s, _, is_bulk in sent if not is_bulk)


def test_a_short_message_that_comes_meanwhile_goes_before_the_next_chunk(tmp_path):
    first, second, _ = MODEL.names
    order: list[str] = []

    async def main():
        async with Network(MODEL, tmp_path) as network:
            network.start(first, send_mbit_s=0.5)  # a chunk in 17 seconds
            network.start(*MODEL.names[1:])
            node, line = network.nodes[first].daemon, network.nodes[first].line
            send, begun, done = line.send, asyncio.Event(), asyncio.Event()

            async def noted(peer, frames, timeout_s):
                await send(peer, frames, timeout_s)
                kind = type(decode([memoryview(frame) for frame in frames])[0]).__name__
                if kind == "Update":
                    begun.set()
                elif begun.is_set():
                    order.append(kind)
                    done.set()

            line.send = noted
            await begun.wait()
            neighbour = node.protocol.neighbours[second]
            neighbour.queue(neighbour.session.resend_request(0, full=False, lost=False))
            node.node.sending.wake()
            await done.wait()

    finish(main())

    assert order[0] not in {"Chunk", "Update"}


def test_the_last_word_does_not_lie_behind_an_update_that_waits_for_the_cap(tmp_path):
    first, *others = MODEL.names
    last: dict[str, str] = {}

    async def main():
        async with Network(MODEL, tmp_path) as network:
            network.start(first, send_mbit_s=0.5)  # a chunk in 17 seconds
            network.start(*others)
            node, line = network.nodes[first].daemon, network.nodes[first].line
            send, begun = line.send, asyncio.Event()

            async def noted(peer, frames, timeout_s):
                await send(peer, frames, timeout_s)
                message = decode([memoryview(frame) for frame in frames])[0]
                if isinstance(message, Update):
                    begun.set()
                last[peer] = message.reason if isinstance(message, Goodbye) else type(message).__name__

            line.send = noted
            await begun.wait()
            node.stop("by SIGTERM")
            await network.nodes[first].task

    finish(main())

    assert last == dict.fromkeys(others, "pausing")


def test_answers_to_a_doctor_keep_the_cap(tmp_path, handed_out):
    plan = plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=2,
        topology={"name": "path"},
        rounds=0,
        stop={"relative_consensus": 1e-300, "settle": 100_000},
    )
    first, second = plan.names
    sent: list[tuple[float, int]] = []

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start(first, send_mbit_s=MBIT_S, incarnation=announcing(1))
            network.start(second, incarnation=announcing(2))
            send = network.nodes[first].line.send

            async def noted(peer, frames, timeout_s):
                await send(peer, frames, timeout_s)
                message = decode([memoryview(frame) for frame in frames])[0]
                if isinstance(message, DoctorAnswer) and message.pad:
                    sent.append((time.monotonic(), sum(memoryview(frame).nbytes for frame in frames)))

            network.nodes[first].line.send = noted
            await network.reached(1)
            asking = network.nodes[second].daemon.node
            handed_out.clear()
            measured = await asking.probing.measure(asking.protocol, asking.sending)

            assert measured[first]["mbit_s"] is not None

    finish(main())

    assert len(sent) > 10
    assert kept(sent, handed_out[0])
