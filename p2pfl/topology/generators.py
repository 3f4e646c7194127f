"""Graphs by name, each a pure function of number of nodes, seed and options."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from p2pfl.errors import TopologyError
from p2pfl.topology.graph import IntArray, Topology
from p2pfl.yaml_files import shown, unknown_name

_MAX_NODES = 10**7
_MAX_EDGES = 10**8
_ATTEMPTS = 100
_MANY_NODES = 20_000  # beyond, a random graph is drawn in arrays
_SURELY_CONNECTED = 3


def ring(num_nodes: int, seed: int = 0) -> Topology:  # noqa: ARG001
    """Each node with the next, the last with the first."""
    nodes = np.arange(num_nodes)
    return Topology.from_edges("ring", num_nodes, nodes, (nodes + 1) % num_nodes, periods=(num_nodes,))


def path(num_nodes: int, seed: int = 0) -> Topology:  # noqa: ARG001
    """A ring with one link cut: the slowest to mix."""
    return Topology.from_edges("path", num_nodes, np.arange(num_nodes - 1), np.arange(1, num_nodes))


def star(num_nodes: int, seed: int = 0) -> Topology:  # noqa: ARG001
    """Node 0 with every other."""
    return Topology.from_edges("star", num_nodes, np.zeros(num_nodes - 1), np.arange(1, num_nodes))


def complete(num_nodes: int, seed: int = 0) -> Topology:  # noqa: ARG001
    """Every node is linked with every other."""
    _limit("complete", num_nodes, num_nodes * (num_nodes - 1) // 2)
    return Topology.from_edges("complete", num_nodes, *np.triu_indices(num_nodes, 1), periods=(num_nodes,))


def grid(num_nodes: int, seed: int = 0, *, rows: int | None = None, columns: int | None = None) -> Topology:  # noqa: ARG001
    """A rectangle, as square as the number of nodes allows; node i is at row i // columns."""
    shape = _shape("grid", num_nodes, rows, columns)
    nodes = np.arange(num_nodes).reshape(shape)
    senders = np.concatenate([nodes[:, :-1].ravel(), nodes[:-1].ravel()])
    receivers = np.concatenate([nodes[:, 1:].ravel(), nodes[1:].ravel()])
    return Topology.from_edges("grid", num_nodes, senders, receivers)


def torus(num_nodes: int, seed: int = 0, *, rows: int | None = None, columns: int | None = None) -> Topology:  # noqa: ARG001
    """A grid whose last row meets the first and whose last column meets the first."""
    shape = _shape("torus", num_nodes, rows, columns)
    nodes = np.arange(num_nodes).reshape(shape)
    receivers = np.concatenate([np.roll(nodes, -1, axis=1).ravel(), np.roll(nodes, -1, axis=0).ravel()])
    return Topology.from_edges("torus", num_nodes, np.tile(nodes.ravel(), 2), receivers, periods=shape)


def hypercube(num_nodes: int, seed: int = 0) -> Topology:  # noqa: ARG001
    """Nodes whose numbers differ in one binary digit."""
    num_digits = num_nodes.bit_length() - 1
    if num_nodes != 1 << num_digits:
        raise TopologyError(
            f"hypercube of {num_nodes} nodes: expected a power of two, such as {1 << num_digits} or {2 << num_digits}; or take torus"
        )
    nodes = np.arange(num_nodes)
    lower = [nodes[nodes & (1 << digit) == 0] for digit in range(num_digits)]
    upper = [ends | (1 << digit) for digit, ends in enumerate(lower)]
    return Topology.from_edges("hypercube", num_nodes, np.concatenate(lower), np.concatenate(upper), periods=(2,) * num_digits)


def exponential(num_nodes: int, seed: int = 0, *, directed: bool = True) -> Topology:  # noqa: ARG001
    """Node i sends to i + 1, i + 2, i + 4, ... (modulo n), the static exponential graph; weights are 1 / (tau + 1), tau = ceil(log2 n).

    Its mixing matrix is doubly stochastic though not symmetric. ``directed=False`` makes every link two-way and leaves the weights to a
    rule.

    Source: Ying et al., NeurIPS 2021 (arXiv:2110.13363).
    """
    num_hops = (num_nodes - 1).bit_length()
    nodes = np.arange(num_nodes)
    receivers = np.concatenate([(nodes + (1 << hop)) % num_nodes for hop in range(num_hops)])
    graph = Topology.from_edges("exponential", num_nodes, np.tile(nodes, num_hops), receivers, directed=directed, periods=(num_nodes,))
    return graph.with_weights(1 / (num_hops + 1), invariant=True) if directed else graph


def random_regular(num_nodes: int, seed: int = 0, *, degree: int = 4) -> Topology:
    """Every node has the same number of links, drawn at random."""
    import networkx as nx

    if not 1 <= degree < num_nodes:
        raise TopologyError(f"random-regular of degree = {degree}: expected 1 to {num_nodes - 1} with {num_nodes} nodes")
    if degree * num_nodes % 2:
        raise TopologyError(
            f"random-regular of degree = {degree} with {num_nodes} nodes: the product must be even; take degree {degree + 1}"
        )
    if num_nodes > _MANY_NODES and degree >= _SURELY_CONNECTED:
        return _many_regular(num_nodes, degree, seed)
    draw = partial(nx.random_regular_graph, degree, num_nodes)
    return _connected("random-regular", num_nodes, seed, draw, f"degree = {degree}", "take degree >= 3")


