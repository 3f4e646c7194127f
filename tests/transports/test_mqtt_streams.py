"""What is said over a broker, without a broker: packets that nobody else can make, streams in order, and a broker's packets in bounds."""

from __future__ import annotations

import asyncio
import random

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from links import STUDY, finish, until
from p2pfl.transports.mqtt_packets import PacketFilter
from p2pfl.transports.mqtt_stream import EARLY_PACKETS, WINDOW_BYTES, WINDOW_PACKETS, MqttStream
from p2pfl.transports.mqtt_words import HEAD_BYTES, Kind, Packet, Words

KEYS = {name: zmq.curve_keypair() for name in "abc"}
STREAM = bytes(range(16))


def words(own, other, study=STUDY):
    return Words(KEYS[own][1], KEYS[own][0], KEYS[other][0], study)


# ---- words


def test_the_two_ends_of_an_edge_read_each_other():
    a, b = words("a", "b"), words("b", "a")
    packet = Packet(kind=Kind.DATA, stream=STREAM, number=2**40, data=b"sealed")

    assert a.outbox == b.inbox != b.outbox == a.inbox
    assert b.read(a.write(packet)) == packet
    assert len(a.write(packet)) == HEAD_BYTES + 6


def test_a_topic_shows_the_study_and_no_member():
    topics = {words(own, other).inbox for own in "abc" for other in "abc" if own != other}

    assert len(topics) == 6
    for topic in topics:
        assert topic.startswith(f"p2pfl/{STUDY}/")
        assert len(topic) == len(f"p2pfl/{STUDY}/") + 32
        assert not any(public.decode() in topic for public, _ in KEYS.values())


@pytest.mark.parametrize("by", ["a third member", "the receiver", "an end of another study", "a broker that changes a byte", "nobody"])
def test_what_the_other_end_has_not_written_is_no_packet(by):
    b = words("b", "a")
    packet = Packet(kind=Kind.RESET, stream=STREAM)
    written = {
        "a third member": words("c", "b").write(packet),
        "the receiver": b.write(packet),
        "an end of another study": words("a", "b", "6" * 64).write(packet),
        "a broker that changes a byte": words("a", "b").write(packet)[:-1] + b"\1",
        "nobody": b"",
    }

    assert b.read(written[by]) is None


@given(st.binary(max_size=100))
def test_no_bytes_break_the_reader(raw):
    assert words("b", "a").read(raw) is None


# ---- streams


class Broker:
    """Passes packets on between two ends of a stream, as a broker may: twice, late, or not at all."""

    def __init__(self, seed=0, *, twice=0.0, late=0, lost=lambda packet: False, data_bytes=1000):
        self.draw, self.twice, self.late, self.lost = random.Random(seed), twice, late, lost
        self.passed = {0: [], 1: []}
        self.ends = [MqttStream(STREAM, lambda packet, to=1 - i: self.post(to, packet), data_bytes) for i in (0, 1)]

    def post(self, to, packet):
        packet = Packet(kind=packet.kind, stream=packet.stream, number=packet.number, data=bytes(packet.data))
        if self.lost(packet):
            return
        for _ in range(1 + (self.draw.random() < self.twice)):
            self.passed[to].append(packet)
            asyncio.get_running_loop().call_later(0.001 * self.draw.randint(0, self.late), self.ends[to].take, packet)


async def all_of(stream):
    found = bytearray()
    while data := await stream.receive():
        found += data
    return bytes(found)


@pytest.mark.parametrize("seed", range(3))
def test_packets_that_come_twice_and_in_another_order_give_the_bytes_once_and_in_order(seed):
    async def main():
        broker = Broker(seed, twice=0.3, late=5)
        said = [random.Random(seed + 10 * i).randbytes(100_000 + i) for i in (0, 1)]

        async def say(i):
            for at in range(0, len(said[i]), 7001):
                await broker.ends[i].send(said[i][at : at + 7001])
            broker.ends[i].end()

        async with asyncio.TaskGroup() as group:
            heard = [group.create_task(all_of(end)) for end in broker.ends]
            for i in (0, 1):
                group.create_task(say(i))

        assert [task.result() for task in heard] == [said[1], said[0]]
        await until(lambda: all(end.is_over for end in broker.ends))
        assert [end.fault for end in broker.ends] == [None, None]

    finish(main())


def test_a_reader_that_stands_still_stops_the_sender_and_loses_nothing():
    async def main():
        broker = Broker(data_bytes=2**16)
        said = random.Random(1).randbytes(3 * WINDOW_BYTES)
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(broker.ends[0].send(said))
            await until(lambda: len(broker.passed[1]) * 2**16 >= WINDOW_BYTES)
            for _ in range(100):
                await asyncio.sleep(0.001)

            assert sum(len(packet.data) for packet in broker.passed[1]) == WINDOW_BYTES
            assert not sending.done()
            found = b""
            while len(found) < len(said):
                found += await broker.ends[1].receive()

            assert found == said

    finish(main())


def test_no_more_packets_are_under_way_than_a_broker_keeps():
    async def main():
        broker = Broker(lost=lambda packet: packet.kind == Kind.ACK)
        sending = asyncio.ensure_future(broker.ends[0].send(bytes(10**6)))
        await asyncio.sleep(0.01)

        assert len(broker.passed[1]) == WINDOW_PACKETS
        sending.cancel()

    finish(main())


