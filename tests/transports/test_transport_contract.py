"""What holds for every transport."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from links import (
    BrokerLinks,
    KindLinks,
    Links,
    ProxiedLinks,
    RelayedLinks,
    arrives,
    finish,
    receive,
    send_until_refused,
    send_when_up,
    until,
)
from p2pfl.errors import TransportError
from p2pfl.transports import MAX_FRAME_BYTES, TRANSPORTS, LinkCondition
from thorough import first_fast

AWAY_S = 1.0
PATIENCE_S = 30.0
MAX_QUEUED = 8
BOTH_ENDS = [("a", "b"), ("b", "a")]  # b dials a where there is dialling


WAYS = {
    "connect": partial(ProxiedLinks, "http"),
    "socks": partial(ProxiedLinks, "socks5"),
    "relay": RelayedLinks,
    "mqtt": BrokerLinks,
    "by kind": KindLinks,
}
"""Links that something else carries, by name."""


LONG = frozenset(WAYS)  # what is theirs alone is in test_proxies.py, test_relay.py and test_mqtt.py


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow if name in LONG | {"relay", "mqtt"} else ()) for name in sorted({*TRANSPORTS, *WAYS})]
)
def links(request):
    links = WAYS.get(request.param, partial(Links, request.param))(max_queued=MAX_QUEUED)
    yield links
    links.close()


def test_frames_arrive_both_ways_and_in_order(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b, asyncio.TaskGroup() as tasks:
            await send_when_up(b, "a", [b"up"])
            await receive(a, 1)
            there = [[b"%d" % i, b"x" * i] for i in range(300)]
            back = [[b"%d" % i] for i in range(300)]

            async def send_all(sender, peer, messages):
                for frames in messages:
                    await sender.send(peer, frames, 5.0)

            tasks.create_task(send_all(a, "b", there), name="there")
            tasks.create_task(send_all(b, "a", back), name="back")
            at_b = tasks.create_task(receive(b, 300), name="b receives")

            assert await receive(a, 300) == [("b", frames) for frames in back]
            assert await at_b == [("a", frames) for frames in there]

    finish(main())


@pytest.mark.parametrize(("sender", "receiver"), BOTH_ENDS)
def test_a_large_message_in_frames_of_1_mb_arrives_intact(links, sender, receiver):
    async def main():
        async with links.member(sender, receiver) as ours, links.member(receiver, sender) as theirs, asyncio.TaskGroup() as tasks:
            chunks = [bytes([i]) * 2**20 for i in range(8)]
            arrived = tasks.create_task(receive(theirs, 8), name="receives")
            for i, chunk in enumerate(chunks):
                await send_when_up(ours, receiver, [b"%d" % i, chunk])

            assert await arrived == [(sender, [b"%d" % i, chunk]) for i, chunk in enumerate(chunks)]

    finish(main())


def test_frames_of_the_largest_size_and_views_of_arrays_arrive(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await send_when_up(b, "a", [b"", bytes(MAX_FRAME_BYTES)])
            await send_when_up(a, "b", [memoryview(bytearray(range(256))).cast("I"), b""])

            assert await receive(a, 1) == [("b", [b"", bytes(MAX_FRAME_BYTES)])]
            assert await receive(b, 1) == [("a", [bytes(range(256)), b""])]

    finish(main())


def test_received_frames_cannot_be_written_to(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            await send_when_up(b, "a", [b"header"])

            assert (await a.receive()).frames[0].readonly

    finish(main())


def test_a_message_is_its_links_whatever_it_says_of_itself(links):
    async def main():
        async with links.member("b", "ac") as b, links.member("a", "b") as a, links.member("c", "b") as c:
            await send_when_up(a, "b", [b"I am c"])
            await send_when_up(c, "b", [b"I am a"])

            assert sorted(await receive(b, 2)) == [("a", [b"I am c"]), ("c", [b"I am a"])]

    finish(main())


@pytest.mark.parametrize(("sender", "absent"), BOTH_ENDS)
def test_no_link_is_known_at_once(links, sender, absent):
    async def main():
        async with links.member(sender, absent) as ours, asyncio.timeout(2):
            with pytest.raises(TransportError, match=f"no link from {sender} to {absent}"):
                await ours.send(absent, [b"hello"], 10.0)

    finish(main())


def test_a_wrong_argument_is_the_callers_fault(links):
    async def main():
        async with links.member("a", "b") as a:
            with pytest.raises(ValueError, match="'c' is no neighbour of 'a'"):
                await a.send("c", [b"x"], 1.0)
            for frames in ([], [b""], [b"x"] * 3, [b"x", bytes(MAX_FRAME_BYTES + 1)]):
                with pytest.raises(ValueError, match="bytes"):
                    await a.send("b", frames, 1.0)

    finish(main())


@pytest.mark.parametrize(("restarts", "stays"), BOTH_ENDS)
def test_a_restarted_peer_is_reached_again_in_both_directions(links, restarts, stays):
    async def main():
        async with links.member(stays, restarts) as staying:
            for life in range(3):
                async with links.member(restarts, stays) as living:
                    await send_when_up(living, stays, [b"life %d" % life])

                    assert await receive(staying, 1) == [(restarts, [b"life %d" % life])]

                    await send_when_up(staying, restarts, [b"answer %d" % life])

                    assert await receive(living, 1) == [(stays, [b"answer %d" % life])]
                # the news of the death may be under way, then it is known at once
                assert (await send_until_refused(staying, restarts, b"anybody?"))[1] == f"no link from {stays} to {restarts}"

    finish(main())


def test_the_same_object_can_be_opened_again(links):
    async def main():
        async with links.member("a", "b") as a:
            b = links.member("b", "a")
            for _ in range(2):
                async with b:
                    await send_when_up(b, "a", [b"again"])

                    assert await receive(a, 1) == [("b", [b"again"])]

    finish(main())


@pytest.mark.parametrize(("sender", "receiver"), BOTH_ENDS)
def test_a_peer_that_does_not_read_stops_its_sender_only_and_loses_nothing(links, sender, receiver):
    async def main():
        async with links.member(sender, [receiver, "c"]) as ours, links.member(receiver, sender) as theirs, links.member("c", sender) as c:
            await send_when_up(ours, receiver, [b"up"])
            await receive(theirs, 1)
            taken, why = await send_until_refused(ours, receiver, bytes(2**20), 0.2, MAX_QUEUED)

            assert why == f"queue from {sender} to {receiver} full for 0.2 s"
            # the queues at both ends, the receiver's own, and 1 MB each in what libzmq and the kernel hold on the way, which grows
            assert MAX_QUEUED <= taken <= 3 * MAX_QUEUED + 32

            for i in range(50):  # others are served meanwhile
                await send_when_up(ours, "c", [b"%d" % i])

                assert await receive(c, 1) == [(sender, [b"%d" % i])]

            assert [frames[0] for _, frames in await receive(theirs, taken)] == [b"%d" % i for i in range(taken)]

            await ours.send(receiver, [b"after"], 5.0)

            assert await receive(theirs, 1) == [(sender, [b"after"])]

    finish(main())


def test_the_last_messages_before_closing_arrive(links):
    async def main():
        async with links.member("a", "b") as receiver:
            async with links.member("b", "a", linger_s=PATIENCE_S) as closing:  # as long as a slow machine needs for 8 MiB
                await send_when_up(closing, "a", [b"0", bytes(2**20)])
                for i in range(1, MAX_QUEUED):
                    await closing.send("a", [b"%d" % i, bytes(2**20)], PATIENCE_S)

            assert [frames[0] for _, frames in await receive(receiver, MAX_QUEUED)] == [b"%d" % i for i in range(MAX_QUEUED)]

    finish(main(), 3 * PATIENCE_S)


@pytest.mark.parametrize(("sender", "receiver"), BOTH_ENDS)
def test_closing_amid_traffic_ends_it_with_a_transport_error(links, sender, receiver):
    async def main():
        async with links.member(sender, receiver) as ours, asyncio.TaskGroup() as tasks:
            async with links.member(receiver, sender) as theirs:
                await send_when_up(ours, receiver, [b"up"])
                sending = tasks.create_task(send_until_refused(ours, receiver, bytes(2**18)), name="sends")
                await receive(theirs, 20)

            assert (await sending)[0] >= 20 - 1

    finish(main())


def test_the_death_of_one_peer_does_not_disturb_the_others(links):
    async def main():
        async with links.member("b", "ac") as hub, links.member("a", "b") as a:
            async with links.member("c", "b") as c:
                await send_when_up(c, "b", [b"c is here"])
                await receive(hub, 1)
            for i in range(100):
                await send_when_up(a, "b", [b"%d" % i])

                assert await receive(hub, 1) == [("a", [b"%d" % i])]

                await send_when_up(hub, "a", [b"%d" % i])

                assert await receive(a, 1) == [("b", [b"%d" % i])]

            assert (await send_until_refused(hub, "c", b"anybody?"))[1] == "no link from b to c"

    finish(main())


def test_a_closed_transport_neither_sends_nor_receives(links):
    async def main():
        async with links.member("a", "b") as a:
            pass
        with pytest.raises(TransportError, match="a is closed"):
            await a.send("b", [b"x"], 1.0)
        with pytest.raises(TransportError, match="a is closed"):
            await a.receive()

    finish(main())


@pytest.mark.parametrize(("comes", "stays"), BOTH_ENDS)
def test_how_a_link_is_can_be_asked_at_any_time(links, comes, stays):
    async def main():
        staying = links.member(stays, comes)

        assert staying.link(comes).state == LinkCondition.CLOSED

        async with staying:
            before = staying.link(comes)

            assert not before.is_up
            assert before.heard_s is None

            for life in (1, 2):
                async with links.member(comes, stays) as coming:
                    await send_when_up(coming, stays, [b"here"])
                    await receive(staying, 1)
                    await until(lambda: staying.link(comes).state == coming.link(stays).state == LinkCondition.UP)

                    assert before.since_s <= staying.link(comes).since_s <= time.monotonic()
                    assert staying.link(comes).heard_s is not None
                    await until(lambda: staying.link_counters[comes]["connected"] == life)  # noqa: B023 - awaited here
                    assert staying.link_counters[comes]["connected"] == life
                await until(lambda: not staying.link(comes).is_up)

                assert coming.link(stays).state == LinkCondition.CLOSED
                await until(lambda: staying.link_counters[comes]["disconnected"] == life)  # noqa: B023 - awaited here
                assert staying.link_counters[comes]["disconnected"] == life

        assert staying.link(comes).state == LinkCondition.CLOSED
        with pytest.raises(ValueError, match="'c' is no neighbour"):
            staying.link("c")

    finish(main())


def test_a_link_that_is_down_leaves_the_others_up(links):
    async def main():
        async with links.member("b", "ac") as hub, links.member("a", "b") as a:
            async with links.member("c", "b") as c:
                for member in (a, c):
                    await send_when_up(member, "b", [b"here"])
                await receive(hub, 2)
            await until(lambda: not hub.link("c").is_up)

            assert hub.link("a").state == a.link("b").state == LinkCondition.UP

    finish(main())


def test_an_exception_inside_comes_out_as_itself(links):
    async def main():
        with pytest.raises(KeyError, match="body"):
            async with links.member("a", "b"):
                raise KeyError("body")

    finish(main())


def test_a_waiting_receiver_can_be_cancelled_and_nothing_is_lost(links):
    async def main():
        async with links.member("a", "b") as a, links.member("b", "a") as b:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(a.receive(), 0.01)
            await send_when_up(b, "a", [b"later"])

            assert await receive(a, 1) == [("b", [b"later"])]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), links.member("c", "b") as c:
                    await c.receive()

    finish(main())


@pytest.mark.parametrize(("excludes", "excluded"), first_fast(BOTH_ENDS))
def test_a_disconnected_neighbour_stays_away_for_so_long_and_comes_back_by_itself(links, excludes, excluded):
    async def main():
        async with (
            links.member(excludes, excluded + "c") as ours,
            links.member(excluded, excludes) as theirs,
            links.member("c", excludes) as c,
        ):
            await send_when_up(theirs, excludes, [b"before"])
            await send_when_up(c, excludes, [b"here"])
            await receive(ours, 2)
            began_s, before = time.monotonic(), theirs.link_counters[excludes]["disconnected"]
            ours.disconnect(excluded, AWAY_S, "too much")

            with pytest.raises(TransportError, match=f"no link from {excludes} to {excluded}"):
                await ours.send(excluded, [b"at once"], 1.0)  # no connection that is about to end takes it
            assert not ours.link(excluded).is_up
            assert ours.link(excluded).detail == "this node has ended the connection for 1 s: too much"
            await until(lambda: theirs.link_counters[excludes]["disconnected"] > before)
            said = ""
            try:
                await ours.send(excluded, [b"anybody?"], 1.0)
            except TransportError as error:
                said = str(error)
            # a busy machine may come so far only when the time is over
            assert f"no link from {excludes} to {excluded}" in said or time.monotonic() - began_s >= AWAY_S
            await send_when_up(c, excludes, [b"still here"])
            assert await receive(ours, 1) == [("c", [b"still here"])]

            await arrives(theirs, ours, excludes, [b"after"])
            assert time.monotonic() - began_s >= AWAY_S
            assert ours.link(excluded).is_up
            counted = ours.link_counters[excluded]
            await until(lambda: counted["connected"] >= 2)  # more often, where a busy machine loses the new connection as well
            await until(lambda: counted["disconnected"] == counted["connected"] - 1)

    finish(main())
