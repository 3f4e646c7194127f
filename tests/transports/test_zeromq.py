"""Links over ZeroMQ: what an attacker, a broken cable or a dead process can do to them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import struct
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from links import ZeroMQLinks, arrives, finish, receive, send_until_refused, send_when_up, until
from p2pfl.errors import ConfigError, TransportError
from p2pfl.testing.tcp_proxy import TcpProxy
from p2pfl.transports import MAX_FRAME_BYTES, Endpoint, LinkCondition, ZeroMQTransport, reserve_port

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"  # ZMTP 3.0: signature and version; mechanism, as-server and filler follow


@pytest.fixture
def links():
    links = ZeroMQLinks()
    yield links
    links.close()


@contextmanager
def raw_socket(kind, address, **options):
    """A socket of somebody who does not use our transport."""
    with zmq.asyncio.Context() as context, context.socket(kind) as client:
        for option, setting in {"linger": 0, **options}.items():
            setattr(client, option, setting)
        client.connect(address)
        yield client


def curve(links, name, server):
    """Options of a raw socket that holds a member's keys."""
    return {
        "curve_publickey": links.endpoint(name).public_key,
        "curve_secretkey": links.keys[name][1],
        "curve_serverkey": links.endpoint(server).public_key,
    }


@asynccontextmanager
async def linked_pair(links, **options):
    """a, which listens, and b, which dials it, with the link up."""
    async with links.member("a", "b", **options) as a, links.member("b", "a", **options) as b:
        await arrives(b, a, "a", [b"up"])
        yield a, b


async def nothing_came(a, b):
    """Whether the next message that *a* delivers is the one that b sends now."""
    await send_when_up(b, "a", [b"first"])
    return await receive(a, 1) == [("b", [b"first"])]


# who may connect


def test_an_unknown_peer_with_valid_keys_of_its_own_is_refused_and_counted(links, caplog):
    caplog.set_level(logging.WARNING)

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b, links.member("unknown", "a") as unknown:
            await until(lambda: a.counters["unauthorized"] and unknown.counters["handshake_failed"])
            with pytest.raises(TransportError, match="no link from unknown to a"):
                await unknown.send("a", [b"let me in"], 1.0)

            assert await nothing_came(a, b)
            assert unknown.counters["connected"] == 0
            await until(lambda: a.counters["connected"] == 1)
            assert a.counters["connected"] == 1

    finish(main())

    assert "a: refused (unauthorized, 1 so far): key" in caplog.text


def test_who_was_refused_is_let_in_once_it_is_a_neighbour(links):
    async def main():
        async with links.member("b", "a") as b:
            async with links.member("a", "c") as a:
                await until(lambda: a.counters["unauthorized"] == 2)
            async with links.member("a", "bc") as a:
                assert await nothing_came(a, b)

    finish(main())


@pytest.mark.parametrize("options", [{}, {"plain_username": b"b", "plain_password": b"b"}], ids=["null", "plain"])
def test_a_client_without_encryption_is_refused(links, options):
    async def main():
        async with linked_pair(links) as (a, b):
            with raw_socket(zmq.DEALER, a.bound_address, **options) as client:
                for _ in range(10):
                    await client.send(b"in the clear")
                await until(lambda: a.counters["disconnected"])

                assert await nothing_came(a, b)
            await until(lambda: a.counters["connected"] == 1)
            assert a.counters["connected"] == 1

    finish(main())


def test_a_holder_of_the_wrong_key_is_never_connected_to(links):
    async def main():
        async with linked_pair(links) as (a, _):
            public_key, _ = zmq.curve_keypair()
            impostor = Endpoint("a", a.me.address, public_key)
            async with ZeroMQTransport(Endpoint("c", None, links.endpoint("c").public_key), links.keys["c"][1], [impostor]) as c:
                await until(lambda: c.counters["handshake_failed"] >= 2)
                with pytest.raises(TransportError, match="no link from c to a"):
                    await c.send("a", [b"secret"], 1.0)

                assert c.counters["connected"] == 0

    finish(main())


