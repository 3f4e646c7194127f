"""A probe greets a running node as a member, and tells what the node takes and what it refuses."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from typer.testing import CliRunner

from networks import HASTY, STUDY, Institutions, Network, averaging, finish, plan_of, starts, wait_until
from p2pfl.cli.node import app
from p2pfl.errors import ConfigError, TransportError
from p2pfl.node.mixing import update_formats
from p2pfl.node.probe import Probe, new_incarnation
from p2pfl.node.probe_site import standing_of
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import NEWEST_SCHEMA, SCHEMA
from p2pfl.wire.negotiation import announcing

PATH = {"name": "path"}


def long_run():
    return plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=3,
        topology=PATH,
        rounds=0,
        stop={"relative_consensus": 1e-6, "patience": 60, "settle": 2000},
    )


async def probed(network: Network, me: str, peer: str, *, faulty: bool = False, **terms: str):
    """Findings by message of a probe in a member's name, from the state that its daemon has left."""
    plan = network.plan
    formats = update_formats(plan.recipe.algorithm, plan.population([me]))
    standing, anew = standing_of(network.states[me], peer, formats)
    held = Terms(**{"study": STUDY, "layout": plan.layout.digest, "start": plan.start_digest} | terms)
    session = LinkSession(peer=peer, member=me, terms=held, incarnation=new_incarnation(), formats=formats)
    counters = network.nodes[peer].daemon.protocol

    def counts():
        return {**counters.edges.refused, **counters.neighbours[me].session.counters}

    transport = network.links.member(me, [peer])
    probe = Probe(transport, session, standing, anew=anew, remembered=standing.ledger.remembered(), counts=counts)
    findings = await probe.run(faulty=faulty)
    return {finding.message: finding for finding in findings}


def test_a_probe_of_a_node_that_waits_for_its_start_has_every_message_taken(tmp_path):
    async def scenario():
        async with Network(averaging(PATH, 3), tmp_path) as network:
            network.start("node-0")
            found = await probed(network, "node-1", "node-0")

            assert [name for name, finding in found.items() if not finding.as_expected] == []
            assert found["Hello"].outcome == "taken"
            assert found["Update"].outcome == found["Records"].outcome == "not sent"
            assert found["Chunk"].reason == "stray_chunk"
            assert (found["Chunk"].answers, found["Sent"].answers) == (("ResendRequest",), ("ResendRequest",))
            assert network.round("node-0") == 0
            assert network.nodes["node-0"].daemon.protocol.neighbours["node-1"].is_paused

    finish(scenario())


@pytest.mark.slow
def test_a_probe_of_a_running_node_is_no_more_than_a_restart_of_the_member(tmp_path):
    async def scenario():
        plan = long_run()
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.reached(8)
            await network.kill("node-2")
            found = await probed(network, "node-2", "node-1")
            network.start("node-2")
            reasons = await network.ended()

            assert [name for name, finding in found.items() if not finding.as_expected] == []
            assert {name for name, finding in found.items() if finding.outcome == "not sent"} <= {"Records"}
            assert found["Update"].reason in {"stale_round", "duplicate", None}
            assert reasons == ["converged"] * 3
            assert float((network.models() - starts(plan).mean(dim=0)).abs().max()) < 1e-6
            assert [network.summary(name)["departures"] for name in plan.names] == [[], [], []]
            assert not {"skipped", "jumped", "state_lost", "took_back"} & {*network.events("node-0"), *network.events("node-1")}

    finish(scenario())


