"""What it takes to inspect a large run: a folder of 10,000 nodes and 1,000 rounds, as the simulator would leave it.

python benchmarks/inspecting.py      # seconds and memory of whole commands, as JSON
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from p2pfl.runs.folder import RunFolder

NODES, ROUNDS, RECORDED = 10_000, 1_000, 100


def make_run(path: Path) -> None:
    """A ring with chords; every round has its row, and some nodes have theirs."""
    names, draw = [f"node-{i:04d}" for i in range(NODES)], random.Random(0)  # noqa: S311  # no secret
    graph = {
        "nodes": names,
        "edges": [[i, (i + step) % NODES, 0.2] for i in range(NODES) for step in (1, 2, NODES - 2, NODES - 1)],
        "lambda_2": 0.9999999,
        "lambda_min": -0.2,
        "laplacian_lambda_2": 2e-6,
        "laplacian_lambda_max": 6.25,
        "diameter": NODES // 4,
    }
    folder = RunFolder.create(path, {"name": "large", "topology": {"name": "ring"}, "stop": None}, topology=graph, engine="simulator")
    seconds = {"train": 0.1, "mix": 0.05, "evaluate": 0.0}
    figures = {"kind": "train", "loss": 0.5, "seconds": seconds}
    for number in range(ROUNDS):
        whole = {"disagreement": 1.0, "bound_low": 0.1, "bound_high": 1.0, "rms_norm": 2.0, "consensus_distance": 0.3, "skipped": 0}
        folder.append_round({"round": number, "nodes": NODES, "bytes_sent": 10**8, **whole, **figures})
        own = {"norm": 2.0, "skipped": [], "agreed_for": 0, "stop_round": None, "bytes_sent": 636, **figures}
        some = (names[i * NODES // RECORDED] for i in range(RECORDED))
        folder.append_node(*({"round": number, "node": name, "disagreement": draw.random(), **own} for name in some))


def main() -> None:
    """Make it, inspect it, print JSON."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        make_run(run)
        found = {}
        for name, options in (("page", []), ("json", ["--json"]), ("html", ["--html", str(Path(place) / "page.html")])):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.perf_counter()
            command = [sys.executable, "-m", "p2pfl", "inspect", str(run), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
            most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of all so far
            found[name] = {"seconds": time.perf_counter() - began, "at_most_mib": max(before, most) / 1024}
        sizes = sum(path.stat().st_size for path in run.iterdir())
        print(json.dumps({"nodes": NODES, "rounds": ROUNDS, "folder_bytes": sizes, **found}, indent=2))


if __name__ == "__main__":
    main()
