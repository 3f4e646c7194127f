"""A graph as its file says it, the numbers in text files, and the checks that every file passes, whatever its format."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from p2pfl.errors import TopologyError, some
from p2pfl.topology.graph import Topology
from p2pfl.yaml_files import shown

_MOST_LINE_SHOWN = 60
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")
_MAX_LATENCY_MS = 1e9  # eleven days: more is a slip of the pen, and sums of it become non-finite

VALUES = {"weight": "weights", "latency_ms": "latency_ms", "bandwidth_mbps": "bandwidth_mbps"}
"""Values of an edge in files, and the fields of a topology that take them."""

_ALLOWED: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "weight": ("a number other than 0", lambda value: value != 0),
    "latency_ms": ("a number from 0 to 1e9", lambda value: 0 <= value <= _MAX_LATENCY_MS),
    "bandwidth_mbps": ("a number > 0", lambda value: value > 0),
}


class Edge(NamedTuple):
    """One edge as its file gives it; a tuple, because there may be millions."""

    place: str
    """Where it stands in the file."""

    sender: object
    receiver: object

    values: Mapping[str, Any]
    """By name, as in `VALUES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    """Nodes and edges of a file, before they are checked."""

    nodes: Sequence[object]

    edges: Sequence[Edge]

    directed: bool

    masses: Mapping[int, Any] = field(default_factory=dict)
    """By place in nodes."""

    faults: Sequence[str] = field(default_factory=list)
    """Findings of the file's reader."""

    transports: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Names of the transports of edges, by their ends as the file writes them."""

    counted: bool = False
    """Whether the file gives only the number of nodes, and no names."""

    remedy: str = "keep one edge a link, or say that the graph is directed"
    """Advice for a file that has each link in both directions."""

    if_apart: str = ""
    """A sentence to add where nothing is wrong but that the graph is not connected."""


def build(name: str, sketch: Sketch) -> Topology:
    """A topology from a sketch.

    Raises:
        TopologyError: all that is wrong with the sketch.
    """
    faults = list(sketch.faults)
    labels = [str(node) for node in sketch.nodes if is_label(node)]
    faults += [
        f"nodes[{i}] = {shown(node)}: expected a text; put it in quotes" for i, node in enumerate(sketch.nodes) if not is_label(node)
    ]
    faults += _faults_of_labels(labels)
    if len(sketch.nodes) < 2 and not sketch.faults:  # noqa: PLR2004  # findings say where the others are
        faults.append(f"nodes: {len(sketch.nodes)} of them, a network needs at least 2")
    ends, wrong = _ends(sketch, labels)
    faults += wrong
    values: dict[str, Any] = {attribute: _values(value, sketch.edges, faults) for value, attribute in VALUES.items()}
    faults += _faults_of_masses(sketch)
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


def is_label(node: object) -> bool:
    """Whether a node may be called so: a text, or a whole number."""
    return (isinstance(node, str) and node != "") or (isinstance(node, int) and not isinstance(node, bool))


def known(place: str, values: Mapping[Any, Any], faults: list[str], also: Sequence[str] = ()) -> dict[str, Any]:
    """The values that we use of those that other programs write, such as colours and labels.

    Args:
        place: where they stand in the file.
        values: by the name that the file gives them.
        faults: takes a finding for each name of ours that is written otherwise.
        also: more names that count, such as mass.
    """
    wanted = (*VALUES, *also)
    strange = [(key, word) for key in values if key not in wanted for word in wanted if str(key).strip().lower() == word]
    faults += [f"{place}: {key!r} = {shown(values[key])}: write {word}" for key, word in strange]
    return {key: value for key, value in values.items() if key in wanted}


def _faults_of_labels(labels: Sequence[str]) -> list[str]:
    """Findings for names that are given twice, or that look like another."""
    faults = [f"nodes: {label!r} is there {count} times" for label, count in sorted(Counter(labels).items()) if count > 1]
    alike: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        if label.isascii() and label.isalnum():
            continue
        if hidden := next((sign for sign in label if not sign.isprintable()), None):
            faults.append(f"nodes: {label!r} holds U+{ord(hidden):04X}, which cannot be seen: take it out")
        elif label != label.strip(" "):
            faults.append(f"nodes: {label!r} begins or ends with a space: take it out")
        if not label.isascii():
            alike[unicodedata.normalize("NFC", label)].add(label)
    return faults + [
        f"nodes: {label!r} is written with different Unicode signs that look alike: write it in one way"
        for label, forms in sorted(alike.items())
        if len(forms) > 1
    ]


def _ends(sketch: Sketch, labels: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Both ends of each edge as places in *labels*, and the findings."""
    number = {label: i for i, label in enumerate(labels)}
    ends: list[tuple[int, int]] = []
    faults: list[str] = []
    repeated: list[int] = []
    seen: dict[tuple[int, int], tuple[str, bool]] = {}
    reversed_twins: Counter[tuple[int, int]] = Counter()
    first_twins = ""
    for place, *pair, _ in sketch.edges:
        unknown = [end for end in pair if not is_label(end) or str(end) not in number]
        if unknown:
            faults += [f"{place}: {end!r} is not a node; the nodes are {some(list(number))}" for end in unknown]
            continue
        one, other = (number[str(end)] for end in pair)
        if one == other:
            faults.append(
                f"{place}: {labels[one]} - {labels[other]} leads from a node to itself; leave it out, a node's own weight is what is left"
            )
        key = (one, other) if sketch.directed else (min(one, other), max(one, other))
        if key in seen:
            before, was_forwards = seen[key]
            repeated.append(len(faults))
            faults.append(f"{place}: {labels[one]} - {labels[other]} is there already, at {before}; keep one of them")
            if was_forwards != (one < other):
                reversed_twins[key] += 1
                first_twins = first_twins or f"{labels[other]} - {labels[one]} at {before} and {place}"
        seen.setdefault(key, (place, one < other))
        ends.append((one, other))
    if len(repeated) == len(reversed_twins) == len(seen) > 1:
        sentence = f"each link is there in both directions, {first_twins}: {sketch.remedy}"
        faults = [sentence, *(fault for i, fault in enumerate(faults) if i not in set(repeated))]
    return ends, faults


def _faults_of_masses(sketch: Sketch) -> list[str]:
    wrong = {i: mass for i, mass in sketch.masses.items() if not (is_number(mass) and mass > 0)}
    faults = [f"nodes[{i}]: mass = {shown(mass)}, expected a number > 0" for i, mass in wrong.items()]
    missing = [i for i in range(len(sketch.nodes)) if i not in sketch.masses] if sketch.masses else []
    return faults + [f"nodes[{i}]: no mass, but others have one; give it for all nodes or for none" for i in missing]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _values(key: str, edges: Sequence[Edge], faults: list[str]) -> list[float] | None:
    """One value of every edge; None: the file has none. Takes findings."""
    first = next((edge.place for edge in edges if key in edge.values), None)
    if first is None:
        return None
    without = [edge.place for edge in edges if key not in edge.values]
    faults += [f"{place}: no {key}, but {first} has one; give it for all edges or for none" for place in without]
    (expected, is_allowed), numbers = _ALLOWED[key], []
    for edge in edges:
        value = edge.values.get(key, 1)
        if is_number(value) and is_allowed(value):
            numbers.append(float(value))
        else:
            faults.append(f"{edge.place}: {key} = {shown(value)}, expected {expected}")
    return numbers


def number(text: str) -> float:
    """A finite number as tables write it, spaces around it allowed.

    Raises:
        ValueError: it is no finite decimal number. Python's float also takes 1_000, nan and infinity.
    """
    text = text.strip(" \t")
    if _NUMBER.fullmatch(text) and abs(value := float(text)) != float("inf"):
        return value
    if _DECIMAL_COMMA.fullmatch(text):
        raise ValueError("expected a number with a decimal point, not a comma")
    raise ValueError("expected a number")


def quoted(line: str) -> str:
    """A line of a file for a message, cut where it is long."""
    line = line.strip("\r\n")
    return repr(line if len(line) <= _MOST_LINE_SHOWN else line[: _MOST_LINE_SHOWN - 1] + "…")
