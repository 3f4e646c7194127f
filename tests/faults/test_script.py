"""Scripts of faults: what they say of a round or of a moment, and how a user writes them."""

from __future__ import annotations

import pytest

from p2pfl.errors import ConfigError
from p2pfl.faults.loading import script_from
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.simulator import simulate

AVERAGING = {"task": {"name": "averaging", "dimension": 3}, "nodes": 4, "rounds": 3, "baselines": [], "stop": None}


def test_a_list_of_a_users_file_is_a_script():
    script = script_from(
        [
            {"pause": "a", "rounds": [3, "7-9"]},
            {"cut": ["a", "b"], "seconds": [10, 20.5]},
            {"loss": ["b", "c"], "rounds": 4},
            {"slow": "c", "factor": 3, "seconds": 5},
            {"kill": "b", "seconds": [30, 40]},
        ]
    )

    assert script == FaultScript(
        (
            Fault(kind=FaultKind.PAUSE, nodes=("a",), rounds=frozenset({3, 7, 8, 9})),
            Fault(kind=FaultKind.CUT, nodes=("a", "b"), from_s=10, until_s=20.5),
            Fault(kind=FaultKind.LOSS, nodes=("b", "c"), rounds=frozenset({4})),
            Fault(kind=FaultKind.SLOW, nodes=("c",), from_s=5, factor=3),
            Fault(kind=FaultKind.KILL, nodes=("b",), from_s=30, until_s=40),
        )
    )


def test_seconds_and_rounds_are_told_apart():
    script = script_from([{"kill": "a", "seconds": [10, 20]}, {"pause": "b", "rounds": "2-3"}, {"slow": "a", "factor": 2.5, "seconds": 5}])

    assert [script.is_killed("a", 0, elapsed_s) for elapsed_s in (9.9, 10, 19.9, 20)] == [False, True, True, False]
    assert [script.is_paused("b", number, 1e6) for number in range(5)] == [False, False, True, True, False]
    assert [script.slowness("a", 0, elapsed_s) for elapsed_s in (0, 5, 1e9)] == [1, 2.5, 2.5]
    assert not script.is_killed("a", 15)
    assert not script.delivers("a", "c", 0, 15)
    assert script.delivers("a", "c", 0, 25)


def test_a_cut_is_of_both_directions_and_a_loss_of_one():
    script = script_from([{"cut": ["a", "b"], "rounds": 1}, {"loss": ["b", "c"], "rounds": 1}])
    edges = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]

    assert [script.is_cut(*edge, 1) for edge in edges] == [True, True, True, False]
    assert not any(script.is_cut(*edge, 2) for edge in edges)


@pytest.mark.parametrize(
    ("entry", "finding"),
    [
        ("pause", "faults[0] = 'pause': expected one of pause, kill, slow, cut, loss"),
        ({"rounds": 3}, "expected one of pause, kill, slow, cut, loss"),
        ({"pause": "a", "kill": "b", "rounds": 3}, "expected one of pause"),
        ({"pause": ["a", "b"], "rounds": 3}, "faults[0].pause = ['a', 'b']: expected the name of one node"),
        ({"cut": "a", "rounds": 3}, "faults[0].cut = 'a': expected two nodes, [a, b]"),
        ({"cut": ["a", "a"], "rounds": 3}, "expected two nodes"),
        ({"pause": 3, "rounds": 3}, "faults[0].pause = 3: expected the name of one node"),
        ({"pause": "a"}, "faults[0].pause: say when, by either rounds or seconds"),
        ({"pause": "a", "rounds": 1, "seconds": 1}, "say when"),
        ({"pause": "a", "rounds": [1], "factor": 2}, "faults[0].factor: unknown key; pause has rounds, seconds"),
        ({"pause": "a", "rounds": -1}, "faults[0].rounds = -1: expected numbers from 0, or first-last, such as [3, 7-9]"),
        ({"pause": "a", "rounds": "9-7"}, "faults[0].rounds = '9-7'"),
        ({"pause": "a", "rounds": True}, "faults[0].rounds = True"),
        ({"pause": "a", "rounds": "0-99999999999"}, "faults[0].rounds"),
        ({"pause": "a", "seconds": [20, 10]}, "faults[0].seconds = [20, 10]: expected [from, until] with 0 <= from < until"),
        ({"pause": "a", "seconds": [1, 2, 3]}, "faults[0].seconds"),
        ({"pause": "a", "seconds": float("nan")}, "faults[0].seconds"),
        ({"slow": "a", "rounds": 1}, "faults[0].factor = 1.0: expected more than 1"),
        ({"slow": "a", "rounds": 1, "factor": 0.5}, "faults[0].factor = 0.5: expected more than 1"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(entry, finding):
    with pytest.raises(ConfigError) as refused:
        script_from([entry])

    assert finding in str(refused.value)


def test_all_wrong_entries_are_told_at_once():
    with pytest.raises(ConfigError) as refused:
        script_from([{"pause": "a"}, {"cut": ["a", "b"], "rounds": 1}, {"kill": "a"}])

    assert [finding.split(":")[0] for finding in refused.value.findings] == ["faults[0].pause", "faults[2].kill"]


def test_the_simulator_names_what_it_cannot_do(tmp_path):
    script = script_from([{"kill": "node-1", "rounds": 1}, {"cut": ["node-0", "nobody"], "rounds": 1}, {"pause": "node-2", "seconds": 3}])

    with pytest.raises(ConfigError) as refused:
        simulate(AVERAGING, faults=script, out=tmp_path / "run")

    assert list(refused.value.findings) == [
        "faults: kill of node-1: cannot be done here; possible: pause, cut, loss",
        "faults: cut of node-0 - nobody: no node nobody; known: node-0, node-1, node-2, node-3",
        "faults: pause of node-2: seconds are not counted here; give rounds",
    ]


def test_a_script_of_a_users_file_does_what_one_by_rounds_does(tmp_path):
    written = script_from([{"pause": "node-1", "rounds": [0, 2]}, {"loss": ["node-0", "node-1"], "rounds": 1}])
    by_rounds = FaultScript.in_rounds(paused={"node-1": {0, 2}}, lost={("node-0", "node-1"): {1}})
    rows = [
        [{**row, "seconds": None} for row in simulate(AVERAGING, faults=script, out=tmp_path / place).node_records]
        for script, place in ((written, "written"), (by_rounds, "by rounds"))
    ]

    assert rows[0] == rows[1]
