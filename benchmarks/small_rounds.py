"""The rate of small rounds: daemons of their own process each, over encrypted links, whose models have some hundred bytes. Prints JSON.

    python benchmarks/small_rounds.py                            # this checkout alone
    python benchmarks/small_rounds.py --other ../before          # in turns with another checkout: also ratios
    python benchmarks/small_rounds.py --profile --only ring      # where the time of one daemon of the ring goes

pair: two daemons, 100 bytes each; the median of the seconds of a round. proxied: the same through a proxy; delayed: through one that keeps
what comes for --delay-ms in each direction. one_way_ms: half of what a plain ping of 100 bytes takes through such a proxy, so that
delay_adds_ms is by how much messages really come later.

ring: eight daemons, 14 parameters; rounds a second, until the slowest has made them all. States lie under --place, whose disk decides with:
each checkpoint is synced. The first rounds, which set everything up, are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import pstats
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

KINDS = ("pair", "proxied", "delayed", "ring")
FIRST_ROUND = 20
TIMEOUT_S = 600.0
PIECE_BYTES = 65536
PINGS, PING_BYTES = 100, 100
PROFILED = 45
"""Functions that are printed."""
CHECKOUT = Path(__file__).resolve().parent.parent


def proxy(target: str, delay_s: float, said: Connection) -> None:
    """Forward connections to a port, each piece after a delay; threads, because asyncio rounds times to milliseconds."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said.send(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        while True:
            near, _ = listening.accept()
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:  # nobody listens there yet; the dialler comes again
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                line: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                threading.Thread(target=take_in, args=(source, line, delay_s), daemon=True).start()
                threading.Thread(target=give_out, args=(sink, line), daemon=True).start()


def take_in(source: socket.socket, line: queue.SimpleQueue[tuple[float, bytes]], delay_s: float) -> None:
    """Read pieces, and note when each is due."""
    with suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            line.put((time.monotonic() + delay_s, piece))
    line.put((0.0, b""))


