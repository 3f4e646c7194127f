"""Graphs that people draw themselves: YAML of our own, and the files of other programs.

The YAML form::

    nodes: [cleveland, hungary, switzerland]      # names, {name: cleveland, mass: 303}, or a number: nodes are then 0, 1, 2, ...
    edges:
      - [cleveland, hungary]
      - {between: [hungary, switzerland], latency_ms: 12}
    directed: false                               # true: between is [sender, receiver]

Any edge may name its transport, such as ``transport: relay``; see `transports_over`. An edge may carry weight (what an end multiplies the
other's message with), latency_ms (one way) and bandwidth_mbps, a node its mass (how much it counts with ``weights: stationary``); each of
them is on all edges, or nodes, or on none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, ConflictError, TopologyError, some
from p2pfl.topology.edge_lists import read_edge_list
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.program_files import read_gml, read_graphml, read_json
from p2pfl.topology.sketch import VALUES, Edge, Sketch, build, is_label
from p2pfl.yaml_files import load_yaml, read_text, shown, unknown_key

_MAX_NODES = 10**6
_TRANSPORT = "transport"


def load(path: Path | str) -> Topology:
    """The graph of a file: .yaml, .graphml, .gml, .edgelist (.edges, .txt) or node-link .json.

    Nodes get names, and rows in the order of the sorted names, unless the file calls them 0 ... N - 1.

    Raises:
        TopologyError: all that is wrong with the file at once, or, if nothing else is, two nodes with no path between them.
    """
    return _load(Path(path))[0]


def load_over(path: Path | str, names: Sequence[str]) -> Topology:
    """The graph of a file over nodes of a run; row i is names[i].

    Nodes are matched by name. Nodes 0 ... N - 1 are also those whose names end so, such as node-0 ... node-9. A file that says no more than
    how many nodes there are has them in the order of their names.

    Args:
        path: as for `load`.
        names: of the run's nodes, sorted.

    Raises:
        TopologyError: as `load`.
        ConflictError: the file has other nodes than the run; the message names both differences.
    """
    graph, counted, _ = _load(Path(path))
    labels = [graph.label(i) for i in range(graph.num_nodes)]
    if set(labels) == set(names):
        return graph.renamed(labels)
    if graph.names is None and (order := _by_number(names, counted=counted)) is not None:
        if graph.num_nodes != len(names):
            raise ConflictError(f"topology.file has {graph.num_nodes} nodes: the run has {len(names)}", "topology")
        return graph.renamed(order)
    strangers, missing = [sorted(set(here) - set(there)) for here, there in ((labels, names), (names, labels))]
    if strangers and missing:
        fault = f"topology.file names the nodes {some(strangers)}: the run has {some(missing)}"
    elif strangers:
        fault = f"topology.file names the nodes {some(strangers)}, which the run does not have"
    else:
        fault = f"topology.file lacks the nodes {some(missing)}, which the run has"
    raise ConflictError(f"{fault}; nodes are matched by name", "topology")


def transports_over(path: Path | str, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """The transports that a file names for edges, by their ends in the order of the names; nodes are matched as by `load_over`."""
    graph, counted, transports = _load(Path(path))
    order = list(names) if graph.names is not None else _by_number(names, counted=counted) or []
    name = {graph.label(i): graph.label(i) if graph.names is not None else order[i] for i in range(graph.num_nodes)}
    return {(min(name[a], name[b]), max(name[a], name[b])): kind for (a, b), kind in transports.items()}


def _by_number(names: Sequence[str], *, counted: bool) -> Sequence[str] | None:
    """The names of the run, sorted, that nodes 0 ... N - 1 of a file stand for, which may only count them; None: that is not certain."""
    if any(name.isdecimal() for name in names):
        return None  # these would be names of the file
    endings = [re.search("[0-9]+$", name) for name in names]
    numbers = [int(ending[0]) for ending in endings if ending is not None]
    if len(numbers) < len(names):
        return names if counted else None
    in_order = [name for _, name in sorted(zip(numbers, names, strict=True))]
    if sorted(numbers) == list(range(len(names))):
        return in_order
    return names if counted and in_order == list(names) else None


def _load(path: Path) -> tuple[Topology, bool, Mapping[tuple[str, str], str]]:
    """The graph of a file, whether the file gives only the number of nodes, and the transports that it names for edges."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TopologyError(f"a file ending in {path.suffix!r}: expected one of {', '.join(_READERS)}", str(path))
    try:
        if path.is_dir():
            raise TopologyError("is a folder: expected a file")
        if not path.exists():
            raise TopologyError("no such file")
        sketch = reader(path)
        topology = build(path.stem, sketch)
        try:
            check_connected(topology)
        except TopologyError as error:
            raise TopologyError([f"{finding}{sketch.if_apart}" for finding in error.findings]) from error
    except ConfigError as error:
        raise TopologyError(error.findings, str(path)) from error
    except OSError as error:
        raise TopologyError(f"cannot be read: {error.strerror or error}", str(path)) from error
    except (RecursionError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError) as error:
        known_faults: dict[type, str] = {RecursionError: "nested too deeply", KeyError: f"{error} is missing"}
        fault = known_faults.get(type(error), " ".join(str(error).split()))
        raise TopologyError(f"cannot be read as {path.suffix}: {fault}", str(path)) from error
    return topology, sketch.counted, sketch.transports