def test_a_stream_whose_packets_are_lost_ends():
    async def main():
        broker = Broker(lost=lambda packet: packet.kind == Kind.DATA and packet.number == 1000)
        await broker.ends[0].send(bytes(3000))
        await until(lambda: any(packet.kind == Kind.ACK for packet in broker.passed[0]))

        assert not broker.ends[0].end_if_stuck(60.0)
        await asyncio.sleep(0.01)
        assert broker.ends[0].end_if_stuck(0.001)
        await asyncio.sleep(0.01)
        assert await broker.ends[1].receive() == bytes(1000)  # what came in order
        with pytest.raises(ConnectionResetError, match="the other end has given it up"):
            await broker.ends[1].receive()
        with pytest.raises(ConnectionResetError, match="closed here"):
            await broker.ends[0].send(b"more")

    finish(main())


def packet(kind, number, data=b""):
    return Packet(kind=kind, stream=STREAM, number=number, data=data)


UNFAIR = {
    "beyond the window": [packet(Kind.DATA, WINDOW_BYTES, b"x")],
    "beyond the end": [packet(Kind.END, 5), packet(Kind.DATA, 3, b"xyz")],
    "two ends": [packet(Kind.END, 5), packet(Kind.END, 6)],
    "an end before what came": [packet(Kind.DATA, 0, b"xyz"), packet(Kind.END, 2)],
    "partly twice": [packet(Kind.DATA, 0, b"xyz"), packet(Kind.DATA, 2, b"zab")],
    "an answer to what was not sent": [packet(Kind.ACK, 1, bytes(8))],
}


@pytest.mark.parametrize("case", UNFAIR)
def test_a_neighbour_that_breaks_the_rules_ends_the_stream(case):
    async def main():
        broker = Broker()
        for each in UNFAIR[case]:
            assert not broker.ends[0].is_over
            broker.ends[0].take(each)

        assert broker.ends[0].is_over
        assert broker.passed[1][-1].kind == Kind.RESET

    finish(main())


def test_packets_before_their_turn_are_bounded_in_number():
    async def main():
        broker = Broker()
        for number in range(1, 10_000):
            broker.ends[0].take(packet(Kind.DATA, number, b"x"))

        assert len(broker.ends[0]._early) == EARLY_PACKETS

    finish(main())


def test_packets_that_have_come_already_take_no_place():
    async def main():
        broker = Broker()
        for number in [*range(100), *range(100)]:
            broker.ends[0].take(packet(Kind.DATA, number, b"x"))

        assert broker.ends[0]._early == {}
        assert await broker.ends[0].receive() == b"x" * 100

    finish(main())


# ---- packets of a broker


def publish(payload, *, topic=b"p2pfl/x", qos=1, number=b"\0\7"):
    rest = len(topic).to_bytes(2, "big") + topic + (number if qos else b"") + payload
    size, length = len(rest), bytearray()
    while True:
        size, low = size >> 7, size & 0x7F
        length.append(low | (0x80 if size else 0))
        if not size:
            return bytes([0x30 | qos << 1]) + bytes(length) + rest


WELCOME_5 = bytes.fromhex("200800000527 00000400".replace(" ", ""))
"""CONNACK of MQTT 5 with a Maximum Packet Size of 1024."""


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 10_000])
def test_a_brokers_packets_pass_as_they_are_but_those_that_are_too_large(piece_bytes):
    line = PacketFilter(200, is_v5=False)
    came = b"".join([b"\x20\2\0\0", publish(b"small"), publish(bytes(5000)), publish(bytes(300), qos=0), publish(b"after"), b"\xd0\0"])
    passed = b"".join(line.pass_on(came[i : i + piece_bytes]) for i in range(0, len(came), piece_bytes))

    assert passed == b"".join([b"\x20\2\0\0", publish(b"small"), publish(b""), publish(b"", qos=0), publish(b"after"), b"\xd0\0"])
    assert line.num_cut == 2
    assert len(line._held) == 0


def test_what_a_broker_announces_is_heard():
    line = PacketFilter(10_000, is_v5=True)

    assert line.pass_on(WELCOME_5[:3]) == b""
    assert line.announced_bytes is None
    assert line.pass_on(WELCOME_5[3:]) == WELCOME_5
    assert line.announced_bytes == 1024


@pytest.mark.parametrize(
    ("came", "is_v5"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n\xff\xff\xff\xff\xff", False),
        (b"\x30\xff\xff\xff\xff\1", False),
        (publish(bytes(5000)), True),
        (b"\x90\xff\xff\x7f", False),
        (b"\x30\xff\xff\x7f\xff\xff" + bytes(70_000), True),
        (b"\x20\3\0\0\x7f", True),
    ],
)
def test_what_is_no_mqtt_ends_the_connection(came, is_v5):
    with pytest.raises(ValueError, match=r"MQTT|at most 200"):
        PacketFilter(200, is_v5=is_v5).pass_on(came if came[0] in b"S\x20" else b"\x20\3\0\0\0" + came)