def test_a_connection_with_a_routing_id_of_its_own_is_not_heard(links):
    async def main():
        async with links.member("a", "bc") as a, links.member("c", "a") as c:
            with raw_socket(zmq.DEALER, a.bound_address, routing_id=b"c", **curve(links, "b", "a")) as client:
                await client.send(b"hello")
                await until(lambda: a.counters["routing_id"])

            await send_when_up(c, "a", [b"first"])

            assert await receive(a, 1) == [("c", [b"first"])]

    finish(main())


def test_the_sender_is_the_key_and_not_a_name_in_the_message(links):
    async def main():
        async with links.member("a", "bc") as a:
            with raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a")) as client:
                await client.send_multipart([b"c", b"from c"])

                assert await receive(a, 1) == [("b", [b"c", b"from c"])]

    finish(main())


def test_without_somebody_to_answer_for_keys_nobody_gets_in(links, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.sockets.HANDSHAKE_S", 0.3)

    async def main():
        async with links.member("a", "b") as a:
            a._readers[0].cancel()
            a._own_sockets[0].close()  # what _readers[0] answers on
            async with links.member("b", "a") as b:
                await until(lambda: a.counters["handshake_failed"])

                assert b.counters["connected"] == a.counters["connected"] == 0

    finish(main())


# what may come


def test_messages_of_more_than_two_frames_are_dropped_and_counted(links):
    async def main():
        async with links.member("a", "b") as a:
            with raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a")) as client:
                for frames in ([b"x"] * 3, [b""] * 1000, [b"1", b"2"], [b"x"] * 4, [b"3"]):
                    await client.send_multipart(frames)

                assert await receive(a, 2) == [("b", [b"1", b"2"]), ("b", [b"3"])]
                assert a.counters["frame_count"] == 3

    finish(main())


@pytest.mark.parametrize(("sender", "receiver"), [("a", "b"), ("b", "a")])
def test_a_frame_above_the_limit_cuts_the_link_which_recovers(links, sender, receiver):
    async def main():
        async with (
            links.member(sender, receiver, max_frame_bytes=2**20) as ours,
            links.member(receiver, sender, max_frame_bytes=2**16) as theirs,
        ):
            await send_when_up(ours, receiver, [bytes(2**16)])

            assert await receive(theirs, 1) == [(sender, [bytes(2**16)])]  # the limit itself is allowed

            await ours.send(receiver, [bytes(2**16 + 1)], 1.0)
            await until(lambda: theirs.counters["disconnected"] == 1)
            await until(lambda: theirs.counters["connected"] == 2)
            await arrives(ours, theirs, receiver, [b"small again"])

    finish(main())


def test_an_announced_size_of_2_tib_is_not_allocated(links):
    async def main():
        async with linked_pair(links) as (a, b):
            address = ("127.0.0.1", int(a.bound_address.rpartition(":")[2]))
            reader, writer = await asyncio.open_connection(*address)
            mechanism = b"CURVE".ljust(20, b"\0")
            writer.write(GREETING[:10] + b"\x03\x00" + mechanism + bytes(32) + b"\x06" + struct.pack(">Q", 2**41) + b"x" * 1000)
            await reader.read()  # until libzmq closes the connection
            writer.close()

            assert await nothing_came(a, b)

    finish(main())


def test_ten_thousand_random_frames_are_survived_and_not_delivered(links):
    async def main():
        draw = random.Random(20261123)
        async with linked_pair(links) as (a, b):
            address = ("127.0.0.1", int(a.bound_address.rpartition(":")[2]))
            mechanism = b"CURVE".ljust(20, b"\0")
            greeting = GREETING[:10] + b"\x03\x00" + mechanism + bytes(32)
            openings = [b"", GREETING, greeting, greeting + b"\x04\xc8\x05HELLO\x01\x00"]
            for i in range(10_000):
                await until(lambda: a.counters["disconnected"] > i - 50)  # noqa: B023 - awaited here; the queue of a listener is short
                with socket.create_connection(address) as connection:
                    connection.sendall(openings[i % len(openings)] + draw.randbytes(draw.choice((1, 10, 64, 200, 1000))))
            await until(lambda: a.counters["disconnected"] == 10_000)

            assert await nothing_came(a, b)
            await until(lambda: a.counters["connected"] == 1)
            assert a.counters["connected"] == 1

    finish(main(), 60.0)


# broken cables and dead processes


def test_a_cut_cable_is_known_and_the_link_returns_when_it_is_healed(links):
    async def main():
        a = links.member("a", "b")
        async with a, TcpProxy(a.bound_address) as cable:
            dialled = Endpoint("a", cable.address, links.endpoint("a").public_key)
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [dialled]) as b:
                for _ in range(2):
                    await send_when_up(b, "a", [b"there"])
                    await receive(a, 1)
                    await send_when_up(a, "b", [b"back"])

                    assert await receive(b, 1) == [("a", [b"back"])]

                    cable.cut()

                    assert (await send_until_refused(a, "b", b"x"))[1] == "no link from a to b"
                    assert (await send_until_refused(b, "a", b"x"))[1] == "no link from b to a"

                    cable.heal()
                await send_when_up(b, "a", [b"again"])

    finish(main())


