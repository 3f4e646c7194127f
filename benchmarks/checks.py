"""What the checks of neighbours cost: eight daemons on a ring over encrypted links in one process, 14 parameters each.

    python benchmarks/checks.py [--slices 120] [--seconds 1]

One network runs, and the checks are switched on and off in turns, slice after slice, here and nowhere else. Prints JSON: the median of the
processor time of a node's round with all checks over that of the slices beside it without; then each check's part in half as many slices
with all checks, looked at function by function (what it takes to look is in it, so the sum is rather too large).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.algorithms import Guard
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.node.clock import Timeouts
from p2pfl.node.daemon import Daemon
from p2pfl.node.link_reports import LinkReports
from p2pfl.node.mixing import Mixing
from p2pfl.node.node import Node
from p2pfl.node.round_log import RoundLog
from p2pfl.protocol.agreed_start import Signing
from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.claims import Claims
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.equivocation import Witness
from p2pfl.protocol.event_throttle import EventThrottle
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.protocol.view import NetworkView
from p2pfl.runs.rows import NodeRow
from p2pfl.transports import Endpoint, ReservedPort, ZeroMQTransport, door, reserve_port
from p2pfl.transports.base import LinkStates
from p2pfl.transports.door import Door

NODES = 8
FEATURES = 13
"""And a bias: 14 parameters."""
TIMEOUTS = Timeouts(deadline_floor_s=120.0, linger_s=20.0, start_within_s=120.0)
FIRST_ROUND = 5
"""Slices begin when the first rounds, which set everything up, are over."""
STUDY = "ab" * 32

Instead = Callable[..., Any]

CHECKS: Mapping[str, list[tuple[type, str, Instead]]] = {
    "bound on norms": [(Guard, "bound", lambda *_: math.inf), (Guard, "norm", lambda *_, **__: 0.0)],
    "distances": [(Mixing, "_look_at_distances", lambda *_: None)],
    "allowance": [
        (NeighbourAllowance, "admits", lambda *_: True),
        (NeighbourAllowance, "earn", lambda *_: None),
        (Edges, "exclusion", lambda *_: None),
        (LinkReports, "count_unreadable", lambda *_: None),
    ],
    "digests in records": [
        (RoundLog, "note_sent", lambda *_: None),
        (RoundLog, "note_received", lambda *_: None),
    ],
    "comparison of records": [
        (RoundLog, "_report_conflicts", lambda *_: None),
        (Witness, "conflicts_with", lambda *_: False),
        (Witness, "note", lambda *_: None),
    ],
    "proof of claims": [
        (NetworkView, "_note_furthest", lambda *_: None),
        (Claims, "look", lambda *_: None),
        (Claims, "_as_believed", lambda _, exchange: exchange),
    ],
    "throttle of events": [(EventThrottle, "offer", lambda _, _kind, _about, row, *__, **___: row), (EventThrottle, "due", lambda *_: [])],
    "door, per message": [
        (ZeroMQTransport, "_book", lambda *_: None),
        (LinkStates, "is_excluded", lambda *_: False),
    ],
    "door, all the time": [(Door, "_look", lambda *_: {})],
}
"""By name, what a check is done by, and what is done instead."""


class Checks:
    """The checks of all daemons here, on or off, and what they take."""

    def __init__(self) -> None:
        self.is_on, self.is_looked_at = True, False
        self.spent_s: Counter[str] = Counter()
        self._turn_s = door.QUIET_TURN_S
        for check, places in CHECKS.items():
            for owner, name, instead in places:
                self._substitute(check, owner, name, instead)

    def switch(self, *, on: bool, looked_at: bool = False) -> None:
        """Do the checks from now on, or not."""
        self.is_on, self.is_looked_at = on, looked_at
        door.QUIET_TURN_S = self._turn_s if on else door.IDLE_TURN_S

    def _substitute(self, check: str, owner: type, name: str, instead: Instead) -> None:
        done: Instead = getattr(owner, name)

        def switched(*arguments: Any, **options: Any) -> Any:
            if not self.is_on:
                return instead(*arguments, **options)
            if not self.is_looked_at:
                return done(*arguments, **options)
            began_s = time.thread_time()
            try:
                return done(*arguments, **options)
            finally:
                self.spent_s[check] += time.thread_time() - began_s

        setattr(owner, name, switched)


class Rounds:
    """Counts rounds that any daemon here has made."""

    def __init__(self) -> None:
        self.count = self.furthest = 0
        record = RoundLog.record  # the one place that every round passes

        def counted(log: RoundLog, row: NodeRow) -> None:
            self.count, self.furthest = self.count + 1, row.round
            record(log, row)

        RoundLog.record = counted  # type: ignore[method-assign]

    async def cost(self, seconds: float) -> float:
        """Processor seconds of a node's round in the next slice."""
        began_s, before = time.process_time(), self.count
        await asyncio.sleep(seconds)
        return (time.process_time() - began_s) / max(1, self.count - before)


