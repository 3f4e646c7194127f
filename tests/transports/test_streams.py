"""Streams that carry a connection: what becomes of whoever waits at one that is closed."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from links import finish, until
from p2pfl.transports.streams import SocketStream


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
