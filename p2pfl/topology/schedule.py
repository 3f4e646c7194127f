"""Graphs that change from round to round, and a node's neighbours in each: every node derives the same from (seed, round), asking nobody.

Shapes: N nodes, s neighbours of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import TopologyError
from p2pfl.topology.generators import TOPOLOGIES, option_faults, ring
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.matcha import activation, matchings, mean_square_left
from p2pfl.topology.rounds import Round, base_graph, fewest_factors, hyper_hypercube, simple_base
from p2pfl.topology.sketch import is_number
from p2pfl.yaml_files import shown, unknown_key, unknown_name

ACCURACY = 1e-6
"""Fraction of the disagreement that is left in the end."""

MOST_ROUNDS = 5000
"""Rounds that are followed one by one."""

MOST_MULTIPLIED = 1024
"""Nodes whose rounds' matrices are multiplied."""
_EXACT = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The weighted graph of every round."""

    name: str
    num_nodes: int
    graph: Callable[[int], Topology]
    """Gives the graph of a round; pure."""

    period: int | None
    """Rounds after which it repeats; 1: it stays as it is, None: random, it never repeats."""

    exact_after: int | None = None
    """Rounds, from a multiple of the period on, that give everybody the exact mean; None: no number of rounds does."""

    directed: bool = False
    weighted_mean: bool = False
    """Whether the mean that is preserved is meant to be a weighted one; what the weights are is the graph's business."""

    everybody: Callable[[], Topology] | None = None
    """The union of a random schedule."""

    least: float = 0.0
    """Bound of a random schedule: no weight, a node's own included, is ever smaller."""

    agreed: Mapping[str, Any] = field(default_factory=dict)
    """Options that a study writes down, because they come from eigenvalues, whose last bits differ from machine to machine."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for `p2pfl topology show`."""

    names: tuple[str, ...] | None = None
    _at: Callable[[int], Topology] = field(init=False, repr=False)

    @property
    def is_steady(self) -> bool:
        """Whether all neighbours exchange with each other in every round."""
        return self.period == 1 and not self.directed

    def __post_init__(self) -> None:
        object.__setattr__(self, "_at", lru_cache(maxsize=min(self.period or 8, 256))(self._named))

    @classmethod
    def static(cls, topology: Topology, *, weighted_mean: bool = False) -> Schedule:
        """Schedule that has one graph in every round."""
        return cls(
            name=topology.name,
            num_nodes=topology.num_nodes,
            graph=lambda _: topology,
            period=1,
            directed=topology.directed,
            weighted_mean=weighted_mean,
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

    def least_weight(self) -> float:
        """The smallest that any message can ever count for, a node's own included."""
        if self.period is None:
            return self.least
        graphs = [self.at(number) for number in range(self.period)]
        weights = [graph.weights.min(initial=1.0) for graph in graphs if graph.weights is not None]
        return float(min(*weights, *(graph.self_weights.min() for graph in graphs)))

    def renamed(self, names: Sequence[str]) -> Schedule:
        """Copy with names[i], sorted, for node i."""
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
    "matchings": "A base graph's links in turns, so that nobody meets two in a round. Options: base.",
    "matcha": "A base graph's links at random, those that hold it together more often. Options: base, budget.",
}
"""Graphs that change, by name, a sentence each."""

OPTIONS = {
    "hyper-hypercube": ("degree",),
    "el-oracle": ("degree",),
    "el-local": ("degree",),
    "matchings": ("base",),
    "matcha": ("base", "budget", "probabilities", "step"),
}


def has_base(name: str) -> bool:
    """Whether a schedule uses the links of another graph."""
    return "base" in OPTIONS.get(name, ())


def schedule_faults(name: str, options: Mapping[str, Any]) -> list[str]:
    """Faults of a schedule's options, a sentence each."""
    allowed = OPTIONS.get(name, ())
    faults = [
        f"topology {name} has no option {key} = {value!r}: expected {', '.join(allowed) or 'none'}"
        for key, value in options.items()
        if key not in allowed
    ]
    degree, budget, step = (options.get(key, 1) for key in ("degree", "budget", "step"))
    if "degree" in allowed and (isinstance(degree, bool) or not isinstance(degree, int) or degree < 1):
        faults.append(f"topology {name} with degree = {degree!r}: expected a whole number above 0")
    if "budget" in allowed and not (is_number(budget) and 0 < budget <= 1):
        faults.append(f"topology {name} with budget = {shown(budget)}: expected a number above 0, at most 1")
    if "step" in allowed and not (is_number(step) and step > 0):
        faults.append(f"topology {name} with step = {shown(step)}: expected a number above 0")
    if "probabilities" in allowed and "probabilities" in options:
        given = options["probabilities"]
        if not isinstance(given, list | tuple) or not all(is_number(p) and 0 <= p <= 1 for p in given):
            faults.append(f"topology {name} with probabilities = {shown(given)}: expected a list of numbers from 0 to 1")
    if "step" in allowed and ("step" in options) != ("probabilities" in options):
        faults.append(f"topology {name} with one of probabilities and step: give both or none")
    if "base" in allowed and "base" in options:
        faults += _base_faults(name, options["base"])
    return faults


