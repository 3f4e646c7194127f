"""Graphs that change from round to round: every node derives the same ones from (seed, round), without asking anybody.

Shapes: N nodes, s neighbours of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import TopologyError
from p2pfl.topology.graph import Topology
from p2pfl.topology.rounds import Round, base_graph, fewest_factors, hyper_hypercube, simple_base

Words = NDArray[np.uint64]

_MOST_MULTIPLIED = 1024  # nodes
_MOST_ROUNDS = 5000
_AGREED = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The weighted graph of every round."""

    name: str
    num_nodes: int
    graph: Callable[[int], Topology]
    """Of a round; pure."""

    period: int | None
    """Rounds after which it repeats; 1: it stays as it is, None: random, it never repeats."""

    exact_after: int | None = None
    """Rounds, from a multiple of the period on, that give everybody the exact mean; None: no number of rounds does."""

    directed: bool = False
    everybody: Callable[[], Topology] | None = None
    """The union of a random schedule."""

    names: tuple[str, ...] | None = None
    _at: Callable[[int], Topology] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_at", lru_cache(maxsize=min(self.period or 8, 256))(self._named))

    @classmethod
    def static(cls, topology: Topology) -> Schedule:
        """The same graph in every round."""
        return cls(
            name=topology.name,
            num_nodes=topology.num_nodes,
            graph=lambda _: topology,
            period=1,
            directed=topology.directed,
            names=topology.names,
        )

    def at(self, round: int) -> Topology:
        """The graph of a round, with weights; it need not be connected."""
        return self._at(round % self.period if self.period else round)

    def _named(self, round: int) -> Topology:
        graph = self.graph(round)
        return graph if self.names is None or graph.names is not None else replace(graph, names=self.names)

    def union(self) -> Topology:
        """Everybody who can ever exchange with whom; weights are the mean over a period, or what they are on average."""
        if self.period == 1:
            return self.at(0)
        if self.period is None:
            assert self.everybody is not None
            union = self.everybody()
            return union if self.names is None else replace(union, names=self.names)
        graphs = [self.at(number) for number in range(self.period)]
        codes = np.concatenate([graph.receivers * self.num_nodes + graph.senders for graph in graphs])
        weights = np.concatenate([graph.weights for graph in graphs if graph.weights is not None])
        edges, which = np.unique(codes, return_inverse=True)
        mean = np.bincount(which, weights=weights) / self.period
        union = Topology.from_edges(self.name, self.num_nodes, edges % self.num_nodes, edges // self.num_nodes, directed=True, weights=mean)
        return replace(union, directed=self.directed, names=self.names)

    def renamed(self, names: Sequence[str]) -> Schedule:
        """The same rounds with names[i], sorted, for node i."""
        return replace(self, names=tuple(names))


SCHEDULES: dict[str, str] = {
    "one-peer-exponential": "i sends to i + 2^t: one message a node, one way; exact where N is a power of two.",
    "one-peer-hypercube": "Pairs that differ in one bit; N a power of two.",
    "hyper-hypercube": "Groups in mixed radix; N without prime factors above degree + 1. Options: degree.",
    **{f"base-{k}": f"Base-(k+1), at most {k - 1} neighbour{'s' if k > 2 else ''} a round: the exact mean for any N." for k in range(2, 6)},  # noqa: PLR2004
    **{f"simple-base-{k}": f"The simpler form of base-{k}." for k in range(2, 6)},
    "el-oracle": "Epidemic Learning: a fresh random graph in each round. Options: degree.",
    "el-local": "Epidemic Learning: each node sends to some of its own choice, one way. Options: degree.",
    "random-matching": "Random pairs.",
}
"""Graphs that change, by name, a sentence each."""

OPTIONS = {"hyper-hypercube": ("degree",), "el-oracle": ("degree",), "el-local": ("degree",)}


def is_schedule(name: str) -> bool:
    """Whether a graph of that name changes from round to round."""
    return name in SCHEDULES


def schedule_faults(name: str, options: dict[str, Any]) -> list[str]:
    """What is wrong with a schedule's options, a sentence each."""
    allowed = OPTIONS.get(name, ())
    faults = [
        f"topology {name} has no option {key} = {value!r}: expected {', '.join(allowed) or 'none'}"
        for key, value in options.items()
        if key not in allowed
    ]
    degree = options.get("degree", 1)
    if "degree" in allowed and (isinstance(degree, bool) or not isinstance(degree, int) or degree < 1):
        faults.append(f"topology {name} with degree = {degree!r}: expected a whole number above 0")
    return faults


def make_schedule(name: str, num_nodes: int, *, seed: int = 0, degree: int | None = None) -> Schedule:
    """The schedule of a name in SCHEDULES.

    Args:
        name: base-2 is Base-(k+1) with k = 1: at most 1 neighbour a round; base-5 has at most 4.
        num_nodes: N.
        seed: of random ones.
        degree: of hyper-hypercube the most neighbours in a round (default 1), of el-oracle and el-local how many each node has (default 2).

    Raises:
        TopologyError: there is no such graph of so many nodes.
    """
    if num_nodes < 2:  # noqa: PLR2004
        raise TopologyError(f"topology {name} of {num_nodes} nodes: a network needs at least 2")
    nodes = list(range(num_nodes))
    if name == "one-peer-exponential":
        return _one_peer_exponential(num_nodes)
    if name == "one-peer-hypercube":
        if num_nodes & (num_nodes - 1):
            raise TopologyError(f"topology {name} of {num_nodes} nodes: expected a power of 2; base-2 takes any number")
        return _periodic(name, num_nodes, hyper_hypercube(nodes, 1) or [])
    if name == "hyper-hypercube":
        most = 1 if degree is None else degree
        if fewest_factors(num_nodes, most + 1) is None:
            raise TopologyError(
                f"topology {name} of {num_nodes} nodes with degree = {most}: expected a number whose prime factors are at most "
                f"{most + 1}; base-{most + 1} takes any number"
            )
        return _periodic(name, num_nodes, hyper_hypercube(nodes, most) or [])
    if name.startswith(("base-", "simple-base-")):
        build = simple_base if name.startswith("simple") else base_graph
        return _periodic(name, num_nodes, build(nodes, int(name.rsplit("-", 1)[1]) - 1))
    return _random(name, num_nodes, seed, 2 if degree is None else degree)


def _one_peer_exponential(num_nodes: int) -> Schedule:
    """Round t: i sends to i + 2**(t mod tau), tau = ceil(log2 N), weights 1/2 (Ying et al. 2021, arXiv:2110.13363)."""
    tau = max(math.ceil(math.log2(num_nodes)), 1)
    senders = np.arange(num_nodes)

    def graph(round: int) -> Topology:
        to = (senders + 2 ** (round % tau)) % num_nodes
        return Topology.from_edges("one-peer-exponential", num_nodes, senders, to, directed=True, weights=np.full(num_nodes, 0.5))

    exact = tau if 2**tau == num_nodes else None
    return Schedule(name="one-peer-exponential", num_nodes=num_nodes, graph=graph, period=tau, exact_after=exact, directed=True)


def _periodic(name: str, num_nodes: int, rounds: list[Round]) -> Schedule:
    def graph(round: int) -> Topology:
        edges = rounds[round % len(rounds)]
        ends = np.array([(i, j) for i, j, _ in edges], dtype=np.int64).reshape(-1, 2)
        weights = [weight for _, _, weight in edges]
        return Topology.from_edges(name, num_nodes, ends[:, 0], ends[:, 1], weights=weights)

    return Schedule(name=name, num_nodes=num_nodes, graph=graph, period=len(rounds), exact_after=len(rounds))


def _random(name: str, num_nodes: int, seed: int, degree: int) -> Schedule:
    if name != "random-matching" and degree >= num_nodes:
        raise TopologyError(f"topology {name} of {num_nodes} nodes with degree = {degree}: expected at most {num_nodes - 1}")
    if name == "el-oracle" and degree * num_nodes % 2:
        raise TopologyError(f"topology {name} of {num_nodes} nodes with degree = {degree}: one of both must be even")
    graphs = {
        "random-matching": partial(_matching, num_nodes, seed),
        "el-oracle": partial(_oracle, num_nodes, seed, degree),
        "el-local": partial(_local, num_nodes, seed, degree),
    }
    share = 1 / (num_nodes - 1) if name == "random-matching" else degree / (num_nodes - 1)
    weight = share * (0.5 if name == "random-matching" else 1 / (degree + 1))

    def everybody() -> Topology:
        i, j = np.triu_indices(num_nodes, 1)
        union = Topology.from_edges(name, num_nodes, i, j, weights=np.full(len(i), weight))
        return replace(union, directed=name == "el-local")

    return Schedule(name=name, num_nodes=num_nodes, graph=graphs[name], period=None, directed=name == "el-local", everybody=everybody)


def _words(seed: int, round: int, attempt: int, count: int) -> Words:
    """Raw words of Philox keyed by (seed, round): the same bits with every version of numpy."""
    generator = np.random.Philox(key=np.array([seed, round], dtype=np.uint64), counter=np.array([0, attempt, 0, 0], dtype=np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def _permutation(words: Words) -> NDArray[np.int64]:
    return np.argsort(words, kind="stable").astype(np.int64)


def _matching(num_nodes: int, seed: int, round: int) -> Topology:
    """Uniformly random pairs; with an odd number of nodes one stays alone."""
    order = _permutation(_words(seed, round, 0, num_nodes))
    pairs = order[: num_nodes // 2 * 2].reshape(-1, 2)
    return Topology.from_edges("random-matching", num_nodes, pairs[:, 0], pairs[:, 1], weights=np.full(len(pairs), 0.5))


def _oracle(num_nodes: int, seed: int, degree: int, round: int) -> Topology:
    """A fresh regular graph under a random naming of the nodes: a circulant, whose contraction is that of any exchangeable regular graph.

    Epidemic Learning with an oracle: de Vos et al., NeurIPS 2023 (arXiv:2310.01972).
    """
    order = _permutation(_words(seed, round, 0, num_nodes))
    # distinct random strides, so that not every round has the same shape
    strides = 1 + _permutation(_words(seed, round, 1, (num_nodes - 1) // 2))[: degree // 2]
    ends = [(order, np.roll(order, -int(stride))) for stride in strides]
    if degree % 2:  # an even number of nodes: the diameters of the circle
        ends.append((order[: num_nodes // 2], order[num_nodes // 2 :]))
    senders, receivers = (np.concatenate(part) for part in zip(*ends, strict=True))
    return Topology.from_edges("el-oracle", num_nodes, senders, receivers, weights=np.full(len(senders), 1 / (degree + 1)))


def _local(num_nodes: int, seed: int, degree: int, round: int) -> Topology:
    """Each node sends to `degree` others of its own choice; who receives averages itself and what came. The mean holds on average only."""
    words = _words(seed, round, 0, num_nodes * (num_nodes - 1)).reshape(num_nodes, num_nodes - 1)
    chosen = np.argsort(words, axis=1, kind="stable")[:, :degree]
    senders = np.repeat(np.arange(num_nodes), degree)
    receivers = (chosen + (chosen >= np.arange(num_nodes)[:, None])).ravel()  # leaves out the node itself
    heard_N = np.bincount(receivers, minlength=num_nodes)
    return Topology.from_edges("el-local", num_nodes, senders, receivers, directed=True, weights=1 / (1 + heard_N[receivers]))


def describe_rounds(schedule: Schedule) -> dict[str, Any]:
    """The figures of ``p2pfl topology show --json`` for a graph that changes, from its rounds themselves.

    degree is of one round; spectral_gap is 1 - (what a round leaves of the disagreement, on average); exact_after is None where no number
    of rounds gives everybody the exact mean.

    Raises:
        TopologyError: there are too many nodes to multiply their matrices.
    """
    if schedule.num_nodes > _MOST_MULTIPLIED:
        raise TopologyError(
            f"topology {schedule.name} of {schedule.num_nodes} nodes: its rounds are multiplied for at most {_MOST_MULTIPLIED}"
        )
    whole_NN = np.eye(schedule.num_nodes) - 1 / schedule.num_nodes
    degrees, left = [], 1.0
    number = 0
    while left > _AGREED and number < _MOST_ROUNDS:
        graph = schedule.at(number)
        degrees.append(np.bincount(graph.senders, minlength=schedule.num_nodes))
        whole_NN = graph.mixing_matrix() @ whole_NN
        whole_NN -= whole_NN.mean(axis=0)  # of random ones the mean itself may move; what counts is who differs
        left = float(np.linalg.norm(whole_NN, 2))
        number += 1
    union = schedule.union()
    sent = np.array(degrees)
    rate = 0.0 if schedule.exact_after is not None else left ** (1 / number)
    return {
        "nodes": schedule.num_nodes,
        "edges": union.num_edges,
        "degree": {"min": int(sent.min()), "mean": float(sent.mean()), "max": int(sent.max())},
        "diameter": None,
        "lambda_2": None,
        "lambda_min": None,
        "spectral_gap": 1 - rate,
        "rounds_to_1e-6": number if left <= _AGREED else None,
        "exact_after": schedule.exact_after,
    }
