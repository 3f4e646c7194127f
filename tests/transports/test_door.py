"""The door over real connections: unknown peers are few, nobody sends without end, and links that are up go on."""

from __future__ import annotations

import asyncio
import errno
import resource
import signal
import socket
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
import zmq

from attackers import (
    RawCurve,
    anonymous_bytes,
    connect,
    endless_message,
    member_at,
    open_files_of,
    silent_connections,
    sodium,
    unfinished_command,
    wrong_key_handshakes,
)
from links import ZeroMQLinks, finish, receive, send_when_up, until
from networks import Institutions, plan_of
from p2pfl.errors import TransportError
from p2pfl.governance.identity import Identity
from p2pfl.transports import MAX_FRAME_BYTES, Endpoint, ZeroMQTransport
from p2pfl.transports.admission import Account, Admission
from p2pfl.transports.door import ENCRYPTED_BYTES, Door
from thorough import LONG, long_or_short

needs_sodium = pytest.mark.skipif(sodium() is None, reason="no libsodium to write CURVE by hand with")
MIB = 2**20
PLACES = Admission(member_bytes=1)


@pytest.fixture
def links():
    links = ZeroMQLinks()
    yield links
    links.close()


def port_of(transport):
    return int(transport.bound_address.rpartition(":")[2])


async def keep_up(a, b):
    """Whether messages go both ways over the link that there is."""
    await b.send("a", [b"there"], 5.0)
    await a.send("b", [b"back"], 5.0)
    return await receive(a, 1) == [("b", [b"there"])] and await receive(b, 1) == [("a", [b"back"])]


async def has_ended(line):
    """Whether the other end has ended a connection, over which its greeting may have come before."""
    line.setblocking(False)
    try:
        async with asyncio.timeout(0.001):
            while await asyncio.get_running_loop().sock_recv(line, 100):
                pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


async def send_until_shut(line, data):
    """Send over and over; returns when the other end has ended the connection."""
    line.setblocking(False)
    with suppress(ConnectionError):
        while True:
            await asyncio.get_running_loop().sock_sendall(line, data)
            await asyncio.sleep(0.01)


class Looks:
    """The looks that a door takes at its connections; a sender that waits for them measures bytes and no speed of this machine."""

    def __init__(self, transport, monkeypatch):
        self._door, self._taken, self._changed = transport._door, 0, threading.Condition()
        self._look = self._door._look
        monkeypatch.setattr(self._door, "_look", self._count)

    def _count(self):
        found = self._look()
        with self._changed:
            self._taken += 1
            self._changed.notify_all()
        return found

    def wait(self):
        """Wait until the door has weighed all that lies in front of it now."""
        with self._changed:
            due = self._taken + 3  # one may be under way, and what it found is weighed before the next one
            assert self._changed.wait_for(lambda: self._taken >= due, 30.0)


def endless_mebibytes(evil, part, looks):
    """Send a message without end, a mebibyte a look of the door; bytes sent until the other end cut it off."""
    sent = 0
    while sent < 64 * MIB and (more := endless_message(evil, part, MIB)):
        sent += more
        looks.wait()
    return sent


# unknown peers


@pytest.mark.parametrize("listen", ["127.0.0.1", "*"])
def test_silent_unknown_peers_are_few_and_the_link_that_is_up_stays(links, listen):
    """At all addresses a listener takes IPv4 and IPv6, where there is IPv6, and has the former in the form of the latter."""

    async def main():
        address = f"tcp://{listen}:{links.endpoint('a').address.rpartition(':')[2]}"
        async with links.member("a", "bc", listen=address) as a, links.member("b", "a") as b:
            await send_when_up(b, "a", [b"up"])
            await receive(a, 1)
            with ExitStack() as unknown:
                lines = [unknown.enter_context(connect(port_of(a), "127.0.0.2")) for _ in range(60)]
                await until(lambda: a.counters["evicted"] == 60 - PLACES.places_per_source)
                async with links.member("c", "a") as c:
                    await send_when_up(c, "a", [b"let in"])

                    assert await receive(a, 1) == [("c", [b"let in"])]
                    assert await keep_up(a, b)

                ended = sum([await has_ended(line) for line in lines])

                assert ended >= 60 - PLACES.places_per_source - 1
            await until(lambda: a.link_counters["b"]["connected"] == 1)
            assert a.link_counters["b"]["connected"] == 1

    finish(main())


