"""Nodes that get no packet for many deadlines, in virtual time: they go on by themselves, and the mean is the true one at the end."""

from __future__ import annotations

import itertools
import random

import pytest
from virtual_networks import TIMEOUTS, quick_folder, run_script

from networks import averaging, starts
from p2pfl.faults.script import Fault, FaultKind, FaultScript
from p2pfl.protocol.network_view import ViewPolicy

NODES = 8
DEADLINES = 15
FROM_S = 3.0
UNTIL_S = FROM_S + DEADLINES * TIMEOUTS.deadline_floor_s
AWAY = 1e-6

HALVES = [half for half in itertools.combinations(range(NODES), NODES // 2) if 0 in half]
_draw = random.Random(16)
SUBSETS = [tuple(sorted(_draw.sample(range(NODES), _draw.randint(2, NODES - 1)))) for _ in range(20)]


def heals(without, *, whole, topology="ring", nodes=NODES):
    """Cut some nodes from every packet, or a whole side from the others, and hold what comes after the end of it to the true mean."""
    plan = averaging({"name": topology}, nodes, dimension=2, tolerance=2e-7)
    names = [plan.names[place] for place in without]
    if whole:
        faults = [Fault(kind=FaultKind.PARTITION, nodes=tuple(names), from_s=FROM_S, until_s=UNTIL_S)]
    else:
        edges = {frozenset((name, other)) for name in names for other in plan.neighbours(name)}
        ends = [(kept[0], kept[1]) for kept in map(sorted, edges)]
        lost = [direction for a, b in ends for direction in ((a, b), (b, a))]
        faults = [Fault(kind=FaultKind.LOSS, nodes=nodes, from_s=FROM_S, until_s=UNTIL_S) for nodes in lost]
    with quick_folder() as place:
        network = run_script(plan, place, FaultScript(tuple(faults)), seed=len(without), view=ViewPolicy(), work_s=(0.2, 0.5))
        network.check_checkpoints()
        away = float((network.models() - starts(plan).mean(0)).abs().max())

        assert network.end_s > UNTIL_S
        assert set(network.reasons.values()) == {"converged"}
        assert len(network.last_rounds()) == 1
        assert away < AWAY


def test_a_node_of_three_without_any_packet_goes_on_by_itself_once_they_come():
    heals((1,), whole=False, nodes=3)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(NODES))
def test_a_node_without_any_packet_goes_on_by_itself_once_they_come(place):
    heals((place,), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("half", range(len(HALVES)))
def test_two_halves_without_a_packet_between_them_meet_at_the_true_mean(half):
    heals(HALVES[half], whole=True, topology="hypercube")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SUBSETS)))
def test_any_nodes_without_any_packet_go_on_by_themselves_once_they_come(number):
    heals(SUBSETS[number], whole=False)
