"""Real daemons over real sockets, with the clock's own delays in between: what the clock foretells is what they take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from links import ZeroMQLinks
from networks import Network, finish, plan_of
from p2pfl.errors import TransportError
from p2pfl.node.clock import Timeouts
from p2pfl.simulator import simulate
from p2pfl.transports import Received, Transport
from p2pfl.yaml_files import dump_yaml

pytestmark = pytest.mark.slow

FROM, TO = 4, 24  # rounds: after the links are made and before anybody closes
AGREES = 0.15
ATTEMPTS = 3
"""A machine that has much else to do in one of them only ever adds seconds."""
NAMES = [f"node-{i}" for i in range(8)]
ROUND_S = 0.2
SPEEDS = {"node-2": 0.5, "node-5": 0.8}


class LongCables:
    """A transport whose messages are under way for as long as the peer is far away, in the order in which they were sent."""

    def __init__(self, inner: Transport, latency_s: Mapping[str, float]) -> None:
        self._inner, self._latency_s = inner, latency_s
        self.counters, self.link_counters, self.link = inner.counters, inner.link_counters, inner.link
        self.disconnect = inner.disconnect

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        self._under_way: dict[str, asyncio.Queue[tuple[float, Sequence[bytes | memoryview], float]]] = {
            peer: asyncio.Queue() for peer in self._latency_s
        }
        self._tasks = [asyncio.create_task(self._deliver(peer), name=f"cable to {peer}") for peer in self._latency_s]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._inner.__aexit__(*error)

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        self._under_way[peer].put_nowait((time.monotonic() + self._latency_s[peer], frames, timeout_s))

    async def receive(self) -> Received:
        return await self._inner.receive()

    async def _deliver(self, peer: str) -> None:
        while True:
            due_s, frames, timeout_s = await self._under_way[peer].get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            with suppress(TransportError):  # there is no link yet, or no more: lost, as on a real cable
                await self._inner.send(peer, frames, timeout_s)


class FarLinks:
    """Members that are as far apart as a graph says."""

    def __init__(self, inner: ZeroMQLinks, latency_s: Mapping[frozenset[str], float]) -> None:
        self._inner, self._latency_s = inner, latency_s

    def member(self, name: str, neighbours: Iterable[str]) -> Transport:
        peers = list(neighbours)
        return LongCables(self._inner.member(name, peers), {peer: self._latency_s[frozenset((name, peer))] for peer in peers})


def ring_with_a_slow_edge():
    return {frozenset((NAMES[i - 1], NAMES[i])): 0.5 if i == 4 else 0.1 for i in range(8)}


def cube_of_unlike_edges():
    chance = np.random.default_rng(11)
    pairs = [(i, i ^ bit) for i in range(8) for bit in (1, 2, 4) if i < i ^ bit]
    return {frozenset((NAMES[i], NAMES[j])): float(chance.uniform(0.05, 0.4)) for i, j in pairs}


@pytest.mark.parametrize("latency_s", [ring_with_a_slow_edge(), cube_of_unlike_edges()], ids=["ring with a slow edge", "cube"])
def test_eight_daemons_take_the_seconds_that_the_clock_foretells(latency_s, tmp_path):
    edges = [{"between": sorted(pair), "latency_ms": seconds * 1e3} for pair, seconds in latency_s.items()]
    (tmp_path / "graph.yaml").write_text(dump_yaml({"nodes": NAMES, "edges": edges}), encoding="utf-8")
    experiment = {
        "task": {"name": "synthetic-logistic"},
        "nodes": 8,
        "topology": {"file": str(tmp_path / "graph.yaml")},
        "algorithm": {"name": "dpsgd", "local_steps": 1},
        "rounds": TO + 2,
        "stop": None,
        "baselines": [],
        "evaluate_every": 1000,
    }
    predicted = simulate(experiment, clock={"round_s": ROUND_S, "speeds": SPEEDS}, out=tmp_path / "clock")
    expected_s = {name: [row["simulated_s"] for row in predicted.node_records if row["node"] == name] for name in NAMES}
    timeouts = {name: Timeouts(round_at_least_s=ROUND_S / SPEEDS.get(name, 1.0), start_within_s=60.0) for name in NAMES}

    async def main(place: Path) -> dict[str, float]:
        links = ZeroMQLinks()
        try:
            network = Network(plan_of(**experiment), place, timeouts_of=timeouts, links=FarLinks(links, latency_s))
            async with network:
                network.start()

                async def seconds_of(name: str) -> float:
                    await network.reached(FROM, [name])
                    began_s = time.monotonic()
                    await network.reached(TO, [name])
                    return time.monotonic() - began_s

                async with asyncio.TaskGroup() as group:
                    timed = {name: group.create_task(seconds_of(name), name=f"stopwatch of {name}") for name in NAMES}
                assert not any("skipped" in network.events(name) for name in NAMES)
                return {name: task.result() for name, task in timed.items()}
        finally:
            links.close()

    foretold = pytest.approx(dict.fromkeys(NAMES, 1.0), abs=AGREES)
    ratios: dict[str, float] = {}
    for attempt in range(ATTEMPTS):
        measured_s = finish(main(tmp_path / str(attempt)), 120)
        ratios = {name: measured_s[name] / (expected_s[name][TO - 1] - expected_s[name][FROM - 1]) for name in NAMES}
        if ratios == foretold:
            break

    assert ratios == foretold
