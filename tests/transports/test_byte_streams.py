"""Streams that carry a connection: what becomes of whoever waits at one that is closed."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from links import finish, until
from p2pfl.transports.streams import DRAIN_S, SocketStream, splice
from virtual_time import run_virtually


def joined():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        return listener.accept()[0], far


def with_number(fd):
    """Both ends of a TCP connection, the first of which has a descriptor's number that is free."""
    near, far = sorted(joined(), key=lambda end: end.fileno() != fd)
    if near.fileno() == fd:
        return near, far
    os.dup2(near.fileno(), fd)
    near.close()
    return socket.socket(fileno=fd), far


@pytest.mark.parametrize("waits", ["to receive", "to send"])
def test_closing_a_stream_wakes_whoever_waits_at_it_and_spoils_no_later_descriptor(waits):
    async def main():
        loop = asyncio.get_running_loop()
        near, far = joined()
        stream, fd = SocketStream(near), near.fileno()
        waiting = asyncio.create_task(stream.receive() if waits == "to receive" else stream.send(bytes(2**26)))
        await until(lambda: fd in loop._selector.get_map())

        stream.close()
        done, _ = await asyncio.wait([waiting], timeout=20)

        assert done, "it waits for good"
        assert waiting.exception() is not None if waits == "to send" else waiting.result() == b""
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            await stream.receive()
        far.close()
        near, far = with_number(fd)
        later = SocketStream(near)
        hearing = asyncio.create_task(later.receive())
        await until(lambda: fd in loop._selector.get_map())
        far.sendall(b"hello")

        assert await hearing == b"hello"
        later.close()
        far.close()

    finish(main())


class Pieces:
    """A stream that says some pieces and ends; each that it is sent takes some seconds."""

    def __init__(self, *pieces, send_s=0.0, ends=True):
        self._pieces, self._send_s, self._ends, self.heard = list(pieces), send_s, ends, []

    async def receive(self):
        if not self._pieces and not self._ends:
            await asyncio.Event().wait()
        return self._pieces.pop(0) if self._pieces else b""

    async def send(self, data):
        await asyncio.sleep(self._send_s)
        self.heard.append(bytes(data))

    def end(self):
        self.heard.append(b"the end")

    def close(self):
        pass


@pytest.mark.parametrize("slow", ["the other end", "the turn"])
def test_what_was_sent_last_arrives_however_long_that_takes(slow):
    said = [b"%d" % i for i in range(8)]
    near, far = Pieces(*said), Pieces(send_s=DRAIN_S / 2 if slow == "the other end" else 0)

    async def turn(size_bytes):
        await asyncio.sleep(3 * DRAIN_S * size_bytes)

    run_virtually(splice(near, far, turn if slow == "the turn" else None), seed=0, at_most_s=1000)

    assert far.heard == [*said, b"the end"]


def test_a_direction_in_which_nothing_moves_ends_with_the_other():
    async def main():
        await splice(Pieces(ends=False), Pieces(b"last"))
        return asyncio.get_running_loop().time()

    assert run_virtually(main(), seed=0, at_most_s=1000) == pytest.approx(DRAIN_S, abs=0.01)