def base_spec(value: Any) -> dict[str, Any]:
    """{"file": ...} or {"name": ..., options} of what stands at `base`: a text is a name or, with a dot or a slash in it, a file."""
    if isinstance(value, str):
        return {"file": value} if "." in value or "/" in value else {"name": value}
    return dict(value)


def _base_faults(name: str, value: Any) -> list[str]:
    """Faults of what stands at `base`."""
    if not isinstance(value, str | Mapping) or not value:
        return [f"topology {name} with base = {shown(value)}: expected a graph's name, a file, or a mapping with name or file"]
    spec = base_spec(value)
    if "file" in spec:
        faults = [f"topology {name}: base.{unknown_key(str(key), spec[key], ['file'])}" for key in spec if key != "file"]
        wrong_path = not isinstance(spec["file"], str) or not spec["file"]
        return faults + ([f"topology {name}: base.file = {shown(spec['file'])}: expected a path"] if wrong_path else [])
    if not isinstance(spec.get("name"), str) or spec["name"] not in TOPOLOGIES:
        return [f"topology {name}: {unknown_name('base.name', spec.get('name'), list(TOPOLOGIES))}"]
    return [f"base: {fault}" for fault in option_faults(spec["name"], {key: v for key, v in spec.items() if key != "name"})]


def make_schedule(
    name: str,
    num_nodes: int,
    *,
    seed: int = 0,
    degree: int | None = None,
    base: Topology | None = None,
    budget: float = 0.5,
    probabilities: Sequence[float] | None = None,
    step: float | None = None,
) -> Schedule:
    """The schedule of a name in SCHEDULES.

    Args:
        name: base-2 is Base-(k+1) with k = 1: at most 1 neighbour a round; base-5 has at most 4.
        num_nodes: N.
        seed: of random ones.
        degree: of hyper-hypercube the most neighbours in a round (default 1), of el-oracle and el-local how many each node has (default 2).
        base: whose links matcha and matchings use; None: a ring.
        budget: of matcha: which part of the base graph's matchings is used in a round on average.
        probabilities: of matcha: of each matching, where they are agreed on; None: the best ones.
        step: of matcha: what a link in use weighs, with the probabilities.

    Raises:
        TopologyError: there is no such graph of so many nodes.
    """
    if num_nodes < 2:  # noqa: PLR2004
        raise TopologyError(f"topology {name} of {num_nodes} nodes: a network needs at least 2")
    nodes = list(range(num_nodes))
    if has_base(name):
        links = ring(num_nodes) if base is None else base
        _check_base(name, num_nodes, links)
        agreed = (tuple(probabilities), step) if probabilities is not None and step is not None else None
        return _in_turns(links) if name == "matchings" else _matcha(links, budget, agreed, seed)
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


def _check_base(name: str, num_nodes: int, base: Topology) -> None:
    if base.directed:
        raise TopologyError(f"topology {name}: its base {base.name} is directed; expected links that go both ways")
    if base.num_nodes != num_nodes:
        raise TopologyError(f"topology {name} of {num_nodes} nodes: its base {base.name} has {base.num_nodes}")
    check_connected(base)


def _in_turns(base: Topology) -> Schedule:
    """Round t: the matching t mod M of the base graph, both ends taking the mean."""
    groups = matchings(base)
    rounds = [[(one, other, 0.5) for one, other in group.tolist()] for group in groups]
    schedule = _periodic("matchings", base.num_nodes, rounds)
    is_exact = base.num_nodes <= MOST_MULTIPLIED and list(disagreement_left(schedule, len(rounds), 0))[-1] < _EXACT  # a hypercube's are
    return replace(schedule, exact_after=len(rounds) if is_exact else None, facts={"base": base.name, "matchings": len(groups)})


