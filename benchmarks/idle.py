"""Processor time of daemons that have nothing to do: all members of a ring but one are there and wait for it. Prints JSON.

    python benchmarks/idle.py                                # eight daemons for a minute
    python benchmarks/idle.py --topology complete

A daemon that waits says Hello to nobody who is there already, gives signs of life, and dials the absent member or awaits it. The figure of
each is its user and system time, from /proc/PID/stat, over the minute, as a percentage of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.launcher.founding import found_network
from p2pfl.launcher.processes import ForkedProcess, ForkServer
from p2pfl.node.status import read_status

SETTLED_S = 5.0
"""After all have met, until it is measured."""
DEADLINE_S = 120.0
POLL_S = 0.2
_USER, _SYSTEM = 11, 12  # in /proc/PID/stat, counted from behind the name


def busy_s(pid: int) -> float:
    """Processor time that a process has taken, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK")


def have_met(place: Path, name: str, absent: str) -> bool:
    """Whether a daemon has a link with each neighbour that is there."""
    state = place / "sites" / name / "state"
    if not (state / "status.url").exists():
        return False
    return all(neighbour["greeted"] for other, neighbour in read_status(state)["neighbours"].items() if other != absent)


async def measure(asked: dict[str, Any], seconds: float, place: Path) -> dict[str, float]:
    """Percentage of a core that each daemon takes."""
    experiment = experiment_from({"task": {"name": "breast-cancer"}, "baselines": [], **asked})
    plan = make_plan(experiment, load_sites(experiment))
    absent, *present = plan.names
    with ExitStack() as ports:
        found_network(plan, place, ports, {})
    with ForkServer() as fork:
        assert await fork.is_fit(), fork.unfit
        started: dict[str, ForkedProcess] = {}
        for name in present:
            folder = place / "sites" / name
            arguments = ["node", "start", str(folder / "site.yaml"), "--until-stdin-closes"]
            started[name] = fork.start(name, arguments, folder / "node.log")
        until_s = time.monotonic() + DEADLINE_S
        while not all(have_met(place, name, absent) for name in present):
            assert time.monotonic() < until_s, "not all daemons have met"
            assert all(process.poll() is None for process in started.values())
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(SETTLED_S)
        pids = {name: process.pid for name, process in started.items() if process.pid is not None}
        before = {name: busy_s(pid) for name, pid in pids.items()}
        began_s = time.monotonic()
        await asyncio.sleep(seconds)
        took_s = time.monotonic() - began_s
        return {name: round(100 * (busy_s(pid) - before[name]) / took_s, 2) for name, pid in pids.items()}


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemons", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--topology", default="ring")
    arguments = parser.parse_args()
    asked = {"nodes": arguments.daemons + 1, "topology": {"name": arguments.topology}}
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(asked, arguments.seconds, Path(folder)))
    print(json.dumps({**asked, "percent_of_a_core": found, "median": median(found.values()), "most": max(found.values())}, indent=2))


if __name__ == "__main__":
    main()
