"""Links through a member that relays: who is let in, what it sees, and what becomes of a link when it dies."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress
from dataclasses import replace

import pytest
import zmq
from zmq.utils import z85

from links import RelayedLinks, arrives, finish, receive, send_when_up, until
from p2pfl.errors import TransportError
from p2pfl.runs.open_files import when_out_of_files
from p2pfl.transports import TRANSPORTS, Endpoint, LinkCondition, LinksByKind, Proxy, ProxyWay, RelayService
from p2pfl.transports.fair_rate import FairQueue, FairRate
from p2pfl.transports.relay_words import CHALLENGE_BYTES, GO, PROOF_BYTES, Answer, Request, is_members, new_challenge, request
from p2pfl.transports.tunnels import Tunnels
from recorder import Recorder
from site_proxy import SiteProxy


@pytest.fixture
def links():
    links = RelayedLinks()
    yield links
    links.close()


def service(links, **options):
    """Another life of the relay, in the loop of the test."""
    pairs = [(links.endpoint("a"), links.endpoint("b"))]
    settings = {"listen": links.ports["relay"].address, "mbit_s": 1000, "heartbeat_s": 1, **options}
    return RelayService(links.relay, links.keys["relay"][1], pairs, **settings)


async def meet(a, b):
    await arrives(b, a, "a", [b"there"])
    await arrives(a, b, "b", [b"back"])


def test_what_the_relay_forwards_holds_no_plaintext(links):
    said = b"a model of patients, and its header"

    async def main():
        async with Recorder(links.ports["relay"].port) as wire:
            links.relay = replace(links.relay, address=wire.address)
            async with links.member("a", "b") as a, links.member("b", "a") as b:
                await send_when_up(b, "a", [said, said * 100])

                assert await receive(a, 1) == [("b", [said, said * 100])]
        heard = b"\0".join(wire.heard)

        assert len(heard) > 100 * len(said)
        assert said[:16] not in heard
        assert b"CURVE" in heard  # it did run through there
        for name in "ab":
            assert links.keys[name][1] not in heard

    finish(main())


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_relay_that_dies_costs_the_link_until_it_is_back(links, first):
    links.beside.close()

    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            for life in range(2):
                await until(lambda: {a.link("b").state, b.link("a").state} <= {LinkCondition.RELAY, LinkCondition.DOWN})
                said = a.link("b") if first == "a" else b.link("a")
                assert life or said.detail.startswith("the relay relay: connection refused at tcp://127.0.0.1:")
                async with service(links) as relay:
                    await meet(a, b)

                    assert relay.counters["relayed"] == 1
                await until(lambda: not a.link("b").is_up and not b.link("a").is_up)

    finish(main(), 60)
    links.beside = type("Closed", (), {"close": lambda self: None})()


def test_who_is_waited_for_at_a_relay_is_said_at_both_ends(links, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.sockets.HANDSHAKE_S", 0.3)

    async def main():
        async with links.member("a", "b") as a:
            assert (a.link("b").state, a.link("b").detail) == (LinkCondition.AWAITED, "it has not come to its relay relay yet")
        async with links.member("b", "a") as b:
            await until(lambda: b.link("a").state == LinkCondition.NO_ANSWER)
            assert b.link("a").detail == "a has not come to its relay relay: it is not running, or does not reach relay"

    finish(main())


def test_a_crowd_of_strangers_does_not_keep_members_out_of_a_relay(links):
    async def main():
        crowd = [socket.create_connection(("127.0.0.1", links.ports["relay"].port)) for _ in range(60)]
        try:
            async with links.member("a", "b") as a, links.member("b", "a") as b:
                await meet(a, b)
        finally:
            for stranger in crowd:
                stranger.close()

        assert links.service.counters["evicted"] > 0

    finish(main())


def test_a_link_that_the_relay_does_not_know_is_refused_and_said(links):
    async def main():
        async with links.member("a", "z") as a:
            await until(lambda: a.link("z").state == LinkCondition.RELAY)

            assert a.link("z").detail == "the relay relay does not relay between a and z: it holds another study or another card"

    finish(main())


def test_somebody_else_behind_the_relays_address_is_found_out(links):
    stranger = zmq.curve_keypair()

    async def main():
        relay = links.relay
        links.relay = Endpoint("relay", relay.address, stranger[0])
        async with links.member("a", "b") as a:
            await until(lambda: a.link("b").state == LinkCondition.RELAY)

            # the true relay cannot check what was made for another key
            assert a.link("b").detail.startswith("the relay relay does not relay between a and b")
        async with await asyncio.start_server(lambda _, writer: writer.write(b"SSH-2.0-" + bytes(99)), "127.0.0.1", 0) as server:
            links.relay = replace(relay, address=f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            async with links.member("a", "b") as a:
                await until(lambda: a.link("b").state == LinkCondition.RELAY)

                assert a.link("b").detail == "the relay relay does not speak as a relay: another program has its port"

    finish(main())


def test_only_the_holder_of_a_key_is_let_in_and_only_once(links):
    """A request is good for one challenge, one relay and one neighbour."""
    a, b, other = (zmq.curve_keypair() for _ in range(3))
    relay = zmq.curve_keypair()
    challenge = new_challenge()
    asked = request(challenge, a, b[0], relay[0])

    assert is_members(asked, challenge, relay[1])
    assert Request.read(asked.raw) == asked
    assert not is_members(asked, new_challenge(), relay[1])
    assert not is_members(replace(asked, neighbour=other[0]), challenge, relay[1])
    assert not is_members(replace(asked, member=other[0]), challenge, relay[1])
    assert not is_members(asked, challenge, other[1])
    assert not is_members(request(challenge, (a[0], other[1]), b[0], relay[0]), challenge, relay[1])


def test_a_recorded_request_is_refused(links):
    async def main():
        port = links.ports["relay"].port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        recorded = request(await reader.readexactly(CHALLENGE_BYTES), links.keys["a"], links.keys["b"][0], links.relay.public_key).raw
        writer.write(recorded)
        assert await reader.readexactly(1) == bytes([Answer.TAKEN])
        writer.close()
        reader, again = await asyncio.open_connection("127.0.0.1", port)
        await reader.readexactly(CHALLENGE_BYTES)
        again.write(recorded)

        assert await reader.read() == bytes([Answer.REFUSED])
        assert links.service.counters["relay_refused"] == 1
        again.close()
        await asyncio.gather(writer.wait_closed(), again.wait_closed(), return_exceptions=True)

    finish(main())


async def come(links, relay, me, other):
    """A connection of a member that the relay has let in, and that waits for its neighbour there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    challenge = await reader.readexactly(CHALLENGE_BYTES)
    writer.write(request(challenge, links.keys[me], links.keys[other][0], links.relay.public_key).raw)
    assert await reader.readexactly(1) == bytes([Answer.TAKEN])
    await reader.readexactly(PROOF_BYTES)
    return reader, writer