def _matcha(base: Topology, budget: float, agreed: tuple[tuple[float, ...], float] | None, seed: int) -> Schedule:
    """Round t: each matching of the base graph with its own probability, drawn by every node from (seed, t) alike."""
    groups = matchings(base)
    p_M, step = activation(base, groups, budget) if agreed is None else agreed
    if len(p_M) != len(groups):
        raise TopologyError(f"topology matcha with {len(p_M)} probabilities: its base {base.name} has {len(groups)} matchings")
    thresholds = [int(p * 2**64) for p in p_M]  # exact: a word is below it with probability p
    links = np.concatenate(groups)
    group_E = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    def of(used: Sequence[bool]) -> Topology:
        ends = links[np.asarray(used)[group_E]]
        return Topology.from_edges("matcha", base.num_nodes, ends[:, 0], ends[:, 1], weights=np.full(len(ends), step))

    def graph(round: int) -> Topology:
        words = _words(seed, round, 0, len(groups)).tolist()
        return of([word < threshold for word, threshold in zip(words, thresholds, strict=True)])

    def everybody() -> Topology:
        """Every link of the base graph, also one that is never used."""
        return Topology.from_edges("matcha", base.num_nodes, links[:, 0], links[:, 1], weights=step * np.array(p_M)[group_E])

    return Schedule(
        name="matcha",
        num_nodes=base.num_nodes,
        graph=graph,
        period=1 if min(p_M) == 1 else None,
        everybody=everybody,
        least=min(0.0, float(of([p > 0 for p in p_M]).self_weights.min())),
        agreed={"probabilities": list(p_M), "step": step},
        facts={"base": base.name, "matchings": len(groups), "squared_left": mean_square_left(base.num_nodes, groups, p_M, step)},
    )


def _words(seed: int, round: int, attempt: int, count: int) -> NDArray[np.uint64]:
    """Raw words of Philox keyed by (seed, round): the same bits with every version of numpy."""
    generator = np.random.Philox(key=np.array([seed, round], dtype=np.uint64), counter=np.array([0, attempt, 0, 0], dtype=np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def _matching(num_nodes: int, seed: int, round: int) -> Topology:
    """Uniformly random pairs; with an odd number of nodes one stays alone."""
    order = np.argsort(_words(seed, round, 0, num_nodes), kind="stable")
    pairs = order[: num_nodes // 2 * 2].reshape(-1, 2)
    return Topology.from_edges("random-matching", num_nodes, pairs[:, 0], pairs[:, 1], weights=np.full(len(pairs), 0.5))


def _oracle(num_nodes: int, seed: int, degree: int, round: int) -> Topology:
    """A fresh regular graph under a random naming of the nodes: a circulant, whose contraction is that of any exchangeable regular graph.

    Epidemic Learning with an oracle: de Vos et al., NeurIPS 2023 (arXiv:2310.01972).
    """
    order = np.argsort(_words(seed, round, 0, num_nodes), kind="stable")
    # distinct random strides, so that not every round has the same shape
    strides = 1 + np.argsort(_words(seed, round, 1, (num_nodes - 1) // 2), kind="stable")[: degree // 2]
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


def disagreement_left(schedule: Schedule, rounds: int = MOST_ROUNDS, until: float = ACCURACY) -> Iterator[float]:
    """Disagreement that is left after each of some rounds from the worst start: the largest singular value of their product.

    It ends with the first round that leaves no more than `until`.
    """
    whole_NN = np.eye(schedule.num_nodes) - 1 / schedule.num_nodes
    for number in range(rounds):
        whole_NN = schedule.at(number).mixing_matrix() @ whole_NN
        whole_NN -= whole_NN.mean(axis=0)  # of random ones the mean itself may move; what counts is who differs
        yield (left := float(np.linalg.norm(whole_NN, 2)))
        if left <= until:
            return


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """One node's neighbours in one round, with its row of the mixing matrix."""

    weights: Mapping[str, float]
    """w_ij by the name of the sender j, in the roster's order."""

    receivers: frozenset[str]
    """Names of the neighbours that this node sends to."""

    self_weight: float
    """Weight of the node's own message."""

    in_step: bool = True
    """Whether both ends of an edge merge each other's message of the same exchange."""

    @property
    def both(self) -> frozenset[str]:
        """Edges over which what one side takes in the other side gives: those that go both ways, where nodes are in step."""
        return self.receivers & self.weights.keys() if self.in_step else frozenset()


def neighbourhoods_of(schedule: Schedule, row: int, *, splits_mass: bool, in_step: bool = True) -> Callable[[int], Neighbourhood]:
    """Find a node's neighbourhood by round, in a schedule with names.

    Where a rule splits mass the sender keeps what it does not give away, 1 - sum_i w_ij, and not the receiver what it does not take.
    """
    names = schedule.names
    assert names is not None

    @lru_cache(maxsize=64)
    def in_phase(phase_of_schedule: int) -> Neighbourhood:
        graph = schedule.at(phase_of_schedule)
        assert graph.weights is not None
        mine, given = graph.receivers == row, graph.senders == row
        weights = {names[j]: float(w) for j, w in zip(graph.senders[mine], graph.weights[mine], strict=True)}
        kept = 1 - float(graph.weights[given].sum()) if splits_mass else float(graph.self_weights[row])
        receivers = frozenset(names[i] for i in graph.receivers[given])
        return Neighbourhood(weights=weights, receivers=receivers, self_weight=kept, in_step=in_step)

    return lambda number: in_phase(number % schedule.period if schedule.period else number)
