"""What it costs to run many daemons on one machine: `p2pfl up` on breast-cancer, from the command to its result. Prints JSON.

    python benchmarks/daemons.py                                 # 64 daemons on a ring, 20 rounds
    python benchmarks/daemons.py --nodes 16 --plain              # each daemon a Python of its own, for comparison
    python benchmarks/daemons.py --topology random-regular

The experiment runs twice. The first time seconds are counted from the start of the command: `all_greeted` is when the last daemon has heard
the last of its neighbours (from the events that daemons record), `total` when the command has ended. The second time its memory is looked
at, which takes the daemons' time: the sum of the proportional set sizes (a page that k processes share counts 1/k in each) of all its
processes, the one that starts them included, at its highest from when all have greeted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

GIB = 2**30
MIB = 2**20
POLL_S = 0.5
PLAINLY = "import sys, p2pfl; p2pfl.up(sys.argv[1], out=sys.argv[2], fork=False)"


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


def start(experiment: Path, place: Path, *, plain: bool) -> subprocess.Popen[bytes]:
    """`p2pfl up`, or what it does where nothing can be forked."""
    command = ["-c", PLAINLY, experiment, place] if plain else ["-m", "p2pfl", "up", experiment, "--out", place, "--json"]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603  # our own command


def must_have_ended_well(running: subprocess.Popen[bytes]) -> None:
    """Leave with a message otherwise."""
    if running.wait():
        sys.exit(f"p2pfl up ended with exit code {running.returncode}")


def seconds(experiment: Path, place: Path, *, plain: bool) -> dict[str, float]:
    """One run that nobody disturbs."""
    began_s = time.time()
    must_have_ended_well(start(experiment, place, plain=plain))
    ended_s = time.time()
    greetings = first_greetings(place)
    assert len(greetings) == links(place), f"{len(greetings)} of {links(place)} neighbours have been heard"
    return {"all_greeted": round(max(greetings) - began_s, 1), "total": round(ended_s - began_s, 1)}


def sizes(experiment: Path, place: Path, *, plain: bool) -> list[int]:
    """Proportional bytes of each process of one run, when their sum was highest."""
    running, most = start(experiment, place, plain=plain), [0]
    while running.poll() is None:
        time.sleep(POLL_S)
        if len(first_greetings(place)) == links(place) > 0:
            most = max(most, [proportional_bytes(pid) for pid in processes_of(running.pid)], key=sum)
    must_have_ended_well(running)
    return most


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--topology", default="ring", help="ring, random-regular (of degree 4), ...")
    parser.add_argument("--plain", action="store_true", help="each daemon a Python of its own")
    arguments = parser.parse_args()
    asked = {"nodes": arguments.nodes, "rounds": arguments.rounds, "topology": {"name": arguments.topology}, "stop": None}
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "breast-cancer.yaml"
        experiment.write_text(json.dumps({"task": {"name": "breast-cancer"}, **asked}))
        taken = seconds(experiment, Path(folder) / "timed", plain=arguments.plain)
        most = sizes(experiment, Path(folder) / "looked-at", plain=arguments.plain)
    figures = {
        "cores": len(os.sched_getaffinity(0)),
        **asked,
        "plain": arguments.plain,
        "seconds": taken,
        "processes": len(most),
        "peak_pss_gib": round(sum(most) / GIB, 2),
        "pss_mib_a_daemon": round(sum(most) / MIB / arguments.nodes, 1),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
