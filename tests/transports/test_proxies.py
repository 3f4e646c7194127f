"""Dialling through a site's proxy: what goes over it, and what is said where it does not connect."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from links import Links, finish, receive, send_when_up, until
from p2pfl.errors import TransportError
from p2pfl.transports import LinkCondition, reserve_port
from p2pfl.transports.proxies import Proxy, ProxyWay
from p2pfl.transports.sockets import LinkSocket
from p2pfl.transports.tunnels import Tunnels
from site_proxy import SiteProxy

PASSWORD = "open:sesame"
KINDS = ["http", "socks5"]


@pytest.fixture
def links():
    links = Links("zeromq")
    yield links
    links.close()


@asynccontextmanager
async def dialling(links, proxy, *, login=None, addresses=None, at=None):
    """b, which dials a by its name through a proxy."""
    user, password = login or (None, "")
    kind, port = (proxy.kind, proxy.port) if at is None else at
    way = ProxyWay(Proxy(kind=kind, host="127.0.0.1", port=port, user=user, password=password))
    made = links.endpoint("a")
    address = addresses or f"tcp://node.hospital.test:{links.ports['a'].port}"
    links.endpoint = lambda name, plain=Links.endpoint: replace(made, address=address) if name == "a" else plain(links, name)
    try:
        async with links.member("b", "a", way_out=way) as b:
            yield b
    finally:
        del links.endpoint


async def meet(a, b):
    await send_when_up(b, "a", [b"there"])
    assert await receive(a, 1) == [("b", [b"there"])]
    await send_when_up(a, "b", [b"back"])
    assert await receive(b, 1) == [("a", [b"back"])]


async def failed(b):
    await until(lambda: b.link("a").state not in (LinkCondition.CONNECTING, LinkCondition.RESOLVING))
    return b.link("a")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("login", [None, ("site", PASSWORD)])
def test_the_proxy_looks_the_name_up_and_connects(links, kind, login, monkeypatch):
    asked = []
    monkeypatch.setattr("p2pfl.transports.resolver.look_up", lambda host: asked.append(host) or [])

    async def main():
        async with (
            SiteProxy(kind, login=login, names={"node.hospital.test": "127.0.0.1"}) as proxy,
            links.member("a", "b") as a,
            dialling(links, proxy, login=login) as b,
        ):
            await meet(a, b)

            assert proxy.targets == [("node.hospital.test", links.ports["a"].port)]
            assert asked == []

    finish(main())


CAUSES = {
    "a password is missing": (
        ("http", ("site", PASSWORD), None, None),
        "it wants a password (407 Proxy Authentication Required): write proxy.user and proxy.password_file in site.yaml",
    ),
    "a password is wrong": (
        ("http", ("site", PASSWORD), ("site", "guessed"), None),
        "it does not take the password of 'site' (407 Proxy Authentication Required): correct proxy.user or the password",
    ),
    "it forbids": (
        ("http", None, None, 403),
        "it does not let this site connect to node.hospital.test:PORT (403 Refused): ask its administrator to allow CONNECT there",
    ),
    "it cannot connect": (
        ("http", None, None, 503),
        "it does not reach node.hospital.test:PORT (503 Refused): is the neighbour running, and is its address right?",
    ),
    "a SOCKS password is missing": (
        ("socks5", ("site", PASSWORD), None, None),
        "it wants another way to log in than none: write proxy.user and proxy.password_file in site.yaml",
    ),
    "a SOCKS password is wrong": (
        ("socks5", ("site", PASSWORD), ("site", "guessed"), None),
        "it does not take the password of 'site': correct proxy.user or the password",
    ),
    "SOCKS forbids": (
        ("socks5", None, None, 2),
        "its rules do not let this site connect to node.hospital.test:PORT (SOCKS reply 2): ask its administrator to allow it",
    ),
    "SOCKS cannot connect": (
        ("socks5", None, None, 4),
        "it does not reach node.hospital.test:PORT: host unreachable (SOCKS reply 4); is the neighbour running, and is its address right?",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_a_refusal_is_said_with_its_cause_and_its_remedy(links, case, caplog):
    caplog.set_level(logging.DEBUG)
    (kind, wanted, login, refuses), said = CAUSES[case]

    async def main():
        async with SiteProxy(kind, login=wanted, refuses=refuses) as proxy, dialling(links, proxy, login=login) as b:
            link = await failed(b)

            assert link.state == LinkCondition.PROXY
            expected = said.replace("PORT", str(links.ports["a"].port))
            assert link.detail == f"the proxy {proxy.address} on the way to a: {expected}"
            assert b.link_counters["a"]["not_connected"] >= 1

    finish(main())
    assert PASSWORD not in caplog.text
    assert "guessed" not in caplog.text
    assert "guessed" not in repr(Proxy(kind="http", host="x", port=1, user="site", password="guessed"))


def test_a_proxy_that_takes_no_basic_login_is_told_from_a_wrong_password(links):
    async def main():
        async with SiteProxy("http", login=("site", PASSWORD)) as proxy:
            proxy.schemes = ["NTLM", "Negotiate"]
            async with dialling(links, proxy, login=("site", "guessed")) as b:
                said = "it takes no Basic login, only NTLM, Negotiate (407 Proxy Authentication Required)"
                assert said in (await failed(b)).detail

    finish(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_is_not_there_is_named(links, kind):
    async def main():
        with reserve_port() as closed:
            async with dialling(links, None, at=(kind, closed.port)) as b:
                link = await failed(b)

                assert link.state == LinkCondition.PROXY
                assert link.detail == (
                    f"connection refused at the proxy {kind}://127.0.0.1:{closed.port} on the way to a: "
                    "correct proxy.address in site.yaml, or ask for the proxy to be started"
                )

    finish(main())


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n\r\n", b"x" * 9000], ids=["none", "another program's", "without an end"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_no_proxy_is_told_from_one(links, kind, answer):
    async def answers(reader, writer):
        await reader.read(1)
        writer.write(answer)
        writer.close()

    async def main():
        server = await asyncio.start_server(answers, "127.0.0.1", 0)
        async with server, dialling(links, None, at=(kind, server.sockets[0].getsockname()[1])) as b:
            link = await failed(b)

            assert link.state == LinkCondition.PROXY
            assert link.detail.endswith("?")

    finish(main())


def test_a_silent_proxy_is_given_up(links, monkeypatch):
    monkeypatch.setattr("p2pfl.transports.sockets.HANDSHAKE_S", 0.3)

    async def main():
        with reserve_port() as held:
            held._socket.listen()
            async with dialling(links, None, at=("http", held.port)) as b:
                assert (await failed(b)).detail == (
                    f"no answer of the proxy http://127.0.0.1:{held.port} on the way to a: "
                    "is it that address, and does a firewall let this machine reach it?"
                )

    finish(main())


def test_a_link_comes_back_when_the_proxy_was_restarted(links):
    async def main():
        proxy = SiteProxy("http", names={"node.hospital.test": "127.0.0.1"})
        async with links.member("a", "b") as a, proxy, dialling(links, proxy) as b:
            await meet(a, b)
            proxy.cut_connections()
            await until(lambda: not b.link("a").is_up or b.link_counters["a"]["disconnected"])
            await until(lambda: b.link_counters["a"]["connected"] == 2)
            await until(lambda: a.link_counters["b"]["connected"] == 2)
            await meet(a, b)

    finish(main())


def test_a_message_that_dies_with_its_connection_is_no_sign_of_a_link(links, monkeypatch):
    """For a moment after libzmq has told that a connection is over, it takes messages for it."""

    async def main():
        a = links.member("a", "b")
        async with SiteProxy("http", names={"node.hospital.test": "127.0.0.1"}) as proxy, dialling(links, proxy) as b:
            async with a:
                await meet(a, b)
            await until(lambda: not b.link("a").is_up)
            with monkeypatch.context() as libzmq:
                libzmq.setattr(LinkSocket, "send", lambda _, frames: None)
                await b.send("a", [b"lost"], 1.0)

            with pytest.raises(TransportError, match="no link from b to a"):
                await b.send("a", [b"anybody?"], 1.0)

    finish(main())


def test_of_several_addresses_the_first_that_the_proxy_reaches_is_used(links):
    links.endpoint("a")
    with reserve_port() as closed:
        addresses = [closed.address, links.ports["a"].address]

        async def main():
            async with SiteProxy("http") as proxy, links.member("a", "b") as a, dialling(links, proxy, addresses=addresses) as b:
                await meet(a, b)

                assert proxy.targets == [("127.0.0.1", closed.port), ("127.0.0.1", links.ports["a"].port)]

        finish(main())


def test_another_program_does_not_get_into_a_tunnel(links):
    class Far:
        sent = b""

        async def receive(self):
            return b""

        async def send(self, data):
            self.sent += bytes(data)

        def end(self):
            pass

        close = end

    async def main():
        far, loop = Far(), asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            tunnels = Tunnels(group)
            address = tunnels.offer(far).address
            port = int(address.rpartition(":")[2])
            for local in (None, ("127.0.0.1", int(address.partition(";")[0].rpartition(":")[2]))):
                with socket.socket() as other:
                    other.setblocking(False)
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if local is not None:
                        other.bind(local)
                    await loop.sock_connect(other, ("127.0.0.1", port))
                    with suppress(OSError):
                        await loop.sock_sendall(other, b"mine" if local else b"foreign")
                        other.shutdown(socket.SHUT_WR)
                        await loop.sock_recv(other, 1)
            await tunnels.close(5.0)

            assert far.sent == b"mine"

    finish(main())
