"""Files of faults: places that repeat themselves in larger networks, and what is wrong with a file, all of it at once."""

from __future__ import annotations

import pytest

from p2pfl.errors import ConfigError
from p2pfl.faults.drawing import KINDS, Pace, draw_faults, kinds_of
from p2pfl.faults.plan_file import FaultPlan
from p2pfl.faults.script import Fault, FaultKind

PACE = Pace(begins=(2, 40), every=(1, 3), lasts=(1, 4))


def ring(nodes):
    names = [f"node-{place:04d}" for place in range(nodes)]
    return {name: sorted((names[place - 1], names[(place + 1) % nodes])) for place, name in enumerate(names)}


def plan_in(tmp_path, text):
    path = tmp_path / "faults.yaml"
    path.write_text(text, encoding="utf-8")
    return FaultPlan.load(path)


@pytest.mark.parametrize("in_rounds", [True, False])
def test_a_drawn_script_comes_back_from_its_file(tmp_path, in_rounds):
    pace = Pace(begins=PACE.begins, every=PACE.every, lasts=PACE.lasts, in_rounds=in_rounds)
    script = draw_faults([*KINDS, FaultKind.CUT, FaultKind.SLOW], seed=7, neighbours=ring(8), pace=pace)

    assert {fault.kind for fault in script.faults} > {FaultKind.KILL, FaultKind.PARTITION}
    assert plan_in(tmp_path, FaultPlan.of(script, ring(8)).text).script(ring(8)) == script


def test_a_script_for_eight_nodes_disturbs_a_thousand_as_much():
    script = draw_faults(KINDS, seed=7, neighbours=ring(8), pace=PACE)
    large = FaultPlan.of(script, ring(8)).script(ring(1000))
    single = [fault for fault in script.faults if fault.kind is not FaultKind.PARTITION]
    places = {int(name[5:]) for fault in large.faults if fault.kind is FaultKind.KILL for name in fault.nodes}

    assert len(large.faults) == len(script.faults) + 124 * len(single)
    assert {place % 8 for place in places} == {int(f.nodes[0][5:]) for f in script.faults if f.kind is FaultKind.KILL}


def test_the_same_seed_draws_the_same_faults_and_another_one_others():
    drawn = [draw_faults(KINDS, seed=seed, neighbours=ring(8), pace=PACE) for seed in (7, 7, 8)]

    assert drawn[0] == drawn[1] != drawn[2]


def test_at_most_half_of_the_nodes_are_away_and_none_is_twice():
    for seed in range(20):
        script = draw_faults([FaultKind.KILL, FaultKind.PAUSE], seed=seed, neighbours=ring(6), pace=PACE)
        for number in range(50):
            away = [fault.nodes[0] for fault in script.faults if fault.holds(number)]

            assert len(set(away)) == len(away) <= 3


def test_names_and_places_stand_for_nodes_and_edges(tmp_path):
    text = """
faults:
  - {kind: kill, node: node-0002, rounds: [3, 4]}
  - {kind: cut, edge: [node-0000, node-0001], from_s: 2, until_s: 3.5}
  - {kind: loss, edge: [1, 0], rounds: [5, 5], probability: 0.5}
  - {kind: partition, nodes: [0, node-0001], rounds: [6, 7]}
"""
    assert plan_in(tmp_path, text).script(ring(4)).faults == (
        Fault(kind=FaultKind.KILL, nodes=("node-0002",), rounds=frozenset({3, 4})),
        Fault(kind=FaultKind.CUT, nodes=("node-0000", "node-0001"), from_s=2, until_s=3.5),
        Fault(kind=FaultKind.LOSS, nodes=("node-0001", "node-0000"), rounds=frozenset({5}), probability=0.5),
        Fault(kind=FaultKind.PARTITION, nodes=("node-0000", "node-0001"), rounds=frozenset({6, 7})),
    )


def test_a_file_says_all_that_is_wrong_with_it(tmp_path):
    text = """
faults:
  - {kind: kill, edge: [0, 1], rounds: [3, 4]}
  - {kind: cut, edge: [0, 1]}
  - {kind: pause, node: 0, rounds: [4, 3]}
  - {kind: pause, node: 0, from_s: 4, until_s: 4}
  - {kind: throttle, edge: [0, 1], rounds: [4, 4]}
  - {kind: clock, node: 0, rounds: [4, 4], offset_s: 60, factor: 2}
"""
    with pytest.raises(ConfigError) as refused:
        plan_in(tmp_path, text)

    assert list(refused.value.findings) == [
        "faults.0: kill: expected node, got edge",
        "faults.1: cut: expected rounds, or from_s and until_s; not both",
        "faults.2: pause: rounds = [4, 3]: expected the first and the last",
        "faults.3: pause: until_s = 4: expected more than from_s",
        "faults.4: throttle: bytes_per_s is required, but missing",
        "faults.5: clock: factor means nothing here",
    ]


def test_a_file_names_nodes_and_edges_that_the_run_does_not_have(tmp_path):
    text = """
faults:
  - {kind: kill, node: basel, rounds: [3, 4]}
  - {kind: kill, node: 4, rounds: [3, 4]}
  - {kind: cut, edge: [node-0000, node-0002], rounds: [3, 4]}
  - {kind: cut, edge: [node-0000, 1], rounds: [3, 4]}
  - {kind: partition, nodes: [0, 1, 2, 3], rounds: [3, 4]}
"""
    with pytest.raises(ConfigError) as refused:
        plan_in(tmp_path, text).script(ring(4))

    assert list(refused.value.findings) == [
        "faults.0: kill: no node basel; known: node-0000, node-0001, node-0002, node-0003",
        "faults.1: kill: place 4: this run has 4 nodes; places begin at 0",
        "faults.2: cut: node-0000 has no neighbour node-0002, only node-0001, node-0003",
        "faults.3: cut: edge = [node-0000, 1]: expected two names, or a place and the number of a neighbour",
        "faults.4: partition: all nodes are on one side",
    ]


def test_a_list_of_kinds_is_read_and_strange_ones_are_named():
    assert kinds_of("kill, dns,kill") == (FaultKind.KILL, FaultKind.DNS)
    with pytest.raises(ConfigError, match="'earthquake': no kind of fault; known: pause, kill"):
        kinds_of("kill,earthquake")
    with pytest.raises(ConfigError, match="no kind of fault; known"):
        kinds_of(",")