def _read_yaml(path: Path) -> Sketch:
    content = load_yaml(path, "nodes: [a, b] and edges: [[a, b]]")
    faults = [
        unknown_key(key, content[key], ["nodes", "edges", "directed"]) for key in content if key not in ("nodes", "edges", "directed")
    ]
    nodes, edges, directed = content.get("nodes"), content.get("edges"), content.get("directed", False)
    if counted := isinstance(nodes, int) and not isinstance(nodes, bool) and 0 <= nodes <= _MAX_NODES:
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
    rows, transports = _read_edges(edges, faults)
    return Sketch(nodes=nodes, edges=rows, directed=directed is True, masses=masses, faults=faults, counted=counted, transports=transports)


def _read_edges(edges: Sequence[Any], faults: list[str]) -> tuple[list[Edge], dict[tuple[str, str], str]]:
    """Read the edges of a YAML file, and the transports that they name by their ends; takes findings."""
    rows: list[Edge] = []
    transports: dict[tuple[str, str], str] = {}
    for i, edge in enumerate(edges):
        place = f"edges[{i}]"
        values = {key: value for key, value in edge.items() if key != "between"} if isinstance(edge, dict) else {}
        pair = edge.get("between") if isinstance(edge, dict) else edge
        transport = values.pop(_TRANSPORT, None)
        if transport is not None and not isinstance(transport, str):
            faults.append(f"{place}.{_TRANSPORT} = {shown(transport)}: expected the name of a transport, such as relay")
        faults += [f"{place}.{unknown_key(str(key), values[key], ['between', *VALUES, _TRANSPORT])}" for key in values if key not in VALUES]
        if isinstance(pair, list) and len(pair) == 2 and all(is_label(end) for end in pair):  # noqa: PLR2004
            rows.append(Edge(place, pair[0], pair[1], values))
            if isinstance(transport, str):
                transports[str(pair[0]), str(pair[1])] = transport
        else:
            faults.append(f"{place} = {shown(edge)}: expected two nodes, [a, b] or {{between: [a, b], ...}}")
    return rows, transports


_READERS: Mapping[str, Callable[[Path], Sketch]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".graphml": lambda path: read_graphml(read_text(path)),
    ".gml": lambda path: read_gml(read_text(path)),
    ".json": lambda path: read_json(read_text(path)),
    **dict.fromkeys((".edgelist", ".edges", ".txt"), lambda path: read_edge_list(read_text(path))),
}
