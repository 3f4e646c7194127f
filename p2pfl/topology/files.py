"""Graphs that people draw themselves: YAML of our own, and what networkx reads.

The YAML form::

    nodes: [cleveland, hungary, switzerland]      # names, {name: cleveland, mass: 303}, or a number: nodes are then 0, 1, 2, ...
    edges:
      - [cleveland, hungary]
      - {between: [hungary, switzerland], latency_ms: 12}
    directed: false                               # true: between is [sender, receiver]

An edge may carry weight (what an end multiplies the other's message with), latency_ms (one way) and bandwidth_mbps, a node its mass (how
much it counts with ``weights: stationary``); each of them is on all edges, or nodes, or on none.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from p2pfl.errors import ConfigError, TopologyError
from p2pfl.text_files import read_text
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.yaml_files import load_yaml, shown, unknown_key

_MAX_NODES = 10**6
_MAX_LATENCY_MS = 1e9  # eleven days: more is a slip of the pen, and sums of it leave the finite numbers
_VALUES = {"weight": "weights", "latency_ms": "latency_ms", "bandwidth_mbps": "bandwidth_mbps"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sketch:
    """What a file says, before it is checked."""

    nodes: Sequence[object]

    edges: Sequence[tuple[str, object, object, Mapping[str, Any]]]
    """Place in the file, two ends, values."""

    directed: bool

    masses: Mapping[int, Any] = field(default_factory=dict)
    """By place in nodes."""

    faults: Sequence[str] = field(default_factory=list)


def load(path: Path | str) -> Topology:
    """The graph of a file: .yaml, .graphml, .gml, .edgelist (.edges, .txt) or node-link .json.

    Nodes get names, and rows in the order of the sorted names, unless the file calls them 0 ... N - 1.

    Raises:
        TopologyError: all that is wrong with the file at once, or, if nothing else is, two nodes with no path between them.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TopologyError(f"a file ending in {path.suffix!r}: expected one of {', '.join(_READERS)}", str(path))
    try:
        if path.is_dir():
            raise TopologyError("is a folder: expected a file")
        if not path.exists():
            raise TopologyError("no such file")
        topology = _build(path.stem, reader(path))
        check_connected(topology)
    except ConfigError as error:
        raise TopologyError(error.findings, str(path)) from error
    except OSError as error:
        raise TopologyError(f"cannot be read: {error.strerror or error}", str(path)) from error
    except RecursionError as error:
        raise TopologyError(f"cannot be read as {path.suffix}: nested too deeply", str(path)) from error
    except KeyError as error:
        raise TopologyError(f"cannot be read as {path.suffix}: {error} is missing", str(path)) from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError) as error:
        raise TopologyError(f"cannot be read as {path.suffix}: {' '.join(str(error).split())}", str(path)) from error
    return topology


def _build(name: str, sketch: _Sketch) -> Topology:
    """A topology from a sketch without faults."""
    faults = list(sketch.faults)
    labels = [str(node) for node in sketch.nodes if _is_label(node)]
    faults += [
        f"nodes[{i}] = {shown(node)}: expected a text; put it in quotes" for i, node in enumerate(sketch.nodes) if not _is_label(node)
    ]
    faults += [f"nodes: {label!r} is there {count} times" for label, count in sorted(Counter(labels).items()) if count > 1]
    if len(sketch.nodes) < 2:  # noqa: PLR2004
        faults.append(f"nodes: {len(sketch.nodes)} of them, a network needs at least 2")
    number = {label: i for i, label in enumerate(labels)}
    ends: list[tuple[int, int]] = []
    seen: dict[tuple[int, int], str] = {}
    for place, *pair, _ in sketch.edges:
        unknown = [end for end in pair if str(end) not in number]
        faults += [f"{place}: {end!r} is not a node; the nodes are {_some(list(number))}" for end in unknown]
        if unknown:
            continue
        one, other = (number[str(end)] for end in pair)
        if one == other:
            faults.append(
                f"{place}: {labels[one]} - {labels[other]} leads from a node to itself; leave it out, a node's own weight is what is left"
            )
        key = (one, other) if sketch.directed else (min(one, other), max(one, other))
        if key in seen:
            faults.append(f"{place}: {labels[one]} - {labels[other]} is there already, at {seen[key]}; keep one of them")
        seen.setdefault(key, place)
        ends.append((one, other))
    values: dict[str, Any] = {}
    for value, attribute in _VALUES.items():
        values[attribute], more_faults = _values(value, sketch.edges)
        faults += more_faults
    faults += _mass_faults(sketch)
    if faults:
        raise TopologyError(faults)
    numbered = set(labels) == {str(i) for i in range(len(labels))}
    if numbered:
        ends = [(int(labels[one]), int(labels[other])) for one, other in ends]
    masses = [float(sketch.masses[i]) for i in range(len(labels))] if sketch.masses else None
    if masses and numbered:
        masses = [mass for _, mass in sorted(zip(map(int, labels), masses, strict=True))]
    senders, receivers = zip(*ends, strict=True) if ends else ((), ())
    return Topology.from_edges(
        name, len(labels), senders, receivers, directed=sketch.directed, names=None if numbered else labels, masses=masses, **values
    )


