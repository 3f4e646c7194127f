"""100 MB in frames of 1 MB between two processes on loopback: libzmq with CURVE as it is, and through our transport.

Then as much both ways at once, by libzmq as it is and by two node daemons that average a model of that size: from the moment at which the
later of the two has its update ready to be sent, with its digest, until both have taken in the other's, checked. "packing" beside it is the
same from the moment at which the model is there, so that the sender's digest counts as well. Prints JSON: MB/s in each direction of each
run, their medians, and their ratios. Runs are interleaved, because the machine's speed drifts.

    python benchmarks/transport.py [--repeats 5] [--megabytes 100]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import secrets
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.node.clock import Timeouts
from p2pfl.node.daemon import Daemon
from p2pfl.node.node import Node
from p2pfl.protocol.agreed_start import Signing
from p2pfl.transports import Endpoint, ZeroMQTransport, reserve_port

FRAME_BYTES = 1_000_000
TIMEOUT_S = 300.0

Keys = tuple[bytes, bytes]
Usage = tuple[float, int]


def usage() -> Usage:
    """Seconds of processor time that this process has used, all threads, and pages that it was given."""
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime, found.ru_minflt


def spent_since(before: Usage) -> Usage:
    """Differences to an earlier look."""
    now = usage()
    return now[0] - before[0], now[1] - before[1]


def raw_receiver(address: str, keys: Keys, num_frames: int, repeats: int) -> None:
    """ROUTER that answers each series of frames with one."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_server = 1
        router.curve_secretkey = keys[1]
        router.rcvhwm = 32
        router.bind(address)
        for _ in range(repeats):
            for _ in range(num_frames):
                route, _header, _payload = router.recv_multipart(copy=False)
            router.send_multipart([route, b"all"])