async def joined(reader):
    while await reader.readexactly(1) != GO:
        pass


@pytest.mark.parametrize("again", ["a", "b"])
def test_an_end_that_comes_back_before_its_loss_is_noticed_has_the_other_end_come_again(links, again):
    """A router that forgets connections tells neither the relay nor the other end."""

    async def main():
        async with service(links, listen="tcp://127.0.0.1:0") as relay:
            first = {"a": await come(links, relay, "a", "b")}
            await until(lambda: relay._waiting)
            first["b"] = await come(links, relay, "b", "a")
            for reader, _ in first.values():
                await joined(reader)
            other = "b" if again == "a" else "a"
            more = [await come(links, relay, again, other) for _ in range(2)]

            assert await asyncio.wait_for(first[other][0].read(), 20) == b""
            await until(lambda: not relay.counters["relaying"])
            assert relay.counters["replaced"] == 1
            more.append(await come(links, relay, other, again))
            await asyncio.wait_for(joined(more[-1][0]), 20)
            for _, writer in (*first.values(), *more):
                writer.close()

    finish(main(), 60)


@pytest.mark.parametrize("thread", ["the relay's", "another"])
def test_a_relay_gives_a_strangers_connection_up_where_files_run_out(links, thread):
    before = tuple(when_out_of_files)  # the other relay's

    async def main():
        async with service(links, listen="tcp://127.0.0.1:0") as relay:
            member = await come(links, relay, "a", "b")
            with socket.create_connection(("127.0.0.1", relay.port)) as stranger:
                await until(lambda: len(relay._streams) == 2)
                connection = relay._streams[max(relay._streams)].socket
                (free_one,) = set(when_out_of_files) - set(before)
                if thread == "another":
                    await asyncio.to_thread(free_one)
                else:
                    free_one()
                    free_one()  # there is no other stranger

                    assert connection.fileno() < 0
                await until(lambda: len(relay._streams) == 1)

                assert connection.fileno() < 0
                assert len(stranger.recv(1000)) in (0, CHALLENGE_BYTES)
            assert relay.counters["evicted"] == 1
            neighbour = await come(links, relay, "b", "a")
            for reader, writer in (member, neighbour):
                await asyncio.wait_for(joined(reader), 20)
                writer.close()
        assert tuple(when_out_of_files) == before

    finish(main(), 60)