def give_out(sink: socket.socket, line: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    """Write pieces when they are due."""
    with suppress(OSError):
        while (due := line.get())[1]:
            if (wait_s := due[0] - time.monotonic()) > 0:
                time.sleep(wait_s)
            sink.sendall(due[1])
        sink.shutdown(socket.SHUT_RDWR)


def echo(said: Connection) -> None:
    """Send back what comes over one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said.send(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
        came, _ = listening.accept()
        came.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while piece := came.recv(PIECE_BYTES):
            came.sendall(piece)


def one_way_s(address: str) -> float:
    """Half of what a ping takes, where the other end sends it back; nobody does anything else meanwhile, and both ends sleep."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    took_s = []
    with socket.create_connection((host, int(port))) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            began_s = time.monotonic()
            link.sendall(bytes(PING_BYTES))
            missing = PING_BYTES
            while missing:
                missing -= len(link.recv(missing))
            took_s.append(time.monotonic() - began_s)
    return median(took_s) / 2


def run_daemon(daemon: Any, results: Any, *, profiled: bool) -> None:
    """One daemon to its end; says when each round was over, and the processor time of a round."""
    from p2pfl.node.round_log import RoundLog

    ended_s: list[float] = []
    spent_s: list[float] = []
    record = RoundLog.record  # the one place that every round passes

    def noted(log: Any, row: Any) -> None:
        ended_s.append(time.monotonic())
        spent_s.append(time.process_time())
        record(log, row)

    RoundLog.record = noted
    profile = cProfile.Profile(time.process_time)
    if profiled:
        profile.enable()
    asyncio.run(asyncio.wait_for(daemon.run(), TIMEOUT_S))
    if profiled:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(PROFILED)
    counted = len(spent_s) - 1 - FIRST_ROUND
    results.put((daemon.node.me, ended_s, 1e6 * (spent_s[-1] - spent_s[FIRST_ROUND]) / counted))


def network(kind: str, rounds: int, delay_s: float, place: Path, *, profiled: bool) -> dict[str, float]:
    """Run a network of the version that Python finds, and look at its rounds."""
    import torch
    import zmq
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from p2pfl.experiment.loading import experiment_from
    from p2pfl.experiment.plan import load_sites, make_plan
    from p2pfl.node.clock import Timeouts
    from p2pfl.node.daemon import Daemon
    from p2pfl.node.node import Node
    from p2pfl.protocol.agreed_start import Signing
    from p2pfl.protocol.network_view import ViewPolicy
    from p2pfl.transports import Endpoint, ZeroMQTransport, reserve_port

    torch.set_num_threads(1)
    nodes, features = (8, 13) if kind == "ring" else (2, 24)
    task = {"name": "synthetic-logistic", "features": features, "samples": 40}
    asked = {"task": task, "nodes": nodes, "topology": {"name": "ring"}, "rounds": rounds, "stop": None, "baselines": []}
    resolved = experiment_from(asked)
    plan = make_plan(resolved, load_sites(resolved))
    assert plan.layout.size == features + 1
    processes = multiprocessing.get_context("fork")
    secrets = {name: Ed25519PrivateKey.generate() for name in plan.names}
    signed = {name: secret.public_key().public_bytes_raw() for name, secret in secrets.items()}
    curve = {name: zmq.curve_keypair() for name in plan.names}
    results = processes.SimpleQueue()
    running = []
    with ExitStack() as stack:
        ports = {name: stack.enter_context(reserve_port()) for name in plan.names}
        address = {name: port.address for name, port in ports.items()}
        listens = dict(address)

        def start(work: Any, *arguments: Any) -> str:
            """Start what listens, and return where."""
            here, there = processes.Pipe()
            started = processes.Process(target=work, args=(*arguments, there), daemon=True)
            started.start()
            stack.callback(started.terminate)
            told: str = here.recv()
            return told

        held_s, pinged = delay_s if kind == "delayed" else 0.0, {}
        if kind in ("proxied", "delayed"):
            pinged = {"one_way_ms": 1000 * one_way_s(start(proxy, start(echo), held_s))}
        for name in plan.names if kind in ("proxied", "delayed") else ():
            address[name] = start(proxy, listens[name], held_s)
        ends = {name: Endpoint(name, address[name], curve[name][0]) for name in plan.names}
        for number, name in enumerate(plan.names):
            others = [ends[other] for other in plan.neighbours(name)]
            node = Node(
                plan,
                name,
                ZeroMQTransport(ends[name], curve[name][1], others, listen=listens[name]),
                study_digest="ab" * 32,
                state=place / name,
                timeouts=Timeouts(deadline_floor_s=120.0, linger_s=20.0, start_within_s=120.0),
                incarnation=number + 1,
                signing=Signing(keys=signed, sign=secrets[name].sign),
                view=ViewPolicy(),
            )
            running.append(
                processes.Process(target=run_daemon, args=(Daemon(node), results), kwargs={"profiled": profiled and number == 0})
            )
        for each in running:
            each.start()
        found = [results.get() for _ in running]
        for each in running:
            each.join()
    turns = [b - a for _, ended_s, _ in found for a, b in zip(ended_s[FIRST_ROUND:-1], ended_s[FIRST_ROUND + 1 :], strict=True)]
    took_s = max(ended_s[-1] for _, ended_s, _ in found) - min(ended_s[FIRST_ROUND] for _, ended_s, _ in found)
    return {
        "median_ms": 1000 * median(turns),
        "rounds_per_s": (rounds - 1 - FIRST_ROUND) / took_s,
        "processor_us": median(spent for *_, spent in found),
        **pinged,
    }


def run(checkout: Path, kind: str, options: argparse.Namespace, *, profiled: bool = False) -> dict[str, float]:
    """Measure a network of a checkout, in a process of its own."""
    rounds = options.ring_rounds if kind == "ring" else options.pair_rounds
    command = [sys.executable, __file__, "--kind", kind, "--rounds", str(rounds), "--delay-ms", str(options.delay_ms)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        ended = subprocess.run(  # noqa: S603  # our own command
            [*command, "--at", place, *(["--profile"] if profiled else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None if profiled else subprocess.PIPE,
            text=True,
            timeout=2 * TIMEOUT_S,
            check=False,
        )
    if ended.returncode:
        sys.exit(f"{kind} of {checkout} ended with exit code {ended.returncode}: {(ended.stderr or '')[-2000:]}")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def figures_of(turns: list[dict[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Medians over the turns of one checkout."""
    figures: dict[str, Any] = {
        kind: {name: round(median(turn[kind][name] for turn in turns), 2) for name in turns[0][kind]} for kind in turns[0]
    }
    for figure, name in (("delay_adds_ms", "one_way_ms"), ("delay_costs_ms", "median_ms")):
        if {"proxied", "delayed"} <= figures.keys():
            figures[figure] = round(median(turn["delayed"][name] - turn["proxied"][name] for turn in turns), 2)
    return figures


def ratios_of(turns: list[dict[str, Mapping[str, float]]], others: list[dict[str, Mapping[str, float]]]) -> dict[str, float]:
    """Medians of the ratios to the other checkout, turn by turn."""
    pairs = list(zip(turns, others, strict=True))
    ratios = {}
    for kind in turns[0]:
        names = {"ring": "rounds_per_s"}.get(kind, "median_ms"), "processor_us"
        ratios |= {f"{kind}.{name}": round(median(here[kind][name] / there[kind][name] for here, there in pairs), 3) for name in names}
    return ratios


def main() -> None:
    """Read the command line, measure, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout of another version")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--pair-rounds", type=int, default=300)
    parser.add_argument("--ring-rounds", type=int, default=1000)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument(
        "--place", type=Path, help="a folder on the disk that is measured with; by default the system's for temporary files"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(network(options.kind, options.rounds, options.delay_ms / 1000, options.at, profiled=options.profile)))
        return
    kinds = options.only or KINDS
    if options.profile:
        for kind in kinds:
            run(CHECKOUT, kind, options, profiled=True)
        return
    checkouts = [CHECKOUT, *([options.other.resolve()] if options.other else [])]
    turns: list[list[dict[str, Mapping[str, float]]]] = [[] for _ in checkouts]
    for number in range(options.turns):
        found: list[dict[str, Mapping[str, float]]] = [{} for _ in checkouts]
        for kind in kinds:
            for place in range(len(checkouts))[:: -1 if number % 2 else 1]:
                found[place][kind] = run(checkouts[place], kind, options)
        for place, each in enumerate(found):
            turns[place].append(each)
    figures = {"cores": len(os.sched_getaffinity(0)), "turns": options.turns, "this": figures_of(turns[0])}
    if options.other:
        figures |= {"other": figures_of(turns[1]), "ratios": ratios_of(*turns)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
