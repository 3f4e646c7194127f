"""The ways in which a run that ended was not as agreed, from its events to its exit code."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace

import pytest

import p2pfl
from networks import DEADLINE_S, HASTY, PATIENT, STUDY, Network, finish, plan_of, signing_of, until
from p2pfl.node import conclusion, daemon
from p2pfl.node.clock import Timeouts
from p2pfl.protocol.network_view import NetworkViewAdapter, ViewPolicy
from p2pfl.runs.events import Departure, departure_rows, departures_in, departures_of_events, exit_code_of
from p2pfl.runs.rows import NodeRow

BRIEF = Timeouts(deadline_floor_s=0.2, deadline_factor=1.0, linger_s=0.3)


def event(node: str, kind: str, detail: str = "", number: int = 0) -> dict[str, object]:
    return {"round": number, "node": node, "event": kind, "detail": detail}


def test_ordinary_events_are_no_departures():
    ordinary = ["started", "resumed", "paused", "died", "agreed", "skipped", "returned", "link_down", "alone"]

    assert departures_of_events(event("a", kind) for kind in ordinary) == []


def test_events_of_one_kind_are_one_sentence_that_names_the_nodes():
    events = [event(f"h{number % 7}", "diverged", f"round {number}: why", number) for number in range(14)]

    assert departures_of_events(events) == [
        Departure(
            kind="non_finite",
            detail="h0, h1, h2, h3, h4 and 2 more: training became non-finite and was rolled back (14 times, first round 0: why)",
        )
    ]


def test_state_that_was_restored_after_all_is_no_departure():
    lost = event("a", "state_lost", "b: its state went back: it was after round 9, and now is after round 3")
    other = event("a", "state_lost", "c: its state went back")

    assert departures_of_events([lost, event("a", "state_restored", "b: its state is again that of after round 9")]) == []
    assert len(departures_of_events([lost, event("d", "state_restored", "b: its state is again that of after round 9")])) == 1
    assert len(departures_of_events([lost, other, event("a", "state_restored", "b: again")])) == 1


def test_what_several_nodes_say_alike_is_said_once():
    events = [event("a", "held", "without d"), event("b", "held", "without d"), event("c", "state_lost", "of b")]

    assert departures_of_events(events) == [
        Departure(kind="rounds_missed", detail="a, b: without d"),
        Departure(kind="state_lost", detail="c: of b"),
    ]


def test_a_flood_is_summed_up():
    found = departures_of_events(event("a", "state_lost", f"time {number}") for number in range(100))

    assert len(found) == 21
    assert found[-1].detail == "80 more of the kind state_lost, which events.jsonl holds"


def test_a_network_that_agreed_may_have_jumped_over_rounds_of_mixing():
    jumps = [
        event("a", "jumped", "from round 30 to round 33; all that were left out only mix", 30),
        event("a", "stopped_late", "one round", 41),
    ]

    assert departures_of_events(jumps, agreed_from=30) == []
    assert [each.kind for each in departures_of_events(jumps, agreed_from=31)] == ["rounds_missed"]
    assert len(departures_of_events(jumps)) == 2


def test_the_exit_code_is_3_exactly_where_a_departure_is_listed():
    rows = departure_rows([Departure(kind="non_finite", detail="a")] * 2)

    assert rows == [{"kind": "non_finite", "detail": "a"}]
    assert exit_code_of({"departures": rows}) == 3
    assert departures_in({"departures": rows}) == ["a"]
    assert exit_code_of({"departures": []}) == exit_code_of({}) == exit_code_of(None) == 0


def test_a_simulated_network_that_did_not_mix_is_a_departure_and_one_halving_of_gamma_is_none():
    found = departures_of_events([event("a", "gamma_halved", "round 3"), event("b", "gamma_exhausted", "round 9: hardly")], simulated=True)

    assert [each.as_row() for each in found] == [
        {"kind": "not_mixed", "detail": "b: choco has halved its gamma as often as it may, and hardly mixes (round 9: hardly)"}
    ]


def test_a_run_whose_gamma_drives_the_models_apart_is_not_as_agreed(tmp_path):
    task = {"name": "averaging", "dimension": 100}
    choco = {"name": "choco", "gamma": 1.0}
    compressor = {"name": "random-k", "share": 0.1}
    options = {"topology": {"name": "ring"}, "nodes": 8, "rounds": 60, "stop": None, "baselines": []}
    run = p2pfl.simulate({"task": task, "algorithm": choco, "compressor": compressor, **options}, out=tmp_path / "run")

    assert {row["kind"] for row in run.summary["departures"]} == {"not_mixed"}
    assert exit_code_of(run.summary) == 3
    assert "drives the models apart at the gamma that was set" in run.summary["departures"][0]["detail"]
    halved = {**choco, "gamma": "auto"}
    again = p2pfl.simulate({"task": task, "algorithm": halved, "compressor": compressor, **options}, out=tmp_path / "auto")

    assert again.summary["departures"] == []
    assert "gamma_halved" in {event["event"] for event in again.events}


# ---- members that have not ended with the others


class Ends:
    """A ring whose members' last words come to one of them, node-0, or do not."""

    def __init__(self, nodes, rounds=30):
        self.plan, self.rounds = fixed_rounds(nodes, rounds), rounds
        policy = ViewPolicy(bytes_per_s=None)
        self.adapters = {
            name: NetworkViewAdapter(self.plan, name, signing, policy, STUDY) for name, signing in signing_of(self.plan).items()
        }

    def says(self, place, number, *, without=(), closing=True):
        name = f"node-{place}"
        row = {"round": number, "kind": "train", "loss": None, "disagreement": 0.0, "norm": 1.0, "agreed_for": 0, "bytes_sent": 1}
        row |= {"node": name, "skipped": [f"node-{other}" for other in without], "seconds": {}}
        self.adapters[name].say(NodeRow.of(row), 0.0, closing=closing)
        if place:
            self.adapters["node-0"].view.hear("node-1", [self.adapters[name].view.newest[place].sealed], 0.0)

    def found(self, company=None):
        return self.adapters["node-0"].unended(self.rounds, self.plan.names if company is None else company)

    @property
    def sees_most(self):
        return self.adapters["node-0"].sees_most_end(self.plan.names)


