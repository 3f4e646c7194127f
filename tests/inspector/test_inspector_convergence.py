"""What the records say about agreement, with figures that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import p2pfl
from p2pfl.inspector.convergence import SlowNode, convergence, fit_rate
from p2pfl.runs.records import RunRecords, read_run

RING_8 = (1 + 2 * math.cos(2 * math.pi / 8)) / 3
GRAPH = {
    "nodes": list("abcdefgh"),
    "edges": [],
    "lambda_2": RING_8,
    "lambda_min": -1 / 3,
    "laplacian_lambda_2": 2 - math.sqrt(2),
    "diameter": 4,
}


def records(rounds, *, nodes=(), experiment=None, topology=GRAPH, summary=None):
    return RunRecords(
        experiment={"stop": {"relative_consensus": 1e-3}, "dtype": "float64", **(experiment or {})},
        environment={},
        topology=topology,
        rounds=list(rounds),
        nodes=list(nodes),
        events=[],
        summary=summary,
    )


def decay(start, count, kind="settle", first=0, key="rms_disagreement", **others):
    return [{"round": first + t, "kind": kind, key: start * RING_8**t, "rms_norm": 1.0, **others} for t in range(count)]


def test_the_fitted_rate_of_a_ring_of_8_is_the_predicted_one():
    course = convergence(records(decay(1.0, 11)))

    assert course.fitted_rate == pytest.approx(0.804737854, abs=1e-9)
    assert course.predicted_rate == pytest.approx(0.804737854, abs=1e-9)
    assert course.fitted_points == 11
    assert course.bound[10] == pytest.approx(0.11390540, abs=1e-8)


def test_training_rounds_are_neither_fitted_nor_bounded():
    training = [{"round": t, "kind": "train", "loss": 0.5, "rms_disagreement": 7.0, "rms_norm": 1.0} for t in range(4)]
    course = convergence(records(training + decay(1.0, 5, first=4)))

    assert course.first_mixing_round == 4
    assert course.bound[:4] == [None] * 4
    assert course.bound[4:] == pytest.approx([RING_8**t for t in range(5)], rel=1e-12)
    assert course.fitted_points == 5
    assert course.fitted_rate == pytest.approx(RING_8, abs=1e-12)


def test_all_rounds_count_where_there_is_nothing_to_train():
    course = convergence(records(decay(2.0, 6, kind="train", loss=None)))

    assert (course.first_mixing_round, course.fitted_points) == (0, 6)


def test_while_it_trains_there_is_no_rate_and_the_reason_is_given():
    training = [{"round": t, "kind": "train", "loss": 0.5, "rms_disagreement": 7.0, "rms_norm": 1.0} for t in range(4)]
    course = convergence(records(training))

    assert course.fitted_rate is None
    assert course.fit_missing == "no round has mixed without training yet"


def test_points_at_the_floor_of_rounding_are_not_fitted():
    above = decay(1.0, 2)
    floor = [{"round": t, "kind": "settle", "rms_disagreement": 1e-15, "rms_norm": 1.0} for t in range(2, 9)]

    course = convergence(records(above + floor))

    assert course.fitted_rate is None
    assert course.fit_missing == "2 of at least 3 mixing rounds lie above the floor of rounding"


def test_the_floor_is_that_of_the_runs_own_dtype():
    rows = decay(1e-5, 5)

    assert convergence(records(rows)).fitted_points == 5
    assert convergence(records(rows, experiment={"dtype": "float32"})).fitted_points == 0
    assert convergence(records(rows, experiment={"dtype": None})).fitted_points == 5


def test_exact_agreement_is_not_a_point_of_the_fit():
    rows = [
        {"round": 0, "kind": "settle", "rms_disagreement": 1.0},
        *({"round": t, "kind": "settle", "rms_disagreement": 0.0} for t in (1, 2, 3)),
    ]

    assert convergence(records(rows)).fitted_points == 1


def test_daemons_records_are_read_by_their_upper_bound():
    rows = decay(0.5, 4, key="bound_high", rms_disagreement=None, bound_low=0.01)
    course = convergence(records(rows))

    assert course.basis == "upper bound"
    assert course.distance == course.high
    assert course.low == [0.01] * 4
    assert course.fitted_rate == pytest.approx(RING_8, abs=1e-12)


def test_one_institutions_own_records_are_read_by_what_it_saw():
    rows = [{"round": t, "kind": "settle", "disagreement": 4.0 * RING_8 ** (2 * t)} for t in range(3)]
    course = convergence(records(rows, topology=None))

    assert course.basis == "local"
    assert course.distance[0] == 2.0
    assert course.fitted_rate == pytest.approx(RING_8, abs=1e-12)
    assert course.predicted_rate is None


def test_the_negative_end_of_the_spectrum_counts_too():
    assert convergence(records([], topology={"lambda_2": 0.2, "lambda_min": -0.6})).predicted_rate == 0.6


def test_a_run_without_rounds_has_no_course():
    course = convergence(records([]))

    assert (course.rounds, course.distance, course.slowest, course.skipped, course.relative) == ([], [], [], [], None)


def test_how_many_rounds_are_left_follows_from_rate_and_tolerance():
    course = convergence(records(decay(1.0, 11)))

    assert course.relative == pytest.approx(0.1139054, abs=1e-7)
    assert course.rounds_to_go == 22  # ln(1e-3 / 0.1139) / ln(0.8047) = 21.8


def test_a_steady_rate_leaves_no_doubt_how_many_rounds_are_left():
    course = convergence(records(decay(1.0, 11)))

    assert course.rounds_to_go_between == (22, 22)


def test_how_sure_the_forecast_is_follows_from_how_rounds_scatter():
    rows = decay(1.0, 21)
    for row in rows:
        row["rms_disagreement"] *= 1.3 if row["round"] % 2 else 0.7
    course = convergence(records(rows))
    fewest, most = course.rounds_to_go_between

    assert fewest < course.rounds_to_go < most
    assert most - fewest <= 8


def test_where_nothing_contracts_nothing_is_foreseen():
    rows = decay(1.0, 11)
    for row in rows:
        row["rms_disagreement"] = 0.5
    course = convergence(records(rows))

    assert (course.rounds_to_go, course.rounds_to_go_between, course.seconds_to_go) == (None, None, None)


def test_seconds_left_are_those_of_the_last_rounds():
    rows = decay(1.0, 11)
    for row in rows:
        row["seconds"] = {"train": 1.0 if row["round"] < 3 else 0.0, "wait": 0.5, "mix": None}
    assert convergence(records(rows)).seconds_to_go == pytest.approx(22 * 0.5)

    for row in rows:
        row["simulated_s"] = 3.0 * row["round"]
    assert convergence(records(rows)).seconds_to_go == pytest.approx(22 * 3.0)


GRAPHS = [({"name": "ring"}, 16), ({"name": "random-regular", "degree": 4}, 32), ({"name": "path"}, 10), ({"name": "star"}, 12)]


@pytest.mark.no_cover
@pytest.mark.parametrize(("topology", "nodes"), GRAPHS)
def test_the_forecast_at_half_time_of_pure_averaging_is_within_a_fifth(topology, nodes, tmp_path):
    settings = {"task": {"name": "averaging"}, "nodes": nodes, "topology": topology, "rounds": 300, "stop": {"relative_consensus": 1e-6}}
    run = read_run(p2pfl.simulate({**settings, "seed": 1}, out=tmp_path / "run").path)
    relative = [row["rms_disagreement"] / row["rms_norm"] for row in run.rounds]
    reached = next(number for number, value in enumerate(relative) if value <= settings["stop"]["relative_consensus"])
    course = convergence(replace(run, rounds=run.rounds[: reached // 2 + 1], summary=None))
    truth, (fewest, most) = reached - reached // 2, course.rounds_to_go_between

    assert course.rounds_to_go == pytest.approx(truth, rel=0.2)
    assert fewest - 1 <= truth <= most + 1


def test_a_run_that_ended_has_no_rounds_left():
    assert convergence(records(decay(1.0, 11), summary={"rounds": 11})).rounds_to_go is None


def test_the_nodes_with_the_largest_disagreement_come_first():
    nodes = [
        {"round": 1, "node": "a", "kind": "settle", "disagreement": 100.0, "norm": 1.0},
        {"round": 2, "node": "a", "kind": "settle", "disagreement": 1.0, "norm": 2.0, "agreed_for": 3},
        {"round": 2, "node": "b", "kind": "settle", "disagreement": 3.0, "norm": 2.0, "agreed_for": 0},
        {"round": 2, "node": "c", "kind": "settle", "disagreement": None},
    ]
    slowest = convergence(records([], nodes=nodes, topology={"laplacian_lambda_2": 3.0})).slowest

    assert slowest == [
        SlowNode(node="b", fraction=0.75, relative=0.5, consensus_counter=0),
        SlowNode(node="a", fraction=0.25, relative=math.sqrt(1 / 3) / 2, consensus_counter=3),
    ]


def test_skips_are_gathered_by_who_and_by_whom():
    nodes = [
        {"round": 4, "node": "a", "kind": "train", "skipped": ["c"]},
        {"round": 5, "node": "a", "kind": "train", "skipped": ["b", "c"]},
        {"round": 5, "node": "b", "kind": "train", "skipped": []},
    ]
    skipped = convergence(records([], nodes=nodes)).skipped

    assert [(skip.node, skip.by, skip.rounds) for skip in skipped] == [("c", "a", [4, 5]), ("b", "a", [5])]


def test_three_points_are_enough_and_two_are_not():
    assert fit_rate([(0, 1.0), (1, 0.5), (3, 0.125)])[0] == pytest.approx(0.5, rel=1e-12)
    assert fit_rate([(0, 1.0), (1, 0.5)])[0] is None
