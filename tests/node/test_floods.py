"""A member that floods a node with valid keys, against real daemons: the others go on, and the disk is not filled.

The victim and the honest third member are pinned to one core, the attacker to another. The rate of rounds without a flood is measured in
the same network and pinning, just before it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import flooding_member
from networks import DEADLINE_S, Institutions, plan_of, wait_until
from p2pfl.evaluation.results import read_models

CORES = sorted(os.sched_getaffinity(0))
WARM_ROUNDS = 50
QUIET_S = 2.0
FLOOD_S = 3.0
BYTES_PER_DAY = 1_000_000
MINUTES_PER_DAY = 1440
TRAINING = {
    "task": {"name": "synthetic-logistic", "features": 10, "samples": 60},
    "nodes": 3,
    "topology": {"name": "complete"},
    "algorithm": {"local_steps": 2, "batch_size": 16},
    "rounds": 100_000,
    "stop": None,
    "baselines": [],
    "evaluate_every": 1000,
    "require": {"members": 2, "within_s": 1.0},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(len(CORES) < 2, reason="needs a core for the victim and one for the attacker"),
]


class Attack:
    """Two honest nodes at work on one core, and a member that is ready to flood the first of them from another core."""

    def __init__(self, place: Path, kind: str, seconds: float, **training) -> None:
        self.institutions = Institutions(plan_of(**{**TRAINING, **training}), place, deadline_floor_s=1.0, linger_s=2.0)
        self.victim, self.honest, self.attacker = self.institutions.plan.names
        self._arguments = [str(place), self.attacker, self.victim, kind, str(seconds)]

    def start(self) -> None:
        # a process inherits the cores of the one that starts it
        os.sched_setaffinity(0, {CORES[0]})
        try:
            self.institutions.start(self.victim, self.honest)
            os.sched_setaffinity(0, {CORES[1]})
            command = [sys.executable, flooding_member.__file__, *self._arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        finally:
            os.sched_setaffinity(0, set(CORES))
        assert self.process.stdout.readline() == "greeted\n", (self.institutions.place / self.victim / "node.log").read_text()[-2000:]

    def flood(self) -> None:
        """Let it go, and wait until it is over."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert int(self.process.stdout.readline()) > 0
        assert self.process.wait(DEADLINE_S) == 0

    def num_rounds(self) -> int:
        rows = self.institutions.state(self.victim) / "run" / "nodes.jsonl"
        return rows.read_bytes().count(b"\n") if rows.exists() else 0

    def sizes(self) -> dict[str, int]:
        """Bytes of every file under the victim's state folder."""
        state = self.institutions.state(self.victim)
        return {str(path.relative_to(state)): path.stat().st_size for path in state.rglob("*") if path.is_file()}

    def events(self) -> list[str]:
        return self.institutions.events(self.victim)


@contextmanager
def attack(place, kind, seconds=FLOOD_S, **training):
    attack = Attack(place, kind, seconds, **training)
    with attack.institutions:
        attack.start()
        try:
            yield attack
        finally:
            attack.process.kill()
            attack.process.communicate()


def rate(attack, during):
    """Rounds a second of the victim while something lasts."""
    before, began_s = attack.num_rounds(), time.monotonic()
    during()
    return (attack.num_rounds() - before) / (time.monotonic() - began_s)


@pytest.mark.parametrize("kind", flooding_member.FLOODS)
def test_a_flood_by_a_member_leaves_the_others_half_of_their_rounds_at_least(tmp_path, kind):
    with attack(tmp_path, kind) as attacked:
        wait_until(lambda: attacked.num_rounds() >= WARM_ROUNDS)
        before = rate(attacked, lambda: signal.sigtimedwait((), QUIET_S))
        flooded = rate(attacked, attacked.flood)
        after = rate(attacked, lambda: signal.sigtimedwait((), QUIET_S))

        assert flooded >= 0.5 * min(before, after), (before, flooded, after)  # the machine's speed drifts
        assert attacked.events().count("excluded") <= 1  # none, where the attacker's core is too slow for more than is allowed
        assert attacked.institutions.end(attacked.victim, signal.SIGTERM) == 0


@pytest.mark.parametrize("kind", ["come_and_go", "restarts"])
def test_a_member_that_comes_and_goes_does_not_fill_the_disk(tmp_path, kind):
    """Growth that the attacker causes above what the same rounds take without it, within a part of a minute, as if it were all of it."""
    with attack(tmp_path, kind, seconds=12.0) as attacked:
        wait_until(lambda: attacked.num_rounds() >= WARM_ROUNDS)
        before, rounds = attacked.sizes(), attacked.num_rounds()
        attacked.flood()
        after, rounds = attacked.sizes(), attacked.num_rounds() - rounds

    of_rounds = {"run/nodes.jsonl", "run/rounds.jsonl", "run/network.jsonl"}
    log = (attacked.institutions.place / attacked.victim / "node.log").read_text().splitlines()
    caused = sum(size - before.get(name, 0) for name, size in after.items() if name not in of_rounds and not name.endswith(".tmp"))
    per_round = sum(after.get(name, 0) - before.get(name, 0) for name in of_rounds) / rounds
    honest = sum(before.get(name, 0) for name in of_rounds) / WARM_ROUNDS

    assert caused * MINUTES_PER_DAY < BYTES_PER_DAY, {name: size - before.get(name, 0) for name, size in after.items()}
    assert per_round < 1.2 * honest
    assert len([line for line in log if ": round " not in line]) < 60


@pytest.mark.parametrize("kind", ["alive", "wrong_digest", "restarts"])
def test_flooded_nodes_end_their_run_as_without_the_flood_and_with_the_same_weights(tmp_path, kind):
    models, codes = [], []
    for place in (tmp_path / "quiet", tmp_path / "flooded"):
        place.mkdir()
        with attack(place, kind, seconds=4.0, rounds=500) as attacked:
            if place.name == "flooded":
                attacked.flood()
            wait_until(lambda: attacked.institutions.exit_code(attacked.victim) is not None)
            codes.append([attacked.institutions.wait(name) for name in (attacked.victim, attacked.honest)])
            states = [attacked.institutions.state(name) / "run" for name in (attacked.victim, attacked.honest)]
            models.append(torch.stack([read_models(state)[state.parent.parent.name] for state in states]))

    assert codes[0] == codes[1]
    assert torch.equal(models[0], models[1])