def test_tunnels_take_turns_by_bytes_and_who_was_silent_goes_next():
    queue = FairQueue()
    for number in range(3):
        queue.put("much", 1000, f"much {number}")
    for number in range(4):
        queue.put("little", 500, f"little {number}")
    first = [queue.take() for _ in range(3)]
    queue.put("silent", 10, "a sign of life")

    assert first == ["much 0", "little 0", "little 1"]
    assert [queue.take() for _ in range(len(queue))] == ["a sign of life", "much 1", "little 2", "little 3", "much 2"]


def test_the_rate_is_kept_by_all_together():
    async def main():
        rate, passed = FairRate(1e6), []
        async with asyncio.TaskGroup() as group:
            running = group.create_task(rate.run())
            loop = asyncio.get_running_loop()
            began_s = loop.time()

            async def send(tunnel):
                for _ in range(5):
                    await rate.take(tunnel, 10_000)
                    passed.append(loop.time() - began_s)

            await asyncio.gather(send("one"), send("other"))
            running.cancel()

        assert [took_s >= 0.01 * number for number, took_s in enumerate(passed, 1)] == [True] * 10

    finish(main())


async def both_ends(links, one, other):
    """Connections of two members that the relay has joined."""
    ends = [await come(links, links.service, *names) for names in ((one, other), (other, one))]
    for reader, _ in ends:
        await joined(reader)
    return ends


async def flood(writer):
    with suppress(ConnectionError):
        while True:
            writer.write(bytes(2**18))
            await writer.drain()


async def read_on(reader):
    while await reader.read(2**16):
        pass


async def bytes_let_past(links, near, far):
    """Bytes that the relay passes on while a byte of one pair is on its way, by the relay's own count."""
    since = links.service.counters["relayed_bytes"]
    near[1].write(b"?")
    assert await far[0].readexactly(1) == b"?"
    return links.service.counters["relayed_bytes"] - since


def test_pairs_that_flood_a_relay_do_not_hold_up_a_sign_of_life_of_another():
    links = RelayedLinks(mbit_s=4)
    a_piece_of_each = 6 * 2**16  # three pairs, both directions

    async def main():
        quiet = await both_ends(links, "a", "d")
        loud = [end for names in ("ab", "ac", "bc") for end in await both_ends(links, *names)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for reader, writer in loud for work in (flood(writer), read_on(reader))]
            await until(lambda: links.service.counters["relayed_bytes"] > 2 * a_piece_of_each)
            let_past = [await bytes_let_past(links, *quiet) for _ in range(5)]
            for task in tasks:
                task.cancel()
        writers = [writer for _, writer in (*quiet, *loud)]
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

        assert min(let_past) < a_piece_of_each / 4

    try:
        finish(main(), 60)
    finally:
        links.close()


async def is_shut(place, address):
    """Whether a connection from one address and port to another is shut."""
    with socket.socket() as intruder:
        intruder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        intruder.bind(place)
        intruder.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(20):
                await loop.sock_connect(intruder, address)
                while await loop.sock_recv(intruder, 100):
                    pass
        except TimeoutError:
            return False
        except OSError:  # at once
            return True
        return True


