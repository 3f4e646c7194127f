"""Seconds beside rounds: on the clock of a simulated network, by hand where a hand can follow, and in closed form.

Shapes: N nodes, E directed edges, P parameters.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from p2pfl.errors import ConfigError
from p2pfl.experiment.spec import ChurnSpec, ClockSpec
from p2pfl.faults.script import Fault, FaultKind
from p2pfl.protocol.deadlines import WINDOW, RoundDurations
from p2pfl.simulator import FaultScript, simulate
from p2pfl.simulator.events.clock import RoundClock, RoundPaces
from p2pfl.simulator.events.delays import Delays
from p2pfl.topology import Schedule, Topology, make_schedule, weighted
from p2pfl.yaml_files import dump_yaml
from simulations import LOGISTIC, distance, drift, plan_of, run_of, stacked, starting_at, starts_of

LEARNING = {**LOGISTIC, "rounds": 12, "stop": None, "baselines": []}
TROUBLED = {
    "round_s": 1.0,
    "speeds": {"node-1": 0.5},
    "latency_ms": 20,
    "loss": 0.1,
    "stragglers": {"share": 0.1, "factor": 30},
    "churn": {"share": 0.05, "rounds": 3},
    "deadline_floor_s": 5,
    "deadline_factor": 2,
}


class Scripted(Delays):
    """Training takes what the test says, and so it is with who is away and what is lost."""

    def __init__(self, graph, *, slow=None, lost=(), away=(), **spec):
        names = tuple(f"node-{i}" for i in range(graph.num_nodes))
        super().__init__(ClockSpec(**spec), graph, names, seed=0)
        self._slow, self._lost, self._away = slow or {}, set(lost), set(away)

    def training(self, round):
        seconds_N = super().training(round)
        return np.array([self._slow.get((row, round), seconds_N[row]) for row in range(len(seconds_N))])

    def lost(self, exchange, senders, receivers):
        return np.array([(int(j), int(i), exchange) in self._lost for j, i in zip(senders, receivers, strict=True)], dtype=np.bool_)

    def leaving(self, round):
        return np.array([(row, round) in self._away for row in range(len(self._rows_N))])


def graph_of(num_nodes, edges, **values):
    """Edges as (i, j), values in their order."""
    ends = np.array(edges).T
    return weighted(Topology.from_edges("test", num_nodes, ends[0], ends[1], **values), "metropolis")


def clock_of(graph, *, phases=1, size_bytes=1000, **script):
    return RoundClock(
        Schedule.static(graph),
        Scripted(graph, **script),
        bytes_of=lambda _: size_bytes,
        phases=phases,
        trains_N=np.ones(graph.num_nodes, dtype=np.bool_),
    )


def rounds_of(clock, count, *, local_steps=5):
    everybody_N = np.ones(len(clock.ready_N), dtype=np.bool_)
    return [clock.round(number, local_steps=local_steps, running_N=everybody_N) for number in range(count)]


def ended(times):
    return [time.ended_N.tolist() for time in times]


PATH = [(0, 1), (1, 2)]
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


# ---- what a round lasts


def test_a_ring_with_one_slow_edge():
    clock = clock_of(graph_of(4, RING, latency_ms=[125, 500, 125, 125]))

    # the ends of the slow edge hear each other half a second after a second of training; the two others are held up by them a round later
    assert ended(rounds_of(clock, 3)) == [[1.125, 1.5, 1.5, 1.125], [2.625, 3.0, 3.0, 2.625], [4.125, 4.5, 4.5, 4.125]]


def test_slowness_spreads_by_one_edge_a_round():
    clock = clock_of(graph_of(4, [(0, 1), (1, 2), (2, 3)]), speeds={"node-0": 0.5})

    assert ended(rounds_of(clock, 4)) == [[2, 2, 1, 1], [4, 4, 3, 2], [6, 6, 5, 4], [8, 8, 7, 6]]


def test_bytes_take_time_over_a_bandwidth():
    clock = clock_of(graph_of(2, [(0, 1)], latency_ms=[250], bandwidth_mbps=[0.016]), size_bytes=1000)  # 2,000 bytes a second

    assert ended(rounds_of(clock, 2)) == [[1.75, 1.75], [3.5, 3.5]]


def test_messages_leave_an_uplink_one_after_another():
    star = graph_of(4, [(0, 1), (0, 2), (0, 3)])
    clock = clock_of(star, size_bytes=1000, uplink_mbps=0.016)

    # the hub's three messages leave after 1/2, 1 and 3/2 seconds, everybody else's only one after 1/2
    assert ended(rounds_of(clock, 1)) == [[1.5, 1.5, 2.0, 2.5]]


def test_edges_without_figures_have_the_experiments():
    clock = clock_of(graph_of(2, [(0, 1)]), latency_ms=250, bandwidth_mbps=0.016)

    assert ended(rounds_of(clock, 1)) == [[1.75, 1.75]]


def test_each_exchange_of_a_round_has_its_messages():
    clock = clock_of(graph_of(4, RING, latency_ms=[125, 500, 125, 125]), phases=2)

    assert ended(rounds_of(clock, 1)) == [[1.625, 2.0, 2.0, 1.625]]


def test_rounds_without_training_take_what_messages_take():
    clock = clock_of(graph_of(2, [(0, 1)], latency_ms=[250]))

    assert ended(rounds_of(clock, 2, local_steps=0)) == [[0.25, 0.25], [0.5, 0.5]]


@pytest.mark.parametrize("seed", range(5))
def test_in_the_long_run_a_round_takes_the_mean_of_the_slowest_cycle(seed):
    chance = np.random.default_rng(seed)
    pairs = [pair for pair in itertools.combinations(range(7), 2) if pair[1] == pair[0] + 1 or chance.random() < 0.3]
    latency_ms, speeds = chance.integers(50, 900, len(pairs)), chance.uniform(0.4, 2.0, 7)
    clock = clock_of(graph_of(7, pairs, latency_ms=latency_ms), speeds={f"node-{i}": speed for i, speed in enumerate(speeds)})
    times = rounds_of(clock, 400)

    # an eigenvalue in the max-plus algebra; latencies are the same both ways, so no longer cycle is slower than an edge there and back
    trains_s = 1 / speeds
    there_and_back = [(trains_s[i] + trains_s[j]) / 2 + ms / 1e3 for (i, j), ms in zip(pairs, latency_ms, strict=True)]
    # after the transient the same repeats after one or two rounds, whichever cycle is the slowest
    assert (times[399].ended_N - times[397].ended_N) / 2 == pytest.approx(max(*trains_s, *there_and_back), rel=1e-12)


def test_links_that_go_one_way_have_cycles_longer_than_two():
    ring = Topology.from_edges("one way", 3, [0, 1, 2], [1, 2, 0], directed=True, latency_ms=[100, 200, 600])
    times = rounds_of(clock_of(weighted(ring, "push-sum")), 31)

    # (3 * 1 + 0.9) / 3
    assert (times[30].ended_N - times[27].ended_N) / 3 == pytest.approx(np.full(3, 1.3), rel=1e-12)


def test_graphs_that_change_have_only_their_rounds_edges():
    schedule = make_schedule("one-peer-hypercube", 4)
    clock = RoundClock(
        schedule,
        Scripted(schedule.union(), speeds={"node-0": 0.25}),
        bytes_of=lambda _: 1000,
        phases=1,
        trains_N=np.ones(4, dtype=np.bool_),
    )

    # 0 and 1 meet, and 2 and 3; then 0 and 2, and 1 and 3
    assert ended(rounds_of(clock, 2)) == [[4, 4, 1, 1], [8, 5, 8, 5]]


def test_the_base_of_a_schedule_says_what_its_links_are_like(tmp_path):
    names = [f"node-{i}" for i in range(4)]
    edges = [{"between": [names[i], names[j]], "latency_ms": ms} for (i, j), ms in zip(RING, [125, 500, 125, 250], strict=True)]
    (tmp_path / "ring.yaml").write_text(dump_yaml({"nodes": names, "edges": edges}), encoding="utf-8")
    topology = {"name": "matchings", "base": {"file": str(tmp_path / "ring.yaml")}}
    run = simulate({**LEARNING, "rounds": 2, "topology": topology, "clock": {}}, out=tmp_path / "run")
    seconds = {(row["round"], row["node"]): row["simulated_s"] for row in run.node_records}

    # 0 - 1 and 2 - 3; then 1 - 2 and 3 - 0
    assert [seconds[0, name] for name in names] == [1.125, 1.125, 1.125, 1.125]
    assert [seconds[1, name] for name in names] == [2.375, 2.625, 2.625, 2.375]


# ---- deadlines


def test_a_straggler_beyond_the_deadline_is_left_behind_and_joins_again():
    clock = clock_of(graph_of(3, PATH), slow={(1, 3): 10}, deadline_floor_s=2, deadline_factor=2)
    times = rounds_of(clock, 9)

    assert ended(times[:3]) == [[1] * 3, [2] * 3, [3] * 3]
    # the ends wait from 4 to 6 and then go on, alone: each round takes a second of training and two of waiting
    assert [row[0] for row in ended(times[3:6])] == [6, 9, 12]
    # at 13 the one in the middle has trained, holds its neighbours' models of round 3 and merges them; rounds 4 and 5 are over without it
    assert times[3].came[0].tolist() == [False, True, True, False]  # edges by receiver: 1 > 0, 0 > 1, 2 > 1, 1 > 2
    assert [time.active_N[1] for time in times] == [True] * 4 + [False] * 2 + [True] * 3
    assert times[3].ended_N[1] == 13
    # in round 6 it mixes what it has without training; the ends have trained from 12 to 13
    assert times[6].trains_N.tolist() == [True, False, True]
    assert ended(times[6:]) == [[13] * 3, [14] * 3, [15] * 3]
    assert times[6].is_whole


def test_a_lost_message_costs_its_receiver_the_deadline_and_no_one_waits_for_its_sender_twice():
    script = {"lost": [(1, 0, 1), (1, 0, 2)], "deadline_floor_s": 2, "deadline_factor": 2}
    times = rounds_of(clock_of(graph_of(2, [(0, 1)]), **script), 5)

    assert ended(times[:2]) == [[1, 1], [4, 2]]
    # node 0 is alone with what it does not wait for, and again has nothing until its deadline; node 1 waits for it
    assert ended(times[2:]) == [[7, 5], [8, 8], [9, 9]]


def test_who_is_heard_late_is_waited_for_again():
    # the edge 0 - 1 is fast, 0 - 2 slow; what node 2 sends in round 1 is there at 5.5, half a second after node 0's deadline
    graph = graph_of(3, [(0, 1), (0, 2)], latency_ms=[0, 1000])
    times = rounds_of(clock_of(graph, slow={(2, 1): 2.5}, deadline_floor_s=1.5, deadline_factor=1), 3)

    assert ended(times[:2]) == [[2, 1, 2], [5, 3, 4.5]]
    assert times[1].came[0].tolist() == [True, False, True, True]  # by receiver: 1 > 0, 2 > 0, 0 > 1, 0 > 2
    # node 0 hears that while it trains from 5 to 6, and so waits for what node 2 has sent at 5.5; node 1 alone would have let it go at 6
    assert times[2].ended_N[0] == 6.5
    assert times[2].is_whole


def test_who_is_heard_two_rounds_late_is_not_waited_for():
    graph = graph_of(3, [(0, 1), (0, 2)], latency_ms=[0, 1000])
    times = rounds_of(clock_of(graph, slow={(2, 1): 5}, deadline_floor_s=3, deadline_factor=1), 4)

    # in round 1 node 0 waits from 3 to its deadline; what node 2 sends at 7 is there at 8, in round 3
    assert [time.ended_N[0] for time in times] == [2, 6, 7, 8]
    assert not any(time.came[0][1] for time in times[1:])


def test_what_has_begun_to_come_in_is_waited_for():
    """Three chunks at 1 MiB a second, with a deadline after two of them."""
    mbps = 2**20 * 8 / 1e6
    graph = graph_of(2, [(0, 1)], bandwidth_mbps=[mbps])
    times = rounds_of(clock_of(graph, size_bytes=3 * 2**20, deadline_floor_s=2, deadline_factor=1), 1)

    assert ended(times) == [[4, 4]]
    assert times[0].is_whole


def test_paces_are_those_of_the_daemons():
    chance = np.random.default_rng(3)
    paces = RoundPaces(4, factor=2.5, floor_s=1.0)
    single = [RoundDurations(factor=2.5, floor_s=1.0, window=WINDOW) for _ in range(4)]
    for _ in range(60):
        assert paces.allowances_s().tolist() == [pace.allowance_s() for pace in single]
        rows = np.flatnonzero(chance.random(4) < 0.7)
        seconds = chance.exponential(2.0, len(rows))
        paces.record(rows, seconds)
        for row, second in zip(rows, seconds, strict=True):
            single[row].record(second)


# ---- who is away


def test_who_is_away_is_waited_for_once_and_comes_back_without_training():
    clock = clock_of(graph_of(3, PATH), away=[(2, 2)], churn=ChurnSpec(share=0.5, rounds=3), deadline_floor_s=2, deadline_factor=2)
    times = rounds_of(clock, 7)

    assert [time.active_N[2] for time in times] == [True, True, False, False, False, True, True]
    # node 1 waits for it from 3 to 5, then no more; node 0 waits for node 1
    assert ended(times[:2]) == [[1] * 3, [2] * 3]
    assert [row[:2] for row in ended(times[2:5])] == [[3, 5], [6, 6], [7, 7]]
    # it is back when node 1 begins round 5, at 7, and mixes when that has trained
    assert times[5].trains_N.tolist() == [True, True, False]
    assert ended(times[5:]) == [[8] * 3, [9] * 3]


def test_shares_are_those_asked_for():
    graph = weighted(Topology.from_edges("ring", 1000, np.arange(1000), (np.arange(1000) + 1) % 1000), "metropolis")
    names = tuple(f"node-{i:04}" for i in range(1000))
    spec = plan_of({**LEARNING, "clock": {"loss": 0.02, "stragglers": {"share": 0.1, "factor": 4}}}).experiment.clock
    delays = Delays(spec, graph, names, seed=5)
    lost = np.array([delays.lost(number, graph.senders, graph.receivers) for number in range(100)])
    slow = np.array([delays.factors(number) for number in range(100)])

    # 200,000 and 100,000 draws: five standard deviations
    assert lost.mean() == pytest.approx(0.02, abs=5 * (0.02 * 0.98 / 2e5) ** 0.5)
    assert (slow == 4).mean() == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / 1e5) ** 0.5)
    assert set(np.unique(slow)) == {1.0, 4.0}


def test_nodes_are_away_as_often_as_churn_says():
    graph = weighted(Topology.from_edges("ring", 1000, np.arange(1000), (np.arange(1000) + 1) % 1000), "metropolis")
    names = tuple(f"node-{i:04}" for i in range(1000))
    spec = plan_of({**LEARNING, "clock": {"churn": {"share": 0.05, "rounds": 4}, "deadline_floor_s": 0.1}}).experiment.clock
    clock = RoundClock(
        Schedule.static(graph), Delays(spec, graph, names, 1), bytes_of=lambda _: 1, phases=1, trains_N=np.ones(1000, dtype=np.bool_)
    )
    rounds_of(clock, 40)
    away = []
    for number in range(40, 80):
        clock.round(number, local_steps=1, running_N=np.ones(1000, dtype=np.bool_))
        away.append(np.mean(clock.back_N > number))

    # away for 4 rounds, there for (1 - 0.05) / 0.05 = 19 on average: 4 / 23; 1,000 nodes, about nine independent looks at each
    share = 4 / 23
    assert np.mean(away) == pytest.approx(share, abs=5 * (share * (1 - share) / 9000) ** 0.5)


# ---- runs


def test_a_clock_changes_no_weights(tmp_path):
    plain = simulate(LEARNING, out=tmp_path / "plain")
    timed = simulate(LEARNING, clock={"speeds": {"node-1": 0.1}, "latency_ms": 30}, out=tmp_path / "timed")

    assert torch.equal(stacked(plain.models), stacked(timed.models))
    assert "simulated" not in plain.summary["seconds"]
    assert timed.summary["seconds"]["simulated"] == timed.records[-1]["simulated_s"] == pytest.approx(12 * 10 + 0.03, rel=1e-12)
    assert [row["simulated_s"] for row in timed.records] == sorted(row["simulated_s"] for row in timed.records)


def test_what_the_clock_loses_is_lost_as_by_script(tmp_path):
    experiment = {**LEARNING, "rounds": 20, "nodes": 6}
    run = simulate(experiment, clock={"loss": 0.15, "deadline_floor_s": 0.05, "deadline_factor": 1}, out=tmp_path / "clock")
    lost = {}
    for row in run.node_records:
        for sender in row["skipped"]:
            lost.setdefault((sender, row["node"]), set()).add(row["round"])
    assert len(lost) > 5
    plan = plan_of(experiment)
    scripted = run_of(plan, tmp_path / "script", FaultScript.in_rounds(lost={edge: frozenset(rounds) for edge, rounds in lost.items()}))

    assert torch.equal(stacked(run.models), stacked(scripted.models))


@pytest.mark.parametrize("algorithm", ["dpsgd", "gradient-tracking", "choco"])
def test_whatever_goes_wrong_the_mean_stands_still(algorithm, tmp_path):
    plan = plan_of(
        {
            "task": {"name": "averaging", "dimension": 3},
            "nodes": 8,
            "rounds": 40,
            "algorithm": {"name": algorithm},
            "clock": TROUBLED,
            "seed": 3,
        }
    )
    plan = starting_at(plan, starts_of(plan) + 5)
    run = run_of(plan, tmp_path / "run")

    assert sum(row["skipped"] for row in run.records) > 20
    assert drift(starts_of(plan), stacked(run.models)) < 1e-12


def test_a_clock_goes_on_from_any_round():
    plan = plan_of({**LEARNING, "nodes": 8, "rounds": 40, "clock": TROUBLED})
    clock, everybody_N = RoundClock.of(plan), np.ones(8, dtype=np.bool_)
    others = []
    for number in range(40):
        others.append((number, RoundClock.of(plan)))
        others[-1][1].restore({name: array.copy() for name, array in clock.arrays().items()})
        times = clock.round(number, local_steps=5, running_N=everybody_N)
        for began, other in others[-4:]:
            again = other.round(number, local_steps=5, running_N=everybody_N)

            assert (began, again.ended_N.tolist(), again.came[0].tolist()) == (
                began,
                pytest.approx(times.ended_N.tolist(), rel=0, abs=0, nan_ok=True),
                times.came[0].tolist(),
            )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["choco", "dpsgd", "gradient-tracking"])
def test_the_same_seed_gives_the_same_seconds_also_in_two_parts(algorithm, tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.simulator.engine._CHECKPOINT_S", 0.0)
    experiment = {**LEARNING, "rounds": 30, "nodes": 6, "clock": TROUBLED, "algorithm": {"name": algorithm}}
    whole = simulate(experiment, out=tmp_path / "whole")
    other = simulate(experiment, seed=1, out=tmp_path / "other")

    class Enough(Exception):
        pass

    def stop(done, most, row):
        if done > 13:
            raise Enough

    with pytest.raises(Enough):
        simulate(experiment, out=tmp_path / "parts", progress=stop)
    parts = simulate(experiment, resume=tmp_path / "parts")

    def told(run):
        return [(row["round"], row["node"], row["loss"], row["skipped"], row["simulated_s"]) for row in run.node_records]

    assert told(parts) == told(whole) != told(other)
    assert torch.equal(stacked(parts.models), stacked(whole.models))


def test_a_network_with_losses_agrees_to_stop_on_the_mean(tmp_path):
    experiment = {
        "task": {"name": "averaging", "dimension": 3},
        "nodes": 6,
        "rounds": 0,
        "stop": {"relative_consensus": 1e-6, "settle": 400},
        "clock": {"loss": 0.01, "latency_ms": 10, "deadline_floor_s": 0.5},
    }
    run = simulate(experiment, out=tmp_path / "run")
    before_NP = plan_of(experiment).population(sorted(run.models)).estimate()

    assert run.summary["stop_reason"] == "converged"
    assert sum(row["skipped"] for row in run.records) > 0
    assert drift(before_NP, stacked(run.models)) < 1e-12
    assert distance(stacked(run.models)) < 1e-5 * distance(before_NP)


# ---- nodes at their own pace


def test_stragglers_and_losses_at_their_own_pace(tmp_path):
    pace = {"pace": {"name": "asynchronous"}, "stop": None}
    run = simulate(
        {**LEARNING, **pace}, clock={"stragglers": {"share": 0.3, "factor": 3}, "loss": 0.2, "latency_ms": 10}, out=tmp_path / "run"
    )
    seconds = {name: [row["simulated_s"] for row in run.node_records if row["node"] == name] for name in run.models}

    for times in seconds.values():
        assert set(np.diff([0.0, *times]).round(9).tolist()) == {1.0, 3.0}
    assert run.summary["seconds"]["simulated"] >= max(times[-1] for times in seconds.values())
    assert any(row["skipped"] for row in run.node_records)


# ---- refusals


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        (
            {"algorithm": {"name": "relaysgd"}, "topology": {"name": "path"}, "stop": None, "clock": {"loss": 0.1}},
            "clock.loss = 0.1: algorithm relaysgd needs every message (reliable)",
        ),
        (
            {"algorithm": {"name": "extra"}, "clock": {"loss": 0.1}},
            "clock.loss = 0.1: algorithm extra needs every message (reliable)",
        ),
        (
            {"algorithm": {"name": "ad-psgd"}, "clock": {"loss": 0.1}},
            "clock.loss = 0.1: two that meet ask until they have heard each other; take pace synchronous or asynchronous",
        ),
        (
            {"pace": {"name": "asynchronous"}, "clock": {"churn": {"share": 0.1, "rounds": 2}}},
            "clock.churn: pace asynchronous has no common rounds to be away for; take synchronous",
        ),
        (
            {"pace": {"name": "asynchronous"}, "clock": {"deadline_floor_s": 2}},
            "clock.deadline_floor_s = 2: with pace asynchronous nobody waits until a deadline; leave it out",
        ),
        (
            {"weights": "push-sum", "algorithm": {"name": "push-sum"}, "clock": {"loss": 0.1}},
            "clock.loss = 0.1: on a directed graph nobody can match what did not come; take an undirected one",
        ),
        ({"clock": {"speeds": {"node-9": 2}}}, "clock.speeds.node-9 = 2.0: no node of that name; one of node-0, node-1, node-2, node-3"),
        ({"clock": {"loss": 1}}, "clock.loss = 1: must be < 1.0"),
        ({"clock": {"stragglers": {"share": 0.1}}}, "clock.stragglers.factor: required, but missing"),
    ],
)
def test_what_does_not_go_with_a_clock_is_a_finding(raw, finding):
    with pytest.raises(ConfigError) as caught:
        plan_of({**LEARNING, **raw})

    assert list(caught.value.findings) == [finding]


def test_a_node_that_a_script_slows_holds_up_those_who_wait_for_it(tmp_path):
    slow = FaultScript((Fault(kind=FaultKind.SLOW, nodes=("node-1",), factor=4, rounds=frozenset({1, 2})),))
    run = simulate(LEARNING, rounds=5, clock={}, faults=slow, out=tmp_path / "run")
    plain = simulate(LEARNING, rounds=5, clock={}, out=tmp_path / "plain")

    assert [row["simulated_s"] for row in run.node_records if row["node"] == "node-1"] == [1, 5, 9, 10, 11]
    assert all(torch.equal(model, plain.models[name]) for name, model in run.models.items())  # everybody was waited for


def test_scripted_faults_and_a_clock_are_not_for_one_run(tmp_path):
    with pytest.raises(ConfigError, match="clock: has faults of its own"):
        simulate(LEARNING, clock={}, faults=FaultScript(), out=tmp_path / "run")