def _mass_faults(sketch: _Sketch) -> list[str]:
    """Of what the nodes count."""
    wrong = {i: mass for i, mass in sketch.masses.items() if not (_is_number(mass) and mass > 0)}
    faults = [f"nodes[{i}]: mass = {shown(mass)}, expected a number > 0" for i, mass in wrong.items()]
    missing = [i for i in range(len(sketch.nodes)) if i not in sketch.masses] if sketch.masses else []
    return faults + [f"nodes[{i}]: no mass, but others have one; give it for all nodes or for none" for i in missing]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _values(key: str, edges: Sequence[tuple[str, object, object, Mapping[str, Any]]]) -> tuple[list[float] | None, list[str]]:
    """One value of every edge (None: the file has none), and what is wrong with them."""
    there = [place for place, _, _, values in edges if key in values]
    if not there:
        return None, []
    faults = [
        f"{place}: no {key}, but {there[0]} has one; give it for all edges or for none"
        for place, _, _, values in edges
        if key not in values
    ]
    numbers = []
    for place, _, _, values in edges:
        value = values.get(key, 1)
        allowed = {"weight": "a number other than 0", "latency_ms": "a number from 0 to 1e9", "bandwidth_mbps": "a number > 0"}[key]
        if (
            not _is_number(value)
            or (key == "weight" and value == 0)
            or (key == "latency_ms" and not 0 <= value <= _MAX_LATENCY_MS)
            or (key == "bandwidth_mbps" and value <= 0)
        ):
            faults.append(f"{place}: {key} = {shown(value)}, expected {allowed}")
        else:
            numbers.append(float(value))
    return numbers, faults


def _is_label(node: object) -> bool:
    return (isinstance(node, str) and node != "") or (isinstance(node, int) and not isinstance(node, bool))


def _some(labels: Sequence[str]) -> str:
    most = 8
    return ", ".join(labels[:most]) + (f", ... ({len(labels)} in all)" if len(labels) > most else "")


