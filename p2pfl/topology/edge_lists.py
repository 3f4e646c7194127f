"""Edge lists as people and other programs write them: two names a line, or two names and a weight.

Names are separated by spaces or tabs, by commas or by semicolons, in all lines alike; names with such signs stand in double quotes.
Comments begin with # or %, as in lists of SNAP and KONECT; `% asym` says that the graph is directed, `% sym` that it is not. Matrix
Market's symmetric coordinate form is read, too. Whatever is none of this is refused with its line.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from p2pfl.topology.sketch import VALUES, Edge, Sketch, known, number, quoted

_MAX_NODES = 10**6
_REMEDY = "keep one line a link, or begin the file with '% sym' if both lines are one link, with '% asym' if directions are meant"
_PLAIN = re.compile(r"[\w.@+-]+(?:(?: +[\w.@+-]+)*|(?:\t+[\w.@+-]+)*)")
_ENCLOSED = re.compile(r"^[\[(<“„«]|[\])>”»:]$")
_SLASHES = re.compile(r"(?<!:)//")  # an address has a colon before them
_SEPARATED = {" ": "spaces", ",": "','", ";": "';'"}
_BETWEEN = {" ": "a space", ",": "a comma", ";": "a semicolon"}
_HEADERS = {"source target", "from to", "src dst", "fromnodeid tonodeid", "node1 node2", "node_1 node_2", "id_1 id_2", "sender receiver"}
_DECIMAL_COMMA = re.compile(r"(?<![\w.,])[0-9]+,[0-9]+(?![\w.,])")
_NUM_ENDS = 2


class _Line(NamedTuple):
    """The fields of one line that holds an edge."""

    number: int
    text: str
    fields: list[str]
    separator: str

    def fault(self, sentence: str) -> str:
        return f"line {self.number}: {quoted(self.text)}: {sentence}"


def read_edge_list(text: str) -> Sketch:
    """The graph of a list; what is wrong with it stands in the sketch's faults."""
    findings: list[str] = []
    comments = _Comments(findings)
    lines: list[_Line] = []
    for place, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        content = line.strip(" \t")
        if not content or comments.takes(place, content):
            continue
        try:
            fields, separator = ([*content.split()], " ") if _PLAIN.fullmatch(content) else _fields(content)
        except ValueError as error:
            findings.append(f"line {place}: {quoted(content)}: {error}")
            continue
        lines.append(_Line(place, content, fields, separator))
    lines = comments.fitting(lines)
    lines, key = _without_header(lines, findings)
    edges = _edges(lines, key, findings)
    if comments.directed is False:
        edges = _merged(edges, findings)
    findings.sort(key=lambda finding: int(re.match("line ([0-9]+)|", finding)[1] or 0))  # type: ignore[index]  # it matches anything
    nodes: list[object] = list(dict.fromkeys(end for edge in edges for end in (edge.sender, edge.receiver)))
    if comments.size is not None:
        nodes = [str(row) for row in range(1, comments.size[0] + 1)]
    sketch = Sketch(
        nodes=nodes,
        edges=edges,
        directed=comments.directed is True,
        faults=findings,
        remedy=_REMEDY,
        if_apart=_perhaps_header(lines),
    )
    if comments.says_directed and comments.directed is None and not _each_twice(edges):
        findings.insert(0, comments.says_directed)
    return sketch


