"""Cost of one secure sum over many members in one process: ``python benchmarks/secure_sums.py [--members 50] [--numbers 1000000]``.

All members share this process and its processors, and their links are in memory, so that seconds are those of one machine doing the work of
all. Bytes are those that a member hands to its links. A ring, a path and a star are the extremes of graphs: a node with c children in the
tree sends 1 + c arrays.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.node.sum_node import SumNode
from p2pfl.node.sum_store import SumFolder
from p2pfl.privacy.fixed_point import FixedPoint
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.transports import MemoryNetwork

FORMATS = {
    "models": (FixedPoint(bits=64, fraction_bits=40), 1000.0),
    "statistics": (FixedPoint(bits=128, fraction_bits=60), 1e6),
}
GRAPHS = {"star": lambda n: nx.star_graph(n - 1), "ring": nx.cycle_graph, "regular": lambda n: nx.random_regular_graph(4, n, seed=1)}
HOUR_S = 3600.0


def terms_of(keys: Sequence[Ed25519PrivateKey], num_numbers: int, form: str) -> SumTerms:
    """A plan of one sum over all members."""
    number_format, bound = FORMATS[form]
    return SumTerms(
        study="5a" * 32,
        sums=(PlannedSum(statistic="benchmark", shape=(num_numbers,), number_format=number_format, bound=bound),),
        participants=tuple(range(len(keys))),
        names=tuple(f"node-{each}" for each in range(len(keys))),
        identities=tuple(key.public_key().public_bytes_raw().hex() for key in keys),
    )


async def add(folder: Path, graph: nx.Graph, num_numbers: int, form: str) -> tuple[float, float, list[int]]:
    """Seconds of one sum, processor seconds a member, and bytes that each has sent; the total is compared with the plain one."""
    num = graph.number_of_nodes()
    keys = [Ed25519PrivateKey.generate() for _ in range(num)]
    terms, network = terms_of(keys, num_numbers, form), MemoryNetwork()
    neighbours = [sorted(graph[each]) for each in range(num)]
    values = np.random.default_rng(0).normal(size=num_numbers)
    number_format = terms.sums[0].number_format
    expected = number_format.decode(number_format.encode(values) * np.uint64(num)) if form == "models" else None
    stores = [SumFolder(folder / name) for name in terms.names]
    for store in stores:
        store.__enter__()
    nodes = [
        SumNode(
            terms,
            neighbours,
            me,
            keys[me],
            stores[me],
            network.transport(terms.names[me], [terms.names[each] for each in neighbours[me]]),
            patience_s=HOUR_S,
            linger_s=HOUR_S,
            presence_s=2.0,
        )
        for me in range(num)
    ]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()

    async def one(node: SumNode) -> np.ndarray:
        return await node.run(lambda: node.total(0, [], values))

    totals = await asyncio.gather(*(one(node) for node in nodes))
    took_s, cpu_s = time.perf_counter() - began_s, (time.process_time() - began_cpu_s) / num
    for total in totals:
        assert np.array_equal(total, totals[0])
        assert expected is None or np.array_equal(total, expected)
    for store in stores:
        store.__exit__(None, None, None)
    return took_s, cpu_s, [node.bytes_sent for node in nodes]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--graph", choices=GRAPHS, action="append")
    parser.add_argument("--form", choices=FORMATS, action="append")
    chosen = parser.parse_args()
    print("| graph | numbers of | seconds, all members on this machine | processor seconds a member | MB sent: least, median, most |")
    print("| --- | --- | --- | --- | --- |")
    for graph in chosen.graph or GRAPHS:
        for form in chosen.form or FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                took_s, cpu_s, sent = asyncio.run(add(Path(folder), GRAPHS[graph](chosen.members), chosen.numbers, form))
            megabytes = ", ".join(f"{each / 1e6:.1f}" for each in (min(sent), float(np.median(sent)), max(sent)))
            print(f"| {graph} | {form} ({FORMATS[form][0].bits} bits) | {took_s:.1f} | {cpu_s:.2f} | {megabytes} |", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
