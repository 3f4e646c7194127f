"""Daemons that agree on their start: late, absent and blocked sites of a ring of eight."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import pytest
import torch
from test_link_states import needs_ipv6
from typer.testing import CliRunner

from links import ZeroMQLinks
from networks import PATIENT, Institutions, Network, averaging, finish, until, wait_until
from p2pfl.cli import app
from p2pfl.errors import ConfigError, MembersMissing
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.outages import incidents
from p2pfl.inspector.verdict import verdict
from p2pfl.node.clock import Timeouts
from p2pfl.node.status import read_status
from p2pfl.protocol import agreed_start
from p2pfl.runs.records import read_run
from p2pfl.transports import Endpoint, resolver

DEADLINE_S = 0.25
TIMEOUTS = Timeouts(deadline_floor_s=DEADLINE_S, deadline_factor=1.0, linger_s=5.0)


def ring(*, nodes=8, members="all", within_s=60.0, settle=2000, **experiment):
    plan = averaging({"name": "ring"}, nodes, tolerance=1e-3, **experiment)
    stop = plan.experiment.stop
    plan = replace(plan, experiment=replace(plan.experiment, stop=replace(stop, settle=settle)))
    require = replace(plan.experiment.require, members=members, within_s=within_s)
    return replace(plan, experiment=replace(plan.experiment, require=require))


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(agreed_start, "GRACE_S", 0.1)
    monkeypatch.setattr(agreed_start, "RESEND_S", 0.1)


async def time_is_up(network, *absent):
    """End the time for all members once every node knows that these alone are absent, however busy the machine is."""
    agreements = [running.daemon.node.agreed.agreement for running in network.nodes.values()]
    places = {network.plan.names.index(name) for name in absent}
    await until(lambda: all(a.awaited().absent == places and not a.awaited().gone and not a.awaited().broken for a in agreements))
    for agreement in agreements:
        agreement.deadline_s = time.monotonic()


def be_patient(network):
    """From now on nobody is given up: what is looked at is over, and a machine may need longer than the deadline for a round."""
    network.timeouts = PATIENT
    for running in network.nodes.values():
        running.daemon.protocol.deadlines._durations.floor_s = PATIENT.deadline_floor_s


def undisturbed(place, plan):
    async def main():
        async with Network(plan, place, timeouts=PATIENT) as network:
            network.start()
            assert await network.ended() == ["converged"] * 8
            return network.models()

    return finish(main(), 120)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["late", "blocked"])
def test_a_site_that_comes_twenty_deadlines_late_changes_no_weight(how, tmp_path):
    plan = ring()
    late = plan.names[3]

    async def main():
        async with Network(plan, tmp_path / "late", timeouts=TIMEOUTS) as network:
            if how == "blocked":  # in the direction of both neighbours; the others hear each other all the time
                network.cut = {(late, name) for name in network.neighbours(late)} | {(name, late) for name in network.neighbours(late)}
            network.start(*(plan.names if how == "blocked" else [name for name in plan.names if name != late]))
            await asyncio.sleep(20 * DEADLINE_S)
            assert {network.round(name) for name in network.nodes} == {0}
            assert not any(node.task.done() for node in network.nodes.values())
            be_patient(network)
            if how == "blocked":
                network.cut = set()
            else:
                network.start(late)
            assert await network.ended() == ["converged"] * 8
            for name in plan.names:
                assert not any(row["skipped"] for row in network.rows(name))
                assert network.events(name).count("start_agreed") == 1
            return network.models()

    assert torch.equal(finish(main(), 120), undisturbed(tmp_path / "undisturbed", plan))


@pytest.mark.slow
def test_a_blocked_link_between_two_that_are_there_is_waited_for(tmp_path):
    plan = ring()
    pair = plan.names[3], plan.names[4]

    async def main():
        async with Network(plan, tmp_path / "blocked", timeouts=TIMEOUTS) as network:
            network.cut = {pair, pair[::-1]}
            network.start()
            await until(lambda: all(set(network.nodes[n].daemon.status()["waiting_for"]) == set(pair) - {n} for n in plan.names))
            await asyncio.sleep(4 * DEADLINE_S)
            waits = network.nodes[plan.names[2]].daemon.status()["waiting_for"]
            assert waits == {pair[0]: f"it has no link with {pair[1]}", pair[1]: f"it has no link with {pair[0]}"}
            assert {network.round(name) for name in plan.names} == {0}
            be_patient(network)
            network.cut = set()
            assert await network.ended() == ["converged"] * 8
            return network.models()

    assert torch.equal(finish(main(), 120), undisturbed(tmp_path / "undisturbed", plan))


@pytest.mark.parametrize("members", [0, -1, 3.0, "some"])
def test_what_is_no_number_of_members_is_refused_in_one_sentence(members):
    with pytest.raises(ConfigError) as refused:
        experiment_from({"task": {"name": "averaging"}, "nodes": 4, "require": {"members": members}}, "study.yaml")

    assert (
        str(refused.value)
        == f"study.yaml: require.members = {members!r}: expected all, or a whole number that is more than half of the members"
    )


def test_where_one_never_comes_nobody_trains_and_everybody_says_who_is_missing(tmp_path, short_grace, caplog):
    caplog.set_level(logging.INFO)
    plan = ring()
    *there, absent = plan.names

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*there)
            await time_is_up(network, absent)
            ends = await asyncio.gather(*(network.nodes[name].task for name in there), return_exceptions=True)
            assert all(isinstance(end, MembersMissing) for end in ends)
            for name, end in zip(there, ends, strict=True):
                assert absent in str(end)
                summary = network.summary(name)
                assert (summary["rounds"], summary["stop_reason"]) == (0, "members_missing")
                assert [departure["kind"] for departure in summary["departures"]] == ["members_missing"]
                assert absent in summary["departures"][0]["detail"]
                assert f"missing: {absent}" in str(end)
                assert network.rows(name) == []
                assert summary["seconds"]["waiting"] > summary["seconds"]["setup"] >= 0
                assert "not_started" in network.events(name)

    finish(main(), 60)
    assert f"7 of 8 members are ready; waiting for {absent}" in caplog.text
    assert "this node has not trained" not in caplog.text  # whoever catches the error says it


@pytest.mark.no_cover
def test_seven_of_eight_train_where_that_was_agreed_and_everything_says_so(tmp_path, caplog):
    plan = ring(members=7, settle=10)
    *there, absent = plan.names

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*there)
            be_patient(network)
            await time_is_up(network, absent)
            await until(lambda: all(network.nodes[name].daemon.status()["started_without"] == [absent] for name in there))
            ends = await asyncio.gather(*(network.nodes[name].task for name in there))
            for name in there:
                assert network.events(name).count("started_without") == 1
                assert network.summary(name)["started_without"] == [absent]
                assert not network.summary(name)["departures"]
                records = read_run(network.states[name] / "run")
                assert f"It began without {absent}, as the study allows." in verdict(records, convergence(records))
                assert not {"unsettled", "jumped"} & set(network.events(name))
            assert len({network.summary(name)["rounds"] for name in there}) == 1
            return ends

    assert set(finish(main(), 120)) <= {"converged", "rounds"}
    assert f"1 of 8 members are missing at the start: {absent}" in caplog.text


def test_who_comes_after_the_start_enters_as_after_an_outage(tmp_path):
    plan = ring(nodes=3, members=2)
    *there, late = plan.names

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*there)
            await time_is_up(network, late)
            await network.reached(2, there)
            network.start(late)
            assert await network.ended() == ["converged"] * 3
            assert [network.summary(name)["started_without"] for name in plan.names] == [[late]] * 3
            assert network.rows(late)
            for name in plan.names:
                records = read_run(network.states[name] / "run")
                assert not [e for e in incidents(records) if (e["event"], e["round"], e["node"]) == ("stopped answering", 0, late)]

    finish(main(), 60)


@pytest.mark.no_cover
def test_two_halves_of_a_ring_do_not_train_and_both_name_the_two_absent(tmp_path, short_grace):
    plan = ring(members=6)
    absent = plan.names[0], plan.names[4]
    there = [name for name in plan.names if name not in absent]

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*there)
            await time_is_up(network, *absent)
            for name in there:
                with pytest.raises(MembersMissing, match=rf"missing: {absent[0]}[^;]*, {absent[1]}[^;]*; .*not heard of"):
                    await network.nodes[name].task
                assert network.rows(name) == []

    finish(main(), 60)


def test_a_node_that_is_restarted_after_the_start_does_not_wait_again(tmp_path):
    plan = ring(nodes=3, within_s=3600.0)
    dies, *_ = plan.names

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start()
            await network.reached(1)
            await network.kill(dies)
            network.start(dies)
            await until(lambda: network.nodes[dies].daemon.status()["started_with"] is not None)
            await network.ended()
            assert network.events(dies).count("start_agreed") == 1

    finish(main(), 60)


def test_a_node_that_gave_up_waits_anew_when_it_is_started_again(tmp_path, short_grace):
    plan = ring(nodes=3, within_s=0.3)
    there = plan.names[:-1]

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*there)
            await asyncio.gather(*(network.nodes[name].task for name in there), return_exceptions=True)
            network.timeouts = PATIENT
            network.start()
            assert await network.ended() == ["converged"] * 3
            assert network.summary(there[0])["stop_reason"] == "converged"
            assert not network.summary(there[0]).get("departures")

    finish(main(), 60)


@pytest.mark.parametrize(("pace", "algorithm"), [("asynchronous", "dpsgd"), ("pairwise", "ad-psgd")])
def test_nodes_at_their_own_pace_start_by_the_same_rule(pace, algorithm, tmp_path, short_grace):
    experiment = experiment_from(
        {
            "task": {"name": "averaging", "dimension": 3},
            "nodes": 4,
            "topology": {"name": "ring"},
            "algorithm": {"name": algorithm},
            "pace": {"name": pace},
            "rounds": 5,
            "stop": None,
            "baselines": [],
            "require": {"within_s": 0.3},
        }
    )
    plan = make_plan(experiment, load_sites(experiment))

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*plan.names[:-1])
            for name in plan.names[:-1]:
                with pytest.raises(MembersMissing, match=plan.names[-1]):
                    await network.nodes[name].task
                assert network.rows(name) == []

    finish(main(), 60)


def test_a_node_that_is_paused_while_it_waits_ends_as_paused(tmp_path):
    plan = ring()

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start(*plan.names[:2])
            await until(lambda: set(network.nodes[plan.names[0]].daemon.status()["waiting_for"]) == set(plan.names[2:]))
            network.nodes[plan.names[0]].daemon.stop("by SIGTERM")
            return await network.nodes[plan.names[0]].task

    assert finish(main(), 60) == "paused"


@pytest.mark.parametrize(("members", "is_right"), [(4, False), (5, True), (8, True), (9, False), ("all", True)])
def test_more_than_half_of_the_members_are_required(members, is_right):
    experiment = experiment_from({"task": {"name": "averaging"}, "nodes": 8, "require": {"members": members}})
    if is_right:
        assert make_plan(experiment, load_sites(experiment)).experiment.require.members == members
        return
    with pytest.raises(ConfigError, match=rf"require\.members = {members}: .*; give all, or 5 to 8"):
        make_plan(experiment, load_sites(experiment))


def test_the_default_stays_out_of_what_a_study_is_made_of_and_another_value_is_in_it():
    plain = {"task": {"name": "averaging"}, "nodes": 8}

    assert "require" not in experiment_from(plain).as_dict()
    written = experiment_from({**plain, "require": {"members": 7}}).as_dict()
    assert written["require"] == {"members": 7, "within_s": 86_400.0}
    assert experiment_from(written).require.members == 7


@pytest.mark.parametrize("bad", [{"members": "most"}, {"members": 0}, {"within_s": 0}, {"within": 3}, {"members": True}])
def test_what_cannot_be_required_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=rf"require\.{next(iter(bad))}"):
        experiment_from({"task": {"name": "averaging"}, "require": bad})


@pytest.mark.slow
def test_processes_that_wait_in_vain_end_with_exit_code_3_and_say_who_is_missing(tmp_path):
    plan = averaging({"name": "ring"}, 3)
    plan = replace(plan, experiment=replace(plan.experiment, require=replace(plan.experiment.require, within_s=15.0)))
    *there, absent = plan.names
    with Institutions(plan, tmp_path) as institutions:
        institutions.start(*there)
        wait_until(lambda: list((institutions.status(there[0]) or {}).get("waiting_for", {})) == [absent], 60)
        status = CliRunner().invoke(app, ["node", "status", str(institutions.site(there[0]))])
        wait_until(institutions.is_over, 120)

        assert [institutions.exit_code(name) for name in there] == [3] * 2
        assert f"{there[0]} waits for 1 of 3 members before it trains:\n  {absent}: " in status.output
        with pytest.raises(ConfigError, match="it ended without training because too few members were ready"):
            read_status(institutions.state(there[0]))
        for name in there:
            log = (institutions.place / name / "node.log").read_text()
            assert "p2pfl: this node has not trained: all 3 members must be ready within 15 s" in log
            assert log.count("this node has not trained") == 1
            assert absent in log.splitlines()[-1]
            assert institutions.summary(name)["departures"][0]["kind"] == "members_missing"


@pytest.mark.slow
def test_one_that_stands_still_costs_no_healthy_neighbour_a_skipped_exchange(tmp_path):
    plan = averaging({"name": "ring"}, 6, tolerance=1e-300)
    plan = replace(plan, experiment=replace(plan.experiment, stop=replace(plan.experiment.stop, settle=12)))
    still, *_ = plan.names
    timeouts = Timeouts(deadline_floor_s=2.0, deadline_factor=1.0, linger_s=1.0)

    async def main():
        async with Network(plan, tmp_path, timeouts=timeouts) as network:
            network.start()
            await network.reached(8)
            network.pause(still)
            others = [name for name in plan.names if name != still]
            await asyncio.gather(*(network.nodes[name].task for name in others))
            return {skipped for name in others for row in network.rows(name) for skipped in row["skipped"]}

    assert finish(main(), 60) == {still}


class LinksOverIPv6(ZeroMQLinks):
    """Cards with IPv6 addresses alone, one of them a host name; every member listens as it does by default."""

    def endpoint(self, name):
        found = super().endpoint(name)
        host = "ip6-only" if name == "node-3" else "[::1]"
        return Endpoint(name, found.address.replace("127.0.0.1", host), found.public_key)

    def member(self, name, neighbours, **options):
        port = self.endpoint(name).address.rpartition(":")[2]
        return super().member(name, neighbours, listen=f"tcp://*:{port}", **options)


@needs_ipv6
@pytest.mark.slow
def test_a_ring_over_ipv6_and_a_name_with_no_other_address_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(resolver, "look_up", lambda host: {"ip6-only": ["::1"]}[host])
    plan = ring()
    links = LinksOverIPv6()

    async def main():
        async with Network(plan, tmp_path / "ipv6", timeouts=PATIENT, links=links) as network:
            network.start()
            assert await network.ended() == ["converged"] * 8
            return network.models()

    try:
        models = finish(main(), 120)
    finally:
        links.close()
    assert torch.equal(models, undisturbed(tmp_path / "undisturbed", plan))
