"""How links are found, lost and described: addresses of both families, names that do not resolve, ends that do not answer."""

from __future__ import annotations

import errno
import socket
import threading

import pytest
import zmq
import zmq.asyncio

from links import ZeroMQLinks, arrives, finish, receive, send_when_up, until
from p2pfl.errors import ConfigError, TransportError
from p2pfl.testing.tcp_proxy import TcpProxy
from p2pfl.transports import Endpoint, LinkCondition, ZeroMQTransport, dialler, reserve_port, resolver, sockets, zeromq
from p2pfl.transports.base import LinkStates
from p2pfl.transports.resolver import Resolver


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.fixture
def links():
    links = ZeroMQLinks()
    yield links
    links.close()


def dialling(links, address, **options):
    """b, which dials a at another address than a's own."""
    me = Endpoint("b", None, links.endpoint("b").public_key)
    return ZeroMQTransport(me, links.keys["b"][1], [Endpoint("a", address, links.endpoint("a").public_key)], **options)


async def becomes(transport, peer, condition):
    await until(lambda: transport.link(peer).state == condition)
    return transport.link(peer)


async def meet(a, b):
    """Whether what b says comes to a, and the answer back."""
    await send_when_up(b, "a", [b"there"])
    assert await receive(a, 1) == [("b", [b"there"])]
    await send_when_up(a, "b", [b"back"])
    assert await receive(b, 1) == [("a", [b"back"])]


# both families


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)])
def test_who_listens_by_default_is_reached_by_both_families(links, host):
    port = links.endpoint("a") and links.ports["a"].port

    async def main():
        async with links.member("a", "b", listen=f"tcp://*:{port}") as a, dialling(links, f"tcp://{host}:{port}") as b:
            await meet(a, b)

    finish(main())


@needs_ipv6
def test_a_name_that_has_ipv6_addresses_only_is_reached(links, monkeypatch):
    monkeypatch.setattr(resolver, "look_up", lambda host: {"ip6-only": ["::1"]}[host])
    port = links.endpoint("a") and links.ports["a"].port

    async def main():
        async with links.member("a", "b", listen=f"tcp://*:{port}") as a, dialling(links, f"tcp://ip6-only:{port}") as b:
            await meet(a, b)

    finish(main())


def test_a_machine_without_ipv6_listens_for_ipv4(links, monkeypatch):
    bind, tried = zmq.asyncio.Socket.bind, []

    def without_ipv6(self, address):
        if address.startswith("tcp:"):
            tried.append(self.getsockopt(zmq.IPV6))
            if tried[-1]:
                raise zmq.ZMQError(errno.EADDRNOTAVAIL)
        return bind(self, address)

    monkeypatch.setattr(zmq.asyncio.Socket, "bind", without_ipv6)
    port = links.endpoint("a") and links.ports["a"].port

    async def main():
        async with links.member("a", "b", listen=f"tcp://*:{port}") as a, dialling(links, f"tcp://127.0.0.1:{port}") as b:
            await meet(a, b)

    finish(main())

    assert tried == [1, 0]


def test_of_several_addresses_the_first_that_works_is_used(links):
    links.endpoint("a")
    with reserve_port() as closed:
        addresses = [closed.address, links.ports["a"].address]

        async def main():
            async with links.member("a", "b") as a, dialling(links, addresses) as b:
                await meet(a, b)

                await until(lambda: b.link_counters["a"] == {"connected": 1, "not_connected": 1})
                assert b.link_counters["a"] == {"connected": 1, "not_connected": 1}
            async with dialling(links, addresses) as b:
                refused = await becomes(b, "a", LinkCondition.REFUSED)

                assert refused.detail == "; ".join(f"connection refused at {address}" for address in addresses)

        finish(main())


def test_an_address_that_moves_behind_its_name_is_found_again(links):
    links.endpoint("a")
    host, port = "moves.example", links.ports["a"].port
    answers = ["127.0.0.2"]

    async def main():
        async with dialling(links, f"tcp://{host}:{port}", lookup=lambda _: answers) as b:
            await becomes(b, "a", LinkCondition.REFUSED)
            answers[:] = ["127.0.0.1"]
            async with links.member("a", "b") as a:
                await meet(a, b)

    finish(main())


# names that do not resolve


