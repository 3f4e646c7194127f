"""What a simulated round costs, beside what a user writes by hand, what the hardware allows, and the bare matrix products.

W1: n nodes on a seeded random 4-regular graph, 128 samples of 784 features each (MNIST from P2PFL_DATA, drawn with replacement; synthetic
of the same shape otherwise), a perceptron 784-64-10 with ReLU, batches of 32, 4 steps of SGD a round at 0.05, 20 rounds.
W2: logistic regression on 13 features, 32 samples a node, batches of 4, 10 steps a round.

    python benchmarks/simulator.py                       # W1 at n = 256, W2 at n = 10,000: five interleaved runs, ratios as JSON
    python benchmarks/simulator.py --nodes 16 64 256 1024 4096
    python benchmarks/simulator.py --million             # W2 at n = 1,000,000, with its memory
    python benchmarks/simulator.py --ranks 2             # W1 at n = 4096: two ranks beside one, one thread each

Ways: `engine` is p2pfl.simulate; `hand` a Python loop over nn.Modules with torch.optim, then averaging; `limit` forward and backward passes
written out for chunks of nodes that stay in the cache, mixing fused into the same loop, a Python thread a core; `floor` the matrix products
of W1 alone, on one core. All give the same weights. Rates are node-rounds a second, medians; ratios are of runs side by side. Those to the
limit and the floor hold from machine to machine; the one to a Python loop also tells how fast the machine's Python is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import p2pfl
from p2pfl.draws import batch_positions
from p2pfl.params import parameters_of
from p2pfl.runs.stopwatch import peak_rss_bytes
from p2pfl.tasks import SiteTable, Split, Task, accuracy
from p2pfl.tasks.partition import node_names
from p2pfl.tasks.vision import mnist
from p2pfl.topology import make, num_crossing, partition, weighted
from p2pfl.training import build_model

CORES = len(os.sched_getaffinity(0))
LR = 0.05


@dataclass(frozen=True)
class Workload:
    """One of the two."""

    name: str
    sizes: tuple[int, ...]
    """Of the layers."""
    samples: int
    batch: int
    steps: int
    rounds: int

    def model(self) -> nn.Module:
        """A perceptron, or none hidden."""
        if len(self.sizes) == 2:  # noqa: PLR2004
            return nn.Linear(*self.sizes)
        first, hidden, last = self.sizes
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of a batch."""
        return (F.cross_entropy if self.sizes[-1] > 1 else F.binary_cross_entropy_with_logits)(outputs, targets)


W1 = Workload("W1", (784, 64, 10), samples=128, batch=32, steps=4, rounds=20)
W2 = Workload("W2", (13, 1), samples=32, batch=4, steps=10, rounds=20)
WORKLOADS = {"W1": W1, "W2": W2}