def erdos_renyi(num_nodes: int, seed: int = 0, *, p: float | None = None) -> Topology:
    """Every pair is linked with probability p (default 2 ln n / n, twice what connects a large graph)."""
    import networkx as nx

    threshold = min(1.0, 2 * math.log(num_nodes) / num_nodes)
    probability = threshold if p is None else p
    if not 0 < probability <= 1:
        raise TopologyError(f"erdos-renyi with p = {p}: expected 0 < p <= 1")
    _limit("erdos-renyi", num_nodes, round(probability * num_nodes * (num_nodes - 1) / 2))
    draw = partial(nx.fast_gnp_random_graph, num_nodes, probability)
    return _connected("erdos-renyi", num_nodes, seed, draw, f"p = {probability:.3g}", f"take p >= {threshold:.3g}")


def small_world(num_nodes: int, seed: int = 0, *, degree: int = 4, p: float = 0.1) -> Topology:
    """A ring where each node knows its `degree` nearest, each link led elsewhere with probability p.

    Source: Watts & Strogatz, Nature 1998.
    """
    import networkx as nx

    if degree % 2 or not 2 <= degree < num_nodes:  # noqa: PLR2004
        raise TopologyError(f"small-world of degree = {degree}: expected an even number from 2 to {num_nodes - 1} with {num_nodes} nodes")
    if not 0 <= p <= 1:
        raise TopologyError(f"small-world with p = {p}: expected 0 <= p <= 1")
    draw = partial(nx.watts_strogatz_graph, num_nodes, degree, p)
    return _connected("small-world", num_nodes, seed, draw, f"degree = {degree}, p = {p}", "take a larger degree or a smaller p")


def barbell(num_nodes: int, seed: int = 0, *, bridge: int | None = None) -> Topology:  # noqa: ARG001
    """Two complete groups joined by a path of `bridge` nodes (default: none, or one where the number of nodes is odd)."""
    between = num_nodes % 2 if bridge is None else bridge
    if between < 0 or num_nodes - between < 4 or (num_nodes - between) % 2:  # noqa: PLR2004
        raise TopologyError(
            f"barbell of {num_nodes} nodes with bridge = {between}: what the bridge leaves must be two equal groups of at least 2"
        )
    size = (num_nodes - between) // 2
    _limit("barbell", num_nodes, size * size)
    one, other = np.triu_indices(size, 1)
    walk = np.arange(size - 1, size + between)  # last of the first group, the bridge; each with the node after it
    senders = np.concatenate([one, one + size + between, walk])
    return Topology.from_edges("barbell", num_nodes, senders, np.concatenate([other, other + size + between, walk + 1]))


def named(graph_name: str, num_nodes: int | None = None, seed: int = 0) -> Topology:  # noqa: ARG001
    """One of the small graphs that networkx knows by name."""
    import networkx as nx

    graph = getattr(nx, f"{graph_name.replace('-', '_')}_graph")()
    if num_nodes not in (None, len(graph)):
        raise TopologyError(
            f"{graph_name} has {len(graph)} nodes, not {num_nodes}: set the number of nodes to {len(graph)} or take another graph"
        )
    return _from_networkx(graph_name, graph)


_SMALL_GRAPHS = (
    "bull chvatal cubical davis-southern-women desargues diamond dodecahedral florentine-families frucht heawood "
    "hoffman-singleton house house-x icosahedral karate-club krackhardt-kite les-miserables moebius-kantor octahedral pappus "
    "petersen sedgewick-maze tetrahedral truncated-cube truncated-tetrahedron tutte"
)
SMALL_GRAPHS = tuple(_SMALL_GRAPHS.split())
"""networkx's small graphs of fixed size, without "_graph" and with dashes."""

TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {
    "ring": ring,
    "path": path,
    "star": star,
    "complete": complete,
    "grid": grid,
    "torus": torus,
    "hypercube": hypercube,
    "exponential": exponential,
    "random-regular": random_regular,
    "erdos-renyi": erdos_renyi,
    "small-world": small_world,
    "barbell": barbell,
    **{name: partial(named, name) for name in SMALL_GRAPHS},
}
"""(num_nodes, seed=0, **options) -> graph, without weights unless it is directed. The seed matters to random graphs only."""


