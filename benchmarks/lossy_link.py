"""One edge over a line of 40 ms that loses one packet in a hundred: TCP's congestion controls, and several connections in parallel.

Two hosts in network namespaces, libzmq with CURVE as it is. The sender gives each message of 1 MB to the first connection that has room.
Prints JSON: Mbit/s by congestion control and number of connections, from the first message to the answer that the last one has come.
Needs root or user namespaces, and /dev/net/tun.

    python benchmarks/lossy_link.py [--megabytes 20] [--mbit-s 20] [--loss 0.01] [--delay-ms 40]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import zmq

TESTS = Path(__file__).parents[1] / "tests"
PORT = 7700
FRAME_BYTES = 1_000_000
CONTROLS = ("cubic", "bbr")
CONNECTIONS = (1, 2, 4, 8)
DEADLINE_S = 900.0


def use(control: str) -> None:
    """Set the congestion control of all connections of this process."""
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as found:  # some are no sockets, or closed by now
            if found.family == socket.AF_INET:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())


def receive(keys: list[bytes], megabytes: int) -> None:
    """Read all messages, of whatever connection, and answer over each."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_server, router.curve_secretkey, router.rcvhwm, router.linger = 1, keys[1], 8, 5000
        router.bind(f"tcp://*:{PORT}")
        routes = set()
        for _ in range(megabytes):
            route, _ = router.recv_multipart()
            routes.add(route)
        for route in routes:
            router.send_multipart([route, b"all"])
        time.sleep(DEADLINE_S)  # the lab ends this process


def send(control: str, address: str, keys: list[bytes], megabytes: int, connections: int) -> None:
    """Send all messages, each over the first connection that has room, and say how long that took."""
    message, poller = bytes(FRAME_BYTES), zmq.Poller()
    with zmq.Context() as context:
        dealers = [context.socket(zmq.DEALER) for _ in range(connections)]
        for dealer in dealers:
            dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
            dealer.curve_serverkey, dealer.sndhwm, dealer.linger, dealer.immediate = keys[0], 2, 0, 1
            dealer.connect(f"tcp://{address}:{PORT}")
            poller.register(dealer, zmq.POLLOUT)
        while len(dict(poller.poll())) < connections:  # all are linked
            time.sleep(0.01)
        use(control)
        started_s = time.monotonic()
        left = megabytes
        while left:
            for dealer, _ in poller.poll():
                if left:
                    dealer.send(message, copy=False)
                    left -= 1
        for dealer in dealers:
            poller.modify(dealer, zmq.POLLIN)
        poller.poll()
        print(json.dumps(time.monotonic() - started_s))
        for dealer in dealers:
            dealer.close()


def measure(arguments: argparse.Namespace, control: str, connections: int) -> float:
    """Mbit/s of one run."""
    sys.path[:0] = [str(TESTS), str(TESTS / "network_lab")]
    from lab import NetworkLab

    keys = [key.decode() for key in zmq.curve_keypair()]
    wires = {"delay_s": arguments.delay_ms / 1000, "loss": arguments.loss, "bytes_per_s": arguments.mbit_s * 1e6 / 8}
    with tempfile.TemporaryDirectory() as folder, NetworkLab(["near", "far"], Path(folder), **wires) as lab:
        place, me = Path(folder), [sys.executable, __file__, "--control", control, "--keys", *keys, "--megabytes", str(arguments.megabytes)]
        lab.start("far", "far", *me, "--receive", log=place / "far.log")
        process = lab.start("near", "near", *me, "--send", lab.addresses["far"], "--connections", str(connections), log=place / "near.log")
        if process.wait(DEADLINE_S):
            sys.exit((place / "near.log").read_text() + (place / "far.log").read_text())
        return arguments.megabytes * 8 / float((place / "near.log").read_text())


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--mbit-s", type=float, default=20.0, help="rate of the line, each way")
    parser.add_argument("--loss", type=float, default=0.01, help="probability that a packet is lost")
    parser.add_argument("--delay-ms", type=float, default=40.0, help="each way")
    parser.add_argument("--connections", type=int, default=0, help="only so many; default: 1, 2, 4 and 8")
    for hidden in ("--control", "--send"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--keys", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keys = [key.encode() for key in arguments.keys or ()]
    if arguments.receive:
        receive(keys, arguments.megabytes)
    elif arguments.send:
        send(arguments.control, arguments.send, keys, arguments.megabytes, arguments.connections)
    else:
        numbers = [arguments.connections] if arguments.connections else CONNECTIONS
        found: dict[str, dict[int, float]] = {control: {} for control in CONTROLS}
        for number in numbers:
            for control in CONTROLS:
                found[control][number] = round(measure(arguments, control, number), 2)
                print(control, number, found[control][number], file=sys.stderr, flush=True)
        print(json.dumps({"mbit_s": found}, indent=2))


if __name__ == "__main__":
    main()
