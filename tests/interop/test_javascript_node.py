"""A node in JavaScript, written from docs/protocol.md and docs/vectors.json, beside two real daemons."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import make_vectors
import numpy as np
import pytest
from javascript import FOLDER, JavaScriptNode, need_node

from networks import DEADLINE_S, Institutions, plan_of, starts, wait_until
from p2pfl.evaluation.results import read_models

LIMIT = 1e-12
PATIENT = {"deadline_floor_s": 120.0, "linger_s": 20.0}
"""Nobody is given up, however busy the machine is."""
HASTY = {"deadline_floor_s": 2.0, "deadline_factor": 2.0, "linger_s": 20.0}
ENDED = 0
DEPARTED = 3


def plan(topology: str):
    """Some rounds that would train, and then enough to be killed in before all have agreed for long enough."""
    return plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=3,
        topology={"name": topology},
        rounds=20,
        stop={"relative_consensus": 1e-9, "patience": 60, "settle": 2000},
    )


def test_it_reproduces_every_vector():
    found = subprocess.run(
        [need_node(), FOLDER / "check_vectors.mjs", make_vectors.PAGE], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )

    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    assert seen.keys() == {"keys", "messages", "refused", "pad", "greeting", "ledger", "stop", "averaging", "record", "scenario"}
    assert seen["refused"] == len(json.loads(Path(make_vectors.PAGE).read_text(encoding="utf-8"))["refused"]["each"])


def all_agree(institutions: Institutions, other: JavaScriptNode) -> list[str]:
    """All three have stopped alike, at the true mean; returns the kinds of events of the node in JavaScript."""
    plan, result = institutions.plan, other.result()
    mean = starts(plan).numpy().mean(axis=0)
    models = {name: read_models(institutions.state(name) / "run")[name].numpy() for name in plan.names if name != other.name}
    models[other.name] = other.model()

    assert result["reason"] == "converged", other.log()
    assert result["unsettled"] == 0
    assert {institutions.summary(name)["stop_reason"] for name in plan.names if name != other.name} == {"converged"}
    assert {name: float(np.abs(model - mean).max()) < LIMIT for name, model in models.items()} == dict.fromkeys(models, True), {
        name: float(np.abs(model - mean).max()) for name, model in models.items()
    }
    return [kind for _, _, kind, _ in result["events"]]


@pytest.mark.slow
def test_it_averages_on_a_path_through_a_kill_of_its_own(tmp_path):
    """It is the one in the middle: it dials one neighbour, listens for the other, and passes on what both say of the start."""
    program, plan_ = need_node(), plan("path")
    with Institutions(plan_, tmp_path, **PATIENT) as institutions, JavaScriptNode(program, institutions, "node-1", deadline_s=120) as other:
        institutions.start("node-0", "node-2")
        wait_until(lambda: other.exchange() >= 40)
        other.kill()
        other.start()
        codes = [other.wait(), institutions.wait("node-0"), institutions.wait("node-2")]

        kinds = all_agree(institutions, other)
        assert codes == [ENDED, ENDED, ENDED]
        assert kinds.count("resumed") == 1
        assert "skipped" not in kinds


@pytest.mark.slow
def test_it_averages_on_a_ring_through_a_kill_of_a_daemon(tmp_path):
    program, plan_ = need_node(), plan("ring")
    with Institutions(plan_, tmp_path, **PATIENT) as institutions, JavaScriptNode(program, institutions, "node-2", deadline_s=120) as other:
        institutions.start("node-0", "node-1")
        wait_until(lambda: other.exchange() >= 40)
        institutions.end("node-0", signal.SIGKILL)
        institutions.start("node-0")
        codes = [other.wait(), institutions.wait("node-0"), institutions.wait("node-1")]

        kinds = all_agree(institutions, other)
        assert codes == [ENDED, ENDED, ENDED]
        assert kinds.count("greeted") >= 3


@pytest.mark.slow
def test_it_falls_behind_jumps_and_is_waited_for_again(tmp_path):
    """The others go on without it: what only one side merged is rolled back, and all end at the mean of all three."""
    program, plan_ = need_node(), plan("ring")
    with Institutions(plan_, tmp_path, **HASTY) as institutions, JavaScriptNode(program, institutions, "node-2") as other:
        institutions.start("node-0", "node-1")
        wait_until(lambda: other.exchange() >= 40)
        other.kill()
        left = other.exchange()
        wait_until(lambda: institutions.round("node-0") >= left + 10)
        other.start()
        codes = [other.wait(), institutions.wait("node-0"), institutions.wait("node-1")]

        kinds = all_agree(institutions, other)
        assert codes[0] == ENDED
        assert set(codes[1:]) <= {ENDED, DEPARTED}
        assert "jumped" in kinds
        assert "returned" in institutions.events("node-0")
