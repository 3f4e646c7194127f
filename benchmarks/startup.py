"""How long `import p2pfl` and `p2pfl --help` take, beside a Python that does nothing. Prints JSON, in milliseconds.

Run with `.venv/bin/python benchmarks/startup.py [REPEATS]`, on a machine that does nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

REPEATS = 21
COMMANDS = {
    "python": ["-c", "pass"],
    "import p2pfl": ["-c", "import p2pfl"],
    "p2pfl --help": ["-m", "p2pfl", "--help"],
    "p2pfl up --help": ["-m", "p2pfl", "up", "--help"],
}


def milliseconds(arguments: list[str]) -> float:
    """From the start of a process to its end."""
    began_s = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603  # our own commands
    return 1000 * (time.perf_counter() - began_s)


def main() -> None:
    """Take turns, so that whatever else the machine does meets all of them; the first turn only warms the disk's cache."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, arguments in COMMANDS.items():
            spent = milliseconds(arguments)
            if turn:
                taken[name].append(spent)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    rows = {
        name: {
            "median_ms": round(median, 1),
            "min_ms": round(min(taken[name]), 1),
            "beyond_python_ms": round(median - medians["python"], 1),
        }
        for name, median in medians.items()
    }
    sys.stdout.write(json.dumps({"python": sys.version.split()[0], "repeats": repeats, "commands": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