def test_another_program_of_the_machine_does_not_reach_the_listener_of_relayed_links(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await meet(a, b)
            await until(lambda: a._coming or b._coming)
            awaiting = a if a._coming else b
            (_, port), *_ = awaiting._coming
            before = awaiting.counters["evicted"]
            address = ("127.0.0.1", int(awaiting._links.bound_address.rpartition(":")[2]))

            assert await is_shut(("127.0.0.1", 0), address)
            assert await is_shut(("127.0.0.2", port), address)  # by the port that the neighbour's has at another address
            # a connection of the neighbour that has ended counts as well where it is only looked at then
            await until(lambda: awaiting.counters["evicted"] >= before + 2)
            await meet(a, b)

    finish(main(), 60)


def test_another_program_of_the_machine_does_not_get_into_a_tunnel():
    class Silent:
        said = b""

        async def receive(self):
            await asyncio.Event().wait()

        async def send(self, data):
            self.said += bytes(data)

        def end(self):
            pass

        close = end

    async def main():
        async with asyncio.TaskGroup() as group:
            tunnels, stream = Tunnels(group), Silent()
            offer = tunnels.offer(stream)
            source, port = (int(place.rpartition(":")[2]) for place in offer.address.split(";"))

            assert await is_shut(("127.0.0.1", 0), ("127.0.0.1", port))
            assert await is_shut(("127.0.0.2", source), ("127.0.0.1", port))
            await tunnels.close(0)

    finish(main(), 60)


def test_an_end_behind_a_proxy_reaches_the_relay(links):
    async def main():
        async with SiteProxy("http") as proxy, links.member("a", "b") as a:
            way = ProxyWay(Proxy(kind="http", host="127.0.0.1", port=proxy.port))
            async with links.member("b", "a", way_out=way) as b:
                await meet(a, b)

                assert proxy.targets == [("127.0.0.1", links.ports["relay"].port)]
                proxy.cut()
                await until(lambda: b.link("a").state == LinkCondition.RELAY)
                assert b.link("a").detail.startswith("the relay relay: connection refused at the proxy http://127.0.0.1:")

    finish(main())


def test_links_of_several_kinds_are_one_transport(links):
    plain = {}

    def member(name, peers_direct, peers_relayed, services=()):
        made = {}
        ends = {peer: Endpoint(peer, plain[peer].address, links.endpoint(peer).public_key) for peer in peers_direct}
        me = Endpoint(name, plain[name].address if name in plain else None, links.endpoint(name).public_key)
        if ends:
            made |= dict.fromkeys(ends, TRANSPORTS["zeromq"](me, links.keys[name][1], ends.values()))
        if peers_relayed:
            made |= dict.fromkeys(peers_relayed, links.member(name, peers_relayed))
        return LinksByKind(name, made, services)

    for name in "abc":
        links.endpoint(name)
        plain[name] = links.ports[name]

    async def main():
        async with member("a", "b", ""), member("b", "a", "c") as b, member("c", "", "b") as c:
            await arrives(c, b, "b", [b"from c"])
            await arrives(b, c, "c", [b"to c"])
            assert b.link("c").state == LinkCondition.UP
            assert b.link_counters["c"]["connected"] == 1
            await until(lambda: b.link("a").is_up)
            assert b.counters["connected"] == 2
            b.disconnect("c", 0.2, "too much")
            assert b.link("c").state == LinkCondition.DOWN
            assert b.link("a").is_up
            with pytest.raises(ValueError, match="'z' is no neighbour"):
                b.link("z")
            with pytest.raises(ValueError, match="'z' is no neighbour of 'b'"):
                await b.send("z", [b"x"], 1.0)

    finish(main())


def test_a_relays_key_that_nobody_made_honestly_costs_the_link_only(links):
    """X25519 refuses points of low order, such as zero."""

    async def main():
        links.relay = replace(links.relay, public_key=z85.encode(bytes(32)))
        async with links.member("a", "b") as a:
            await until(lambda: a.link("b").state == LinkCondition.RELAY)

            assert a.link("b").detail == "the relay relay has a key on its card that is none"

    finish(main())


def test_a_port_that_is_taken_is_named(links):
    async def main():
        for listen in (links.ports["relay"].address, f"tcp://*:{links.ports['relay'].port}"):
            with pytest.raises(TransportError, match=rf"relay\.listen = '{re.escape(listen)}': Address already in use"):
                async with service(links, listen=listen):
                    pass

    finish(main())


def test_a_relay_listens_on_all_interfaces(links):
    async def main():
        async with service(links, listen="tcp://*:0") as relay:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            try:
                assert (await reader.readexactly(CHALLENGE_BYTES)).startswith(b"p2pfl relay 1\n")
            finally:
                writer.close()
                await writer.wait_closed()

    finish(main())