class _Comments:
    """Statements that stand in comments: whether the graph is directed, and how large a matrix is."""

    def __init__(self, findings: list[str]) -> None:
        self.directed: bool | None = None
        """None: nothing says so."""
        self.says_directed = ""
        """A finding for SNAP's sentence that the graph is directed."""
        self.size: tuple[int, int] | None = None
        """Rows and entries of a matrix."""
        self._is_refused = False
        self._said_at = ""
        self._is_matrix = False
        self._size_at = ""
        self._findings = findings

    def takes(self, place: int, content: str) -> bool:
        """Whether a line is a comment, or the size of a matrix, and holds no edge."""
        if content.startswith("%"):
            self._hear(f"line {place}: {quoted(content)}", content)
        elif content.startswith("#"):
            if re.match(r"#\s*directed graph\b", content, re.IGNORECASE):
                self.says_directed = self.says_directed or (
                    f"line {place}: {quoted(content)}: a list is read as undirected: begin the file with '% asym', or leave this line out"
                )
        elif self._is_matrix and not self._size_at:
            self._hear_size(f"line {place}: {quoted(content)}", content)
        else:
            return False
        return True

    def _hear(self, place: str, content: str) -> None:
        if content.lower().startswith("%%matrixmarket"):
            if not re.fullmatch(r"\S+ matrix coordinate (pattern|real|integer) symmetric", " ".join(content.lower().split())):
                self._findings.append(f"{place}: expected '%%MatrixMarket matrix coordinate … symmetric'")
                self._is_refused = True
            self._is_matrix = True
            return
        word = re.match(r"%\s*(sym|asym|bip)(?![\w-])", content)
        if word is not None and word[1] == "bip":
            self._findings.append(f"{place}: a graph of two kinds of nodes, expected one kind: '% sym' or '% asym'")
            self._is_refused = True
        elif word is not None:
            if self._said_at and self.directed != (word[1] == "asym"):
                self._findings.append(f"{place}: {self._said_at} says otherwise; keep one of them")
            self._said_at, self.directed = self._said_at or place.partition(":")[0], word[1] == "asym"

    def _hear_size(self, place: str, content: str) -> None:
        self._size_at = place
        words = content.split()
        if len(words) != 3 or not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words) or words[0] != words[1]:  # noqa: PLR2004
            self._findings.append(f"{place}: expected rows, columns (as many) and entries")
            self._is_refused = True
        elif int(words[0]) > _MAX_NODES:
            self._findings.append(f"{place}: expected at most {_MAX_NODES} rows")
        else:
            self.size = int(words[0]), int(words[2])

    def fitting(self, lines: list[_Line]) -> list[_Line]:
        """The lines that can be edges of such a graph; the others are findings."""
        if self._is_refused or self.size is None:
            return [] if self._is_refused else lines
        rows, entries = self.size
        if len(lines) != entries:
            self._findings.append(f"{self._size_at}: says {entries} entries, there are {len(lines)}")
        kept = []
        for line in lines:
            if all(re.fullmatch(r"[1-9][0-9]{0,17}", end) and int(end) <= rows for end in line.fields[:_NUM_ENDS]):
                kept.append(line)
            else:
                self._findings.append(line.fault(f"expected numbers from 1 to {rows}"))
        return kept


def _fields(content: str) -> tuple[list[str], str]:
    """Fields of a line and what separates them; values in braces are one field; raises ValueError with a sentence about the line."""
    pieces = _pieces(content)
    signs = {piece for piece, is_field in pieces if not is_field}
    separator = ";" if ";" in signs else "," if "," in signs else " "
    if separator == " ":
        if "\t" in content and not {'"', "{", "#"} & set(content) and any(" " in field.strip(" ") for field in content.split("\t")):
            raise ValueError("spaces and tabs between names: put names with spaces in quotes")
        fields = [piece for piece, is_field in pieces if is_field]
    else:
        fields = _between(pieces, separator, content)
    bare = [piece.rstrip(",;") for piece in re.split(r"[ \t,;]+", content)]
    if any(piece[:1] == "'" for piece in bare) and any(piece[-1:] == "'" for piece in bare) and not content.endswith("}"):
        raise ValueError("expected double quotes around names")
    return fields, separator


