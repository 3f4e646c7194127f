"""Nodes whose neighbours are not there, or are reached over IPv6: what the administrator sees."""

from __future__ import annotations

import logging
import re
import signal

import pytest
from test_link_states import needs_ipv6

from links import ZeroMQLinks
from networks import HASTY, Institutions, Network, averaging, finish, until, wait_until
from p2pfl.protocol import link_watch
from p2pfl.transports import Endpoint


@pytest.fixture
def links():
    links = ZeroMQLinks()
    yield links
    links.close()


def at(links, name, address):
    """Tell everybody else another address of a member than its own."""
    links.endpoint(name)
    original = links.endpoint

    def endpoint(asked):
        found = original(asked)
        return Endpoint(name, address, found.public_key) if asked == name else found

    links.endpoint = endpoint


def waits(tmp_path, links, caplog, text):
    """Start the last of two nodes alone, until its log says a text of the other; its status and events."""
    plan = averaging({"name": "path"}, 2)
    absent, alone = plan.names

    async def main():
        async with Network(plan, tmp_path, links=links) as network:
            network.start(alone)
            await until(lambda: re.search(text, caplog.text))
            return network.nodes[alone].daemon.status()["neighbours"][absent], network.events(alone)

    return finish(main(), 60)


@pytest.mark.parametrize(
    ("address", "state", "text"),
    [
        (None, "refused", r"waiting for node-0: connection refused at tcp://127\.0\.0\.1:\d+"),
        ("tcp://no-such-host.invalid:7700", "unknown name", r"waiting for node-0: name not known: no-such-host\.invalid"),
        pytest.param("tcp://[::1]:1", "refused", r"waiting for node-0: connection refused at tcp://\[::1\]:1", marks=needs_ipv6),
    ],
)
def test_the_log_says_whom_a_node_waits_for_and_why(tmp_path, links, caplog, monkeypatch, address, state, text):
    monkeypatch.setattr(link_watch, "SETTLE_S", 0.0)
    caplog.set_level(logging.INFO)
    if address is not None:
        at(links, "node-0", address)
    status, events = waits(tmp_path, links, caplog, text)

    assert status["link"] == state
    assert re.search(text.removeprefix("waiting for node-0: "), status["link_detail"])
    assert status["greeted"] is False
    assert "waiting" in events


def test_a_neighbour_that_holds_another_study_is_said(tmp_path, links, caplog, monkeypatch):
    monkeypatch.setattr(link_watch, "SETTLE_S", 0.0)
    caplog.set_level(logging.INFO)
    plan = averaging({"name": "path"}, 2)
    one, other = plan.names

    async def main():
        async with Network(plan, tmp_path, links=links) as network:
            network.start(one)
            network.options["study_digest"] = "20" * 32
            network.start(other)
            await until(lambda: f"waiting for {other}: {other} holds study 2020202020202020…, this node abababababababab…" in caplog.text)

            assert network.nodes[one].daemon.status()["neighbours"][other]["link"] == "other study"

    finish(main(), 60)


def test_a_neighbour_that_dies_and_comes_back_is_said_in_log_and_events(tmp_path, links, caplog, monkeypatch):
    monkeypatch.setattr(link_watch, "SETTLE_S", 0.0)
    caplog.set_level(logging.INFO)
    plan = averaging({"name": "path"}, 2, tolerance=1e-300)
    stays, dies = plan.names

    async def main():
        async with Network(plan, tmp_path, links=links, timeouts=HASTY) as network:
            network.start()
            await network.reached(2)
            await network.kill(dies)
            await until(lambda: f"{dies} is out for " in caplog.text)
            network.start(dies)
            await until(lambda: f"{dies} is back after " in caplog.text)
            return network.events(stays)

    events = finish(main(), 60)

    assert "link_up" in events[events.index("link_down") :]


@pytest.mark.no_cover
def test_an_undisturbed_run_has_no_warning(tmp_path, links, caplog):
    caplog.set_level(logging.INFO)

    async def main():
        async with Network(averaging({"name": "ring"}, 4), tmp_path, links=links) as network:
            network.start()
            await network.ended()

    finish(main(), 60)

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.slow
def test_a_node_alone_says_so_on_its_own_standard_error(tmp_path):
    with Institutions(averaging({"name": "path"}, 2), tmp_path) as institutions:
        absent, alone = institutions.plan.names
        institutions.start(alone)
        log = institutions.place / alone / "node.log"
        wait_until(lambda: f"waiting for {absent}: connection refused at tcp://127.0.0.1:" in log.read_text(), 60)

        assert institutions.status(alone)["neighbours"][absent]["link"] == "refused"
        assert institutions.end(alone, signal.SIGHUP) == 0


@needs_ipv6
@pytest.mark.slow
def test_nodes_with_cards_of_ipv6_alone_meet_with_default_settings(tmp_path):
    def over_ipv6(_, address):
        return address.replace("127.0.0.1", "[::1]")

    with Institutions(averaging({"name": "ring"}, 3), tmp_path, via=over_ipv6, listen=None) as institutions:
        institutions.start()
        wait_until(institutions.is_over, 120)

        assert [institutions.exit_code(name) for name in institutions.plan.names] == [0, 0, 0]
        assert float((institutions.models() - institutions.models().mean(0)).norm()) < 1e-4
        assert not any(row["skipped"] for name in institutions.plan.names for row in institutions.rows(name))