def test_an_unknown_peer_that_sends_more_than_a_handshake_is_shut(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await send_when_up(b, "a", [b"up"])
            await receive(a, 1)
            with connect(port_of(a)) as line:
                await send_until_shut(line, unfinished_command(MAX_FRAME_BYTES)[:500_000])

            await until(lambda: a.counters["oversent"])
            assert a.counters["oversent"] == 1
            assert await keep_up(a, b)

    finish(main())


def test_a_listener_that_floods_its_dialler_before_the_handshake_is_shut(links):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            impostor = Endpoint("a", f"tcp://127.0.0.1:{server.getsockname()[1]}", links.endpoint("a").public_key)
            server.setblocking(False)
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [impostor]) as b:
                while not b.counters["oversent"]:  # a busy machine may end the handshake before the door has looked
                    line, _ = await asyncio.get_running_loop().sock_accept(server)
                    with line:
                        await send_until_shut(line, unfinished_command(MAX_FRAME_BYTES)[:500_000])

    finish(main())


@pytest.mark.parametrize(("place", "fails"), [("os.dup", OSError(errno.EMFILE, "")), ("p2pfl.transports.door._can_open", False)])
def test_where_files_run_out_the_newest_unknown_peer_goes_and_links_stay(links, monkeypatch, place, fails):
    def fail(*_):
        if isinstance(fails, OSError):
            raise fails
        return fails

    async def main():
        async with links.member("a", "bc") as a, links.member("b", "a") as b:
            await send_when_up(b, "a", [b"up"])
            await receive(a, 1)
            with monkeypatch.context() as short:
                short.setattr(place, fail)
                with connect(port_of(a)) as line:
                    while not await has_ended(line):
                        pass

                await until(lambda: a.counters["evicted"] == 1)

                assert await keep_up(a, b)

            async with links.member("c", "a") as c:
                await send_when_up(c, "a", [b"again"])

                assert await receive(a, 1) == [("c", [b"again"])]

    finish(main())


def test_a_door_that_breaks_ends_the_node_and_says_so(links, monkeypatch):
    async def main():
        async with links.member("a", "b") as a:
            monkeypatch.setattr(a._door._admission, "arrive", None)
            with connect(port_of(a)):
                await a.receive()

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(BaseExceptionGroup) as raised:
        finish(main())

    assert raised.group_contains(RuntimeError, match="the door of a has broken")


# members


@needs_sodium
@pytest.mark.parametrize("part", [b"", bytes(40), bytes(2**16)], ids=["empty", "short", "long"])
def test_a_member_that_sends_a_message_without_end_is_cut_off(links, part, monkeypatch):
    async def main():
        async with links.member("a", "bc", max_frame_bytes=2**16) as a, links.member("b", "a", max_frame_bytes=2**16) as b:
            await send_when_up(b, "a", [b"up"])
            await receive(a, 1)
            keys = (links.endpoint("c").public_key, links.keys["c"][1])
            evil = await asyncio.to_thread(member_at, port_of(a), keys, links.endpoint("a").public_key)
            with evil.line:
                evil.send(b"")  # as libzmq makes itself known
                sent = await asyncio.to_thread(endless_mebibytes, evil, part, Looks(a, monkeypatch))

            assert sent < 32 * MIB
            await until(lambda: a.counters["oversent"])
            assert a.counters["oversent"] == 1
            assert await keep_up(a, b)

    finish(main())


@needs_sodium
def test_a_listener_that_sends_a_message_without_end_is_cut_off(links, monkeypatch):
    async def main():
        keys = links.endpoint("a").public_key, links.keys["a"][1]
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = Endpoint("a", f"tcp://127.0.0.1:{server.getsockname()[1]}", keys[0])
            async with ZeroMQTransport(links.endpoint("b"), links.keys["b"][1], [place], max_frame_bytes=2**16) as b:
                line, _ = await asyncio.to_thread(server.accept)
                with line:
                    evil = await asyncio.to_thread(RawCurve, line, keys, None)
                    await until(lambda: b.link("a").is_up)
                    sent = await asyncio.to_thread(endless_mebibytes, evil, bytes(2**16), Looks(b, monkeypatch))

                assert sent < 32 * MIB
                await until(lambda: b.counters["oversent"])
                assert b.counters["oversent"] == 1
                await until(lambda: b.link_counters["a"]["disconnected"])

    finish(main())