def _between(pieces: list[tuple[str, bool]], separator: str, content: str) -> list[str]:
    """Fields between commas or semicolons; spaces beside these do not count; raises ValueError with a sentence about the line."""
    groups: list[list[tuple[str, bool]]] = [[]]
    for piece in pieces:
        if piece == (separator, False):
            groups.append([])
        else:
            groups[-1].append(piece)
    fields = []
    for group in groups:
        field = "".join(piece for piece, _ in group)
        if not field:
            raise ValueError("an empty name")
        if (" ", False) in group:
            hint = ", write decimals with a point" if _DECIMAL_COMMA.search(content) else ""
            raise ValueError(f"spaces and {_SEPARATED[separator]} between names: put names with spaces in quotes{hint}")
        if (",", False) in group and not _DECIMAL_COMMA.fullmatch(field):
            raise ValueError("commas and ';' between names: put names with commas in quotes")
        fields.append(field)
    return fields


_PIECE = re.compile(
    r"""
      (?P<quoted>"(?:[^"]|"")*")          # in double quotes, which are written twice inside
    | (?P<values>\{.*\})                   # a mapping of Python
    | (?P<sign>[ \t]*[,;][ \t]*|[ \t]+)
    | (?P<bare>[^ \t,;"]+)
    """,
    re.VERBOSE,
)


