"""GraphML: one flat graph, read strictly and with lines.

networkx reads it, too, but leaves out further graphs, nested ones and default values, adds nodes that only edges name, and has no lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from p2pfl.errors import TopologyError
from p2pfl.topology.numbers import number
from p2pfl.topology.sketch import VALUES, Edge, Sketch, known
from p2pfl.yaml_files import shown

_NUMBERS = ("int", "long", "float", "double", "integer")
_MAX_DEPTH = 200


@dataclass(slots=True)
class _Element:
    """An element, its tag without the namespace."""

    tag: str
    attributes: Mapping[str, str]
    line: int
    children: list[_Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, tag: str) -> list[_Element]:
        return [child for child in self.children if child.tag == tag]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def read_graphml(text: str) -> Sketch:
    """The graph of a file; ids are the nodes' names.

    Raises:
        TopologyError: it is not GraphML, or holds more or less than one graph.
    """
    root = _parsed(text)
    graphs = root.all("graph")
    if root.tag != "graphml":
        raise TopologyError(f"line {root.line}: <{root.tag}>: expected <graphml>")
    if len(graphs) != 1:
        at = f", at lines {', '.join(str(graph.line) for graph in graphs[:8])}" if graphs else ""
        raise TopologyError(f"holds {len(graphs)} graphs{at}: expected one")
    graph = graphs[0]
    findings = _findings_of_structure(root, graph)
    default = graph.attributes.get("edgedefault")
    if default not in ("directed", "undirected"):
        findings.append(f"line {graph.line}: edgedefault = {shown(default)}: expected directed or undirected")
    keys = {kind: _keys(root, kind, findings) for kind in ("node", "edge")}
    declared = {key.attributes.get("id") for key in root.all("key")}
    nodes: list[object] = []
    masses: dict[int, object] = {}
    for i, node in enumerate(graph.all("node")):
        nodes.append(node.attributes.get("id"))
        values = _values(node, keys["node"], declared, findings)
        masses |= {i: values["mass"]} if "mass" in values else {}
    edges = []
    for edge in graph.all("edge"):
        place, ends = f"line {edge.line}", [edge.attributes.get(end) for end in ("source", "target")]
        direction = edge.attributes.get("directed", "true" if default == "directed" else "false")
        if direction not in ("true", "false"):
            findings.append(f"{place}: directed = {shown(direction)}: expected true or false")
        elif (direction == "true") != (default == "directed"):
            findings.append(f"{place}: directed = {shown(direction)} in a graph with edgedefault = {shown(default)}: expected all alike")
        if None in ends:
            findings.append(f"{place}: an edge without {'a source' if ends[0] is None else 'a target'}")
        else:
            edges.append(Edge(place, ends[0], ends[1], _values(edge, keys["edge"], declared, findings)))
    remedy = 'keep one edge a link, or write edgedefault="directed"'
    return Sketch(nodes=nodes, edges=edges, directed=default == "directed", masses=masses, faults=findings, remedy=remedy)


def _parsed(text: str) -> _Element:
    """The root element.

    Raises:
        TopologyError: it is not XML, or declares entities.
    """
    parser = expat.ParserCreate(encoding="UTF-8", namespace_separator=" ")
    outside = _Element("", {}, 0)
    opened = [outside]

    def start(name: str, attributes: dict[str, str]) -> None:
        element = _Element(name.rpartition(" ")[2], attributes, parser.CurrentLineNumber)
        if len(opened) > _MAX_DEPTH:
            raise TopologyError(f"line {element.line}: nested more than {_MAX_DEPTH} deep")
        opened[-1].children.append(element)
        opened.append(element)

    def text_follows(piece: str) -> None:
        opened[-1].texts.append(piece)

    def declare(*_: object) -> None:
        raise TopologyError(f"line {parser.CurrentLineNumber}: declares an entity: write the text itself")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: opened.pop()
    parser.CharacterDataHandler = text_follows
    parser.EntityDeclHandler = declare
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise TopologyError(f"line {error.lineno}: cannot be read as XML: {expat.errors.messages[error.code]}") from error
    return outside.children[0]


def _findings_of_structure(root: _Element, graph: _Element) -> list[str]:
    """Findings for parts that cannot be read as nodes and edges of one graph."""
    found = [f"line {child.line}: <{child.tag}> outside of the graph" for child in root.children if child.tag in ("node", "edge")]
    for child in graph.children:
        if child.tag == "hyperedge":
            found.append(f"line {child.line}: a hyperedge: expected edges between two nodes")
        elif child.tag not in ("node", "edge") and child.tag.lower() in ("node", "edge"):
            found.append(f"line {child.line}: <{child.tag}>: write <{child.tag.lower()}>")
        elif child.all("graph"):
            found.append(f"line {child.all('graph')[0].line}: a graph inside of {_called(child)}: expected one flat graph")
        if child.tag == "node" and "id" not in child.attributes:
            found.append(f"line {child.line}: a node without an id")
    return found


def _called(element: _Element) -> str:
    return f"{element.tag} {shown(element.attributes['id'])}" if "id" in element.attributes else f"an {element.tag}"


@dataclass(frozen=True, slots=True)
class _Key:
    """A value that nodes or edges may have."""

    name: str
    kind: str
    default: _Element | None


def _keys(root: _Element, kind: str, findings: list[str]) -> dict[str, _Key]:
    """The keys of nodes or of edges by their id."""
    found: dict[str, _Key] = {}
    for key in root.all("key"):
        name, of = key.attributes.get("attr.name", ""), key.attributes.get("for", "all")
        if of not in (kind, "all"):
            continue
        if key.attributes.get("id", "") in found or name in [other.name for other in found.values() if other.name]:
            findings.append(f"line {key.line}: the key {name or key.attributes.get('id')} of {kind}s is declared twice")
        default = next(iter(key.all("default")), None)
        found[key.attributes.get("id", "")] = _Key(name, key.attributes.get("attr.type", "string"), default)
    return found


def _values(element: _Element, keys: Mapping[str, _Key], declared: set[str | None], findings: list[str]) -> dict[str, Any]:
    """Values of a node or an edge that we use, those of `default` among them."""
    place = f"line {element.line}"
    also = ["mass"] if element.tag == "node" else []
    given: dict[str, Any] = {}
    for data in element.all("data"):
        key = keys.get(data.attributes.get("key", ""))
        if key is None:
            if data.attributes.get("key") not in declared:
                findings.append(f"line {data.line}: data with the key {shown(data.attributes.get('key'))}, which is not declared")
            continue
        if key.name in given and key.name in (*VALUES, *also):
            findings.append(f"line {data.line}: {key.name} is given twice")
        given[key.name] = _value(data, key)
    for key in keys.values():
        if key.default is not None and key.name not in given:
            given[key.name] = _value(key.default, key)
    values, strange = known(place, given, also)
    findings += strange
    return values


def _value(data: _Element, key: _Key) -> float | str:
    """A number where the key says that there are numbers and this is one, otherwise the text."""
    if key.kind not in _NUMBERS:
        return data.text
    try:
        return number(data.text.strip())
    except ValueError:
        return data.text