@needs_sodium
def test_a_member_that_leaves_unread_messages_behind_and_comes_back_is_held_to_its_bytes(links):
    """Each time it fills the queue of a new connection, while nobody reads."""

    async def main():
        async with links.member("a", "c", max_queued=4, max_frame_bytes=2**16) as a:
            keys = (links.endpoint("c").public_key, links.keys["c"][1])
            connections = refused = 0
            while refused < 3:
                try:
                    evil = await asyncio.to_thread(member_at, port_of(a), keys, links.endpoint("a").public_key)
                except ConnectionError:  # reset: nobody may come in
                    refused += 1
                    continue
                connections += 1
                with evil.line, suppress(OSError):
                    evil.send(b"")
                    for _ in range(6):
                        evil.send(bytes(2**16), more=True)
                        evil.send(bytes(2**16))

            assert connections < 100

            async with links.member("c", "a") as c, asyncio.TaskGroup() as tasks:
                tasks.create_task(send_when_up(c, "a", [b"read again"]), name="sends once it may come in")
                while (read := await receive(a, 1)) != [("c", [b"read again"])] and not read[0][1][0].strip(b"\0"):
                    pass  # of what was left behind

                assert read == [("c", [b"read again"])]

    finish(main(), 60.0)


def test_a_member_has_two_connections_and_the_oldest_goes(links):
    async def main():
        async with links.member("a", "b") as a:
            with zmq.Context() as context, ExitStack() as opened:
                for number in range(3):
                    dealer = opened.enter_context(context.socket(zmq.DEALER))
                    dealer.linger = 0
                    dealer.curve_publickey, dealer.curve_secretkey = links.endpoint("b").public_key, links.keys["b"][1]
                    dealer.curve_serverkey = links.endpoint("a").public_key
                    dealer.reconnect_ivl = -1
                    dealer.connect(a.bound_address)
                    dealer.send(b"%d" % number)
                    await receive(a, 1)
                await until(lambda: a.counters["disconnected"])
                await a.send("b", [b"to the newest"], 1.0)

                assert await asyncio.to_thread(dealer.recv) == b"to the newest"
                await until(lambda: a.counters["replaced"] == a.counters["disconnected"] == 1)
                assert a.counters["replaced"] == a.counters["disconnected"] == 1

    finish(main())


def test_an_honest_queue_that_nobody_reads_is_not_too_much(links, monkeypatch):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            looks = {each: Looks(each, monkeypatch) for each in (a, b)}
            for sender, receiver in ((a, b), (b, a)):
                await send_when_up(b, "a", [b"up"])
                await receive(a, 1)
                taken = 0
                try:
                    while True:
                        await sender.send(receiver.me.name, [bytes(MAX_FRAME_BYTES), bytes(MAX_FRAME_BYTES)], 0.3)
                        taken += 1
                except TransportError:
                    pass
                await asyncio.to_thread(looks[receiver].wait)

                assert len(await receive(receiver, taken)) == taken
            await until(lambda: a.counters == b.counters == {"connected": 1})
            assert a.counters == b.counters == {"connected": 1}

    finish(main())


def test_a_message_that_is_read_before_its_connection_was_told_of_still_shows_whose_it_is():
    async def main():
        door = Door(Admission(member_bytes=2**20), asyncio.get_running_loop(), lambda *_: None)
        with socket.create_server(("127.0.0.1", 0)) as server:
            door.listens_at(server.getsockname()[1])
            with socket.create_connection(server.getsockname()) as far, server.accept()[0] as near:
                near.sendall(bytes(ENCRYPTED_BYTES + 1))
                far.recv(ENCRYPTED_BYTES + 1, socket.MSG_WAITALL)
                door._promote(near.fileno(), "127.0.0.1", "b", Account())
                door._accept(near.fileno(), None, None)
                (number,) = door._admission._connections
                assert door._admission.member(number) is None

                await until(lambda: door._promote_early() or door._admission.member(number) == "b")
                assert not door._early
                door._forget(number)

    finish(main())


# real daemons


@contextmanager
def hospitals_in(place):
    """Three daemons with much to do."""
    plan = plan_of(
        task={"name": "synthetic-logistic", "features": 10, "samples": 60},
        nodes=3,
        topology={"name": "complete"},
        algorithm={"local_steps": 2, "batch_size": 16},
        rounds=1_000_000,
        evaluate_every=1000,
    )
    with Institutions(plan, place) as network:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[0]), before[1]))
        try:
            network.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        wait(lambda: network.round("node-0") >= 20)
        yield network


@pytest.fixture(scope="module")
def all_attacks_hospitals(tmp_path_factory):
    with hospitals_in(tmp_path_factory.mktemp("hospitals")) as network:
        yield network


@pytest.fixture
def hospitals(request, tmp_path):
    """In the short form all attacks are on the same node."""
    if LONG:
        with hospitals_in(tmp_path) as network:
            yield network
    else:
        yield request.getfixturevalue("all_attacks_hospitals")


def wait(condition, deadline_s=60.0):
    until_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.05)


