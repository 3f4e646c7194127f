"""What the checks of neighbours cost can be measured: the benchmark reaches into them by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "checks.py"
DEADLINE_S = 120
CHECKS = 9


@pytest.mark.slow
def test_every_check_of_neighbours_is_switched_and_looked_at():
    command = [sys.executable, str(BENCHMARK), "--slices", "4", "--seconds", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    found = json.loads(done.stdout)

    assert found["node_rounds"] > 0
    assert len(found["microseconds"]) == CHECKS
    assert {check for check, spent in found["microseconds"].items() if not spent} <= {"proof of claims", "throttle of events"}