def test_a_member_without_a_last_record_is_gone_where_its_neighbours_went_on_without_it():
    ends = Ends(4)
    ends.says(2, 0, closing=False)  # where records are rare, no later one tells when it went
    ends.says(0, 29)
    ends.says(1, 29, without=[2])
    ends.says(3, 29, without=[2])

    assert ends.found() == {"node-2": 0}
    assert ends.sees_most


def test_a_member_is_gone_of_which_nothing_came_for_longer_than_news_need():
    ends = Ends(4)
    ends.says(2, 6, closing=False)
    ends.says(0, 29)
    ends.says(1, 29)

    assert ends.found() == {"node-2": 6, "node-3": None}


def test_news_of_rare_records_need_the_step_once():
    ends = Ends(4)
    ends.adapters["node-0"].view.level = 3
    ends.says(2, 8, closing=False)
    for place in (0, 1, 3):
        ends.says(place, 29)

    assert ends.found() == {"node-2": 8}


def test_a_member_whose_last_record_was_only_not_passed_on_is_not_gone():
    ends = Ends(4)
    ends.says(2, 27, closing=False)
    for place in (0, 1, 3):
        ends.says(place, 29)

    assert ends.found() == {}


def test_a_member_that_one_neighbour_missed_is_not_gone():
    ends = Ends(4)
    ends.says(2, 27, closing=False)
    ends.says(0, 29)
    ends.says(1, 29, without=[2])
    ends.says(3, 29)

    assert ends.found() == {}


def test_a_member_that_did_not_start_is_not_gone():
    ends = Ends(4)
    ends.says(0, 29)
    ends.says(1, 29, without=[2])
    ends.says(3, 29, without=[2])

    assert ends.found(["node-0", "node-1", "node-3"]) == {}


def test_who_ends_alone_does_not_know_how_the_others_ended():
    ends = Ends(4)
    for place in (1, 2, 3):
        ends.says(place, 8, closing=False)
    ends.says(0, 29, without=[1, 3])

    assert ends.found() == {"node-1": 8, "node-2": 8, "node-3": 8}
    assert not ends.sees_most


# ---- daemons


class Watched(Network):
    """A network whose nodes also tell each other how it goes."""

    def __init__(self, plan, place, *, policy=ViewPolicy(bytes_per_s=None), **options):  # noqa: B008  # frozen
        super().__init__(plan, place, view=policy, **options)


def fixed_rounds(nodes, rounds):
    return plan_of(task={"name": "averaging", "dimension": 3}, nodes=nodes, topology={"name": "ring"}, rounds=rounds, stop=None)


@pytest.mark.slow
def test_a_neighbour_that_waits_for_a_slow_one_in_its_last_round_is_waited_for(tmp_path):
    plan = fixed_rounds(4, 2)
    brief = replace(PATIENT, linger_s=0.1)
    slow = replace(brief, round_at_least_s=2.0)

    async def run():
        async with Watched(plan, tmp_path, timeouts=brief, timeouts_of={"node-2": slow}) as network:
            network.start()
            await network.ended()
            return {name: (network.rows(name), network.summary(name)["departures"]) for name in plan.names}

    found = finish(run())

    assert not any(row["skipped"] for rows, _ in found.values() for row in rows)
    assert {name: departures for name, (_, departures) in found.items()} == {name: [] for name in plan.names}


