"""Scripts of faults: what they say of a round or of a moment."""

from __future__ import annotations

import math

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


def slow(factor: float, **when) -> Fault:
    return Fault(kind=FaultKind.SLOW, nodes=("a",), factor=factor, **when)


def test_factors_of_a_slow_node_multiply_where_they_meet():
    script = FaultScript((slow(2.5, rounds=frozenset({1, 2})), slow(4, from_s=5, until_s=9)))

    assert [script.slowness("a", number) for number in range(4)] == [1, 2.5, 2.5, 1]
    assert [script.slowness("a", 1, elapsed_s) for elapsed_s in (4, 5, 9)] == [2.5, 10, 2.5]
    assert script.slowness("b", 1, 5) == 1
    assert script.delivers("a", "b", 1, 5)


@pytest.mark.parametrize(
    ("work_s", "began_s", "takes_s"),
    [
        (5, 0, 5),  # over before the fault begins
        (10, 10, 40),
        (6, 8, 2 + 4 * 4),  # it begins meanwhile
        (6, 46, 4 + 5),  # it ends meanwhile
        (20, 5, 5 + 40 + 5),  # both
        (3, 50, 3),
    ],
)
def test_training_is_longer_by_the_factor_while_the_fault_holds(work_s, began_s, takes_s):
    assert FaultScript((slow(4, from_s=10, until_s=50),)).training_s("a", 0, work_s, began_s) == takes_s


@pytest.mark.parametrize("factor", [1.0, 0.5, math.nan, math.inf])
def test_a_slow_node_whose_factor_slows_nothing_is_refused(factor):
    with pytest.raises(ConfigError) as refused:
        FaultScript((slow(factor, from_s=0), slow(1.01, from_s=0))).check(["a"])

    assert list(refused.value.findings) == [
        f"faults: slow of a: factor = {factor}: expected more than 1, how many times as long local steps take"
    ]


def test_time_is_the_clocks_without_which_nobody_is_slow(tmp_path):
    script = FaultScript((Fault(kind=FaultKind.SLOW, nodes=("node-1",), factor=4, rounds=frozenset({1})),))

    with pytest.raises(ConfigError) as refused:
        simulate(AVERAGING, faults=script, out=tmp_path / "run")

    assert list(refused.value.findings) == ["faults: slow of node-1: cannot be done here; possible: pause, kill, cut, loss, partition"]


def test_the_simulator_names_what_it_cannot_do(tmp_path):
    script = FaultScript(
        (
            Fault(kind=FaultKind.CORRUPT, nodes=("node-0", "node-1"), rounds=frozenset({1})),
            Fault(kind=FaultKind.CUT, nodes=("node-0", "nobody"), rounds=frozenset({1})),
            Fault(kind=FaultKind.PAUSE, nodes=("node-2",), from_s=3),
        )
    )

    with pytest.raises(ConfigError) as refused:
        simulate(AVERAGING, faults=script, out=tmp_path / "run")

    assert list(refused.value.findings) == [
        "faults: corrupt of node-0 - node-1: cannot be done here; possible: pause, kill, cut, loss, partition",
        "faults: cut of node-0 - nobody: no node nobody; known: node-0, node-1, node-2, node-3",
        "faults: pause of node-2: seconds are not counted here; give rounds",
    ]
