"""Links in memory."""

from __future__ import annotations

import pytest

from links import finish, receive
from p2pfl.errors import TransportError
from p2pfl.transports import MemoryNetwork


def test_the_network_loses_what_the_script_says():
    async def main():
        asked = []

        def lost(sender, receiver, frames):
            asked.append((sender, receiver, bytes(frames[0])))
            return receiver == "b" and frames[0] == b"second"

        network = MemoryNetwork(lost)
        async with network.transport("a", "b") as a, network.transport("b", "a") as b:
            for header in (b"first", b"second", b"third"):
                await a.send("b", [header], 1.0)
            await b.send("a", [b"second"], 1.0)

            assert await receive(b, 2) == [("a", [b"first"]), ("a", [b"third"])]
            assert await receive(a, 1) == [("b", [b"second"])]
        assert asked == [("a", "b", b"first"), ("a", "b", b"second"), ("a", "b", b"third"), ("b", "a", b"second")]

    finish(main())


def test_the_queue_holds_exactly_max_queued_messages():
    async def main():
        network = MemoryNetwork(max_queued=3)
        async with network.transport("a", "b") as a, network.transport("b", "a") as b:
            for i in range(3):
                await a.send("b", [b"%d" % i], 0.0)
            with pytest.raises(TransportError, match=r"queue from a to b full for 0\.01 s"):
                await a.send("b", [b"3"], 0.01)

            assert await receive(b, 3) == [("a", [b"0"]), ("a", [b"1"]), ("a", [b"2"])]

    finish(main())


def test_a_frame_is_what_it_was_when_it_was_sent():
    async def main():
        network = MemoryNetwork()
        async with network.transport("a", "b") as a, network.transport("b", "a") as b:
            buffer = bytearray(b"sent")
            await a.send("b", [memoryview(buffer)], 1.0)
            buffer[:] = b"late"

            assert await receive(b, 1) == [("a", [b"sent"])]

    finish(main())


def test_an_unknown_peer_is_refused_and_counted():
    async def main():
        network = MemoryNetwork()
        async with network.transport("b", "a") as b, network.transport("unknown", "b") as unknown:
            with pytest.raises(TransportError, match="no link from unknown to b"):
                await unknown.send("b", [b"let me in"], 1.0)

            assert b.counters == {"unauthorized": 1}

    finish(main())


def test_a_name_is_open_once():
    async def main():
        network = MemoryNetwork()
        async with network.transport("a", "b"):
            with pytest.raises(ValueError, match="'a' is open already"):
                async with network.transport("a", "b"):
                    pass

    finish(main())
