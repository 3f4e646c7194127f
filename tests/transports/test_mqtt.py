"""Links over a real broker: what others there can do to them, what becomes of them when it restarts, and what is said of its faults."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import logging
import shutil
from contextlib import asynccontextmanager
from dataclasses import replace

import aiomqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.client import MQTTMessage
from zmq.utils import z85

from links import STUDY, BrokerLinks, arrives, finish, receive, send_when_up, until
from mosquitto import Mosquitto, passwords
from p2pfl.errors import ConfigError
from p2pfl.transports import LinkCondition, Proxy, ProxyWay
from p2pfl.transports.mqtt import join_broker
from p2pfl.transports.mqtt_session import MOST_UNDER_WAY
from p2pfl.transports.mqtt_words import Kind, Packet
from site_proxy import SiteProxy

PASSWORD = "open-sesame"


@pytest.fixture
def links():
    links = BrokerLinks()
    yield links
    links.close()


@pytest.fixture
def meeting():
    """Makes links at a broker with a configuration of its own."""
    made = []

    def make(listener=("allow_anonymous true",), everywhere=(), **settings):
        links = BrokerLinks(**settings)
        links.mosquitto.close()
        links.mosquitto = Mosquitto(listener, everywhere).start()
        links.broker = links.mosquitto.broker(**settings)
        made.append(links)
        return links

    yield make
    for links in made:
        links.close()


async def meet(a, b):
    await arrives(b, a, "a", [b"there"])
    await arrives(a, b, "b", [b"back"])


@asynccontextmanager
async def stranger(links):
    """Somebody else with access to the broker, who hears everything."""
    async with aiomqtt.Client("127.0.0.1", links.mosquitto.port) as client:
        await client.subscribe("#", qos=1)
        yield client


async def failed(a):
    await until(lambda: a.link("b").state == LinkCondition.BROKER)
    return a.link("b").detail


# ---- what others at the broker can do


@pytest.mark.slow
def test_what_others_publish_and_publish_again_changes_nothing(meeting, caplog):
    links = meeting(everywhere=["set_tcp_nodelay true"])

    async def main():
        async with stranger(links) as other, links.member("a", "b") as a, links.member("b", "a") as b, asyncio.TaskGroup() as group:
            heard = set()

            async def disturb():
                async for message in other.messages:
                    if message.payload in heard or message.payload.endswith(b"forged"):
                        continue  # of this one itself
                    heard.add(message.payload)
                    await other.publish(message.topic.value, message.payload, qos=1)  # once more, and late
                    await other.publish(message.topic.value, message.payload[:20] + b"forged", qos=1)

            disturbing = group.create_task(disturb())
            await meet(a, b)
            for i in range(30):
                await b.send("a", [b"%d" % i, bytes([i]) * 3000], 5.0)

                assert await receive(a, 1) == [("b", [b"%d" % i, bytes([i]) * 3000])]

            await until(lambda: a.counters["forged"] > 30 and len(heard) > 60)
            disturbing.cancel()

            assert a.link("b").is_up
            assert a.link_counters["b"] == {"connected": 1}

    finish(main())
    assert "a message at the broker that b has not sent" in caplog.text


def test_a_publish_that_is_too_large_costs_neither_memory_nor_the_link(meeting):
    links = meeting(version="3.1.1")

    async def main():
        async with stranger(links) as other, links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            inbox = a._carrier._sessions["b"]._words.inbox
            for retained in (False, True):
                await other.publish(inbox, bytes(3_000_000), qos=1, retain=retained, timeout=10)
            await until(lambda: a.counters["forged"] >= 2)
            await meet(a, b)

            assert a.link_counters["b"]["disconnected"] == 0

    finish(main())


def test_messages_that_nobody_has_room_for_do_not_fill_the_log(links, caplog, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.mqtt_session.MOST_WAITING", 2)

    async def main():
        async with stranger(links) as other, links.member("a", "b") as a:
            session = a._carrier._sessions["b"]
            await until(lambda: session._connection is not None)
            client = session._connection._client
            for _ in range(500):
                client._on_message(None, None, MQTTMessage(topic=session._words.inbox.encode()))
            await other.publish(session._words.inbox, b"heard", qos=1)
            await until(lambda: a.counters["forged"])

    finish(main())
    full = [record for record in caplog.records if "Message queue is full" in record.getMessage()]

    assert len(full) == 9  # of 498, the 1st, 2nd, 4th, ... 256th
    assert "(256 so far)" in full[-1].getMessage()
    assert {record.name for record in full} == {"p2pfl.transports.broker"}


def test_a_recorded_packet_of_an_older_stream_ends_nothing(links):
    async def main():
        async with stranger(links) as other, links.member("a", "b") as a:
            async with links.member("b", "a") as b:
                await meet(a, b)
            old = []
            async with links.member("b", "a") as b:
                await meet(a, b)
                while not other.messages or len(old) < 10:
                    message = await anext(other.messages)
                    old.append((message.topic.value, message.payload))
                for topic, payload in old:
                    await other.publish(topic, payload, qos=1)
                await meet(a, b)

                assert a.link_counters["b"]["connected"] == 2

    finish(main())


def test_what_is_repeated_again_and_again_makes_no_end_say_ever_more(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            session, other = a._carrier._sessions["b"], b._carrier._sessions["a"]
            wanted = other._words.write(Packet(kind=Kind.OPEN, stream=bytes(16)))
            unknown = other._words.write(Packet(kind=Kind.ACK, stream=b"\1" * 16, data=bytes(8)))
            # what is on its way to the broker already counts as well
            await until(lambda: session._outgoing.empty() and session._num_under_way == 0)
            for _ in range(5000):
                session._take(wanted)
                session._take(unknown)

            assert session._outgoing.qsize() == MOST_UNDER_WAY
            await until(lambda: session._outgoing.empty() and session._num_under_way == 0)
            await meet(a, b)
            assert a.link_counters["b"] == {"connected": 1}

    finish(main())


# ---- ends


@pytest.mark.parametrize("version", ["5", pytest.param("3.1.1", marks=pytest.mark.slow)])
def test_links_come_back_when_the_broker_was_restarted(meeting, version):
    links = meeting(version=version)

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            await b.send("a", [b"under way", bytes(2**20)], 1.0)
            links.mosquitto.stop()
            await until(lambda: {a.link("b").state, b.link("a").state} <= {LinkCondition.BROKER, LinkCondition.DOWN})
            await until(lambda: a.link("b").state == LinkCondition.BROKER)
            expected = f"the broker mqtt://127.0.0.1:{links.mosquitto.port}: connection refused at tcp://127.0.0.1:{links.mosquitto.port}"
            await until(lambda: a.link("b").detail.startswith(expected))
            assert a.link("b").detail.endswith("; is it running, and are mqtt.host and mqtt.port in site.yaml right?")
            links.mosquitto.start()
            await meet(a, b)

    finish(main(), 40)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_neighbour_whose_client_dies_is_noticed_at_once(meeting, version):
    links = meeting(version=version, keepalive_s=3600)

    async def main():
        async with SiteProxy("socks5") as proxy, links.member("a", "b", heartbeat_s=3600) as a:
            way = ProxyWay(Proxy(kind="socks5", host="127.0.0.1", port=proxy.port))
            async with links.member("b", "a", heartbeat_s=3600, way_out=way) as b:
                await meet(a, b)
                assert proxy.targets == [("127.0.0.1", links.mosquitto.port)]
                proxy.cut()  # nobody says good-bye
                await until(lambda: not a.link("b").is_up)

    finish(main())


# ---- sizes of packets


@pytest.mark.parametrize(
    ("everywhere", "settings", "most_bytes"),
    [(["max_packet_size 2000"], {}, 2000), (["max_packet_size 1500"], {"version": "3.1.1", "packet_bytes": 1400}, 1400)],
    ids=["as the broker announces", "as the site says"],
)
def test_packets_are_as_small_as_the_broker_wants_them(meeting, everywhere, settings, most_bytes):
    links = meeting(everywhere=everywhere, **settings)

    async def main():
        async with stranger(links) as other, links.member("a", "b") as a, links.member("b", "a") as b:
            sent = [b"model", bytes(range(256)) * 1000]
            await send_when_up(b, "a", sent)

            assert await receive(a, 1) == [("b", sent)]
            sizes = [len((await anext(other.messages)).payload) for _ in range(len(other.messages))]
            assert most_bytes - 200 < max(sizes) < most_bytes

    finish(main())


def test_a_broker_whose_limit_is_too_small_is_told_of(meeting):
    links = meeting(everywhere=["max_packet_size 900"])

    async def main():
        async with links.member("a", "b") as a:
            assert await failed(a) == (
                f"the broker {links.broker} takes packets of at most 900 bytes, which is too little: at least 1024 are needed; "
                "ask its administrator to raise the limit"
            )

    finish(main())


def test_a_broker_that_takes_too_few_messages_at_once_is_told_of(meeting):
    links = meeting(everywhere=["max_inflight_messages 3"])

    async def main():
        async with links.member("a", "b") as a:
            assert await failed(a) == (
                f"the broker {links.broker} takes only 3 messages at once, which is too little: at least 8 are needed; "
                "write mqtt.version: 3.1.1, where there is no such limit, or ask its administrator to raise it"
            )
        old = replace(links.broker, version="3.1.1")
        async with links.member("a", "b", broker=old) as a, links.member("b", "a", broker=old) as b:
            await meet(a, b)
            await b.send("a", [b"large", bytes(2**20)], 5.0)

            assert await receive(a, 1) == [("b", [b"large", bytes(2**20)])]

    finish(main())


def test_a_broker_that_takes_no_large_packet_is_named(meeting):
    links = meeting(everywhere=["max_packet_size 3000"], version="3.1.1")

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            await a.send("b", [bytes(2**18)], 1.0)
            said = await failed(a)

            assert "If that happens again and again, the broker may take or pass on no packets of mqtt.packet_bytes = 65536" in said

    finish(main())


@pytest.mark.slow
def test_a_broker_that_drops_large_packets_is_told_of(meeting, caplog):
    links = meeting(everywhere=["message_size_limit 3000"], version="3.1.1")

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            for end in (a, b):  # not before: a busy machine may need as long for the meeting
                for session in end._carrier._sessions.values():
                    session._patience_s = 0.2
            await a.send("b", [bytes(2**18)], 1.0)
            await until(lambda: a.counters["stuck"])

    finish(main())
    assert "has got no answer for 0.2 s. If that happens again and again, the broker may take or pass on no packets" in caplog.text


# ---- the way to the broker


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_a_broker_is_reached_through_the_sites_proxy(links, kind):
    async def main():
        async with SiteProxy(kind, names={"broker.test": "127.0.0.1"}) as proxy, links.member("a", "b") as a:
            way = ProxyWay(Proxy(kind=kind, host="127.0.0.1", port=proxy.port))
            broker = links.mosquitto.broker(host="broker.test")
            async with links.member("b", "a", way_out=way, broker=broker) as b:
                await meet(a, b)

                assert proxy.targets == [("broker.test", links.mosquitto.port)]

    finish(main())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate of 127.0.0.1 that vouches for itself."""
    place = tmp_path_factory.mktemp("certificate")
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (place / "broker.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (place / "broker.key").write_bytes(secret)
    return place


@pytest.fixture
def secured(meeting, certificate, tmp_path):
    """Links at a broker with TLS that wants a password."""
    listener = ["allow_anonymous false", f"password_file {passwords(tmp_path, site=PASSWORD)}"]
    listener += [f"certfile {certificate / 'broker.pem'}", f"keyfile {certificate / 'broker.key'}"]
    # a socket says of itself when it listens, and mosquitto says nothing to somebody without TLS
    return meeting(listener, tls=True, ca_file=certificate / "broker.pem", username="site", password=PASSWORD)


def test_tls_and_a_password_reach_a_broker_and_no_log(secured, caplog):
    caplog.set_level(logging.DEBUG)

    async def main():
        async with secured.member("a", "b") as a, secured.member("b", "a") as b:
            await meet(a, b)
            await b.send("a", [b"large", bytes(2**20)], 1.0)

            assert await receive(a, 1) == [("b", [b"large", bytes(2**20)])]

    finish(main())
    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(secured.broker)


FAULTS = {
    "the password is wrong": (
        {"password": "guessed"},
        "does not take the password of 'site': correct mqtt.username or the password, or ask its administrator",
    ),
    "there is no password": (
        {"username": None, "password": None},
        "wants a password: write mqtt.username and mqtt.password_file in site.yaml",
    ),
    "an unknown authority": (
        {"ca_file": None},
        (
            "shows a certificate that this site does not trust (self-signed certificate): write its authority's as mqtt.ca_file, "
            "or correct mqtt.host"
        ),
    ),
    "another name": (
        {"host": "localhost"},
        (
            "shows a certificate that this site does not trust (Hostname mismatch, certificate is not valid for 'localhost'.): "
            "write its authority's as mqtt.ca_file, or correct mqtt.host"
        ),
    ),
    "no TLS": (
        {"tls": False},
        (
            "ended the connection before it answered: has it a listener for MQTT 5 without TLS there? "
            "See mqtt.port, mqtt.tls and mqtt.version in site.yaml"
        ),
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_broker_that_does_not_let_this_site_in_is_told_of_with_a_remedy(secured, case, caplog):
    caplog.set_level(logging.DEBUG)
    settings, said = FAULTS[case]

    async def main():
        broker = secured.mosquitto.broker(
            **{"tls": True, "ca_file": secured.broker.ca_file, "username": "site", "password": PASSWORD, **settings}
        )
        async with secured.member("a", "b", broker=broker) as a:
            assert await failed(a) == f"the broker {broker} {said}"
        async with secured.member("b", "a", broker=broker) as b:  # the end that dials
            await until(lambda: b.link("a").state == LinkCondition.BROKER)
            assert b.link("a").detail == f"the broker {broker} {said}"

    finish(main())
    assert PASSWORD not in caplog.text
    assert "guessed" not in caplog.text


def test_a_broker_without_tls_is_told_of(links):
    async def main():
        async with links.member("a", "b", broker=links.mosquitto.broker(tls=True)) as a:
            said = await failed(a)

            assert said.startswith(f"the broker mqtts://127.0.0.1:{links.mosquitto.port} does not answer with TLS (")
            assert said.endswith("): correct mqtt.port, or write mqtt.tls: false where it has none")

    finish(main())


def test_another_program_at_the_brokers_port_is_told_of(links):
    async def main():
        def answer(_, writer):
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with links.member("a", "b", broker=links.mosquitto.broker(port=port)) as a:
                assert await failed(a) == f"the broker mqtt://127.0.0.1:{port} answers with what is not MQTT"

    finish(main())


def test_a_broker_whose_name_is_not_known_is_told_of(links):
    async def main():
        async with links.member("a", "b", broker=links.mosquitto.broker(host="nowhere.invalid")) as a:
            assert "the broker mqtt://nowhere.invalid:" in await failed(a)
            assert "name not known: nowhere.invalid" in a.link("b").detail

    finish(main())


def test_a_broker_that_passes_nothing_on_is_told_of(meeting, tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.sockets.HANDSHAKE_S", 0.5)
    rules = tmp_path / "rules"
    rules.write_text("topic write p2pfl/#\n")
    links = meeting(["allow_anonymous true"], [f"acl_file {rules}"])

    async def main():
        async with links.member("a", "b"), links.member("b", "a") as b:
            await until(lambda: b.link("a").state == LinkCondition.NO_ANSWER)

            assert b.link("a").detail == (
                f"a does not answer at the broker {links.broker}: it is not running, or does not reach the broker, or the broker does not "
                f"pass on what is published under p2pfl/{STUDY}/"
            )

    finish(main())


def test_certificates_that_cannot_be_read_are_refused_at_once(links, tmp_path):
    broken = tmp_path / "ca.pem"
    for why in ("No such file or directory", "holds no certificate in PEM"):
        with pytest.raises(ConfigError, match=f"mqtt.ca_file = '.*ca.pem': {why}"):
            links.member("a", "b", broker=links.mosquitto.broker(tls=True, ca_file=broken))
        broken.write_text("nothing")


def test_nothing_is_left_on_the_disk(links, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            places = list(tmp_path.iterdir())

            assert [place.stat().st_mode & 0o777 for place in places] == [0o700] * 2
        assert list(tmp_path.iterdir()) == []

    finish(main())


def test_a_place_that_gives_no_socket_is_told_of(links, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def main():
        async with links.member("a", "b") as a:
            assert "this machine gives no socket in " in await failed(a)

    finish(main())
    shutil.rmtree(long)


@pytest.mark.parametrize("honest", ["a", "z"])
def test_a_neighbour_whose_key_is_none_costs_no_other_link(links, honest):
    """A key of low order, with which everybody has the same secret; from the end that waits and from the one that dials."""
    bad = replace(links.endpoint("c"), public_key=z85.encode(bytes(32)))

    async def main():
        me, peers = links.endpoint(honest), [bad, links.endpoint("b")]
        made = join_broker(me, links.keys[honest][1], peers, broker=links.broker, study=STUDY)
        async with made as ours, links.member("b", honest) as b:
            await arrives(b, ours, honest, [b"there"])
            await until(lambda: ours.link("c").state == LinkCondition.WRONG_KEY)

            assert ours.link("c").detail == "c has a key on its card that is none"

    finish(main())