def test_a_bit_changed_on_the_way_is_never_delivered_and_the_link_recovers(links):
    async def main():
        a = links.member("a", "b")
        async with a, TcpProxy(a.bound_address) as cable:
            dialled = Endpoint("a", cable.address, links.endpoint("a").public_key)
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [dialled]) as b:
                for sender, receiver in ((a, b), (b, a)):
                    await send_when_up(b, "a", [b"up"])
                    await receive(a, 1)
                    ended = receiver.counters["disconnected"]
                    cable.flip()
                    await sender.send(receiver.me.name, [b"weights"], 1.0)
                    await until(lambda: receiver.counters["disconnected"] > ended)  # noqa: B023 - awaited here
                    await arrives(sender, receiver, receiver.me.name, [b"next"])

    finish(main())


def test_a_stalled_cable_fills_the_queue_and_loses_nothing(links):
    async def main():
        a = links.member("a", "b", max_queued=4)
        async with a, TcpProxy(a.bound_address) as cable:
            dialled = Endpoint("a", cable.address, links.endpoint("a").public_key)
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [dialled], max_queued=4) as b:
                await send_when_up(b, "a", [b"up"])
                await receive(a, 1)
                for sender, receiver in ((a, b), (b, a)):
                    cable.stall()
                    taken, why = await send_until_refused(sender, receiver.me.name, bytes(2**20), 0.1)

                    assert why == f"queue from {sender.me.name} to {receiver.me.name} full for 0.1 s"
                    assert 4 <= taken <= 4 + 32  # what the kernel and the cable hold; theirs grows up to 6 MB a socket

                    cable.heal()

                    assert [frames[0] for _, frames in await receive(receiver, taken)] == [b"%d" % i for i in range(taken)]
                await until(lambda: a.counters == b.counters == {"connected": 1})
                assert a.counters == b.counters == {"connected": 1}

    finish(main())


def test_a_peer_that_dies_while_its_messages_wait_leaves_them_behind(links):
    async def main():
        async with links.member("a", "bc", max_queued=4) as a, links.member("c", "a") as c:
            await send_when_up(c, "a", [b"up"])
            async with links.member("b", "a", max_queued=4, linger_s=0) as b:
                await send_when_up(b, "a", [b"up"])
                taken, why = await send_until_refused(b, "a", bytes(2**20), 0.2, at_least=8)
            waiting = await receive(a, 2 + 4)  # c's, b's and what certainly came over

            assert why == "queue from b to a full for 0.2 s"
            assert taken >= 8
            assert waiting[-1] == ("b", [b"%d" % 3, bytes(2**20)])

            # the end of the connection is known once what came before it has been read
            async with asyncio.TaskGroup() as tasks:
                draining = tasks.create_task(receive(a, taken), name="reads the rest")
                await until(lambda: a.counters["disconnected"])
                draining.cancel()
            await send_until_refused(a, "b", b"x")
            await send_when_up(a, "c", [b"served"])

            assert await receive(c, 1) == [("a", [b"served"])]

    finish(main())