def raw_sender(address: str, server_key: bytes, keys: Keys) -> tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]:
    """DEALER to the above."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey = keys
    dealer.curve_serverkey = server_key
    dealer.sndhwm = 32
    dealer.linger = 0
    dealer.connect(address)
    return context, dealer


def raw_run(dealer: zmq.Socket[bytes], payload: bytes, num_frames: int) -> float:
    """Seconds from the first frame to the answer."""
    started_s = time.perf_counter()
    for _ in range(num_frames):
        dealer.send_multipart([b"header", payload], copy=False)
    dealer.recv()
    return time.perf_counter() - started_s


async def receive_all(me: Endpoint, secret_key: bytes, peer: Endpoint, num_frames: int, repeats: int) -> None:
    """The same through our transport."""
    async with ZeroMQTransport(me, secret_key, [peer]) as transport:
        for _ in range(repeats):
            for _ in range(num_frames):
                await transport.receive()
            await transport.send(peer.name, [b"all"], TIMEOUT_S)
        await transport.receive()  # the sender's goodbye


def transport_receiver(me: Endpoint, secret_key: bytes, peer: Endpoint, num_frames: int, repeats: int) -> None:
    """The process around it."""
    asyncio.run(asyncio.wait_for(receive_all(me, secret_key, peer, num_frames, repeats), 10 * TIMEOUT_S))


async def transport_run(transport: ZeroMQTransport, peer: str, payload: bytes, num_frames: int) -> float:
    """Seconds from the first frame to the answer."""
    started_s = time.perf_counter()
    for _ in range(num_frames):
        await transport.send(peer, [b"header", payload], TIMEOUT_S)
    await transport.receive()
    return time.perf_counter() - started_s


async def measure(repeats: int, megabytes: int) -> dict[str, object]:
    """Both, in turns; the first turn warms up and is not counted."""
    payload = bytes(FRAME_BYTES)
    processes = multiprocessing.get_context("spawn")
    near_keys, far_keys = zmq.curve_keypair(), zmq.curve_keypair()
    seconds: dict[str, list[float]] = {"raw": [], "transport": []}
    with reserve_port() as raw_port, reserve_port() as port:
        far, near = Endpoint("far", port.address, far_keys[0]), Endpoint("near", None, near_keys[0])
        children = [
            processes.Process(target=raw_receiver, args=(raw_port.address, far_keys, megabytes, repeats + 1)),
            processes.Process(target=transport_receiver, args=(far, far_keys[1], near, megabytes, repeats + 1)),
        ]
        for child in children:
            child.start()
        context, dealer = raw_sender(raw_port.address, far_keys[0], near_keys)
        async with ZeroMQTransport(near, near_keys[1], [far]) as transport:
            await linked(transport)
            for _ in range(repeats + 1):
                seconds["raw"].append(raw_run(dealer, payload, megabytes))
                seconds["transport"].append(await transport_run(transport, "far", payload, megabytes))
            await transport.send("far", [b"goodbye"], TIMEOUT_S)
        dealer.close()
        context.term()
        for child in children:
            child.join(TIMEOUT_S)
    speeds = {name: [megabytes / taken_s for taken_s in each[1:]] for name, each in seconds.items()}
    medians = {name: median(each) for name, each in speeds.items()}
    return {
        "megabytes": megabytes,
        "megabytes_per_second": {name: [round(speed, 1) for speed in each] for name, each in speeds.items()},
        "median": {name: round(speed, 1) for name, speed in medians.items()},
        "transport_over_raw": round(medians["transport"] / medians["raw"], 3),
    }


def both_ways_raw(address: str, keys: Keys, server_key: bytes | None, num_frames: int, repeats: int, turn: Barrier, results: Any) -> None:
    """One end of a connection over which as much comes as goes; the one without the other's key listens. Sends and reads in turns."""
    model = memoryview(secrets.token_bytes(num_frames * FRAME_BYTES))  # as large as what daemons send: one frame again and again is cached
    with zmq.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.curve_publickey, pair.curve_secretkey = keys
        pair.sndhwm = pair.rcvhwm = 32
        pair.linger = 0
        if server_key is None:
            pair.curve_server = 1
            pair.bind(address)
        else:
            pair.curve_serverkey = server_key
            pair.connect(address)
        pair.send(b"up")
        pair.recv()
        for number in range(repeats):
            turn.wait(TIMEOUT_S)  # the daemons' turn is over
            pair.send(b"now")
            pair.recv()
            started_s, used = time.monotonic(), usage()
            to_send = to_read = num_frames
            while to_send or to_read:
                ready = pair.poll(1000 * TIMEOUT_S, (zmq.POLLIN if to_read else 0) | (zmq.POLLOUT if to_send else 0))
                if ready & zmq.POLLIN:
                    pair.recv_multipart(copy=False)
                    to_read -= 1
                if ready & zmq.POLLOUT:
                    first = (num_frames - to_send) * FRAME_BYTES
                    pair.send_multipart([b"header", model[first : first + FRAME_BYTES]], copy=False)
                    to_send -= 1
            results.put(("raw", number, (started_s, time.monotonic()), spent_since(used)))
            turn.wait(TIMEOUT_S)
        turn.wait(TIMEOUT_S)  # to end takes processor time, of which the daemons' last turn would have less


class TimedDaemon(Daemon):
    """A daemon that takes turns with the others, and notes when its update was ready and when the neighbour's was here."""

    turn: Barrier
    results: Any

    _ready_s = 0.0
    _used: Usage = (0.0, 0)

    async def _exchange(self, outgoing: Any) -> bool:
        number = self.node.place.round
        await asyncio.to_thread(self.turn.wait, TIMEOUT_S)
        await asyncio.to_thread(self.turn.wait, TIMEOUT_S)  # the raw connection's turn is over
        started_s, used = time.monotonic(), usage()
        pack = self.node.mixing.pack

        def timed(*arguments: Any) -> Any:
            found = pack(*arguments)
            self._ready_s, self._used = time.monotonic(), usage()
            return found

        self.node.mixing.pack = timed
        is_over = await super()._exchange(outgoing)
        self.node.mixing.pack = pack
        ended_s = time.monotonic()
        self.results.put(("daemons", number, (self._ready_s, ended_s), spent_since(self._used)))
        self.results.put(("packing", number, (started_s, ended_s), spent_since(used)))
        return is_over