def test_faulty_messages_are_refused_each_for_its_reason(tmp_path):
    async def scenario():
        async with Network(averaging(PATH, 3), tmp_path, timeouts=HASTY) as network:
            network.start("node-0")
            found = await probed(network, "node-1", "node-0", faulty=True)

            assert [name for name, finding in found.items() if not finding.as_expected] == []
            assert {name: finding.reason for name, finding in found.items() if finding.outcome == "refused"} == {
                "another schema": "wrong_schema",
                "a byte behind the header": "bad_message",
                "a payload where none is": "bad_message",
                "a stop at round 0": "implausible_stop",
                "a record that is none": "bad_record",
                "Update, another size": "wrong_size",
                "Update, another channel": "wrong_format",
                "Update, another digest": "wrong_digest",
                "Hello, name": "wrong_name",
                "Hello, study": "wrong_study",
                "Hello, layout": "wrong_layout",
                "Hello, start": "wrong_start",
            }

    finish(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("schema", [SCHEMA, NEWEST_SCHEMA])
def test_a_sign_of_life_is_no_answer_to_a_question(tmp_path, schema):
    async def scenario():
        async with Network(averaging(PATH, 3), tmp_path, timeouts=HASTY) as network:
            network.start("node-0", incarnation=announcing(1, schema))
            daemon = network.nodes["node-0"].daemon
            neighbour = daemon.protocol.neighbours["node-1"]
            receive = daemon.node.transport.receive

            async def receive_late():
                received = await receive()
                for _ in range(20):  # signs of life go out meanwhile
                    await asyncio.sleep(0)
                return received

            async def speak_unasked():
                while True:
                    if neighbour.session.is_open:
                        neighbour.queue(daemon.protocol.stopping.where_it_is(neighbour))
                        daemon.node.sending.wake()
                    await asyncio.sleep(0)

            daemon.node.transport.receive = receive_late
            speaking = asyncio.create_task(speak_unasked())
            found = await probed(network, "node-1", "node-0", faulty=True)
            speaking.cancel()

            assert [name for name, finding in found.items() if not finding.as_expected] == []

    finish(scenario())


@pytest.mark.parametrize("term", ["study", "layout", "start"])
def test_a_hello_that_is_refused_says_what_either_side_holds(tmp_path, term):
    async def scenario():
        async with Network(averaging(PATH, 3), tmp_path) as network:
            network.start("node-0")
            found = await probed(network, "node-1", "node-0", **{term: "77" * 32})

            assert list(found) == ["Hello"]
            assert (found["Hello"].outcome, found["Hello"].reason, found["Hello"].as_expected) == ("refused", f"wrong_{term}", False)
            assert f"{term}: 7777777777777777… here" in found["Hello"].detail

    finish(scenario())


@pytest.mark.slow
def test_the_command_probes_a_daemon_over_its_real_link(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plan = long_run()
    with Institutions(plan, tmp_path) as institutions:
        site, address = institutions.site("node-1"), institutions.study.member("node-0").address
        institutions.start("node-0")
        wait_until(lambda: institutions.round("node-0") == 0)
        at = ["probe", address, "--site", str(site), "--state", str(institutions.state("node-0"))]

        said = CliRunner().invoke(app, [*at, "--faulty", "--json"])
        assert said.exit_code == 0, (said.output, said.exception)
        report = json.loads(said.output)
        assert (report["member"], report["neighbour"], report["address"], report["as_expected"]) == ("node-1", "node-0", address, True)
        assert {row["reason"] for row in report["findings"]} >= {"wrong_schema", "wrong_study", "wrong_digest"}

        text = CliRunner().invoke(app, ["probe", "node-0", "--site", str(site)])
        assert text.exit_code == 0, text.output
        assert "as the protocol says" in text.output
        assert max(map(len, text.output.splitlines())) <= 80

        institutions.start("node-1")
        wait_until(lambda: institutions.round("node-1") == 0)
        busy = CliRunner().invoke(app, at)
        assert isinstance(busy.exception, ConfigError)
        assert "another node is running on this state folder" in str(busy.exception)
        institutions.end("node-1", signal.SIGKILL)
        nobody = CliRunner().invoke(app, ["probe", "tcp://127.0.0.1:1", "--site", str(site)])
        assert isinstance(nobody.exception, ConfigError)
        assert "name it with --neighbour" in str(nobody.exception)


def test_a_probe_that_is_to_be_dialled_says_so_and_what_to_check(tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.node.probe.LINK_S", 0.3)
    with Institutions(long_run(), tmp_path) as institutions:
        own, other = (institutions.study.member(name).address for name in ("node-0", "node-1"))
        waits = CliRunner().invoke(app, ["probe", other, "--site", str(institutions.site("node-0"))])
        dials = CliRunner().invoke(app, ["probe", own, "--site", str(institutions.site("node-1"))])

    assert isinstance(waits.exception, TransportError)
    assert str(waits.exception).startswith(
        "no link to node-1 within 0.3 s: awaited; on this edge it is node-1 that dials, and the probe waits"
    )
    assert f"check that its node runs with this study, and that firewalls let it reach this site at {own}" in str(waits.exception)
    assert "that dials" not in str(dials.exception)
