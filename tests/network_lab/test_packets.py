"""The router's decisions, and the lab itself with small processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from lab import NetworkLab
from packets import ACK, SYN, Firewall, Packet, Wires, streams
from router import RefusedError, Router

from networks import wait_until


def packet(source="a", target="b", ports=(1, 2), flags=ACK, sequence=0, content=b"", size_bytes=1000):
    return Packet(source, target, size_bytes, 6, ports, flags, sequence, content)


def tcp(content=b"", flags=0x18):
    head = bytes.fromhex("1e14 0bb8 80000001 00000000 50") + bytes([flags]) + bytes.fromhex("ffff 0000 0000")
    size = 20 + len(head) + len(content)
    return b"\x45\x00" + size.to_bytes(2, "big") + bytes(5) + b"\x06\x00\x00" + bytes([10, 77, 0, 1, 10, 77, 0, 2]) + head + content


def test_a_packet_is_taken_apart():
    assert Packet.read(tcp(b"hello") + b"padding") == Packet("10.77.0.1", "10.77.0.2", 52, 6, (7700, 3000), 0x18, 2**31 + 1, b"hello")
    assert Packet.read(b"\x60" + bytes(60)) is None
    assert Packet.read(b"\x45") is None


def test_a_closed_host_hears_only_those_that_it_has_asked():
    firewall = Firewall(closed=frozenset("b"))

    assert not firewall.lets_pass(packet(flags=SYN))
    assert firewall.lets_pass(packet("b", "a", (2, 1), flags=SYN))
    assert firewall.lets_pass(packet(flags=SYN | ACK))
    assert not firewall.lets_pass(packet(ports=(3, 2)))


def test_hosts_that_are_apart_or_behind_a_proxy_reach_nobody_else():
    firewall = Firewall(only_to={"c": frozenset("p")}, apart=frozenset({frozenset("ab")}))

    assert not firewall.lets_pass(packet("b", "a"))
    assert not firewall.lets_pass(packet("c", "a"))
    assert not firewall.lets_pass(packet("a", "c"))
    assert firewall.lets_pass(packet("c", "p"))
    assert firewall.lets_pass(packet("p", "c"))


def test_packets_are_delayed_by_a_jitter_and_keep_their_order():
    wires = Wires(delay_s=0.04, jitter_s=0.01)
    seldom_s = [wires.enter(packet(), float(number)) - number for number in range(1000)]

    assert 0.030 <= min(seldom_s) < 0.031
    assert 0.049 < max(seldom_s) <= 0.050

    often_s = [wires.enter(packet(), 2000 + number / 1000) for number in range(1000)]

    assert often_s == sorted(often_s)


def test_one_packet_in_a_hundred_is_lost():
    wires = Wires(loss=0.01)

    assert 60 < [wires.enter(packet(), 0.0) for _ in range(10_000)].count(None) < 140


def test_a_line_carries_no_more_than_its_rate_and_drops_what_would_wait_too_long():
    wires = Wires(bytes_per_s=10_000, buffer_s=0.35)

    assert [wires.leave(packet(), 1.0) for _ in range(4)] == pytest.approx([1.1, 1.2, 1.3, 1.4])
    assert wires.leave(packet(), 1.0) is None
    assert wires.leave(packet("b", "a"), 1.0) == pytest.approx(1.1)  # a line of its own


def test_streams_are_put_together_whatever_came_twice_late_or_not_at_all():
    last = 2**32 - 3
    sent = [
        packet(flags=SYN, sequence=last - 1),
        packet(sequence=last, content=b"abc"),
        packet(sequence=3, content=b"ghi"),
        packet(sequence=0, content=b"def"),
        packet(sequence=1, content=b"efgh"),
        packet(sequence=20, content=b"xyz"),
        packet("b", "a", (2, 1), sequence=5, content=b"other"),
        packet(flags=SYN, sequence=last - 1),
        packet(sequence=last, content=b"anew"),
    ]

    assert streams(sent) == {("a", 1, "b", 2): [b"abcdefghi", b"xyz", b"anew"], ("b", 2, "a", 1): [b"other"]}


SERVER = """
import socket
listener = socket.create_server(("0.0.0.0", 9000))
print("listens", flush=True)
connection, _ = listener.accept()
connection.sendall(connection.recv(100).upper())
"""
CLIENT = """
import socket, sys
try:
    connection = socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[2]))
except TimeoutError:
    sys.exit(3)
connection.sendall(b"hello")
sys.stdout.write(connection.recv(100).decode())
"""


def test_hosts_reach_each_other_through_the_router_and_its_firewall_alone(tmp_path):
    with NetworkLab(["a", "b"], tmp_path, closed=["b"], delay_s=0.001) as lab:

        def start(host, key, program, *arguments):
            return lab.start(host, key, sys.executable, "-S", "-c", program, *arguments, log=tmp_path / key)

        for host in lab.addresses:
            server = f"server at {host}"
            (tmp_path / server).touch()
            start(host, server, SERVER)
            wait_until((tmp_path / server).read_text)  # it listens
        there = start("b", "there", CLIENT, lab.addresses["a"], "20")
        refused = start("a", "refused", CLIENT, lab.addresses["b"], "0.5")

        assert (there.wait(20), refused.wait(20)) == (0, 3)
        stays = start("a", "stays", "import time; time.sleep(600)")
        os.kill(stays.pid, 0)
    assert (tmp_path / "there").read_text().endswith("HELLO")
    assert lab.counters["refused"] > 0
    assert [said for flow, said in lab.streams().items() if flow[2] == "b"] == [[b"HELLO"]]
    with pytest.raises(ProcessLookupError):
        os.kill(stays.pid, 0)


KILLED = """
import sys, time
from pathlib import Path
from lab import NetworkLab
place = Path(sys.argv[1])
with NetworkLab(["a"], place) as lab:
    print(lab.start("a", "stays", "sleep", "600", log=place / "log").pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_is_left_where_the_tests_are_killed(tmp_path):
    with NetworkLab(["a"], tmp_path):
        pass  # else it is skipped, saying why
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environment) as tests:
        stays = Path(f"/proc/{int(tests.stdout.readline())}")
        namespace = (stays / "ns" / "net").readlink()
        assert namespace != Path("/proc/self/ns/net").readlink()
        tests.kill()
    wait_until(lambda: not stays.exists() and namespace not in in_use())


def in_use():
    """The network namespaces that processes are in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(OSError):  # it has just ended, or is another account's
            found.add(process.readlink())
    return found


def test_an_account_that_may_not_make_namespaces_is_told_why(tmp_path, monkeypatch):
    import router

    def refuse(name, *_):
        raise PermissionError(1, "Operation not permitted", name)

    monkeypatch.setattr(router, "called", refuse)
    firewall = {"closed": [], "only_to": {}, "apart": []}
    settings = {"hosts": {"a": "10.77.0.1"}, "firewall": firewall, "wires": {}, "capture": str(tmp_path / "packets")}
    made = Router(json.loads(json.dumps(settings)))
    try:
        with pytest.raises(RefusedError, match="neither network nor user namespaces can be made by this account: Operation not permitted"):
            made.open()
    finally:
        made.capture.close()
