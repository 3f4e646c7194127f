"""What it costs to run many daemons on one machine: `p2pfl up` on breast-cancer, from the command to its result. Prints JSON.

    python benchmarks/daemons.py                                 # 64 daemons on a ring, 20 rounds
    python benchmarks/daemons.py --nodes 16 --plain              # each daemon a Python of its own, for comparison
    python benchmarks/daemons.py --topology random-regular

Seconds are counted from the start of the command: `all_greeted` is when the last daemon has heard the last of its neighbours (from the
events that daemons record), `total` when the command has ended. Memory is the sum of the proportional set sizes (a page that k processes
share counts 1/k in each) of all its processes, the one that starts them included; it is looked at once all have greeted and then every few
seconds, because looking takes the daemons' time, too: `looking` says how much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

GIB = 2**30
MIB = 2**20
POLL_S = 0.5
COMMAND = "import json, sys, p2pfl; p2pfl.up({'task': {'name': 'breast-cancer'}}, **json.loads(sys.argv[1]))"


def processes_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for process in found:  # grows while it is walked
        try:
            children = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
        except OSError:  # it has ended
            continue
        found += [int(child) for each in children for child in each]
    return found


def proportional_bytes(pid: int) -> int:
    """Proportional set size; 0 where the process has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def first_greetings(place: Path) -> list[float]:
    """When each daemon first heard each of its neighbours, seconds since the epoch."""
    times = {}
    for path in place.glob("sites/*/state/run/events.jsonl"):
        whole, _, _torn = path.read_text().rpartition("\n")
        for event in map(json.loads, whole.splitlines()):
            if event["event"] == "greeted":
                times.setdefault((event["node"], event["detail"].split(" ")[0]), event["time"])
    return [datetime.fromisoformat(moment).timestamp() for moment in times.values()]


def links(place: Path) -> int:
    """Ordered pairs of neighbours, once the run has written its graph."""
    path = place / "topology.json"
    return len(json.loads(path.read_text())["edges"]) if path.exists() else 0


def measure(place: Path, asked: dict[str, Any], every_s: float) -> dict[str, Any]:
    """One run."""
    began_s = time.time()
    running = subprocess.Popen(  # noqa: S603  # our own command
        [sys.executable, "-c", COMMAND, json.dumps({"out": str(place), **asked})], stdout=subprocess.DEVNULL
    )
    peak: list[int] = []
    looking_s, look_at_s, have_greeted = 0.0, 0.0, False
    while running.poll() is None:
        time.sleep(POLL_S)
        have_greeted = have_greeted or (links(place) or -1) == len(first_greetings(place))
        if have_greeted and time.time() >= look_at_s:
            before_s = time.time()
            sizes = [proportional_bytes(pid) for pid in processes_of(running.pid)]
            peak = max(peak, sizes, key=sum)
            looking_s += time.time() - before_s
            look_at_s = time.time() + every_s
    total_s = time.time() - began_s
    if running.returncode:
        sys.exit(f"p2pfl.up ended with exit code {running.returncode}")
    greetings = first_greetings(place)
    assert len(greetings) == links(place), f"{len(greetings)} of {links(place)} neighbours have been heard"
    return {
        "seconds": {"all_greeted": round(max(greetings) - began_s, 1), "total": round(total_s, 1), "looking": round(looking_s, 1)},
        "processes": len(peak),
        "peak_pss_gib": round(sum(peak) / GIB, 2),
        "pss_mib_a_daemon": round(sum(peak) / MIB / asked["nodes"], 1),
    }


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--topology", default="ring", help="ring, random-regular (of degree 4), ...")
    parser.add_argument("--plain", action="store_true", help="each daemon a Python of its own")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks at memory")
    arguments = parser.parse_args()
    asked = {
        "nodes": arguments.nodes,
        "rounds": arguments.rounds,
        "topology": {"name": arguments.topology},
        "stop": None,
        "fork": not arguments.plain,
    }
    folder = Path(tempfile.mkdtemp())
    try:
        measured = measure(folder / "run", asked, arguments.every)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), **asked, **measured}, indent=2))


if __name__ == "__main__":
    main()
