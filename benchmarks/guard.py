"""What the checks of neighbours' updates cost: eight daemons on a ring over memory in one process, 14 parameters each.

    python benchmarks/guard.py [--rounds 200]

Prints JSON: processor time in the checks as a fraction of all that the run takes, and in microseconds a node and round. Everything is
measured in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.algorithms import Guard
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.node.daemon import Daemon
from p2pfl.node.mixing import Mixing
from p2pfl.node.timeouts import Timeouts
from p2pfl.protocol.agreed_start import Signing
from p2pfl.transports import MemoryNetwork

NODES = 8
FEATURES = 13
"""And a bias: 14 parameters."""
TIMEOUTS = Timeouts(deadline_floor_s=120.0, linger_s=20.0, greet_timeout_s=120.0)


class Spent:
    """Processor time in some methods, whichever thread calls them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: type, name: str) -> None:
        """Count a method's calls from now on."""
        method: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            began_s = time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - began_s

        setattr(owner, name, watched)


async def run(plan: Plan, place: Path) -> None:
    """All rounds of all daemons."""
    secrets = {name: Ed25519PrivateKey.generate() for name in plan.names}
    keys = {name: secret.public_key().public_bytes_raw() for name, secret in secrets.items()}
    links = MemoryNetwork(max_queued=32)
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(plan.names):
            daemon = Daemon(
                plan,
                name,
                links.transport(name, plan.neighbours(name)),
                study_digest="ab" * 32,
                state=place / name,
                timeouts=TIMEOUTS,
                incarnation=number + 1,
                signing=Signing(keys=keys, sign=secrets[name].sign),
                status_port=None,
            )
            group.create_task(daemon.run(), name=name)


def main() -> None:
    """Read the command line, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    resolved = experiment_from(
        {
            "task": {"name": "synthetic-logistic", "features": FEATURES, "samples": 40},
            "nodes": NODES,
            "topology": {"name": "ring"},
            "rounds": rounds,
            "stop": None,
            "baselines": [],
        }
    )
    plan, spent = make_plan(resolved, load_sites(resolved)), Spent()
    for owner, name in ((Guard, "bound"), (Guard, "norm"), (Mixing, "_look_at_distances")):
        spent.watch(owner, name)
    with tempfile.TemporaryDirectory() as place:
        began_s = time.process_time()
        asyncio.run(run(plan, Path(place)))
        all_s = time.process_time() - began_s
    figures = {
        "nodes": NODES,
        "parameters": plan.layout.size,
        "rounds": rounds,
        "fraction": round(spent.seconds / all_s, 4),
        "microseconds_a_node_and_round": round(1e6 * spent.seconds / (NODES * rounds), 1),
        "of_microseconds": round(1e6 * all_s / (NODES * rounds), 1),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