def make(name: str, num_nodes: int | None = None, seed: int = 0, **options: Any) -> Topology:
    """The graph of a name.

    Args:
        name: a key of TOPOLOGIES.
        num_nodes: at least 2; None only for a small graph that has its own number.
        seed: of a random graph; the others do not look at it.
        options: the generator's own, such as degree.

    Raises:
        TopologyError: there is no such graph, or none of that size or with those options.
    """
    if name not in TOPOLOGIES:
        raise TopologyError(unknown_name("topology", name, list(TOPOLOGIES)))
    if num_nodes is None and name not in SMALL_GRAPHS:
        raise TopologyError(f"topology {name}: needs a number of nodes")
    if num_nodes is not None and num_nodes < 2:  # noqa: PLR2004
        raise TopologyError(f"topology {name} of {num_nodes} nodes: a network needs at least 2")
    if num_nodes is not None and num_nodes > _MAX_NODES:
        raise TopologyError(f"topology {name} of {num_nodes} nodes: expected at most {_MAX_NODES}")
    if faults := option_faults(name, options):
        raise TopologyError(faults)
    return TOPOLOGIES[name](num_nodes, seed, **options)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that a generator takes besides number of nodes and seed."""
    parameters = inspect.signature(TOPOLOGIES[name]).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def option_faults(name: str, options: Mapping[str, Any]) -> list[str]:
    """Faults of a known graph's options, the seed among them."""
    allowed = options_of(name)
    seed = inspect.signature(TOPOLOGIES[name]).parameters["seed"]
    faults = [_wrong(name, key, value, {"seed": seed} if key == "seed" else allowed) for key, value in options.items()]
    return [fault for fault in faults if fault]


def _wrong(name: str, key: str, value: object, allowed: dict[str, inspect.Parameter]) -> str | None:
    """Fault of one option, if it has any."""
    if key not in allowed:
        return f"topology {name} has no option {key} = {shown(value)}: expected {', '.join(allowed) or 'none'}"
    annotation = str(allowed[key].annotation)  # a text: annotations are postponed
    if annotation.startswith("bool"):
        fits, expected = isinstance(value, bool), "true or false"
    elif annotation.startswith("int"):
        fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    may_be_none = value is None and annotation.endswith("None")
    return None if fits or may_be_none else f"topology {name} with {key} = {shown(value)}: expected {expected}"


def _shape(name: str, num_nodes: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """Rows and columns, the most square ones where they are not given."""
    if any(side is not None and side < 1 for side in (rows, columns)):
        raise TopologyError(f"{name} with rows = {rows}, columns = {columns}: expected numbers >= 1")
    if rows is None and columns is None:
        rows = next(side for side in range(math.isqrt(num_nodes), 0, -1) if num_nodes % side == 0)
    high = rows if rows is not None else num_nodes // (columns or 1)
    wide = columns if columns is not None else num_nodes // high
    if high * wide != num_nodes:
        raise TopologyError(f"{name} of {num_nodes} nodes with rows = {rows}, columns = {columns}: rows x columns must be {num_nodes}")
    return high, wide


def _many_regular(num_nodes: int, degree: int, seed: int) -> Topology:
    """Random regular graph of very many nodes: half-edges paired at random, and pairs that cannot be exchange ends with others.

    Source: the configuration model, Bollobas 1980; at degree 3 and more it is connected but for a chance of the order of 1 / N.
    """
    rng = np.random.default_rng([seed, degree])
    ends = rng.permutation(np.repeat(np.arange(num_nodes), degree)).reshape(-1, 2)
    while True:
        codes = ends.min(axis=1) * num_nodes + ends.max(axis=1)
        order = np.argsort(codes, kind="stable")
        is_repeated = np.zeros(len(codes), dtype=np.bool_)
        is_repeated[order[1:]] = codes[order[1:]] == codes[order[:-1]]
        wrong = np.flatnonzero(is_repeated | (ends[:, 0] == ends[:, 1]))
        if not len(wrong):
            return Topology.from_edges("random-regular", num_nodes, ends[:, 0], ends[:, 1])
        others = rng.choice(len(ends), size=len(wrong), replace=False)
        # one after the other: a pair may be among both
        for a, b in zip(wrong.tolist(), others.tolist(), strict=True):
            ends[a, 1], ends[b, 1] = ends[b, 1], ends[a, 1]


def _limit(name: str, num_nodes: int, num_edges: int) -> None:
    if num_edges > _MAX_EDGES:
        raise TopologyError(
            f"{name} of {num_nodes} nodes has {num_edges} edges, more than {_MAX_EDGES}: take fewer nodes or random-regular"
        )


def _connected(name: str, num_nodes: int, seed: int, draw: Callable[..., Any], options: str, remedy: str) -> Topology:
    """The first connected one of up to 100 draws from one stream of random numbers."""
    import networkx as nx

    rng = random.Random(seed)  # noqa: S311  # a graph, not a secret
    for _ in range(_ATTEMPTS):
        graph = draw(seed=rng)
        if nx.is_connected(graph):
            return _from_networkx(name, graph)
    raise TopologyError(f"{name} of {num_nodes} nodes with {options}: none of {_ATTEMPTS} draws is connected; {remedy}")


def _from_networkx(name: str, graph: Any) -> Topology:
    """An undirected graph; labels that are texts become names."""
    labels = list(graph)
    names = labels if isinstance(labels[0], str) else None
    number = {label: i for i, label in enumerate(labels if names else sorted(labels))}
    ends: IntArray = np.array([(number[a], number[b]) for a, b in graph.edges], dtype=np.int64).reshape(-1, 2)
    return Topology.from_edges(name, len(labels), ends[:, 0], ends[:, 1], names=names)
