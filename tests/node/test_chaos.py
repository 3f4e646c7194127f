"""Seeded chaos in virtual time: real daemon objects are killed, paused and cut off, and nothing of it may cost the mean or the end."""

from __future__ import annotations

import pytest
from virtual_networks import quick_folder, run_script

from networks import averaging, starts
from p2pfl.faults.drawing import KINDS, Pace, draw_faults
from p2pfl.faults.script import FaultKind
from p2pfl.protocol.network_view import ViewPolicy

SMALL = [("ring", 3), ("path", 3), ("ring", 4)]
LARGE = [("ring", 8), ("path", 6), ("star", 7), ("hypercube", 8), ("ring", 5)]
PACE = Pace(begins=(1.0, 10.0), every=(0.3, 1.5), lasts=(0.5, 6.0), in_rounds=False)
DRIFT = 1e-6
FAST = 4


def runs_through(seed, topology, nodes):
    """Run one seed to its end, hold it to all that must stay true, and return its script."""
    plan = averaging({"name": topology}, nodes, dimension=2, tolerance=1e-2, seed=seed)
    neighbours = {name: plan.neighbours(name) for name in plan.names}
    script = draw_faults([*KINDS, FaultKind.CUT], seed=seed, neighbours=neighbours, pace=PACE)
    with quick_folder() as place:
        network = run_script(plan, place, script, seed=seed, view=ViewPolicy())
        network.check_checkpoints()
        moved_P = network.models().mean(0) - starts(plan).mean(0)

        assert len(network.last_rounds()) == 1, f"seed {seed}: ended after rounds {network.last_rounds()}"
        assert float(moved_P.abs().max()) < DRIFT, f"seed {seed}"
    return script


@pytest.mark.parametrize("seed", [seed if seed < FAST else pytest.param(seed, marks=pytest.mark.slow) for seed in range(12)])
def test_a_dozen_seeds_end_at_one_agreed_round_with_the_mean_where_it_was(seed):
    topology, nodes = SMALL[seed % len(SMALL)]

    assert runs_through(seed, topology, nodes).faults


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_hundred_seeds_end_at_one_agreed_round_with_the_mean_where_it_was(part):
    for seed in range(1000 + part, 1200, 20):
        topology, nodes = LARGE[seed % len(LARGE)]
        runs_through(seed, topology, nodes)