def daemons(plan: Plan, place: Path, ports: dict[str, ReservedPort]) -> list[Daemon]:
    """All of a plan."""
    secrets = {name: Ed25519PrivateKey.generate() for name in plan.names}
    signed = {name: secret.public_key().public_bytes_raw() for name, secret in secrets.items()}
    curve = {name: zmq.curve_keypair() for name in plan.names}
    ends = {name: Endpoint(name, ports[name].address, curve[name][0]) for name in plan.names}
    return [
        Daemon(
            Node(
                plan,
                name,
                ZeroMQTransport(ends[name], curve[name][1], [ends[other] for other in plan.neighbours(name)]),
                study_digest=STUDY,
                state=place / name,
                timeouts=TIMEOUTS,
                incarnation=number + 1,
                signing=Signing(keys=signed, sign=secrets[name].sign),
                view=ViewPolicy(),
            ),
            status_port=None,
        )
        for number, name in enumerate(plan.names)
    ]


async def measure(plan: Plan, place: Path, *, slices: int, seconds: float) -> dict[str, Any]:
    """Run the network for as long as it takes."""
    checks, rounds, ports = Checks(), Rounds(), {name: reserve_port() for name in plan.names}
    running = [asyncio.create_task(daemon.run(), name=daemon.node.me) for daemon in daemons(plan, place, ports)]
    try:
        while rounds.furthest < FIRST_ROUND:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(seconds)
        costs = []
        for number in range(slices):
            checks.switch(on=number % 2 == 0)
            costs.append(await rounds.cost(seconds))
        with_s, without_s = costs[::2], costs[1::2]
        ratios = [2 * each / (costs[k - 1] + costs[k + 1]) for k, each in enumerate(costs) if k % 2 == 0 and 0 < k < len(costs) - 1]
        checks.switch(on=True, looked_at=True)
        began_s, before = time.process_time(), rounds.count
        await asyncio.sleep(slices * seconds / 2)
        all_s, node_rounds = time.process_time() - began_s, rounds.count - before
    finally:
        for task in running:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*running)
        for port in ports.values():
            port.close()
    parts = {check: round(checks.spent_s[check] / all_s, 4) for check in CHECKS}
    return {
        "ratio": round(median(ratios), 4),
        "microseconds_a_node_and_round": {"with": round(1e6 * median(with_s)), "without": round(1e6 * median(without_s))},
        "node_rounds": rounds.count,
        "fraction": parts,
        "fraction_of_all": round(sum(parts.values()), 4),
        "microseconds": {check: round(1e6 * checks.spent_s[check] / node_rounds, 1) for check in CHECKS},
    }


def main() -> None:
    """Read the command line, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one slice")
    arguments = parser.parse_args()
    resolved = experiment_from(
        {
            "task": {"name": "synthetic-logistic", "features": FEATURES, "samples": 40},
            "nodes": NODES,
            "topology": {"name": "ring"},
            "rounds": 10**6,
            "stop": None,
            "baselines": [],
        }
    )
    plan = make_plan(resolved, load_sites(resolved))
    with tempfile.TemporaryDirectory() as place:
        figures = asyncio.run(measure(plan, Path(place), slices=arguments.slices, seconds=arguments.seconds))
    print(json.dumps({"nodes": NODES, "parameters": plan.layout.size, **figures}, indent=2))


if __name__ == "__main__":
    main()
