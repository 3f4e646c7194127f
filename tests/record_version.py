"""Record what this version writes, small enough to keep: keys, a study, checkpoints in the middle of a run, run folders, messages.

    python tests/record_version.py tests/recorded/NAME

Later versions are held against the folders that earlier ones have left. The keys in it are for tests alone.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from commands import start_command
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml
from wire_samples import EVERY_MESSAGE, frames_of

MEMBERS = ("hospital-0", "hospital-1", "hospital-2")
EXPERIMENT = {
    "name": "recorded",
    "task": {"name": "breast-cancer"},
    "nodes": len(MEMBERS),
    "partition": {"name": "iid"},
    "topology": {"name": "path"},
    "algorithm": {"name": "dpsgd", "local_steps": 2, "batch_size": 8},
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "rounds": 12,
    "stop": {"settle": 20},
    "evaluate_every": 4,
    "baselines": ["local"],
}
PAUSED_AFTER = 4
"""Rounds that every node has written before it is asked to pause."""
DEADLINE_S = 120.0


def run(*arguments: object, cwd: Path) -> str:
    """What a command of p2pfl says."""
    command = [sys.executable, "-m", "p2pfl", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=DEADLINE_S).stdout


def rounds_of(site: Path) -> int:
    """How many rounds a node has recorded."""
    records = site / "state" / "run" / "nodes.jsonl"
    return len(records.read_text().splitlines()) if records.exists() else 0


def record_network(place: Path) -> None:
    """Keys, cards, study, site files, and the state of three daemons that were paused in the middle."""
    (place / "experiment.yaml").write_text(dump_yaml(EXPERIMENT))
    for member in MEMBERS:
        with reserve_port() as port:
            address = port.address
        run("keys", "new", "--name", member, "--address", address, "--out", f"{member}/keys", cwd=place)
    cards = [part for member in MEMBERS for part in ("--card", f"{member}/keys/card.yaml")]
    run("study", "new", "experiment.yaml", *cards, cwd=place)
    digest = json.loads(run("study", "show", "study.yaml", "--json", cwd=place))["digest"]
    for member in MEMBERS:
        run("study", "join", "study.yaml", "--keys", f"{member}/keys", "--confirm", digest, "--out", f"{member}/site.yaml", cwd=place)
        site = place / member / "site.yaml"
        site.write_text(site.read_text() + "round_at_least_s: 0.3\n")
    nodes = [start_command("node", "start", f"{member}/site.yaml", cwd=place) for member in MEMBERS]
    deadline_s = time.monotonic() + DEADLINE_S
    while min(rounds_of(place / member) for member in MEMBERS) < PAUSED_AFTER:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{place}: no {PAUSED_AFTER} rounds within {DEADLINE_S} s")
        time.sleep(0.05)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    for node in nodes:
        node.communicate(timeout=DEADLINE_S)
    (place / "digest.txt").write_text(digest + "\n")


def record_simulation(place: Path) -> None:
    """The folder of a whole run and the checkpoint of one that was interrupted."""
    run("simulate", "experiment.yaml", "--out", "run", cwd=place)
    longer = ("--rounds", "100000", "--set", "stop=null", "--set", "baselines=[]", "--set", "algorithm.local_steps=2000")
    simulation = start_command("simulate", "experiment.yaml", *longer, "--out", "interrupted", cwd=place)
    checkpoint = place / "interrupted" / "checkpoint.safetensors"
    deadline_s = time.monotonic() + DEADLINE_S
    while not checkpoint.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{checkpoint}: not written within {DEADLINE_S} s")
        time.sleep(0.01)
    simulation.send_signal(signal.SIGKILL)
    simulation.communicate(timeout=DEADLINE_S)


def record_messages(place: Path) -> None:
    """One message of each kind, its frames as hexadecimal text."""
    messages = {type(message).__name__: [bytes(frame).hex() for frame in frames_of(message)] for message in EVERY_MESSAGE}
    (place / "messages.json").write_text(json.dumps(messages, indent=1) + "\n")


def main() -> None:
    """Write everything into the folder that the command line names."""
    (out,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        record_network(place)
        record_simulation(place)
        record_messages(place)
        for lock in place.rglob("lock"):
            lock.unlink()
        shutil.copytree(place, out)


if __name__ == "__main__":
    main()