def _read_yaml(path: Path) -> _Sketch:
    content = load_yaml(path, "nodes: [a, b] and edges: [[a, b]]")
    faults = [
        unknown_key(key, content[key], ["nodes", "edges", "directed"]) for key in content if key not in ("nodes", "edges", "directed")
    ]
    nodes, edges, directed = content.get("nodes"), content.get("edges"), content.get("directed", False)
    if isinstance(nodes, int) and not isinstance(nodes, bool) and 0 <= nodes <= _MAX_NODES:
        nodes = list(range(nodes))
    given = {key: f"= {shown(content[key])}: expected" if key in content else "is missing: expected" for key in ("nodes", "edges")}
    if not isinstance(nodes, list):
        faults.append(f"nodes {given['nodes']} a list of names or how many there are, at most {_MAX_NODES}")
    if not isinstance(edges, list):
        faults.append(f"edges {given['edges']} a list of [a, b] or {{between: [a, b], ...}}")
    if not isinstance(directed, bool):
        faults.append(f"directed = {shown(directed)}: expected true or false")
    if not isinstance(nodes, list) or not isinstance(edges, list):
        raise TopologyError(faults)
    masses: dict[int, Any] = {}
    for i, node in enumerate(nodes):
        if isinstance(node, dict):
            faults += [f"nodes[{i}].{unknown_key(str(key), node[key], ['name', 'mass'])}" for key in node if key not in ("name", "mass")]
            masses |= {i: node["mass"]} if "mass" in node else {}
    nodes = [node.get("name") if isinstance(node, dict) else node for node in nodes]
    rows = []
    for i, edge in enumerate(edges):
        place = f"edges[{i}]"
        values = {key: value for key, value in edge.items() if key != "between"} if isinstance(edge, dict) else {}
        pair = edge.get("between") if isinstance(edge, dict) else edge
        faults += [f"{place}.{unknown_key(str(key), values[key], ['between', *_VALUES])}" for key in values if key not in _VALUES]
        if isinstance(pair, list) and len(pair) == 2 and all(_is_label(end) for end in pair):  # noqa: PLR2004
            rows.append((place, *pair, values))
        else:
            faults.append(f"{place} = {shown(edge)}: expected two nodes, [a, b] or {{between: [a, b], ...}}")
    return _Sketch(nodes=nodes, edges=rows, directed=directed is True, masses=masses, faults=faults)


def _read_json(path: Path) -> _Sketch:
    """Node-link form, as networkx writes it; the edges are under "edges" or, before networkx 3.4, under "links"."""
    content = json.loads(read_text(path))
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), list):
        raise TopologyError('expected node-link JSON: {"nodes": [{"id": ...}], "edges": [{"source": ..., "target": ...}]}')
    if not isinstance(directed := content.get("directed", False), bool):
        raise TopologyError(f"directed = {shown(directed)}: expected true or false")
    key = "edges" if "edges" in content else "links"
    rows = [(f"{key}[{i}]", edge["source"], edge["target"], _known(edge)) for i, edge in enumerate(content.get(key, []))]
    masses = {i: node["mass"] for i, node in enumerate(content["nodes"]) if "mass" in node}
    nodes = [node["id"] for node in content["nodes"]]
    return _Sketch(nodes=nodes, edges=rows, directed=directed, masses=masses)


def _networkx_reader(read: Callable[[Any, Path], Any]) -> Callable[[Path], _Sketch]:
    """A reader from a function of networkx and a path."""

    def reader(path: Path) -> _Sketch:
        import networkx as nx

        try:
            graph = read(nx, path)
        except nx.NetworkXError as error:
            raise TopologyError(f"networkx says: {error}") from error
        rows = [(f"edge {a} - {b}", a, b, _known(values)) for a, b, values in graph.edges(data=True)]
        masses = {i: values["mass"] for i, (_, values) in enumerate(graph.nodes(data=True)) if "mass" in values}
        return _Sketch(nodes=list(graph), edges=rows, directed=graph.is_directed(), masses=masses)

    return reader


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """What we use of what other programs write on an edge."""
    return {key: value for key, value in values.items() if key in _VALUES}


def _edge_list(nx: Any, path: Path) -> Any:
    """Lines "a b", "a b 0.5" (a weight) or "a b {'weight': 0.5}"; a multigraph, so that a line written twice is noticed."""
    lines = read_text(path).splitlines()
    first = next((line.split("#")[0].split() for line in lines if line.split("#")[0].split()), [])
    data: Any = (("weight", float),) if len(first) == 3 and not first[2].startswith("{") else True  # noqa: PLR2004
    return nx.parse_edgelist(lines, create_using=nx.MultiGraph, data=data)


def _gml(nx: Any, path: Path) -> Any:
    by_label = "label" in read_text(path)
    return nx.read_gml(path, label="label" if by_label else "id")


_READERS: Mapping[str, Callable[[Path], _Sketch]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".graphml": _networkx_reader(lambda nx, path: nx.read_graphml(path)),
    ".gml": _networkx_reader(_gml),
    ".json": _read_json,
    ".edgelist": _networkx_reader(_edge_list),
    ".edges": _networkx_reader(_edge_list),
    ".txt": _networkx_reader(_edge_list),
}
