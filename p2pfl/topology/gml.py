"""GML: nested lists of keys and values, read strictly and with lines.

networkx reads it, too, but without lines, not in UTF-8, and without what stands outside of the graph.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from p2pfl.errors import TopologyError
from p2pfl.topology.numbers import quoted
from p2pfl.topology.sketch import Edge, Sketch, known
from p2pfl.yaml_files import shown

_MAX_DEPTH = 50
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


class _Entry(NamedTuple):
    """A key with its value, which is a number, a text or a list of entries."""

    key: str
    value: int | float | str | list[_Entry]
    line: int


def read_gml(text: str) -> Sketch:
    """The graph of a file; labels are the nodes' names where all nodes have one, ids where none has.

    Raises:
        TopologyError: it is not GML, or holds more or less than one graph.
    """
    entries = _parsed(text)
    findings = [f"line {entry.line}: {entry.key} outside of the graph" for entry in entries if entry.key in ("node", "edge")]
    graphs = [entry for entry in entries if entry.key.lower() == "graph"]
    if len(graphs) != 1 or not isinstance(graphs[0].value, list):
        raise TopologyError(f"holds {len(graphs)} graphs: expected one, graph [ node [ id 1 ] ... edge [ source 1 target 2 ] ... ]")
    inside = graphs[0].value
    for entry in inside:
        if entry.key.lower() in ("node", "edge", "directed") and entry.key != entry.key.lower():
            findings.append(f"line {entry.line}: {entry.key!r}: write {entry.key.lower()}")
        elif entry.key in ("node", "edge") and not isinstance(entry.value, list):
            findings.append(f"line {entry.line}: {entry.key} {shown(entry.value)}: expected {entry.key} [ ... ]")
    directed = _directed(inside, findings)
    parts = {kind: [(entry.line, entry.value) for entry in inside if entry.key == kind] for kind in ("node", "edge")}
    name_of, masses, nodes = _nodes([(line, value) for line, value in parts["node"] if isinstance(value, list)], findings)
    edges = []
    for line, value in parts["edge"]:
        if isinstance(value, list):
            edges += _edge(line, value, name_of, findings)
    if len(set(map(str, nodes))) < len(nodes):
        edges = []  # which node they mean is not known
    return Sketch(
        nodes=nodes, edges=edges, directed=directed, masses=masses, faults=findings, remedy="keep one edge a link, or write directed 1"
    )


def _pieces(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, part and line, spaces and comments left out.

    Raises:
        TopologyError: a sign that begins no part of GML.
    """
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


def _parsed(text: str) -> list[_Entry]:
    """Entries of a file.

    Raises:
        TopologyError: keys, values and brackets do not fit together.
    """
    outermost: list[_Entry] = []
    opened: list[tuple[list[_Entry], int]] = [(outermost, 0)]
    key: tuple[str, int] | None = None
    for kind, part, line in _pieces(text):
        inside, opened_at = opened[-1]
        if key is None:
            if kind == "key":
                key = part, line
            elif part == "]" and opened_at:
                opened.pop()
            else:
                raise TopologyError(f"line {line}: {quoted(part)}: expected a key")
        elif part == "[":
            if len(opened) > _MAX_DEPTH:
                raise TopologyError(f"line {line}: nested more than {_MAX_DEPTH} deep")
            entries: list[_Entry] = []
            inside.append(_Entry(key[0], entries, key[1]))
            opened.append((entries, line))
            key = None
        elif kind == "bracket":
            raise TopologyError(f"line {line}: {key[0]} ]: expected a value")
        else:
            inside.append(_Entry(key[0], _value(kind, part), key[1]))
            key = None
    if key is not None:
        raise TopologyError(f"line {key[1]}: {key[0]}: expected a value, but the file ends")
    if len(opened) > 1:
        raise TopologyError(f"line {opened[-1][1]}: a bracket that is not closed")
    return outermost


def _value(kind: str, part: str) -> int | float | str:
    if kind == "number":
        return int(part) if re.fullmatch("[+-]?[0-9]+", part) else float(part)
    if kind == "text":
        return _ENTITY.sub(lambda found: html.unescape(found[0]), part[1:-1])
    return part


def _directed(inside: list[_Entry], findings: list[str]) -> bool:
    given = [entry for entry in inside if entry.key == "directed"]
    findings += [
        f"line {entry.line}: directed {shown(entry.value)}: expected 0 or 1"
        for entry in given
        if isinstance(entry.value, str) or entry.value not in (0, 1)
    ]
    if len(given) > 1:
        findings.append(f"line {given[1].line}: directed is there already, at line {given[0].line}; keep one of them")
    return bool(given) and given[0].value == 1


def _nodes(
    nodes: list[tuple[int, list[_Entry]]], findings: list[str]
) -> tuple[dict[int | float | str, object], dict[int, object], list[object]]:
    """The name by id, masses by place, and names in the file's order."""
    ids: dict[int | float | str, int] = {}
    labels: list[object] = []
    masses: dict[int, object] = {}
    for i, (line, entries) in enumerate(nodes):
        once = _once(line, "node", entries, ("id", "label", "mass"), findings)
        values, strange = known(f"line {line}", once, ["mass"])
        findings += strange
        masses |= {i: values["mass"]} if "mass" in values else {}
        labels.append(once.get("label"))
        name = once.get("id")
        if isinstance(name, list) or name is None:
            findings.append(f"line {line}: a node without an id")
        elif name in ids:
            findings.append(f"line {line}: a node with id {shown(name)} is there already, at line {ids[name]}")
        else:
            ids[name] = line
    with_label = [label is not None for label in labels]
    if any(with_label) and not all(with_label):
        some = nodes[with_label.index(True)][0]
        findings += [
            f"line {line}: a node without a label, but the node at line {some} has one; give it to all nodes or to none"
            for (line, _), has in zip(nodes, with_label, strict=True)
            if not has
        ]
    if len(ids) < len(nodes) or any(with_label) != all(with_label):
        return {}, masses, list(range(len(nodes)))  # a finding has been said; the names are not known
    names = labels if any(with_label) else list(ids)
    return dict(zip(ids, names, strict=True)), masses, list(names)


def _edge(line: int, entries: list[_Entry], name_of: dict[int | float | str, object], findings: list[str]) -> list[Edge]:
    once = _once(line, "edge", entries, ("source", "target", "weight", "latency_ms", "bandwidth_mbps"), findings)
    ends: list[object] = []
    for end in ("source", "target"):
        given = once.get(end)
        if isinstance(given, list) or given is None:
            findings.append(f"line {line}: an edge without a {end}")
        elif name_of and given not in name_of:
            findings.append(f"line {line}: {end} {shown(given)} is not the id of a node")
        elif name_of:
            ends.append(name_of[given])
    values, strange = known(f"line {line}", once)
    findings += strange
    return [Edge(f"line {line}", ends[0], ends[1], values)] if len(ends) == 2 else []  # noqa: PLR2004


def _once(
    line: int, kind: str, entries: list[_Entry], wanted: tuple[str, ...], findings: list[str]
) -> dict[str, int | float | str | list[_Entry]]:
    """Values by key, with a finding for each key of ours that is there twice."""
    counts = Counter(entry.key for entry in entries)
    findings += [f"line {line}: the {kind} has {key} {counts[key]} times; expected once" for key in wanted if counts[key] > 1]
    return {entry.key: entry.value for entry in reversed(entries)}
