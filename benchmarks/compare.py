"""Whether the simulator is as fast as it was: this run's ratios beside the recorded ones. A drop of more than 15 % fails.

    python benchmarks/compare.py             # as `make bench`: exit code 1 where a ratio has dropped
    python benchmarks/compare.py --record    # what is measured now is what later runs are held against

Ratios are of runs side by side, to the limit and to the floor (see simulator.py): they hold from machine to machine, so that a slower one
does not count as a slower simulator; a busy one may.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import simulator

RECORDED = Path(__file__).with_name("recorded.json")
ALLOWED_DROP = 0.15
REPEATS = 5
ROUNDS = 20


def measured() -> dict[str, float]:
    """Every ratio, by what it is of."""
    torch.set_num_threads(simulator.CORES)
    perceptrons = simulator.w1(256, REPEATS, ROUNDS, by_hand=False)
    patients = simulator.w2(10_000, REPEATS, ROUNDS, by_hand=False)
    return {
        "W1 at 256 nodes, of the limit": perceptrons["of_limit"],
        "W1 at 256 nodes, of the floor on as many cores": perceptrons["of_floor_a_core"],
        "W2 at 10,000 nodes, of the limit": patients["of_limit"],
    }


def dropped(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A sentence for each ratio that is more than the allowed drop below what was recorded, or was not measured."""
    missing = [f"{name}: recorded, and not measured" for name in recorded.keys() - found.keys()]
    slower = {name: (found[name], before) for name, before in recorded.items() if found.get(name, before) < (1 - ALLOWED_DROP) * before}
    return missing + [f"{name}: {now:.3g}, recorded {before:.3g} ({now / before - 1:+.0%})" for name, (now, before) in slower.items()]


def main() -> None:
    """Read the command line, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write what is measured into {RECORDED.name}")
    arguments = parser.parse_args()
    found = measured()
    if arguments.record:
        RECORDED.write_text(json.dumps(found, indent=2) + "\n")
    recorded = json.loads(RECORDED.read_text())
    for name, ratio in found.items():
        print(f"{name}: {ratio:.3g} (recorded {recorded[name]:.3g})")
    if found_slower := dropped(found, recorded):
        sys.exit("slower than recorded:\n" + "\n".join(found_slower))


if __name__ == "__main__":
    main()
