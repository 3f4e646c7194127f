"""A member that floods a node with valid keys, against real daemons: the others go on, and the disk is not filled.

The victim and another honest member are pinned to one core, the attackers to another. The rate of rounds without a flood is measured in
the same network and pinning, just before and after it. In the short form one network is attacked in all ways, by a member for each.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
import torch

import flooding_member
from networks import Institutions, plan_of, wait_until
from p2pfl.evaluation.results import read_models
from p2pfl.runs.records import read_run
from thorough import LONG, long_or_short

CORES = sorted(os.sched_getaffinity(0))
WARM_ROUNDS = 50
QUIET_S = long_or_short(2.0, 0.5)
FLOOD_S = long_or_short(3.0, 1.0)
COMING_AND_GOING_S = long_or_short(60.0, 3.0)
COMINGS_AND_GOINGS = ("come_and_go", "restarts", *long_or_short(("come_and_go_slowly",), ()))
BYTES_PER_DAY = 1_000_000
MINUTES_PER_DAY = 1440
TRAINING = {
    "task": {"name": "synthetic-logistic", "features": 10, "samples": 60},
    "topology": {"name": "complete"},
    "algorithm": {"local_steps": 2, "batch_size": 16},
    "rounds": 100_000,
    "stop": None,
    "baselines": [],
    "evaluate_every": 1000,
    "require": {"members": "all", "within_s": 60.0},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(CORES) < 2, reason="needs a core for the victim and one for the attacker"),
]


class Attacked:
    """Two honest nodes at work on one core, and for each kind of attack a member that makes it from another core."""

    def __init__(self, place: Path, kinds: Sequence[str], *, deadline_s: float = 1.0, **training) -> None:
        plan = plan_of(**{**TRAINING, "nodes": 2 + len(kinds), **training})
        self.institutions = Institutions(plan, place, deadline_floor_s=deadline_s, linger_s=2.0)
        self.victim, self.honest, *attackers = plan.names
        self._attackers = dict(zip(kinds, attackers, strict=True))

    def __enter__(self) -> Self:
        # a process inherits the cores of the one that starts it
        os.sched_setaffinity(0, {CORES[1]})
        command = [sys.executable, flooding_member.__file__, str(self.institutions.place), self.victim]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(0, {CORES[0]})
        self.institutions.start(self.victim, self.honest)
        os.sched_setaffinity(0, set(CORES))
        return self

    def __exit__(self, *error: object) -> None:
        os.sched_setaffinity(0, set(CORES))
        self.process.kill()
        self.process.communicate()
        self.institutions.__exit__()

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def greet(self, kind: str, seconds: float) -> None:
        """A member connects that is to attack in one way."""
        self.say(f"{self._attackers[kind]} {kind} {seconds}")
        assert self.process.stdout.readline() == "greeted\n", "\n".join(self.log()[-20:])

    def flood(self) -> None:
        """Let it go, and wait until it is over."""
        assert self.institutions.exit_code(self.victim) is None
        self.say("")
        assert int(self.process.stdout.readline()) > 0

    def num_rounds(self) -> int:
        rows = self.institutions.state(self.victim) / "run" / "nodes.jsonl"
        return rows.read_bytes().count(b"\n") if rows.exists() else 0

    def warm_up(self) -> None:
        before = self.num_rounds()
        wait_until(lambda: self.num_rounds() >= before + WARM_ROUNDS)

    def sizes(self, kind: str) -> dict[str, int]:
        """Bytes of every file under the victim's state folder, without events about members that are to attack in other ways."""
        state = self.institutions.state(self.victim)
        sizes = {str(path.relative_to(state)): path.stat().st_size for path in state.rglob("*") if path.is_file()}
        others = {name for of, name in self._attackers.items() if of != kind}
        events = (state / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return sizes | {"run/events.jsonl": sum(len(line) + 1 for line in events if others.isdisjoint(re.findall(r"node-\d+", line)))}

    def log(self) -> list[str]:
        """What the victim's log says but for its rounds."""
        lines = (self.institutions.place / self.victim / "node.log").read_text().splitlines()
        return [line for line in lines if ": round " not in line]

    def exclusions(self, kind: str) -> int:
        """How often the victim has disconnected the member that attacks in this way."""
        events = read_run(self.institutions.state(self.victim) / "run").events
        return sum(event["event"] == "excluded" and event["detail"].startswith(f"{self._attackers[kind]} ") for event in events)


@contextmanager
def attacked(place, *kinds):
    with Attacked(place, kinds) as found:
        yield found
        assert found.institutions.end(found.victim, signal.SIGTERM) == 0


@pytest.fixture(scope="module")
def attacked_in_all_ways(tmp_path_factory):
    with attacked(tmp_path_factory.mktemp("attacked"), *COMINGS_AND_GOINGS, *flooding_member.FLOODS) as found:
        yield found


@pytest.fixture
def network(request, tmp_path, kind):
    if LONG:
        with attacked(tmp_path, kind) as found:
            yield found
    else:
        yield request.getfixturevalue("attacked_in_all_ways")


def rate(network, during):
    """Rounds a second of the victim while something lasts."""
    before, began_s = network.num_rounds(), time.monotonic()
    during()
    return (network.num_rounds() - before) / (time.monotonic() - began_s)


@pytest.mark.alone
@pytest.mark.parametrize("kind", COMINGS_AND_GOINGS)
def test_a_member_that_comes_and_goes_does_not_fill_the_disk(network, kind):
    """Growth that the attacker causes above what the same rounds take without it, in a minute, or in a part of one."""
    network.greet(kind, COMING_AND_GOING_S)
    network.warm_up()
    before, rounds_before, log_before = network.sizes(kind), network.num_rounds(), network.log()
    network.flood()
    after, rounds, log = network.sizes(kind), network.num_rounds() - rounds_before, network.log()

    of_rounds = {"run/nodes.jsonl", "run/rounds.jsonl", "run/network.jsonl"}
    caused = sum(size - before.get(name, 0) for name, size in after.items() if name not in of_rounds and not name.endswith(".tmp"))
    per_round = sum(after.get(name, 0) - before.get(name, 0) for name in of_rounds) / rounds
    honest = sum(before.get(name, 0) for name in of_rounds) / rounds_before
    print(f"{kind}: {caused} bytes in {COMING_AND_GOING_S:g} s, and {per_round:.0f} a round instead of {honest:.0f}")  # noqa: T201

    assert caused * MINUTES_PER_DAY < BYTES_PER_DAY, {name: size - before.get(name, 0) for name, size in after.items()}
    assert per_round < 1.2 * honest
    assert len(log) - len(log_before) < 60


@pytest.mark.alone
@pytest.mark.parametrize("kind", flooding_member.FLOODS)
def test_a_flood_by_a_member_leaves_the_others_half_of_their_rounds_at_least(network, kind):
    network.greet(kind, FLOOD_S)
    network.warm_up()
    before = rate(network, lambda: signal.sigtimedwait((), QUIET_S))
    flooded = rate(network, network.flood)
    after = rate(network, lambda: signal.sigtimedwait((), QUIET_S))
    print(f"{kind}: {flooded:.0f} rounds a second, {before:.0f} before and {after:.0f} after")  # noqa: T201

    assert flooded >= 0.5 * min(before, after), (before, flooded, after)  # the machine's speed drifts
    assert network.exclusions(kind) <= 1  # none, where the attacker's core is too slow for more than is allowed


@pytest.mark.parametrize("kinds", long_or_short([("alive",), ("wrong_digest",), ("restarts",)], [("alive", "wrong_digest", "restarts")]))
def test_flooded_nodes_end_their_run_as_without_the_flood_and_with_the_same_weights(tmp_path, kinds):
    models, codes = [], []
    for place in (tmp_path / "quiet", tmp_path / "flooded"):
        place.mkdir()
        with Attacked(place, kinds, deadline_s=3.0, rounds=500) as network:
            for kind in kinds if place.name == "flooded" else kinds[:1]:
                network.greet(kind, long_or_short(4.0, 1.0))
                if place.name == "flooded":
                    network.flood()
            names = network.victim, network.honest
            wait_until(lambda names=names, all_of=network.institutions: all(all_of.exit_code(name) is not None for name in names))
            codes.append([network.institutions.wait(name) for name in names])
            states = [network.institutions.state(name) / "run" for name in names]
            models.append(torch.stack([read_models(state)[state.parent.parent.name] for state in states]))

    assert codes[0] == codes[1]
    assert torch.equal(models[0], models[1])