def _pieces(content: str) -> list[tuple[str, bool]]:
    """Fields (True) and the signs between them (False) of a line, up to its comment; raises ValueError with a sentence about the line."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    while at < len(content):
        if content[at] == "#" and (not pieces or not pieces[-1][1]):
            break
        after_field = bool(pieces) and pieces[-1][1]
        if content[at] == '"' and after_field:
            raise ValueError("a quotation mark inside a name: put the name in quotes and write it twice")
        found = _PIECE.match(content, at)
        if found is None:
            raise ValueError("a quotation mark that is not closed")
        if found["sign"] is not None:
            pieces.append((found[0].strip(" \t") or " ", False))
        else:
            pieces.append((_name(found, after_field=after_field), True))
        at = found.end()
    while pieces and pieces[-1] == (" ", False):
        pieces.pop()
    return pieces


def _name(found: re.Match[str], *, after_field: bool) -> str:
    """Name in a field, without its quotes; raises ValueError with a sentence about the line."""
    piece = found[0]
    if found["quoted"] is not None:
        if piece == '""':
            raise ValueError("an empty name")
        return piece[1:-1].replace('""', '"')
    if after_field:
        raise ValueError("a quotation mark inside a name: put the name in quotes and write it twice")
    if found["bare"] is not None and piece.startswith("{"):
        raise ValueError("expected values as {'weight': 0.5}")
    if found["bare"] is not None and _SLASHES.search(piece):
        raise ValueError("expected # before a comment, or the name in quotes")
    if found["bare"] is not None and _ENCLOSED.search(piece):
        raise ValueError("a bracket, a colon or a quotation mark around a name: put names in double quotes, and nothing else")
    if found["bare"] is not None and "#" in piece:
        raise ValueError("'#' inside a name: put the name in quotes, or a space before a comment")
    return piece


def _without_header(lines: list[_Line], findings: list[str]) -> tuple[list[_Line], str]:
    """The lines below a header, and what the third column is called."""
    if not lines:
        return lines, "weight"
    first, rest = lines[0], lines[1:]
    words = [field.lower() for field in first.fields]
    others = {field for line in rest for field in line.fields[:_NUM_ENDS]}
    alone = others.isdisjoint(first.fields[:_NUM_ENDS])
    if alone and " ".join(words[:_NUM_ENDS]) in _HEADERS and (len(words) == _NUM_ENDS or words[_NUM_ENDS:] in ([key] for key in VALUES)):
        return rest, words[_NUM_ENDS] if len(words) > _NUM_ENDS else "weight"
    if alone and not findings and len(rest) > 1 and len(words) == _NUM_ENDS and first.separator == rest[0].separator:
        findings.append(first.fault("no other line has these names: leave a header out"))
        return rest, "weight"
    return lines, "weight"


def _perhaps_header(lines: list[_Line]) -> str:
    """A sentence for two lines without a name in common, of which the first may be a header; empty where it cannot be one."""
    if len(lines) != 2 or not set(lines[0].fields[:_NUM_ENDS]).isdisjoint(lines[1].fields[:_NUM_ENDS]):  # noqa: PLR2004
        return ""
    if any(re.match(r"[+-]?[0-9.]", field) for field in lines[0].fields):
        return ""
    return f"; line {lines[0].number}, {quoted(lines[0].text)}, may be a header: leave it out then"


def _edges(lines: list[_Line], key: str, findings: list[str]) -> list[Edge]:
    """Edges of lines with two names, or two names and values; findings for the others."""
    edges: list[Edge] = []
    if not lines:
        return edges
    first = next((line for line in lines if len(line.fields) > 1), lines[0])
    for line in lines:
        try:
            values = _values_of(line, key, first, findings, is_first=line is lines[0])
        except ValueError as error:
            findings.append(line.fault(str(error)))
            continue
        edges.append(Edge(f"line {line.number}", line.fields[0], line.fields[1], values))
    return edges


def _values_of(line: _Line, key: str, like: _Line, findings: list[str], *, is_first: bool) -> Mapping[str, Any]:
    """Values behind the two names of a line, separated like another; raises ValueError with a sentence about it."""
    fields, separator = line.fields, like.separator
    if len(fields) > 1 and line.separator != separator:
        ours, theirs = _SEPARATED[line.separator], _SEPARATED[separator]
        raise ValueError(f"separated by {ours}, but line {like.number} by {theirs}; separate all lines in one way")
    if len(fields) < _NUM_ENDS:
        raise ValueError(f"expected two names with {_BETWEEN[separator]} between")
    if len(fields) == _NUM_ENDS:
        return {}
    if any(field.startswith("{") for field in fields[_NUM_ENDS:]):
        try:
            values = ast.literal_eval(fields[_NUM_ENDS])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = None
        if not isinstance(values, dict) or len(fields) > _NUM_ENDS + 1:
            raise ValueError("expected values as {'weight': 0.5}")
        return known(f"line {line.number}", values, findings)
    if len(fields) > _NUM_ENDS + 1:
        decimal = (
            "; write decimals with a point" if separator == "," and all(re.fullmatch("[0-9]+", field) for field in fields[2:4]) else ""
        )
        raise ValueError(f"{len(fields)} columns, expected two names, or two names and a weight{decimal}")
    try:
        return {key: number(fields[_NUM_ENDS])}
    except ValueError as error:
        is_header = is_first and not re.match(r"[+-]?[0-9.]", fields[_NUM_ENDS])
        raise ValueError(f"{key} {fields[_NUM_ENDS]!r}: {error}{'; leave a header out' if is_header else ''}") from error


def _each_twice(edges: list[Edge]) -> bool:
    """Whether each link is there in both directions."""
    counts = Counter((edge.sender, edge.receiver) for edge in edges)
    return len(counts) > _NUM_ENDS and all(count == 1 and counts[b, a] == 1 for (a, b), count in list(counts.items()))


def _merged(edges: list[Edge], findings: list[str]) -> list[Edge]:
    """The edges of a list that says `% sym`: one for two lines that give a link in both directions with the same values."""
    seen: dict[tuple[object, object], Edge] = {}
    kept = []
    for edge in edges:
        back = seen.pop((edge.receiver, edge.sender), None) if edge.sender != edge.receiver else None
        if back is None:
            seen[edge.sender, edge.receiver] = edge
            kept.append(edge)
        elif back.values != edge.values:
            findings.append(
                f"{edge.place}: {edge.sender} - {edge.receiver} has {_said(edge.values)}, but {_said(back.values)} at {back.place};"
                " give both directions the same, or begin the file with '% asym'"
            )
    return kept


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value!r}" for key, value in values.items()) or "no values"
