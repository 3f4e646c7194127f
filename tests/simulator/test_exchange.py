"""Messages that are lost, links that are cut, nodes that stand still, by script: the mean does not drift.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithms import ALGORITHMS, DPSGD
from p2pfl.simulator import FaultScript
from simulations import LOGISTIC, drift, plan_of, run_of, stacked, starting_at, starts_of

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer


@dataclass(frozen=True)
class Twice(DPSGD):
    """Two exchanges a round."""

    phases = 2


def test_faults_say_what_arrives():
    faults = FaultScript.in_rounds(paused={"a": frozenset({1})}, cut={("b", "c"): frozenset({2})}, lost={("b", "d"): frozenset({3})})

    assert [faults.is_paused("a", r) for r in range(3)] == [False, True, False]
    assert not any(faults.delivers(*edge, 1) for edge in (("a", "b"), ("b", "a")))
    assert not any(faults.delivers(*edge, 2) for edge in (("b", "c"), ("c", "b")))
    assert [faults.delivers(*edge, 3) for edge in (("b", "d"), ("d", "b"))] == [False, True]
    assert all(faults.delivers(*edge, 0) for edge in itertools.permutations("abcd", 2))


def script(names, edges, rng, rounds, share):
    """Every kind of fault, each with the given chance in each round."""

    def chosen():
        return frozenset(np.flatnonzero(rng.random(rounds) < share).tolist())

    return FaultScript.in_rounds(
        paused={name: frozenset(r for r in chosen() if rng.random() < 0.3) for name in names},
        cut={edge: chosen() for edge in edges},
        lost={edge: chosen() for edge in itertools.chain(edges, [edge[::-1] for edge in edges])},
    )


@given(seed=st.integers(0, 2**32 - 1), topology=st.sampled_from(["ring", "star", "complete", "erdos-renyi"]), share=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_whatever_is_lost_the_mean_stands_still(seed, topology, share):
    rng = np.random.default_rng(seed)
    rounds = int(rng.integers(1, 12))
    task = {"name": "averaging", "dimension": 3}
    plan = plan_of({"task": task, "nodes": 6, "topology": {"name": topology}, "rounds": rounds, "seed": seed})
    edges = [(plan.names[i], plan.names[j]) for i, j in zip(plan.topology.senders, plan.topology.receivers, strict=True) if i < j]
    with tempfile.TemporaryDirectory() as place:
        run = run_of(plan, Path(place) / "run", script(plan.names, edges, rng, rounds, share))
        after = stacked(run.models)

    # some hundred flows of the size of the start's disagreement, each rounded in float64
    assert drift(starts_of(plan), after) < 1e-13


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.02, 0.4))
@settings(max_examples=15, deadline=None)
def test_the_mean_stands_still_where_losses_keep_nodes_from_stopping_together(seed, share):
    rng = np.random.default_rng(seed)
    stop = {"relative_consensus": 0.9, "patience": 1, "settle": 60}
    plan = plan_of({"task": {"name": "averaging", "dimension": 3}, "nodes": 5, "rounds": 0, "stop": stop, "seed": seed})
    plan = starting_at(plan, starts_of(plan) + 5)
    edges = [(plan.names[i], plan.names[j]) for i, j in zip(plan.topology.senders, plan.topology.receivers, strict=True) if i < j]
    with tempfile.TemporaryDirectory() as place:
        run = run_of(plan, Path(place) / "run", script(plan.names, edges, rng, 30, share))
        after = stacked(run.models)

    assert drift(starts_of(plan), after) < 1e-13


def test_a_node_that_has_stopped_neither_gives_nor_takes_and_its_news_stops_the_others(tmp_path):
    """Three in a path that agree at once; the news of the stop is kept from the last node for ten rounds."""
    stop = {"relative_consensus": 0.9, "patience": 1, "settle": 60}
    plan = plan_of({"task": {"name": "averaging", "dimension": 2}, "nodes": 3, "topology": {"name": "path"}, "rounds": 0, "stop": stop})
    plan = starting_at(plan, starts_of(plan) + 100)
    a, b, c = plan.names
    # h reaches patience + diameter = 3 in round 2: all would stop after round 6; b is deaf to nothing, c hears nothing from round 2 to 12
    run = run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost={(b, c): frozenset(range(2, 13))}))
    stops = {name: [row["stop_round"] for row in run.node_records if row["node"] == name] for name in plan.names}

    assert stops[a][-1] == stops[b][-1] == stops[c][-1] == 6
    assert stops[c].index(6) == 13
    assert run.summary["rounds"] == 14
    assert run.summary["stop_reason"] == "converged"
    skipped = {row["round"]: row["skipped"] for row in run.node_records if row["node"] == c}
    assert skipped[1] == []
    assert skipped[13] == [b]
    assert drift(starts_of(plan), stacked(run.models)) < 1e-13


def two_nodes(**overrides):
    """At 0 and 8, with weight 1/2 between them."""
    plan = plan_of({"task": {"name": "averaging", "dimension": 1}, "nodes": 2, "topology": {"name": "path"}}, **overrides)
    return starting_at(plan, torch.tensor([[0.0], [8.0]], dtype=torch.float64))


def test_one_message_lost_once_is_taken_back_in_the_next_round(tmp_path):
    plan = two_nodes(rounds=2, save_models_every=1)
    a, b = plan.names
    run = run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost={(a, b): frozenset({0})}))

    # weight 1/2: a takes 4 and b nothing; then a takes 1/2 (8 - 4) and gives back the 4, b takes 1/2 (4 - 8)
    assert stacked(run.models_after(0)).flatten().tolist() == [4.0, 8.0]
    assert stacked(run.models_after(1)).flatten().tolist() == [2.0, 6.0]
    assert [row["skipped"] for row in run.records] == [1, 0]


def test_a_loss_in_the_last_round_is_settled_at_the_end(tmp_path):
    plan = two_nodes(rounds=1)
    a, b = plan.names

    assert stacked(run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost={(a, b): frozenset({0})})).models).flatten().tolist() == [
        0.0,
        8.0,
    ]


def test_a_node_that_stands_still_neither_trains_nor_mixes(tmp_path):
    plan = plan_of(LOGISTIC, rounds=3, save_models_every=1)
    name = plan.names[2]
    run = run_of(plan, tmp_path / "run", FaultScript.in_rounds(paused={name: frozenset({1})}))

    assert torch.equal(run.models_after(0)[name], run.models_after(1)[name])
    assert not torch.equal(run.models_after(1)[name], run.models_after(2)[name])
    rows = [row for row in run.node_records if row["node"] == name]
    assert [row["loss"] is None for row in rows] == [False, True, False]
    assert [len(row["skipped"]) for row in rows] == [0, 2, 0]
    assert [row["skipped"] for row in run.records] == [0, 4, 0]


def test_two_exchanges_a_round_settle_what_was_lost(tmp_path, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "twice", Twice)
    plan = plan_of({"task": {"name": "averaging"}, "nodes": 5, "rounds": 8, "algorithm": {"name": "twice"}})
    lost = {(plan.names[0], plan.names[1]): frozenset({0, 3, 7})}

    assert drift(starts_of(plan), stacked(run_of(plan, tmp_path / "run", FaultScript.in_rounds(lost=lost)).models)) < 1e-13
