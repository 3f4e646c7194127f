"""Scripts of faults: what they say of a round or of a moment."""

from __future__ import annotations

import pytest

from p2pfl.errors import ConfigError
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.simulator import simulate

AVERAGING = {"task": {"name": "averaging", "dimension": 3}, "nodes": 4, "rounds": 3, "baselines": [], "stop": None}


def test_seconds_and_rounds_are_told_apart():
    kill = Fault(kind=FaultKind.KILL, nodes=("a",), from_s=10, until_s=20)
    script = FaultScript((kill, Fault(kind=FaultKind.PAUSE, nodes=("b",), rounds=frozenset({2, 3}))))

    assert [script.is_killed("a", 0, elapsed_s) for elapsed_s in (9.9, 10, 19.9, 20)] == [False, True, True, False]
    assert [script.is_paused("b", number, 1e6) for number in range(5)] == [False, False, True, True, False]
    assert not script.is_killed("a", 15)
    assert not script.delivers("a", "c", 0, 15)
    assert script.delivers("a", "c", 0, 25)


def test_a_cut_is_of_both_directions_and_a_loss_of_one():
    script = FaultScript.in_rounds(cut={("a", "b"): {1}}, lost={("b", "c"): {1}})
    edges = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]

    assert [script.is_cut(*edge, 1) for edge in edges] == [True, True, True, False]
    assert not any(script.is_cut(*edge, 2) for edge in edges)


def test_the_simulator_names_what_it_cannot_do(tmp_path):
    script = FaultScript(
        (
            Fault(kind=FaultKind.KILL, nodes=("node-1",), rounds=frozenset({1})),
            Fault(kind=FaultKind.CUT, nodes=("node-0", "nobody"), rounds=frozenset({1})),
            Fault(kind=FaultKind.PAUSE, nodes=("node-2",), from_s=3),
        )
    )

    with pytest.raises(ConfigError) as refused:
        simulate(AVERAGING, faults=script, out=tmp_path / "run")

    assert list(refused.value.findings) == [
        "faults: kill of node-1: cannot be done here; possible: pause, cut, loss",
        "faults: cut of node-0 - nobody: no node nobody; known: node-0, node-1, node-2, node-3",
        "faults: pause of node-2: seconds are not counted here; give rounds",
    ]
