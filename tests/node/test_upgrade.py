"""Nodes of one study are upgraded one after the other: this version and an earlier one train together, and end with the same model.

P2PFL_OTHER_CHECKOUT is the folder of a checkout of the other version.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from networks import DEADLINE_S, Institutions, hear_interrupts, plan_of, wait_until
from p2pfl.runs.records import read_run
from p2pfl.runs.status_client import address_in, fetch_page, token_in

OTHER = os.environ.get("P2PFL_OTHER_CHECKOUT")
EXPERIMENT = {
    "task": {"name": "breast-cancer"},
    "nodes": 4,
    "partition": {"name": "iid"},
    "topology": {"name": "ring"},
    "rounds": 40,
    "stop": {"settle": 200},
    "require": {"within_s": 120},
}


def start(institutions: Institutions, name: str, checkout: Path) -> subprocess.Popen[bytes]:
    """A node of the version in a checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "p2pfl", "--verbose", "node", "start", str(institutions.site(name))]
    with (institutions.place / name / "node.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=institutions.place,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=hear_interrupts,  # noqa: PLW1509
        )


def status(institutions: Institutions, name: str) -> dict:
    state = institutions.state(name)
    url = address_in(state)
    if url is None:
        return {"round": -1, "neighbours": {}}
    try:
        return json.loads(fetch_page(url, "/status", token_in(state)))
    except OSError:
        return {"round": -1, "neighbours": {}}


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="P2PFL_OTHER_CHECKOUT names no checkout of another version")
def test_a_ring_is_upgraded_while_it_runs(tmp_path):
    here, other = Path(__file__).parents[2], Path(str(OTHER))
    plan = plan_of(**EXPERIMENT)
    old, new = plan.names[:3], plan.names[3:]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with Institutions(plan, tmp_path, round_at_least_s=0.1) as institutions:
        try:
            for name in plan.names:
                processes[name] = start(institutions, name, other if name in old else here)
            wait_until(lambda: status(institutions, new[0])["round"] >= 5)
            mixed = status(institutions, new[0])["neighbours"]
            for name in old[:2]:  # one after the other, and one stays as it is
                processes[name].send_signal(signal.SIGTERM)
                assert processes[name].wait(DEADLINE_S) == 0
                reached = status(institutions, new[0])["round"]
                processes[name] = start(institutions, name, here)
                wait_until(lambda name=name, reached=reached: status(institutions, name)["round"] > reached)
            upgraded = status(institutions, old[0])["neighbours"]
            codes = {name: process.wait(DEADLINE_S) for name, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        models = institutions.models()
        logs = {name: (tmp_path / name / "node.log").read_text() for name in plan.names}

    assert codes == dict.fromkeys(plan.names, 0), logs
    assert {neighbour["schema"] for neighbour in mixed.values()} == {4}
    assert upgraded[new[0]]["schema"] == 5
    for name in plan.names:
        summary = read_run(institutions.state(name) / "run").summary
        assert summary is not None
        assert (summary["stop_reason"], summary["departures"]) == ("converged", [])
        assert not re.search(r"wrong_schema|refused from|Traceback", logs[name])
    assert float((models - models.mean(dim=0)).norm() / models.norm()) < 1e-4
    assert torch.isfinite(models).all()