def test_a_late_message_of_an_old_connection_does_not_change_the_way_back(links):
    async def main():
        async with links.member("a", "b") as a:
            with raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a")) as old:
                await old.send(b"old")
                await receive(a, 1)
                with raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a")) as new:
                    await new.send(b"new")
                    await receive(a, 1)
                    await old.send(b"late")
                    await receive(a, 1)
                    await a.send("b", [b"to the newest"], 1.0)

                    assert await new.recv_multipart() == [b"to the newest"]
                await until(lambda: a.counters["disconnected"] == 1)
                await a.send("b", [b"the old one is what is left"], 1.0)

                assert await old.recv_multipart() == [b"the old one is what is left"]

    finish(main())


CHILD = """
import asyncio, sys
from p2pfl.transports import Endpoint, ZeroMQTransport

async def main():
    (peer, address, key), (name, public, secret) = eval(sys.argv[1])
    async with ZeroMQTransport(Endpoint(name, None, public), secret, [Endpoint(peer, address, key)]) as transport:
        while True:
            try:
                await transport.send(peer, [b"alive"], 1.0)
                break
            except Exception:
                await asyncio.sleep(0.01)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def child(links, name, peer):
    """A member in a process of its own, which says that it is alive and then reads into its queue only."""
    dialled = links.endpoint(peer)
    arguments = ((peer, dialled.address, dialled.public_key), (name, *links.keys[name]))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, repr(arguments), env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_is_known_and_others_are_served(links, blow):
    async def main():
        links.endpoint("c")
        async with (
            links.member("a", "bc") as a,
            links.member("b", "a") as b,
            child(links, "c", "a") as process,
        ):
            assert await receive(a, 1) == [("c", [b"alive"])]

            process.send_signal(blow)
            taken, why = await send_until_refused(a, "c", bytes(2**20), 0.2)
            if blow == signal.SIGKILL and "full" in why:  # a busy machine tells of the end when the queue is full already
                await until(lambda: a.counters["disconnected"])
                _, why = await send_until_refused(a, "c", bytes(2**20), 0.2)

            # a stopped process still has its kernel: its link stays, and fills
            assert why == ("no link from a to c" if blow == signal.SIGKILL else "queue from a to c full for 0.2 s")
            assert taken <= 2 * links.max_queued + 32
            assert await nothing_came(a, b)
            if blow == signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
                await send_when_up(a, "c", [b"welcome back"])

    finish(main())


# addresses and closing


def test_who_has_no_address_dials_even_if_its_name_sorts_first():
    links = ZeroMQLinks(hidden="a")

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await send_when_up(a, "b", [b"from behind a firewall"])

            assert await receive(b, 1) == [("a", [b"from behind a firewall"])]

            await b.send("a", [b"answer"], 1.0)

            assert await receive(a, 1) == [("b", [b"answer"])]
            assert a.bound_address is None

    finish(main())
    links.close()


def test_an_edge_is_one_connection(links):
    async def main():
        async with linked_pair(links) as (a, b):
            await send_when_up(a, "b", [b"x"])
            await receive(b, 1)

            await until(lambda: (a.counters, b.counters) == ({"connected": 1}, {"connected": 1}))
            assert (a.counters, b.counters) == ({"connected": 1}, {"connected": 1})
            assert b.bound_address is None

    finish(main())


def test_faults_in_keys_and_addresses_are_told_when_the_transport_is_made(links):
    a, b = links.endpoint("a"), links.endpoint("b")
    secret = links.keys["a"][1]
    with pytest.raises(ConfigError, match="address of a and b: none given"):
        ZeroMQTransport(Endpoint("a", None, a.public_key), secret, [Endpoint("b", None, b.public_key)])
    with pytest.raises(ValueError, match="secret key of a: does not belong"):
        ZeroMQTransport(a, links.keys["b"][1], [b])
    with pytest.raises(ValueError, match=r"public key of b = b'short': 40 bytes of z85"):
        ZeroMQTransport(a, secret, [Endpoint("b", None, b"short")])
    with pytest.raises(ValueError, match="two members have the same"):
        ZeroMQTransport(a, secret, [Endpoint("b", None, a.public_key)])


def test_an_address_that_cannot_be_used_says_whose_fault_it_is(links):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as busy:
            taken = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
            with pytest.raises(TransportError, match=f"listen = '{taken}': Address already in use"):
                async with links.member("a", "b", listen=taken):
                    pass
        for wrong in ("127.0.0.1:7700", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "carrier-pigeon://127.0.0.1:1"):
            with pytest.raises(ConfigError, match=r"listen = .*not an address such as"):
                async with links.member("a", "b", listen=wrong):
                    pass
        b = ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [Endpoint("a", "7700", links.endpoint("a").public_key)])
        with pytest.raises(ConfigError, match="address of a = '7700': not an address such as"):
            async with b:
                pass

    finish(main())


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://0.0.0.0:0", "tcp://[::1]:0"])
def test_port_0_is_told_after_binding(links, listen):
    if "[" in listen and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")

    async def main():
        async with links.member("a", "b", listen=listen) as a:
            address = a.bound_address.replace("0.0.0.0", "127.0.0.1")
            dialled = Endpoint("a", address, links.endpoint("a").public_key)
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [dialled]) as b:
                assert await nothing_came(a, b)

    finish(main())


def test_closing_waits_for_a_stuck_link_without_stopping_the_loop(links):
    async def main():
        async with links.member("a", "b") as a, asyncio.TaskGroup() as tasks:
            is_stuck = asyncio.Event()

            async def leave():
                async with links.member("b", "a", linger_s=15.0) as b:
                    await send_when_up(b, "a", [b"up"])
                    await send_until_refused(b, "a", bytes(2**20), 0.2)
                    is_stuck.set()

            leaving, turns = tasks.create_task(leave(), name="leaves"), 0
            await is_stuck.wait()
            while turns < 10:
                await asyncio.sleep(0.01)
                turns += 1

            assert turns >= 10
            assert not leaving.done()

            reading = tasks.create_task(receive(a, 10_000), name="reads what it waits with")
            await leaving
            reading.cancel()

    finish(main())


# reserved ports


def test_a_reserved_port_can_be_bound_by_zeromq_and_again_after_a_close():
    with reserve_port() as port:
        for _ in range(3):
            # leaving a context waits until its listeners are closed
            with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
                router.linger = dealer.linger = 0
                router.bind(port.address)
                dealer.connect(port.address)
                dealer.send(b"reached")

                assert router.poll(5000)
                assert router.recv_multipart()[1:] == [b"reached"]


def test_a_reserved_port_is_given_to_nobody_else():
    sockets = [socket.socket() for _ in range(500)]
    with reserve_port() as port:
        for other in sockets:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
        given = {other.getsockname()[1] for other in sockets}
        for other in sockets:
            other.close()

        assert port.port not in given
        assert len(given) == 500
        assert port.address == f"tcp://127.0.0.1:{port.port}"


def test_the_limit_of_a_frame_leaves_room_for_a_chunk_of_1_mib():
    assert MAX_FRAME_BYTES == 2**20 + 2**16


# who is disconnected


def test_every_connection_of_a_disconnected_member_ends_and_nobody_elses(links):
    async def main():
        async with links.member("a", "bc") as a, links.member("c", "a") as c:
            await send_when_up(c, "a", [b"here"])
            with ExitStack() as opened:
                for _ in range(2):  # as many as the door lets one member have
                    await opened.enter_context(raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a"))).send(b"here")
                await receive(a, 3)
                before = a.counters["disconnected"]
                a.disconnect("b", 30.0, "too much")
                await until(lambda: a.counters["disconnected"] >= before + 2)
                _again = [opened.enter_context(raw_socket(zmq.DEALER, a.bound_address, **curve(links, "b", "a"))) for _ in range(2)]
                await until(lambda: a.counters["handshake_failed"] >= 2)  # of the first two, too, where libzmq has not given up
                await c.send("a", [b"still here"], 1.0)

                assert await receive(a, 1) == [("c", [b"still here"])]
                await until(lambda: a.link_counters["c"]["connected"] == 1)
                assert a.link_counters["c"]["connected"] == 1

    finish(main())


def test_who_is_excluded_is_told_so(links):
    async def main():
        async with linked_pair(links) as (a, b):
            a.disconnect("b", 30.0, "too much")
            await until(lambda: b.link("a").state == LinkCondition.HANDSHAKE_FAILED)

            assert "has excluded b for a while" in b.link("a").detail

    finish(main())
