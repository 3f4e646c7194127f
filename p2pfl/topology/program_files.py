"""Graph files of other programs: GraphML, GML and node-link JSON, each one flat graph, read strictly and with lines.

networkx reads them, too, but without lines, and GML not in UTF-8; it leaves out further graphs, nested ones, default values and whatever
stands outside of the graph, and adds nodes that only edges name.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from p2pfl.errors import TopologyError
from p2pfl.topology.sketch import VALUES, Edge, Sketch, known, number, quoted
from p2pfl.yaml_files import shown

_MAX_DEPTH_XML, _MAX_DEPTH_GML = 200, 50
_LINE = " line"  # an attribute that no file can have
_ENTITY = re.compile(r"&(?:#[0-9]+|#[xX][0-9A-Fa-f]+|[A-Za-z][0-9A-Za-z]*);")
_PART = re.compile(
    r"""
      (?P<space>\s+|\#[^\n]*)
    | (?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?=[\s\[\]#]|$))
    | (?P<key>[A-Za-z_][0-9A-Za-z_]*(?=[\s\[\]#"]|$))
    | (?P<text>"[^"]*")
    | (?P<bracket>[\[\]])
    """,
    re.VERBOSE,
)


def read_graphml(text: str) -> Sketch:
    """The graph of a GraphML file; ids are the nodes' names.

    Raises:
        TopologyError: it is not GraphML, or holds more or less than one graph.
    """
    root = _root(text)
    graphs = root.findall("graph")
    if root.tag != "graphml":
        raise TopologyError(f"{_place(root)}: <{root.tag}>: expected <graphml>")
    if len(graphs) != 1:
        at = f", at lines {', '.join(graph.attrib[_LINE] for graph in graphs[:8])}" if graphs else ""
        raise TopologyError(f"holds {len(graphs)} graphs{at}: expected one")
    graph = graphs[0]
    faults = _faults_of_structure(root, graph)
    default = graph.get("edgedefault")
    if default not in ("directed", "undirected"):
        faults.append(f"{_place(graph)}: edgedefault = {shown(default)}: expected directed or undirected")
    keys = {kind: _keys(root, kind, faults) for kind in ("node", "edge")}
    declared = {key.get("id") for key in root.findall("key")}
    nodes = graph.findall("node")
    values = [_values(node, keys["node"], declared, faults) for node in nodes]
    masses = {i: given["mass"] for i, given in enumerate(values) if "mass" in given}
    edges = []
    for edge in graph.findall("edge"):
        place, ends = _place(edge), [edge.get(end) for end in ("source", "target")]
        direction = edge.get("directed", "true" if default == "directed" else "false")
        if direction not in ("true", "false"):
            faults.append(f"{place}: directed = {shown(direction)}: expected true or false")
        elif (direction == "true") != (default == "directed"):
            faults.append(f"{place}: directed = {shown(direction)} in a graph with edgedefault = {shown(default)}: expected all alike")
        if None in ends:
            faults.append(f"{place}: an edge without {'a source' if ends[0] is None else 'a target'}")
        else:
            edges.append(Edge(place, ends[0], ends[1], _values(edge, keys["edge"], declared, faults)))
    remedy = 'keep one edge a link, or write edgedefault="directed"'
    names = [node.get("id") for node in nodes]
    return Sketch(nodes=names, edges=edges, directed=default == "directed", masses=masses, faults=faults, remedy=remedy)


def _root(text: str) -> Element:
    """The root of XML, tags without their namespace; it must not declare entities."""
    parser, builder, depth = expat.ParserCreate(encoding="UTF-8", namespace_separator=" "), TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH_XML:
            raise TopologyError(f"line {parser.CurrentLineNumber}: nested more than {_MAX_DEPTH_XML} deep")
        builder.start(name.rpartition(" ")[2], attributes | {_LINE: str(parser.CurrentLineNumber)})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.rpartition(" ")[2])

    def declare(*_: object) -> None:
        raise TopologyError(f"line {parser.CurrentLineNumber}: declares an entity: write the text itself")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.EntityDeclHandler = declare
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise TopologyError(f"line {error.lineno}: cannot be read as XML: {expat.errors.messages[error.code]}") from error
    return builder.close()


def _place(element: Element) -> str:
    return f"line {element.attrib[_LINE]}"


def _faults_of_structure(root: Element, graph: Element) -> list[str]:
    """Findings for parts that cannot be read as nodes and edges of one graph."""
    found = [f"{_place(child)}: <{child.tag}> outside of the graph" for child in root if child.tag in ("node", "edge")]
    for child in graph:
        inside = child.find("graph")
        if child.tag == "hyperedge":
            found.append(f"{_place(child)}: a hyperedge: expected edges between two nodes")
        elif child.tag not in ("node", "edge") and child.tag.lower() in ("node", "edge"):
            found.append(f"{_place(child)}: <{child.tag}>: write <{child.tag.lower()}>")
        elif inside is not None:
            called = f"{child.tag} {shown(child.attrib['id'])}" if "id" in child.attrib else f"an {child.tag}"
            found.append(f"{_place(inside)}: a graph inside of {called}: expected one flat graph")
        if child.tag == "node" and "id" not in child.attrib:
            found.append(f"{_place(child)}: a node without an id")
    return found


def _keys(root: Element, kind: str, faults: list[str]) -> dict[str, Element]:
    """The declarations of values that nodes or edges may have, by their id."""
    found: dict[str, Element] = {}
    for key in root.findall("key"):
        if key.get("for", "all") not in (kind, "all"):
            continue
        name = key.get("attr.name", "")
        if key.get("id", "") in found or (name and name in [other.get("attr.name") for other in found.values()]):
            faults.append(f"{_place(key)}: the key {name or key.get('id')} of {kind}s is declared twice")
        found[key.get("id", "")] = key
    return found


def _values(element: Element, keys: Mapping[str, Element], declared: set[str | None], faults: list[str]) -> dict[str, Any]:
    """Values of a node or an edge that we use, those of `default` among them."""
    also = ["mass"] if element.tag == "node" else []
    given: dict[str, Any] = {}
    for data in element.findall("data"):
        key = keys.get(data.get("key", ""))
        if key is None:
            if data.get("key") not in declared:
                faults.append(f"{_place(data)}: data with the key {shown(data.get('key'))}, which is not declared")
            continue
        name = key.get("attr.name", "")
        if name in given and name in (*VALUES, *also):
            faults.append(f"{_place(data)}: {name} is given twice")
        given[name] = _number_or_text(data, key)
    for key in keys.values():
        default = key.find("default")
        if default is not None and key.get("attr.name", "") not in given:
            given[key.get("attr.name", "")] = _number_or_text(default, key)
    return known(_place(element), given, faults, also)


def _number_or_text(data: Element, key: Element) -> float | str:
    """A number where the key says that there are numbers and this is one, otherwise the text."""
    text = "".join([data.text or "", *(child.tail or "" for child in data)])
    if key.get("attr.type") not in ("int", "long", "float", "double", "integer"):
        return text
    try:
        return number(text.strip())
    except ValueError:
        return text


class _Entry(NamedTuple):
    """A key with its value, which is a number, a text or a list of entries."""

    key: str
    value: int | float | str | list[_Entry]
    line: int


def read_gml(text: str) -> Sketch:
    """The graph of a GML file; labels are the nodes' names where all nodes have one, ids where none has.

    Raises:
        TopologyError: it is not GML, or holds more or less than one graph.
    """
    entries = _entries(_pieces(text))
    faults = [f"line {entry.line}: {entry.key} outside of the graph" for entry in entries if entry.key in ("node", "edge")]
    graphs = [entry for entry in entries if entry.key.lower() == "graph"]
    if len(graphs) != 1 or not isinstance(graphs[0].value, list):
        raise TopologyError(f"holds {len(graphs)} graphs: expected one, graph [ node [ id 1 ] ... edge [ source 1 target 2 ] ... ]")
    inside = graphs[0].value
    for entry in inside:
        if entry.key.lower() in ("node", "edge", "directed") and entry.key != entry.key.lower():
            faults.append(f"line {entry.line}: {entry.key!r}: write {entry.key.lower()}")
        elif entry.key in ("node", "edge") and not isinstance(entry.value, list):
            faults.append(f"line {entry.line}: {entry.key} {shown(entry.value)}: expected {entry.key} [ ... ]")
    directed = _directed(inside, faults)
    parts = {kind: [(entry.line, entry.value) for entry in inside if entry.key == kind] for kind in ("node", "edge")}
    name_of, masses, nodes = _gml_nodes([(line, value) for line, value in parts["node"] if isinstance(value, list)], faults)
    edges = []
    for line, value in parts["edge"]:
        if isinstance(value, list):
            edges += _gml_edge(line, value, name_of, faults)
    if len(set(map(str, nodes))) < len(nodes):
        edges = []  # which node they mean is not known
    return Sketch(
        nodes=nodes, edges=edges, directed=directed, masses=masses, faults=faults, remedy="keep one edge a link, or write directed 1"
    )


def _pieces(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, part and line, spaces and comments left out."""
    at, line = 0, 1
    while at < len(text):
        found = _PART.match(text, at)
        if found is None:
            rest = text[at:].partition("\n")[0]
            fault = "a quotation mark that is not closed" if rest.startswith('"') else "expected a key, a number, a text in quotes, [ or ]"
            raise TopologyError(f"line {line}: {quoted(rest)}: {fault}")
        kind = found.lastgroup or ""
        if kind != "space":
            yield kind, found[0], line
        line += found[0].count("\n")
        at = found.end()


def _entries(pieces: Iterator[tuple[str, str, int]], opened_at: int = 0, depth: int = 0) -> list[_Entry]:
    """Entries up to the bracket that closes those which the line `opened_at` opens, or up to the file's end."""
    found: list[_Entry] = []
    for kind, key, line in pieces:
        if key == "]" and opened_at:
            return found
        if kind != "key":
            raise TopologyError(f"line {line}: {quoted(key)}: expected a key")
        value_kind, part, part_line = next(pieces, ("end", "", 0))
        if value_kind == "end":
            raise TopologyError(f"line {line}: {key}: expected a value, but the file ends")
        if part == "]":
            raise TopologyError(f"line {part_line}: {key} ]: expected a value")
        if part == "[" and depth >= _MAX_DEPTH_GML:
            raise TopologyError(f"line {part_line}: nested more than {_MAX_DEPTH_GML} deep")
        value = _entries(pieces, part_line, depth + 1) if part == "[" else _number_or_unquoted(value_kind, part)
        found.append(_Entry(key, value, line))
    if opened_at:
        raise TopologyError(f"line {opened_at}: a bracket that is not closed")
    return found


def _number_or_unquoted(kind: str, part: str) -> int | float | str:
    if kind == "number":
        return int(part) if re.fullmatch("[+-]?[0-9]+", part) else float(part)
    if kind == "text":
        return _ENTITY.sub(lambda found: html.unescape(found[0]), part[1:-1])
    return part


def _directed(inside: list[_Entry], faults: list[str]) -> bool:
    given = [entry for entry in inside if entry.key == "directed"]
    faults += [
        f"line {entry.line}: directed {shown(entry.value)}: expected 0 or 1"
        for entry in given
        if isinstance(entry.value, str) or entry.value not in (0, 1)
    ]
    if len(given) > 1:
        faults.append(f"line {given[1].line}: directed is there already, at line {given[0].line}; keep one of them")
    return bool(given) and given[0].value == 1


def _gml_nodes(
    nodes: list[tuple[int, list[_Entry]]], faults: list[str]
) -> tuple[dict[int | float | str, object], dict[int, object], list[object]]:
    """The name by id, masses by place, and names in the file's order."""
    ids: dict[int | float | str, int] = {}
    labels: list[object] = []
    masses: dict[int, object] = {}
    for i, (line, entries) in enumerate(nodes):
        once = _once(line, "node", entries, ("id", "label", "mass"), faults)
        values = known(f"line {line}", once, faults, ["mass"])
        masses |= {i: values["mass"]} if "mass" in values else {}
        labels.append(once.get("label"))
        name = once.get("id")
        if isinstance(name, list) or name is None:
            faults.append(f"line {line}: a node without an id")
        elif name in ids:
            faults.append(f"line {line}: a node with id {shown(name)} is there already, at line {ids[name]}")
        else:
            ids[name] = line
    with_label = [label is not None for label in labels]
    if any(with_label) and not all(with_label):
        some = nodes[with_label.index(True)][0]
        faults += [
            f"line {line}: a node without a label, but the node at line {some} has one; give it to all nodes or to none"
            for (line, _), has in zip(nodes, with_label, strict=True)
            if not has
        ]
    if len(ids) < len(nodes) or any(with_label) != all(with_label):
        return {}, masses, list(range(len(nodes)))  # a finding has been said; the names are not known
    names = labels if any(with_label) else list(ids)
    return dict(zip(ids, names, strict=True)), masses, list(names)


def _gml_edge(line: int, entries: list[_Entry], name_of: dict[int | float | str, object], faults: list[str]) -> list[Edge]:
    once = _once(line, "edge", entries, ("source", "target", "weight", "latency_ms", "bandwidth_mbps"), faults)
    ends: list[object] = []
    for end in ("source", "target"):
        given = once.get(end)
        if isinstance(given, list) or given is None:
            faults.append(f"line {line}: an edge without a {end}")
        elif name_of and given not in name_of:
            faults.append(f"line {line}: {end} {shown(given)} is not the id of a node")
        elif name_of:
            ends.append(name_of[given])
    values = known(f"line {line}", once, faults)
    return [Edge(f"line {line}", ends[0], ends[1], values)] if len(ends) == 2 else []  # noqa: PLR2004


def _once(
    line: int, kind: str, entries: list[_Entry], wanted: tuple[str, ...], faults: list[str]
) -> dict[str, int | float | str | list[_Entry]]:
    """Values by key, with a finding for each key of ours that is there twice."""
    counts = Counter(entry.key for entry in entries)
    faults += [f"line {line}: the {kind} has {key} {counts[key]} times; expected once" for key in wanted if counts[key] > 1]
    return {entry.key: entry.value for entry in reversed(entries)}


def read_json(text: str) -> Sketch:
    """The graph of node-link JSON, as networkx writes it; the edges are under "edges" or, before networkx 3.4, under "links".

    Raises:
        TopologyError: it is not JSON of that form.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise TopologyError(f"line {error.lineno}, column {error.colno}: cannot be read as JSON: {error.msg}") from error
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), list):
        raise TopologyError('expected node-link JSON: {"nodes": [{"id": ...}], "edges": [{"source": ..., "target": ...}]}')
    faults: list[str] = []
    directed = content.get("directed", False)
    if not isinstance(directed, bool):
        faults.append(f"directed = {shown(directed)}: expected true or false")
    faults += [f"{key!r}: write {key.lower()!r}" for key in content if key != key.lower() and key.lower() in ("directed", "edges", "links")]
    if "edges" in content and "links" in content:
        faults.append("has edges and links: keep one of them")
    nodes: list[object] = []
    masses: dict[int, object] = {}
    for i, node in enumerate(content["nodes"]):
        if not isinstance(node, dict) or "id" not in node:
            faults.append(f'nodes[{i}] = {shown(node)}: expected {{"id": ...}}')
            continue
        values = known(f"nodes[{i}]", node, faults, ["mass"])
        masses |= {len(nodes): values["mass"]} if "mass" in values else {}
        nodes.append(node["id"])
    key = "edges" if "edges" in content else "links"
    listed = content.get(key, [])
    if not isinstance(listed, list):
        raise TopologyError([*faults, f"{key} = {shown(listed)}: expected a list"])
    edges = []
    for i, edge in enumerate(listed):
        if not isinstance(edge, dict) or not {"source", "target"} <= edge.keys():
            faults.append(f'{key}[{i}] = {shown(edge)}: expected {{"source": ..., "target": ...}}')
            continue
        edges.append(Edge(f"{key}[{i}]", edge["source"], edge["target"], known(f"{key}[{i}]", edge, faults)))
    remedy = 'keep one edge a link, or write "directed": true'
    return Sketch(nodes=nodes, edges=edges, directed=directed is True, masses=masses, faults=faults, remedy=remedy)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each key once."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise TopologyError([f"the key {key!r} is given twice in one object" for key in twice])
    return dict(pairs)