def test_a_resolver_that_hangs_delays_no_other_link_and_not_the_end(links):
    released = threading.Event()

    def lookup(host):
        released.wait(60)
        return ["127.0.0.1"]

    async def main():
        peers = [Endpoint("c", "tcp://hangs.example:7700", links.endpoint("c").public_key), links.endpoint("a")]
        b = ZeroMQTransport(Endpoint("d", None, links.endpoint("d").public_key), links.keys["d"][1], peers, lookup=lookup)
        async with b:
            for _ in range(3):
                async with links.member("a", "d") as a:
                    await arrives(b, a, "a", [b"there"])

            assert b.link("c").state == LinkCondition.RESOLVING
            assert [thread.name for thread in threading.enumerate() if "hangs" in thread.name] == ["looks up hangs.example"]

    try:
        finish(main())
    finally:
        released.set()


def test_a_resolver_that_hangs_is_said_to(links, monkeypatch):
    monkeypatch.setattr(dialler, "RESOLVE_S", 0.05)
    released = threading.Event()

    async def main():
        async with dialling(links, "tcp://hangs.example:7700", lookup=lambda _: released.wait(60) and []) as b:
            said = await becomes(b, "a", LinkCondition.UNKNOWN_NAME)

            assert said.detail == "name not known: hangs.example (the resolver has not answered for 0.05 s)"
            assert b.link_counters["a"]["unresolved"] >= 1

    try:
        finish(main())
    finally:
        released.set()


def test_a_name_that_nobody_has_is_said(links):
    def lookup(host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def main():
        async with dialling(links, "tcp://no-such-host.invalid:7700", lookup=lookup) as b:
            said = await becomes(b, "a", LinkCondition.UNKNOWN_NAME)

            assert said.detail == "name not known: no-such-host.invalid (Name or service not known)"

    finish(main())


def test_libzmq_is_given_numbers_only(links, monkeypatch):
    given, connect = [], zmq.asyncio.Socket.connect
    monkeypatch.setattr(zmq.asyncio.Socket, "connect", lambda self, address: given.append(address) or connect(self, address))

    async def main():
        async with (
            links.member("a", "b") as a,
            dialling(links, f"tcp://some.name:{links.ports['a'].port}", lookup=lambda _: ["127.0.0.1"]) as b,
        ):
            await meet(a, b)

    finish(main())

    assert [address for address in given if address.startswith("tcp:")] == [links.ports["a"].address]


def test_a_numeric_host_asks_no_resolver():
    async def main():
        asked = Resolver(lambda host: [host, "asked"])

        assert await asked.resolve("127.0.0.1", 1.0) == ["127.0.0.1"]
        assert await asked.resolve("2001:db8::7", 1.0) == ["2001:db8::7"]
        assert await asked.resolve("name", 1.0) == ["name", "asked"]

    finish(main())


def test_a_name_is_asked_for_once_at_a_time():
    released, calls = threading.Event(), []

    def lookup(host):
        calls.append(host)
        released.wait(10)
        return ["192.0.2.1"]

    async def main():
        one = Resolver(lookup)
        for _ in range(3):
            with pytest.raises(TransportError, match="has not answered"):
                await one.resolve("slow", 0.01)
        released.set()

        assert await one.resolve("slow", 10.0) == ["192.0.2.1"]

    finish(main())

    assert calls == ["slow"]


@pytest.mark.parametrize("wrong", ["7700", "tcp://a", "tcp://a:x", "udp://a:1", "tcp://[::1:7700"])
def test_an_address_that_is_none_is_refused_at_once(links, wrong):
    links.endpoint("a")

    async def main():
        with pytest.raises(ConfigError, match=r"address of a = .*: not an address such as"):
            async with dialling(links, [links.ports["a"].address, wrong]):
                pass

    finish(main())


# ends that do not answer


def test_a_port_where_nobody_listens_is_said(links):
    async def main():
        async with links.member("b", "a") as b:
            refused = await becomes(b, "a", LinkCondition.REFUSED)

            assert refused.detail == f"connection refused at {links.ports['a'].address}"

            await until(lambda: b.link_counters["a"]["not_connected"] >= 3)

            assert b.link("a").since_s == refused.since_s  # trying again is no news

    finish(main())


def test_an_address_that_is_silent_is_said(links, monkeypatch):
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = f"tcp://127.0.0.1:{full.getsockname()[1]}"
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:  # the queue of connections that nobody accepts: the next one has no answer
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())

            async def main():
                async with dialling(links, address) as b:
                    await until(lambda: b.link("a").state not in (LinkCondition.CONNECTING, LinkCondition.RESOLVING))

                    return b.link("a")

            said = []
            finish(_kept(main(), said))
            if said[0].state == LinkCondition.HANDSHAKE_FAILED:
                pytest.skip("this system's queue of connections is never full")

            assert said[0].state == LinkCondition.NO_ANSWER
            assert said[0].detail == f"no answer at {address} (a firewall, or the machine is off)"
        finally:
            for filler in fillers:
                filler.close()