class Memory:
    """The most that a process grew meanwhile, and the most files that it had open."""

    def __init__(self, pid):
        self._pid, self._before = pid, anonymous_bytes(pid)
        self._over = threading.Event()
        self.growth_bytes = self.files = 0
        self._thread = threading.Thread(target=self._sample)

    def _sample(self):
        while not self._over.wait(0.05):
            self.growth_bytes = max(self.growth_bytes, anonymous_bytes(self._pid) - self._before)
            self.files = max(self.files, open_files_of(self._pid))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()


def listening_port(network, name):
    return int(next(iter(network.study.member(name).addresses)).rpartition(":")[2])


@pytest.mark.slow
@pytest.mark.alone
def test_five_thousand_connections_of_unknown_peers_do_not_end_a_node(hospitals):
    port, before, number = listening_port(hospitals, "node-0"), hospitals.round("node-0"), long_or_short(5000, 1000)
    with Memory(hospitals.pid("node-0")) as memory:
        silent_connections(port, number, 500)

    assert hospitals.exit_code("node-0") is None
    assert memory.files < 400
    wait(lambda: hospitals.round("node-0") > before + 20)
    links = hospitals.status("node-0")["links"]

    assert links["evicted"] > 0.8 * number
    assert links["connected"] == 2


@pytest.mark.slow
@pytest.mark.alone
def test_unknown_peers_with_unfinished_commands_take_little_memory(hospitals):
    port, data = listening_port(hospitals, "node-0"), unfinished_command(MAX_FRAME_BYTES)
    with Memory(hospitals.pid("node-0")) as memory, ExitStack() as lines:
        for _ in range(400):
            line = lines.enter_context(connect(port))
            line.setblocking(False)
            try:
                while line.send(data):
                    pass
            except OSError:
                continue

    assert memory.growth_bytes < 20 * 10**6
    assert hospitals.exit_code("node-0") is None


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("source", "median_s", "most_s"), [("127.0.0.2", 2.0, 2.0), ("127.0.0.1", 30.0, 180.0)], ids=["another", "same"])
def test_a_neighbour_comes_in_while_an_unknown_peer_shakes_hands_700_times_a_second(hospitals, source, median_s, most_s):
    port, server = listening_port(hospitals, "node-0"), hospitals.study.member("node-0").curve.encode()
    hospitals.end("node-2", signal.SIGKILL)
    keys = Identity.load(hospitals.place / "node-2" / "keys")
    over = threading.Event()
    flood = threading.Thread(target=wrong_key_handshakes, args=(port, server, source, 700, over.is_set))
    flood.start()
    took_s = []

    async def come_in():
        node = Endpoint("node-0", f"tcp://127.0.0.1:{port}", server)
        async with ZeroMQTransport(Endpoint("node-2", None, keys.curve_public), keys.curve_secret, [node]) as member:
            began_s = time.monotonic()
            await until(lambda: member.link("node-0").is_up)
            took_s.append(time.monotonic() - began_s)

    def turned_away():
        links = hospitals.status("node-0")["links"]
        return links.get("evicted", 0) + links.get("unauthorized", 0)

    before = turned_away()
    try:
        wait(lambda: turned_away() > before + 500)
        for _ in range(long_or_short(20, 10)):
            asyncio.run(asyncio.wait_for(come_in(), most_s))
    finally:
        over.set()
        flood.join()

    assert statistics.median(took_s) < median_s
    assert max(took_s) < most_s


@needs_sodium
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("size", [0, MIB])
def test_a_member_with_a_message_without_end_takes_no_more_memory_than_128_mib(hospitals, size):
    port, keys = listening_port(hospitals, "node-0"), Identity.load(hospitals.place / "node-2" / "keys")
    server = hospitals.study.member("node-0").curve.encode()
    hospitals.end("node-2", signal.SIGKILL)

    def num_shut():
        return hospitals.status("node-0")["links"].get("oversent", 0)

    before, began_s = num_shut(), time.monotonic()
    least_s, most_s = began_s + long_or_short(8.0, 2.0), began_s + 60.0
    with Memory(hospitals.pid("node-0")) as memory:
        while time.monotonic() < least_s or (num_shut() == before and time.monotonic() < most_s):
            try:
                evil = member_at(port, (keys.curve_public, keys.curve_secret), server)
            except OSError:
                continue
            with evil.line:
                endless_message(evil, bytes(size), 10**9, lambda: time.monotonic() > most_s)

    assert memory.growth_bytes < 128 * MIB
    assert hospitals.exit_code("node-0") is None
    assert num_shut() > before
