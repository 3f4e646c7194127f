"""100 MB in frames of 1 MB between two processes on loopback: libzmq with CURVE as it is, and through our transport.

Prints JSON: MB/s of each run, their medians, and transport / raw. Runs are interleaved, because the machine's speed drifts.

    python benchmarks/transport.py [--repeats 5] [--megabytes 100]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from statistics import median

import zmq

from p2pfl.transports import Endpoint, ZeroMQTransport, reserve_port

FRAME_BYTES = 1_000_000
TIMEOUT_S = 60.0

Keys = tuple[bytes, bytes]


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
    print(json.dumps(asyncio.run(measure(arguments.repeats, arguments.megabytes)), indent=2))


if __name__ == "__main__":
    main()