@p2pfl.task
def images(num_nodes: int) -> Task:
    """W1: every node's own draw of one table."""
    if "P2PFL_DATA" in os.environ:
        (site,) = mnist(nodes=1, partition={"name": "iid"}).sites
        assert site.train is not None
        inputs, targets = site.train[0].flatten(1).float() / 255, site.train[1]
    else:
        draw = torch.Generator().manual_seed(0)
        inputs, targets = torch.rand(60_000, 784, generator=draw), torch.randint(0, 10, (60_000,), generator=draw)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, len(inputs), num_nodes * W1.samples, dtype=np.int32))
    starts = torch.arange(num_nodes + 1) * W1.samples
    train, test = Split(starts=starts, rows=rows), Split(starts=starts // 4, rows=rows)
    sites = SiteTable(names=node_names("node", num_nodes), inputs=inputs, targets=targets, train=train, test=test)
    return Task(name="images", model=W1.model, loss=F.cross_entropy, metrics={"accuracy": accuracy}, sites=sites)


@p2pfl.task
def patients(num_nodes: int) -> Task:
    """W2: every node's own rows."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_nodes * W2.samples, 13, generator=draw)
    targets = (inputs[:, :1] + inputs[:, 1:2] > 0).float()
    starts = torch.arange(num_nodes + 1) * W2.samples
    sites = SiteTable(names=node_names("node", num_nodes), inputs=inputs, targets=targets, train=Split(starts=starts))
    return Task(name="patients", model=W2.model, loss=F.binary_cross_entropy_with_logits, metrics={}, sites=sites)


def graph_of(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Each node's neighbours (N, 4) and their weights, of the engine's own graph."""
    index, weights, _ = weighted(make("random-regular", num_nodes, 0, degree=4)).padded()
    return torch.from_numpy(index), torch.from_numpy(weights).float()


def engine(workload: Workload, num_nodes: int, rounds: int) -> float:
    """p2pfl.simulate: node-rounds a second of training and mixing."""
    torch.set_num_threads(CORES)  # the other ways leave it at one
    with tempfile.TemporaryDirectory() as folder:
        run = run_engine(workload, num_nodes, rounds, Path(folder) / "run")
        return float(run.summary["node_rounds_per_second"])


def run_engine(workload: Workload, num_nodes: int, rounds: int, out: Path) -> p2pfl.Run:
    """By itself, or as one of torchrun's ranks."""
    task = f"simulator:{'images' if workload is W1 else 'patients'}"
    experiment = {
        "task": {"name": task, "num_nodes": num_nodes},
        "topology": {"name": "random-regular", "degree": 4},
        "algorithm": {"name": "dpsgd", "local_steps": workload.steps, "batch_size": workload.batch},
        "optimizer": {"name": "sgd", "lr": LR},
        "rounds": rounds,
        "stop": None,
        "baselines": [],
        "evaluate_every": 10**6,
        "checkpoint_every": 10**6,
    }
    return p2pfl.simulate(experiment, out=out, allow_tasks=[task])


@dataclass
class Data:
    """What the other ways train on: the same rows and the same batches."""

    workload: Workload
    inputs: Tensor
    targets: Tensor
    rows_NR: Tensor
    start_P: Tensor
    index_NK: Tensor
    weights_NK: Tensor

    @classmethod
    def of(cls, workload: Workload, num_nodes: int) -> Data:
        """Of the task that the engine runs."""
        task = (images if workload is W1 else patients)(num_nodes)
        sites = task.sites
        assert isinstance(sites, SiteTable)
        rows = sites.train.rows if sites.train.rows is not None else torch.arange(num_nodes * workload.samples)
        start_P = parameters_of(build_model(task, torch.float32, 0))
        return cls(workload, sites.inputs, sites.targets, rows.long().view(num_nodes, -1), start_P, *graph_of(num_nodes))

    def batches(self, round: int, nodes: slice) -> Tensor:
        """Row numbers (C, steps, batch) of some nodes."""
        chosen = torch.arange(len(self.rows_NR))[nodes]
        sizes = torch.full_like(chosen, self.workload.samples)
        positions = batch_positions(0, chosen, sizes, round * self.workload.steps, self.workload.steps, self.workload.batch)
        return self.rows_NR[nodes].gather(1, positions.flatten(1)).view_as(positions)


def hand(data: Data, rounds: int, threads: int = 1) -> float:
    """A loop over modules with torch.optim, then averaging."""
    torch.set_num_threads(threads)
    workload, num_nodes = data.workload, len(data.rows_NR)
    models = [workload.model() for _ in range(num_nodes)]
    for model in models:
        nn.utils.vector_to_parameters(data.start_P.clone(), model.parameters())
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    began = time.perf_counter()
    for number in range(rounds):
        for node, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for rows in data.batches(number, slice(node, node + 1))[0]:
                optimizer.zero_grad()
                workload.loss(model(data.inputs[rows]), data.targets[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            old = [[p.clone() for p in model.parameters()] for model in models]
            for node, model in enumerate(models):
                for k, p in enumerate(model.parameters()):
                    p.mul_(float(1 - data.weights_NK[node].sum()))
                    for neighbour, weight in zip(data.index_NK[node].tolist(), data.weights_NK[node].tolist(), strict=True):
                        p.add_(old[neighbour][k], alpha=weight)
    seconds = time.perf_counter() - began
    torch.set_num_threads(1)
    return num_nodes * rounds / seconds


def limit(data: Data, rounds: int, chunk: int = 8) -> float:
    """W1 written out for chunks that stay in the cache, mixing in the same loop, a Python thread a core."""
    torch.set_num_threads(1)
    num_nodes, (features, hidden, classes) = len(data.rows_NR), W1.sizes
    x, y = data.start_P.repeat(num_nodes, 1), torch.empty(num_nodes, len(data.start_P))
    ends = np.cumsum([features * hidden, hidden, hidden * classes]).tolist()
    own_N = 1 - data.weights_NK.sum(dim=1)

    def work(number: int, first: int) -> None:
        nodes = slice(first, min(first + chunk, num_nodes))
        part = y[nodes]
        torch.mul(x[nodes], own_N[nodes, None], out=part)  # the round before is mixed as this one begins
        for k in range(data.index_NK.shape[1]):
            part.addcmul_(x[data.index_NK[nodes, k]], data.weights_NK[nodes, k, None])
        w_1, b_1 = part[:, : ends[0]].view(-1, hidden, features), part[:, ends[0] : ends[1]]
        w_2, b_2 = part[:, ends[1] : ends[2]].view(-1, classes, hidden), part[:, ends[2] :]
        for rows in data.batches(number, nodes).unbind(1):
            inputs, targets = data.inputs[rows], data.targets[rows]
            inner = torch.baddbmm(b_1.unsqueeze(1), inputs, w_1.transpose(1, 2)).relu_()
            slope = torch.softmax(torch.baddbmm(b_2.unsqueeze(1), inner, w_2.transpose(1, 2)), -1)
            slope.scatter_add_(2, targets.unsqueeze(-1), slope.new_tensor(-1.0).expand(*targets.shape, 1))
            slope.mul_(LR / targets.shape[1])
            before = torch.bmm(slope, w_2).masked_fill_(inner <= 0, 0)
            w_2.baddbmm_(slope.transpose(1, 2), inner, alpha=-1)
            b_2.sub_(slope.sum(1))
            w_1.baddbmm_(before.transpose(1, 2), inputs, alpha=-1)
            b_1.sub_(before.sum(1))

    began = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        for number in range(rounds):
            list(pool.map(lambda first, number=number: work(number, first), range(0, num_nodes, chunk)))
            x, y = y, x
    return num_nodes * rounds / (time.perf_counter() - began)


def limit_of_patients(data: Data, rounds: int, chunk: int = 1024) -> float:
    """W2 written out in the same way; its gradients in one product."""
    torch.set_num_threads(1)
    num_nodes, (features, _) = len(data.rows_NR), W2.sizes
    x, y = data.start_P.repeat(num_nodes, 1), torch.empty(num_nodes, len(data.start_P))
    own_N = 1 - data.weights_NK.sum(dim=1)

    def work(number: int, first: int) -> None:
        nodes = slice(first, min(first + chunk, num_nodes))
        part = y[nodes]
        torch.mul(x[nodes], own_N[nodes, None], out=part)
        for k in range(data.index_NK.shape[1]):
            part.addcmul_(x[data.index_NK[nodes, k]], data.weights_NK[nodes, k, None])
        weights, offset = part[:, :features, None], part[:, features:, None]
        for rows in data.batches(number, nodes).unbind(1):
            inputs = data.inputs[rows]
            slope = torch.baddbmm(offset, inputs, weights).sigmoid_().sub_(data.targets[rows]).mul_(LR / rows.shape[1])
            weights.baddbmm_(inputs.transpose(1, 2), slope, alpha=-1)
            offset.sub_(slope.sum(1, keepdim=True))

    began = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        for number in range(rounds):
            list(pool.map(lambda first, number=number: work(number, first), range(0, num_nodes, chunk)))
            x, y = y, x
    return num_nodes * rounds / (time.perf_counter() - began)


def floor(repeats: int = 400) -> float:
    """The matrix products of a node-round of W1 alone, on one core."""
    torch.set_num_threads(1)
    features, hidden, classes = W1.sizes
    inputs, w_1 = torch.randn(W1.batch, features), torch.randn(hidden, features)
    inner, w_2, slope = torch.randn(W1.batch, hidden), torch.randn(classes, hidden), torch.randn(W1.batch, classes)
    into = torch.empty_like(w_1)
    began = time.perf_counter()
    for _ in range(repeats * W1.steps):
        torch.mm(inputs, w_1.T)
        torch.mm(inner, w_2.T)
        torch.mm(slope, w_2)
        torch.mm(slope.T, inner)
        torch.mm(inner.T, inputs, out=into)
    return repeats / (time.perf_counter() - began)


def interleaved(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every way once, then every way again: a machine whose speed drifts drifts for all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
            sys.stderr.write(f"{number + 1}/{repeats} {name}: {found[name][-1]:,.0f} node-rounds/s\n")
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios side by side."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def ways_by_hand(data: Data, rounds: int) -> dict[str, Callable[[], float]]:
    """Give the loop by hand with as many of torch's threads as it is fastest with."""
    threads = max(range(1, CORES + 1), key=lambda threads: hand(data, 1, threads))
    return {"hand": lambda: hand(data, rounds, threads)}


def w1(num_nodes: int, repeats: int, rounds: int, *, by_hand: bool = True) -> dict[str, Any]:
    """Ratios at one size."""
    data = Data.of(W1, num_nodes)
    ways = {"engine": lambda: engine(W1, num_nodes, rounds), "limit": lambda: limit(data, rounds), "floor": floor}
    found = interleaved(ways | (ways_by_hand(Data.of(W1, min(num_nodes, 256)), 3 if num_nodes > 16 else 20) if by_hand else {}), repeats)  # noqa: PLR2004
    return {
        "nodes": num_nodes,
        "node_rounds_per_second": {name: statistics.median(values) for name, values in found.items()},
        "of_limit": ratio(found, "engine", "limit"),
        "of_floor_a_core": ratio(found, "engine", "floor") / CORES,
        "times_hand": ratio(found, "engine", "hand") if by_hand else None,
    }


def w2(num_nodes: int, repeats: int, rounds: int, *, by_hand: bool = True) -> dict[str, Any]:
    """Ratios at one size; by hand a thousand nodes are enough, its cost grows with them."""
    data = Data.of(W2, num_nodes)
    ways = {"engine": lambda: engine(W2, num_nodes, rounds), "limit": lambda: limit_of_patients(data, rounds)}
    found = interleaved(ways | (ways_by_hand(Data.of(W2, min(num_nodes, 1000)), 1) if by_hand else {}), repeats)
    return {
        "nodes": num_nodes,
        "node_rounds_per_second": {name: statistics.median(values) for name, values in found.items()},
        "of_limit": ratio(found, "engine", "limit"),
        "times_hand": ratio(found, "engine", "hand") if by_hand else None,
    }


def million(num_nodes: int, rounds: int) -> dict[str, Any]:
    """W2 in a process of its own, with the most memory that it ever held, beside 10,000 nodes."""
    code = f"import json, simulator as s; print(json.dumps([s.engine(s.W2, {num_nodes}, {rounds}), s.peak_gib()]))"
    small = engine(W2, 10_000, 20)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)  # noqa: S603
    rate, gib = json.loads(done.stdout.splitlines()[-1])
    return {
        "nodes": num_nodes,
        "node_rounds_per_second": rate,
        "cost_beside_10_000": small / rate,
        "peak_gib": gib,
        "seconds": time.perf_counter() - began,
    }


def sharded(num_nodes: int, ranks: int, repeats: int, rounds: int) -> dict[str, Any]:
    """W1 shared by ranks, beside one; one thread each, in turns."""
    found = interleaved({str(count): lambda count=count: at_ranks(num_nodes, count, rounds) for count in (1, ranks)}, repeats)
    graph = make("random-regular", num_nodes, 0, degree=4)
    return {
        "nodes": num_nodes,
        "ranks": ranks,
        "rounds": rounds,
        "links_between_ranks": num_crossing(graph, partition(graph, ranks)),
        "node_rounds_per_second": {count: statistics.median(values) for count, values in found.items()},
        "times_one_rank": ratio(found, str(ranks), "1"),
    }


def at_ranks(num_nodes: int, ranks: int, rounds: int) -> float:
    """Node-rounds a second of W1, in processes of their own."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        work = [__file__, "--nodes", str(num_nodes), "--rounds", str(rounds), "--out", str(out)]
        subprocess.run([sys.executable, *start, *work], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603
        return float(p2pfl.Run(out).summary["node_rounds_per_second"])


def peak_gib() -> float:
    """The most memory that this process ever held."""
    return peak_rss_bytes() / 2**30


def main() -> None:
    """Read the command line, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", help="sizes of W1 (256)")
    parser.add_argument("--patients", type=int, nargs="*", default=[10_000], help="sizes of W2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--million", type=int, nargs="?", const=1_000_000, help="W2 at this size, with its memory")
    parser.add_argument("--ranks", type=int, help="W1 at the first size (4096 by default), shared by so many ranks, beside one")
    parser.add_argument("--out", type=Path, help="run W1 once, as one of the ranks that torchrun starts, and leave the run there")
    arguments = parser.parse_args()
    if arguments.out:
        run_engine(W1, arguments.nodes[0], arguments.rounds, arguments.out)
        return
    torch.set_num_threads(CORES)
    result: dict[str, Any] = {"cores": CORES, "torch": torch.__version__, "data": "mnist" if "P2PFL_DATA" in os.environ else "synthetic"}
    if arguments.ranks:
        result["sharded"] = sharded((arguments.nodes or [4096])[0], arguments.ranks, arguments.repeats, arguments.rounds)
    elif arguments.million:
        result["million"] = million(arguments.million, arguments.rounds)
    else:
        result["w1"] = [w1(n, arguments.repeats, arguments.rounds) for n in arguments.nodes or [256]]
        result["w2"] = [w2(n, arguments.repeats, arguments.rounds) for n in arguments.patients]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
