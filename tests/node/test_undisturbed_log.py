"""A run that nothing disturbs logs no warning: from the start in any order to the close."""

from __future__ import annotations

import asyncio
import logging
import random
import re

import pytest

from links import MemoryLinks, ZeroMQLinks
from networks import Institutions, Network, averaging, finish, plan_of, until, wait_until
from p2pfl.node import daemon
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.wire.codec import decode
from p2pfl.wire.messages import Goodbye
from thorough import first_fast

LEARNING = {"task": {"name": "breast-cancer"}, "nodes": 5, "topology": {"name": "ring"}, "rounds": 4, "stop": None}
PLANS = {
    "ring": lambda: averaging({"name": "ring"}, 5, tolerance=1e-2),
    "pairs": lambda: plan_of(**LEARNING, algorithm={"name": "ad-psgd"}),
    "path": lambda: averaging({"name": "path"}, 4, tolerance=1e-3),
    "learning": lambda: plan_of(**LEARNING),
    "asynchronous": lambda: plan_of(**LEARNING, pace={"name": "asynchronous"}),
}
CASES = [("ring", ZeroMQLinks, 0.0), ("pairs", ZeroMQLinks, 0.0)]
CASES += [(plan, links, latency_s) for plan in PLANS for links, latency_s in ((MemoryLinks, 0.04), (ZeroMQLinks, 0.01))]


class Distant:
    """Links over which every message takes its time, so that news cross each other."""

    def __init__(self, links, latency_s):
        self.links, self.latency_s = links, latency_s

    def member(self, name, neighbours):
        line = self.links.member(name, neighbours)
        send = line.send

        async def send_late(peer, frames, timeout_s):
            await asyncio.sleep(self.latency_s)
            await send(peer, frames, timeout_s)

        line.send = send_late
        return line


class Watched(Network):
    """A network whose nodes also tell each other how it goes."""

    def __init__(self, plan, place, **options):
        super().__init__(plan, place, view=ViewPolicy(), **options)


def alarms(caplog):
    return [f"{record.levelname} {record.name}: {record.getMessage()}" for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("plan", "links", "latency_s"), first_fast(CASES, 2))
def test_an_undisturbed_run_logs_no_warning(plan, links, latency_s, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    network_plan, made = PLANS[plan](), links(max_queued=32)
    order = list(network_plan.names)
    random.Random(0).shuffle(order)

    async def run():
        async with Watched(network_plan, tmp_path, links=Distant(made, latency_s)) as network:
            for name in order:  # each begins while those before it are dialling
                network.start(name)
                await asyncio.sleep(0)
            return await network.ended(), [network.summary(name)["departures"] for name in order]

    caplog.clear()  # of what the task had to say of its partition
    try:
        reasons, departures = finish(run())
    finally:
        made.close()

    assert set(reasons) <= {"converged", "rounds"}
    assert departures == [[]] * len(order)
    assert alarms(caplog) == []
    assert sum(record.getMessage().startswith("started") for record in caplog.records) == len(order)


def test_a_last_word_on_its_way_into_its_link_is_waited_for(tmp_path):
    plan = averaging({"name": "path"}, 2)

    async def run():
        async with Network(plan, tmp_path) as network:
            network.start()
            for running in network.nodes.values():
                hold_last_words(running)
            return await network.ended(), [network.summary(name)["departures"] for name in plan.names], map(network.events, plan.names)

    reasons, departures, events = finish(run())

    assert (set(reasons), departures) == ({"converged"}, [[], []])
    assert any("left" in each for each in events)  # who ends first has been heard by the other


def hold_last_words(running):
    """Let a node's last word take its time, while others wake the node."""
    send, clock = running.line.send, running.daemon.clock

    async def send_late(peer, frames, timeout_s):
        if isinstance(decode(frames)[0], Goodbye):
            for _ in range(20):
                clock.wake()
                await asyncio.sleep(0)
        await send(peer, frames, timeout_s)

    running.line.send = send_late


def test_a_round_that_waits_says_for_whom(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(daemon, "SAY_AWAITED_S", 0.05)
    caplog.set_level(logging.INFO)
    plan = averaging({"name": "ring"}, 3)
    still = plan.names[1]
    said = f"for {still} (last heard "

    def lines():
        return [record.getMessage() for record in caplog.records if said in record.getMessage()]

    async def run():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.reached(2)
            network.pause(still)
            await until(lines)
            network.wake(still)
            await network.ended()

    finish(run())

    assert re.fullmatch(rf"round \d+: waiting for \d s for {still} \(last heard \d s ago\)", lines()[0])


@pytest.mark.slow
def test_a_node_that_waits_says_for_whom_and_why_and_warns_of_nothing(tmp_path):
    with Institutions(plan_of(**LEARNING), tmp_path) as institutions:
        *others, first = institutions.plan.names  # who comes later dials

        def log(name):
            return (tmp_path / name / "node.log").read_text()

        institutions.start(first)
        neighbours = institutions.plan.neighbours(first)
        wait_until(lambda: all(f"waiting for {name}: " in log(first) for name in neighbours))
        assert "refused" in log(first)
        institutions.start(*others)
        wait_until(institutions.is_over)

        assert [institutions.exit_code(name) for name in institutions.plan.names] == [0] * 5
        assert [institutions.summary(name)["departures"] for name in institutions.plan.names] == [[]] * 5
        assert [
            line for name in institutions.plan.names for line in log(name).splitlines() if " WARNING " in line or " ERROR " in line
        ] == []
