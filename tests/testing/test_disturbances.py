"""Cables that lose, slow down and change what one dialling side sends, and processes whose clock and names are off."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from links import finish, until
from p2pfl.testing.disturbance import DOMAIN, disturb, write_conditions
from p2pfl.testing.tcp_proxy import Disturbance, TcpProxy

SENT = bytes(range(256)) * 40


async def through(proxy, meanwhile):
    """Send over a proxy whose dialling side is called basel, do something once it is in there, and return what comes out."""
    received = asyncio.Queue()

    async def serve(reader, writer):
        received.put_nowait(await reader.read(-1))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, proxy:
        proxy.lead_to(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        _, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
        writer.write(SENT)
        await until(lambda: proxy.received_bytes[0] == len(SENT))
        await meanwhile()
        writer.write_eof()
        found = await received.get()
        writer.close()
    return found


def proxy_for(name="basel"):
    return TcpProxy(dialler_at=lambda _port: name)


@pytest.mark.parametrize("disturbance", [Disturbance(loss=(1.0, 0.0)), Disturbance(bytes_per_s=10.0)])
def test_what_is_held_comes_once_the_fault_is_over(disturbance):
    proxy = proxy_for()
    proxy.disturb({"basel": disturbance})

    async def heal():
        held.append(proxy.passed_bytes[0])
        proxy.disturb({})

    async def run():
        assert await through(proxy, heal) == SENT

    held = []
    finish(run())

    assert held == [0]


@pytest.mark.parametrize("disturbed", [{"basel": Disturbance(loss=(0.0, 1.0))}, {"bern": Disturbance(loss=(1.0, 1.0))}])
def test_the_other_direction_and_other_edges_are_undisturbed(disturbed):
    proxy = proxy_for()
    proxy.disturb(disturbed)

    async def passed():
        await until(lambda: proxy.passed_bytes[0] == len(SENT))

    async def run():
        assert await through(proxy, passed) == SENT

    finish(run())


def test_a_corrupt_edge_changes_bits_and_loses_none():
    async def nothing():
        pass

    async def run():
        for _ in range(20):  # every other piece
            proxy = proxy_for()
            proxy._chance.seed(len(found))
            proxy.disturb({"basel": Disturbance(corrupts=True)})
            found.append(await through(proxy, nothing))

    found = []
    finish(run())

    assert {len(each) for each in found} == {len(SENT)}
    assert 0 < sum(each != SENT for each in found) <= 20


def test_a_process_is_told_its_clock_and_its_names_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", real := time.time)
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    path, host = tmp_path / "conditions.json", f"node-1{DOMAIN}"
    disturb(path)
    began_s = real()

    assert began_s <= time.time() <= real()
    assert socket.getaddrinfo(host, 80)[0][4][0] == "127.0.0.1"

    write_conditions(path, clock_offset_s=3600.0, unknown_hosts={host})

    assert began_s + 3600 <= time.time() <= real() + 3600
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(host, 80)
    assert socket.getaddrinfo(f"node-2{DOMAIN}", 80)[0][4][0] == "127.0.0.1"
