"""Daemons of which two share a broker and nothing else."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress

import aiomqtt
import pytest
import torch

from links import Beside
from mosquitto import Mosquitto, passwords
from networks import PATIENT, Institutions, Network, averaging, finish, wait_until
from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.broker import BrokerSettings
from p2pfl.node.own_links import own_links
from p2pfl.node.site import SiteFile
from p2pfl.transports import LinksByKind, ZeroMQTransport
from p2pfl.transports.carried import CarriedLinks

HIDDEN = ("node-1", "node-2")
PASSWORD = "open-sesame"


class Subscriber:
    """Somebody with access to a broker, who keeps all that it passes on; used inside `async with`."""

    def __init__(self, port, **options):
        self.heard = []
        self._port, self._options = port, options

    async def __aenter__(self):
        self.client = aiomqtt.Client("127.0.0.1", self._port, **self._options)
        await self.client.__aenter__()
        await self.client.subscribe("#", qos=1)
        self._listening = asyncio.ensure_future(self._listen())
        return self

    async def _listen(self):
        with suppress(aiomqtt.MqttError):  # the broker has ended
            async for message in self.client.messages:
                self.heard.append((message.topic.value, message.payload))

    async def __aexit__(self, *error):
        self._listening.cancel()
        await self.client.__aexit__(None, None, None)


@pytest.fixture
def mosquitto(tmp_path):
    broker = Mosquitto(["allow_anonymous false", f"password_file {passwords(tmp_path, site=PASSWORD)}"]).start()
    yield broker
    broker.close()


@pytest.fixture
def subscriber(mosquitto):
    beside = Beside()

    async def make():
        return Subscriber(mosquitto.port, username="site", password=PASSWORD)

    yield beside.open(beside.call(make()))
    beside.close()


@pytest.mark.slow
def test_an_edge_over_a_broker_gives_the_same_weights_and_shows_the_broker_nothing(tmp_path, mosquitto, subscriber):
    plan = averaging({"name": "ring"}, 5, tolerance=1e-3)

    async def direct():
        async with Network(plan, tmp_path / "direct", timeouts=PATIENT) as network:
            network.start()
            await network.ended()
            return network.models()

    expected = finish(direct(), 120)
    file = tmp_path / "mqtt-password"
    file.write_text(PASSWORD)
    file.chmod(0o600)
    reached = {"host": "127.0.0.1", "port": mosquitto.port, "tls": False, "username": "site", "password_file": str(file)}
    options = {"via": lambda name, own: None if name in HIDDEN else own, "transports": {HIDDEN: "mqtt"}}
    with Institutions(plan, tmp_path, mqtt=reached, round_at_least_s=0.05, **options) as institutions:
        institutions.start()
        wait_until(lambda: institutions.round(HIDDEN[0]) >= 3)
        mosquitto.stop()
        wait_until(lambda: not institutions.status(HIDDEN[0])["neighbours"][HIDDEN[1]]["link"].startswith("up"))
        mosquitto.start()
        wait_until(institutions.is_over)

        assert [institutions.exit_code(name) for name in plan.names] == [0] * 5
        assert not any(row["skipped"] for name in plan.names for row in institutions.rows(name))
        assert torch.equal(institutions.models(), expected)
        assert PASSWORD not in "".join((tmp_path / name / "node.log").read_text() for name in plan.names)
        secrets = [*plan.names, "averaging", "schema", "exchange"]
        models = [row.numpy().tobytes()[:8] for row in institutions.models()]
        digest = institutions.study.digest
    topics = {topic for topic, _ in subscriber.heard}
    heard = b"\0".join(topic.encode() + b"\0" + payload for topic, payload in subscriber.heard)

    assert len(topics) == 2
    assert all(topic.startswith(f"p2pfl/{digest}/") for topic in topics)
    assert len(heard) > 10_000
    assert b"CURVE" in heard  # it did run through there
    assert [said for said in secrets if said.encode() in heard] == []
    assert [model for model in models if model in heard] == []


@pytest.fixture
def members():
    plan = averaging({"name": "ring"}, 5)
    identities = {f"node-{i}": Identity.new() for i in range(5)}
    cards = [identity.card(name, f"tcp://127.0.0.1:{7700 + i}") for i, (name, identity) in enumerate(identities.items())]

    def links_of(name, settings, transport=None, **more):
        transports = {HIDDEN: "mqtt"} if transport is None else None
        study = Study.create(plan.experiment.as_dict(), cards, plan.topology, transport=transport, transports=transports)
        site = SiteFile(member=name, study="study.yaml", mqtt=settings, **more)
        return own_links(site, study, study.member(name), identities[name].curve_secret)

    return links_of


def test_each_node_gets_the_links_that_the_study_has_over_a_broker(members):
    reached = BrokerSettings(host="broker.example")

    assert isinstance(members("node-0", None), ZeroMQTransport)
    assert isinstance(members("node-1", reached), LinksByKind)
    assert isinstance(members("node-0", reached, transport="mqtt"), CarriedLinks)


def test_a_site_that_does_not_say_its_broker_is_told_what_to_write(members):
    expected = (
        r"mqtt = null: the study has the links to node-2 go over an MQTT broker; write how this site reaches it, such as mqtt: \{host"
    )
    with pytest.raises(ConfigError, match=expected):
        members("node-1", None)


def test_a_missing_extra_is_named(members, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiomqtt", None)
    with pytest.raises(MissingExtraError, match=r"links over an MQTT broker need aiomqtt: pip install 'p2pfl-mesh\[mqtt\]'"):
        members("node-1", BrokerSettings(host="broker.example"))


def test_a_password_that_would_go_unencrypted_is_warned_of(members, monkeypatch, caplog):
    monkeypatch.setenv("P2PFL_MQTT_PASSWORD", PASSWORD)
    caplog.set_level(logging.WARNING)
    members("node-1", BrokerSettings(host="127.0.0.1", tls=False, username="site"))

    assert caplog.text == ""

    members("node-1", BrokerSettings(host="broker.example", tls=False, username="site"))

    assert "mqtt.tls = false: the password goes to broker.example unencrypted" in caplog.text
    assert PASSWORD not in caplog.text