def test_a_node_that_has_said_its_last_word_stays_until_its_neighbour_has(tmp_path, monkeypatch):
    """A link that ends takes with it what the other end has not read."""
    plan = fixed_rounds(2, 2)
    held, write_result = threading.Event(), conclusion.write_result
    monkeypatch.setattr(conclusion, "LAST_WORDS_S", DEADLINE_S)
    monkeypatch.setattr(
        conclusion, "write_result", lambda node, reason: (node.me == "node-0" or held.wait()) and write_result(node, reason)
    )

    async def run():
        async with Network(plan, tmp_path, timeouts=replace(PATIENT, linger_s=DEADLINE_S)) as network:
            network.start()
            try:
                await until(lambda: network.nodes["node-1"].daemon.protocol.neighbours["node-0"].left)
                has_gone, _ = await asyncio.wait([network.nodes["node-0"].task], timeout=0.5)
            finally:
                held.set()
            await network.ended()
            return has_gone

    assert finish(run()) == set()


def test_a_node_that_has_left_hears_the_last_word_of_one_that_leaves_after_it(tmp_path, monkeypatch):
    plan = fixed_rounds(2, 2)
    monkeypatch.setattr(conclusion, "LAST_WORDS_S", 2 * DEADLINE_S)

    async def run():
        async with Network(plan, tmp_path, timeouts=replace(PATIENT, linger_s=2 * DEADLINE_S)) as network:
            first, ended = [], asyncio.Event()

            async def part_and_tell(node, part=daemon.part):
                is_first = not first
                first.append(node.me)
                await (part(node) if is_first else ended.wait())  # the other one keeps its link

            monkeypatch.setattr(daemon, "part", part_and_tell)
            network.start()
            await until(lambda: first)
            try:
                await asyncio.wait_for(asyncio.shield(network.nodes[first[0]].task), DEADLINE_S)
            finally:
                ended.set()
            await network.ended()

    finish(run())


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ViewPolicy(), ViewPolicy(bytes_per_s=None)], ids=["rare records", "every round"])
def test_the_opposite_of_a_node_that_went_for_good_says_so(tmp_path, policy):
    plan = fixed_rounds(4, 30)

    async def run():
        async with Watched(plan, tmp_path, timeouts=replace(BRIEF, linger_s=2.0), policy=policy) as network:
            network.start()
            await network.reached(6)
            await network.kill("node-2")
            left = [name for name in plan.names if name != "node-2"]
            await asyncio.gather(*(network.nodes[name].task for name in left))
            return {name: network.summary(name) for name in left}

    summaries = finish(run())

    assert [row["detail"].partition(" in round ")[0] for row in summaries["node-0"]["departures"]] == ["node-0: node-2: last heard of"]
    for name in ("node-1", "node-3"):  # which have settled with node-0
        assert f"{name}: ended without the last word of node-2, for which it waited 2 s" in departures_in(summaries[name])


@pytest.mark.slow
def test_a_node_that_goes_on_alone_says_so_and_does_not_know_how_the_others_ended(tmp_path):
    plan = fixed_rounds(4, 30)

    async def run():
        async with Watched(plan, tmp_path, timeouts=BRIEF) as network:
            network.start()
            await network.reached(6)
            for name in ("node-0", "node-1", "node-3"):
                await network.kill(name)
            await network.nodes["node-2"].task
            return network.summary("node-2")

    said = departures_in(finish(run()))

    assert any(detail.startswith("node-2: how node-0 ended is not known here: ") for detail in said)
    assert any(detail.startswith("node-2: rounds ") and detail.endswith(" to 29 were made without any neighbour") for detail in said)
    assert not any("node-2: node-0: last heard of" in detail for detail in said)


@pytest.mark.slow
def test_a_node_that_went_for_good_is_a_departure_near_and_far(tmp_path):
    plan = fixed_rounds(6, 60)

    async def run():
        async with Watched(plan, tmp_path, timeouts=BRIEF) as network:
            network.start()
            await network.reached(10)
            await network.kill("node-3")
            left = [name for name in plan.names if name != "node-3"]
            await asyncio.gather(*(network.nodes[name].task for name in left))
            return {name: network.summary(name) for name in left}

    summaries = finish(run())

    for name in ("node-2", "node-4"):
        assert any("ended without the last word of " in detail and "node-3" in detail for detail in departures_in(summaries[name]))
    assert any(detail.startswith("node-0: node-3: last heard of in round ") for detail in departures_in(summaries["node-0"]))
    assert {exit_code_of(summary) for summary in summaries.values()} == {3}


@pytest.mark.no_cover
def test_a_node_that_jumped_over_rounds_says_so_and_the_others_were_there(tmp_path):
    plan = fixed_rounds(4, 80)

    async def run():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(5)
            network.pause("node-1")
            await network.reached(20, ["node-0", "node-2", "node-3"])
            network.wake("node-1")
            await network.ended()
            return {name: network.summary(name) for name in plan.names}

    summaries = finish(run())

    assert [row["kind"] for row in summaries["node-1"]["departures"]] == ["rounds_missed"]
    detail = summaries["node-1"]["departures"][0]["detail"]
    assert re.search(
        r"node-1: jumped over rounds \((\d+ times, first )?from round \d+ to round \d+; rounds? \d+ .*not trained\)", detail
    ), detail