def both_ways_daemon(
    place: str, number: int, endpoints: list[Endpoint], secret_key: bytes, megabytes: int, repeats: int, turn: Barrier, results: Any
) -> None:
    """One of two nodes that average a model for some rounds."""
    experiment = experiment_from(
        {
            "task": {"name": "averaging", "dimension": megabytes * 10**6 // 4},
            "nodes": 2,
            "topology": {"name": "complete"},
            "rounds": repeats,
            "dtype": "float32",
            "stop": None,
            "baselines": [],
        }
    )
    plan = make_plan(experiment, load_sites(experiment))
    me, peer = endpoints[number], endpoints[1 - number]
    transport = ZeroMQTransport(me, secret_key, [peer])
    timeouts = Timeouts(deadline_floor_s=TIMEOUT_S, linger_s=5.0, start_within_s=TIMEOUT_S)
    signers = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (0, 1)]  # known to both, and of no other use
    names = [endpoint.name for endpoint in endpoints]
    node = Node(
        plan,
        me.name,
        transport,
        study_digest="ab" * 32,
        state=Path(place) / me.name,
        timeouts=timeouts,
        incarnation=secrets.randbits(60) + 1,
        signing=Signing(
            keys={name: signer.public_key().public_bytes_raw() for name, signer in zip(names, signers, strict=True)},
            sign=signers[number].sign,
        ),
    )
    daemon = TimedDaemon(node, status_port=None)
    daemon.turn, daemon.results = turn, results
    asyncio.run(daemon.run())
    turn.wait(TIMEOUT_S)


def measure_both_ways(repeats: int, megabytes: int) -> dict[str, object]:
    """Measure libzmq and the daemons in turns; the first turn warms up and is not counted."""
    processes = multiprocessing.get_context("spawn")
    turn, results = processes.Barrier(4), processes.Queue()
    keys = [zmq.curve_keypair() for _ in range(4)]
    with reserve_port() as raw_port, reserve_port() as port, tempfile.TemporaryDirectory() as place:
        endpoints = [Endpoint("node-0", port.address, keys[2][0]), Endpoint("node-1", None, keys[3][0])]
        raw = (repeats + 1, turn, results)
        children = [
            processes.Process(target=both_ways_raw, args=(raw_port.address, keys[0], None, megabytes, *raw)),
            processes.Process(target=both_ways_raw, args=(raw_port.address, keys[1], keys[0][0], megabytes, *raw)),
            *(
                processes.Process(target=both_ways_daemon, args=(place, number, endpoints, keys[2 + number][1], megabytes, *raw))
                for number in (0, 1)
            ),
        ]
        for child in children:
            child.start()
        ends = [results.get(timeout=10 * TIMEOUT_S) for _ in range(6 * (repeats + 1))]
        for child in children:
            child.join(TIMEOUT_S)
    # processes of one machine have one monotonic clock; from the later of both beginnings to the later of both ends
    speeds = {name: [megabytes / _took_s(ends, name, number) for number in range(1, repeats + 1)] for name in ("raw", "daemons", "packing")}
    medians = {name: median(each) for name, each in speeds.items()}
    spent = {name: [used for of, number, _, used in ends if of == name and number > 0] for name in speeds}
    return {
        "processor_seconds": {name: round(median(seconds for seconds, _ in each), 3) for name, each in spent.items()},
        "pages": {name: round(median(pages for _, pages in each)) for name, each in spent.items()},
        "megabytes_per_second_each_way": {name: [round(speed, 1) for speed in each] for name, each in speeds.items()},
        "median": {name: round(speed, 1) for name, speed in medians.items()},
        "daemons_over_raw": round(medians["daemons"] / medians["raw"], 3),
        "packing_over_raw": round(medians["packing"] / medians["raw"], 3),
    }


def _took_s(ends: list[tuple[str, int, tuple[float, float], Usage]], name: str, number: int) -> float:
    began_s, ended_s = zip(*(times for of, turn, times, _ in ends if (of, turn) == (name, number)), strict=True)
    return max(ended_s) - max(began_s)


async def linked(transport: ZeroMQTransport) -> None:
    """Wait until the other process is there."""
    async with asyncio.timeout(TIMEOUT_S):
        while not transport.counters["connected"]:  # noqa: ASYNC110 - a counter, not an event
            await asyncio.sleep(0.01)


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.repeats, arguments.megabytes))
    print(json.dumps(found | {"both_ways": measure_both_ways(arguments.repeats, arguments.megabytes)}, indent=2))


if __name__ == "__main__":
    main()