async def _kept(result, where):
    where.append(await result)


def test_a_neighbour_that_does_not_know_our_key_is_said(links):
    async def main():
        async with links.member("a", "c"), links.member("b", "a") as b:
            said = await becomes(b, "a", LinkCondition.WRONG_KEY)

            assert said.detail.endswith("does not know the key of b: it holds another study or another card")
            await until(lambda: b.link_counters["a"]["handshake_failed"] >= 1)
            assert b.link_counters["a"]["handshake_failed"] >= 1

    finish(main())


def test_another_key_than_the_cards_and_another_program_are_said(links):
    async def main():
        async with links.member("a", "b"):
            me = Endpoint("b", None, links.endpoint("b").public_key)
            impostor = Endpoint("a", links.ports["a"].address, zmq.curve_keypair()[0])
            async with ZeroMQTransport(me, links.keys["b"][1], [impostor]) as b:
                said = await becomes(b, "a", LinkCondition.HANDSHAKE_FAILED)

                assert "another key than on its card" in said.detail

    finish(main())


def test_a_link_that_is_cut_is_down_at_both_ends_and_comes_back(links):
    async def main():
        links.endpoint("a")
        cable = TcpProxy(links.ports["a"].address)
        async with cable, links.member("a", "b", heartbeat_s=1) as a, dialling(links, cable.address, heartbeat_s=1) as b:
            await meet(a, b)
            cable.cut()
            await until(lambda: not a.link("b").is_up and not b.link("a").is_up)

            assert (a.link("b").state, a.link("b").detail) == (LinkCondition.DOWN, "the connection has ended")

            cable.heal()
            await meet(a, b)

            assert a.link("b").state == b.link("a").state == LinkCondition.UP
            await until(lambda: a.link_counters["b"] == {"connected": 2, "disconnected": 1})
            assert a.link_counters["b"] == {"connected": 2, "disconnected": 1}

    finish(main())


@pytest.mark.slow
def test_a_neighbour_that_stands_still_is_silent_and_one_that_is_only_quiet_is_not(links, monkeypatch):
    monkeypatch.setattr(zeromq, "SILENT_AT_LEAST_S", 0.0)
    monkeypatch.setattr(zeromq, "MISSED_HEARTBEATS", 3)

    async def main():
        links.endpoint("a")
        cable, c = TcpProxy(links.ports["a"].address), links.member("c", "a", heartbeat_s=1)
        async with cable, c, links.member("a", "bc", heartbeat_s=1) as a, dialling(links, cable.address, heartbeat_s=1) as b:
            await meet(a, b)
            await send_when_up(c, "a", [b"here"])
            await until(lambda: a._links._beating == {"b", "c"} and b._links._beating == {"a"})
            cable.stall()
            silent = await becomes(a, "b", LinkCondition.SILENT)
            await becomes(b, "a", LinkCondition.SILENT)

            assert silent.since_s == silent.heard_s
            assert silent.is_up
            assert a.link("c").state == LinkCondition.UP

            cable.heal()
            await becomes(a, "b", LinkCondition.UP)
            await becomes(b, "a", LinkCondition.UP)

    finish(main())


# the record itself


def test_a_state_is_dated_from_its_beginning():
    clock = [1.0]
    states = LinkStates(["a"], lambda: clock[0])
    for now_s, state, detail in ((2.0, LinkCondition.REFUSED, "x"), (3.0, LinkCondition.REFUSED, "y")):
        clock[0] = now_s
        states.note("a", state, detail)
    states.begin("a", LinkCondition.CONNECTING)

    assert (states.state("a").state, states.state("a").detail, states.state("a").since_s) == (LinkCondition.REFUSED, "y", 2.0)

    states.note_received_if_up("a", is_sign_of_life=False)

    assert (states.state("a").state, states.state("a").heard_s) == (LinkCondition.REFUSED, 3.0)

    clock[0] = 4.0
    states.note_received("a")

    assert (states.state("a").state, states.state("a").since_s, states.state("a").heard_s) == (LinkCondition.UP, 4.0, 4.0)
