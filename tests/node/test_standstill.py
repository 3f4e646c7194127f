"""Daemons whose process stood still: what others sent in the meantime is heard before they take up the round of the others."""

from __future__ import annotations

import asyncio

from networks import HASTY, MemoryLinks, Network, finish, plan_of, until
from p2pfl.node import daemon
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.runs.records import read_run


class ByAndBy:
    """A line that hands out what has queued up a message at a time, as a network does."""

    def __init__(self, line):
        self._receive = line.receive

    async def receive(self):
        await asyncio.sleep(0)
        return await self._receive()


def jumps_of(state):
    """Rounds that a node jumped to."""
    events = read_run(state / "run").events
    return [int(event["detail"].split(" to round ")[1].split(";")[0]) for event in events if event["event"] == "jumped"]


def test_a_node_that_stood_still_jumps_to_where_the_others_are_now(tmp_path):
    plan = plan_of(
        task={"name": "averaging", "dimension": 3},
        nodes=3,
        topology={"name": "complete"},
        rounds=0,
        stop={"relative_consensus": 1e-300, "settle": 100_000},
    )
    *others, sleeper = plan.names

    async def run():
        # signed records prove how far the others are; by the time alone a node may be taken a part of the way only
        everything = ViewPolicy(bytes_per_s=None)
        async with Network(plan, tmp_path, links=MemoryLinks(max_queued=2**20), timeouts=HASTY, view=everything) as network:
            network.start()
            line = network.nodes[sleeper].line
            line.receive = ByAndBy(line).receive
            await network.reached(30)
            network.pause(sleeper)
            before = len(jumps_of(network.states[sleeper]))
            await network.reached(150, others)
            network.wake(sleeper)
            where = min(network.round(name) for name in others)
            await until(lambda: network.round(sleeper) >= where and len(jumps_of(network.states[sleeper])) > before)
            return where, jumps_of(network.states[sleeper])[before]

    where, first = finish(run())

    assert first >= where - daemon.RETURN_REACH
