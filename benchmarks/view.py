"""What the network's view costs each node, in bytes sent a second: 64 nodes over memory in one process, 16 as processes.

    python benchmarks/view.py [--nodes 64] [--seconds 60] [--processes 16]

Rounds are as short as the machine makes them, or at least --round-s. Nothing is asserted; a site's allowance is 1,000 bytes a second.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.launcher.network import up
from p2pfl.node.clock import Timeouts
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.node.status import read_status
from p2pfl.protocol.agreed_start import Signing
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.transports import MemoryNetwork

TIMEOUTS = Timeouts(deadline_floor_s=120.0, linger_s=20.0, start_within_s=120.0)
MANY_ROUNDS = 100_000


def experiment(nodes: int, topology: str, rounds: int) -> dict[str, Any]:
    """Patients enough for any number of nodes."""
    return {
        "name": "view",
        "task": {"name": "synthetic-logistic", "features": 10, "samples": 40},
        "nodes": nodes,
        "topology": {"name": topology},
        "rounds": rounds,
        "stop": None,
        "baselines": [],
        "checkpoint_every": 1000,
    }


async def in_memory(plan: Plan, place: Path, seconds: float, round_s: float) -> None:
    """Run all daemons in this process for a while and print the rates."""
    secrets = {name: Ed25519PrivateKey.generate() for name in plan.names}
    keys = {name: secret.public_key().public_bytes_raw() for name, secret in secrets.items()}
    links = MemoryNetwork(max_queued=32)
    timeouts = Timeouts(**{field: getattr(TIMEOUTS, field) for field in Timeouts.__slots__} | {"round_at_least_s": round_s})
    daemons = [
        Daemon(
            Node(
                plan,
                name,
                links.transport(name, plan.neighbours(name)),
                study_digest="ab" * 32,
                state=place / name,
                timeouts=timeouts,
                incarnation=number + 1,
                signing=Signing(keys=keys, sign=secrets[name].sign),
                view=ViewPolicy(),
            ),
            status_port=None,
        )
        for number, name in enumerate(plan.names)
    ]
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for daemon in daemons:
            group.create_task(daemon.run(), name=daemon.node.me)
        await asyncio.sleep(seconds)
        report([daemon.status() for daemon in daemons], time.monotonic() - began_s)
        for daemon in daemons:
            daemon.stop()


def as_processes(nodes: int, topology: str, seconds: float, round_s: float, place: Path) -> None:
    """The same over encrypted sockets."""
    rounds = max(10, int(seconds / max(round_s, 0.1)))
    began_s = time.monotonic()
    last: list[dict[str, Any]] = []

    def progress(done: int, _possible: int, _row: Any) -> None:
        nonlocal last
        if done >= rounds - 1 and not last:
            last = [read_status(path) for path in sorted(place.glob("run/sites/*/state"))]
            report(last, time.monotonic() - began_s)

    settings = {"round_at_least_s": round_s, "deadline_floor_s": 120.0}
    up(experiment(nodes, topology, rounds), out=place / "run", site=settings, progress=progress)


def report(found: list[dict[str, Any]], seconds: float) -> None:
    """One line."""
    rates = [status["network"]["bytes_sent"] / seconds for status in found]
    rounds = min(status["round"] for status in found)
    ages = [row["age_s"] for status in found for row in status["network"]["rows"]]
    mean = sum(rates) / len(rates)
    rows = min(len(status["network"]["rows"]) for status in found)
    print(
        f"{len(found)} nodes, {rounds} rounds, {seconds:.0f} s: {max(rates):.0f} bytes/s at most, {mean:.0f} on average, "
        f"every {found[0]['network']['every']} rounds; {rows} or more rows at each node, none older than {max(ages):.0f} s"
    )


def main() -> None:
    """As asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--topology", default="ring")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--round-s", type=float, default=0.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if asked.nodes:
            resolved = experiment_from(experiment(asked.nodes, asked.topology, MANY_ROUNDS))
            asyncio.run(in_memory(make_plan(resolved, load_sites(resolved)), Path(place), asked.seconds, asked.round_s))
        if asked.processes:
            as_processes(asked.processes, asked.topology, asked.seconds, asked.round_s, Path(place))


if __name__ == "__main__":
    main()
