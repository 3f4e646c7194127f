"""Files that people write: YAML with numbers as people write them, checked against frozen dataclasses with all faults at once."""

from __future__ import annotations

import codecs
import copy
import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

from p2pfl.errors import ConfigError

T = TypeVar("T")

_MAX_SHOWN = 60
_MAX_BYTES = 64 * 1024**2
_MAX_DEPTH = 50
_MOST_EXPLAINED = 50  # findings; to look for what was meant takes time, and nobody reads so many
_MAX_ALIASED = 10_000  # values that aliases may add to a file: nested ones can stand for more than any memory holds
_TYPE_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "dict_type": "a mapping (key: value)",
    "mapping_type": "a mapping (key: value)",
    "dataclass_type": "a mapping (key: value)",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "none_required": "null",
    "invalid_key": "a text as the key",
}
_BOUNDS = {"greater_than_equal": (">=", "ge"), "greater_than": (">", "gt"), "less_than_equal": ("<=", "le"), "less_than": ("<", "lt")}

_KEPT: dict[bytes, dict[str, Any]] = {}
"""Parsed content of files that will be loaded again; see `keep_yaml`."""

_NUMBER = re.compile(
    r"^(?:[-+]?(?:\d[\d_]*)\.[\d_]*(?:[eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.\d+(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

_WHOLE_NUMBER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
"""Whole numbers of YAML 1.1, but for its octal 010 and its 1:30 to the base of 60: a clinic's code and a time of day."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes 1e-3 for a number (YAML 1.1 wants 1.0e-3) and refuses what people do not mean, all of it at once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[tuple[int, int, str]] = []  # line, column
        self._sizes: dict[int, tuple[int, int]] = {}
        self._num_aliased = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.constructor.ConstructorError(None, None, "an alias inside of what it stands for", mark)
            self._num_aliased += self._sizes[id(node)][0]
            if self._num_aliased > _MAX_ALIASED:
                raise yaml.constructor.ConstructorError(None, None, f"aliases stand for more than {_MAX_ALIASED} values", mark)
            return node
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [self._sizes[id(part)] for part in inner] if isinstance(node, yaml.CollectionNode) else []
        size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if depth > _MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, f"nested more than {_MAX_DEPTH} deep", mark)
        self._sizes[id(node)] = (size, depth)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fault(key, f"a {'list' if isinstance(key, yaml.SequenceNode) else 'mapping'} as a key: expected a text")
            elif key.value in seen:
                self._fault(key, f"the key {key.value!r} is given twice")
            else:
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # from !!int x, or digits without end
            given = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}" if isinstance(node, yaml.ScalarNode) else str(error)
            raise yaml.constructor.ConstructorError(None, None, given, node.start_mark) from error

    def _fault(self, node: yaml.Node, sentence: str) -> None:
        self.faults.append((node.start_mark.line + 1, node.start_mark.column + 1, sentence))


_Loader.yaml_implicit_resolvers = {  # pyyaml's own way
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE_NUMBER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts a text in quotes where _Loader, too, would take it for something else: '1e5' is a name here."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parse_yaml(text: str, place: str) -> Any:
    """Parse a YAML text into the value that it stands for.

    Raises:
        ConfigError: it is not YAML; the message names line and column.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if loader.faults:
            raise ConfigError([f"line {line}, column {column}: {what}" for line, column, what in sorted(loader.faults)], place)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context or ""
        if what.startswith("but "):
            what = f"{error.context}, {what}"
        if "'\\t'" in what:
            what += "; indent with spaces"
        raise ConfigError(f"{where}{what}", place) from error
    except RecursionError as error:
        raise ConfigError(f"not readable as YAML: nested more than {_MAX_DEPTH} deep", place) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not readable as YAML: {' '.join(str(error).split())}", place) from error


def load_yaml(path: Path | str, such_as: str = "", most_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Load the mapping that a YAML file holds; a file of more than *most_bytes* is refused before it is parsed.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not YAML or not a mapping with text keys.
    """
    content = _content(path, most_bytes + 1)
    if content in _KEPT:
        return copy.deepcopy(_KEPT[content])
    text = decode(content, str(path))
    if len(content) > most_bytes:
        raise ConfigError(f"cannot be read: more than {most_bytes} bytes", str(path))
    value = parse_yaml(text, str(path))
    if value is None and all(line.partition("#")[0].strip() in ("", "---", "...") for line in text.splitlines()):
        raise ConfigError(f"is empty: expected a mapping (key: value){', such as ' if such_as else ''}{such_as}", str(path))
    if not isinstance(value, dict):
        given = "a text" if isinstance(value, str) else shown(value)  # a text may be a private key, given in the wrong place
        raise ConfigError(f"holds {given}: expected a mapping (key: value)", str(path))
    if strange := strange_keys(value):
        raise ConfigError(strange, str(path))
    return value


def keep_yaml(path: Path | str) -> None:
    """Keep a parsed file, so that loading the same content again is fast, also in a process that is forked later.

    Raises:
        ConfigError: as `load_yaml`.
    """
    value = load_yaml(path)
    _KEPT[Path(path).read_bytes()] = value


def strange_keys(value: Mapping[Any, Any], of: str = "") -> list[str]:
    """Find the keys of a mapping that are not texts, a sentence each."""
    return [f"{of}{': ' if of else ''}the key {shown(key)}: expected a text" for key in value if not isinstance(key, str)]


def text_keys(value: Any) -> Any:
    """Leave out the keys of a mapping that are not texts; anything else stays as it is."""
    return {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, Mapping) else value


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Write a mapping as YAML text, keys in the order given."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def check(kind: type[T], value: Mapping[str, Any], place: str) -> T:
    """Make an instance of a frozen dataclass from a mapping, with its types checked.

    Raises:
        ConfigError: one finding for each fault, each with the key, the value given and what is allowed.
    """
    try:
        return cast("T", _validator(cast("Hashable", kind)).validate_python(dict(value)))
    except ValidationError as error:
        raise ConfigError(findings(kind, error), place) from error


def prepare_check(kind: type[Any]) -> None:
    """Make now what `check` needs for a kind of content, for processes that are forked later."""
    _validator(cast("Hashable", kind))


@cache
def _validator(kind: Any) -> SchemaValidator:
    """Make pydantic's validator stricter: true is no number, 5.0 no whole one, '5' neither, and no number is infinite."""
    return SchemaValidator(_strict(TypeAdapter(kind).core_schema))


def _strict(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(part) for key, part in schema.items()}
    strictness = {"int": {"strict": True}, "bool": {"strict": True}, "float": {"strict": True, "allow_inf_nan": False}}
    kind = schema.get("type")
    return inner | strictness.get(kind, {}) if isinstance(kind, str) else inner


def findings(kind: type[Any], error: ValidationError) -> list[str]:
    """Translate each fault that pydantic found into one sentence for the person who wrote the file."""
    sentences: dict[str, None] = {}
    for fault in error.errors(include_url=False):
        is_key = fault["type"] == "unexpected_keyword_argument"  # and whatever somebody wrote as one, even the name of a type
        parts, last = fault["loc"], len(fault["loc"]) - 1
        location = [part for i, part in enumerate(parts) if (is_key and i == last) or not _is_type_name(part)]
        if is_key and len(sentences) >= _MOST_EXPLAINED:
            sentences[f"{'.'.join(map(str, location))}: unknown key"] = None
        else:
            sentences[_sentence(kind, location, fault)] = None
    return list(sentences)


def unknown_key(key: str, given: object, allowed: list[str]) -> str:
    """Finding for a key that the section does not have."""
    return f"{key} = {shown(given)}: unknown key, {_one_of(key, allowed)}"


def unknown_name(key: str, given: object, allowed: list[str]) -> str:
    """Finding for a name that nothing is registered under."""
    return f"{key} = {shown(given)}: {_one_of(given, allowed)}"


def _sentence(kind: type[Any], location: list[str | int], fault: Any) -> str:
    key = ".".join(str(part) for part in location)
    code, given = fault["type"], fault["input"]
    if code == "unexpected_keyword_argument":
        allowed = [f.name for f in fields(_owner(kind, location[:-1]))]
        return key.removesuffix(str(location[-1])) + unknown_key(str(location[-1]), given, allowed)
    if code == "missing":
        return f"{key}: required, but missing"
    context = fault.get("ctx", {})
    if code in _BOUNDS:
        sign, bound = _BOUNDS[code]
        expected = f"must be {sign} {context[bound]}"
    elif code == "literal_error":
        expected = f"one of {context['expected']}"
    elif code == "value_error":
        expected = str(context.get("error", fault["msg"]))
        return f"{key} = {shown(given)}: {expected}" if key else expected
    else:
        expected = f"expected {_TYPE_WORDS[code]}" if code in _TYPE_WORDS else fault["msg"]
    return f"{key} = {shown(given)}: {expected}"


def _one_of(given: object, allowed: list[str]) -> str:
    if len(allowed) == 1:
        return f"expected {allowed[0]}"
    return f"{nearest(given, allowed)}one of {', '.join(allowed)}"


def nearest(given: object, allowed: list[str]) -> str:
    """Ask whether another name was meant; empty where none is near."""
    near = difflib.get_close_matches(str(given), allowed, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _owner(kind: type[Any], location: list[str | int]) -> type[Any]:
    """The dataclass that the keys at a location belong to."""
    import typing

    for part in location:
        hint: Any = typing.get_type_hints(kind, include_extras=False).get(str(part))
        inner = [arm for arm in (hint, *typing.get_args(hint)) if isinstance(arm, type) and is_dataclass(arm)]
        if not inner:
            break
        kind = cast("type[Any]", inner[0])
    return kind


def _is_type_name(part: str | int) -> bool:
    """Whether pydantic put the name of a union's arm into the location."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in ("float", "int", "str", "bool", "none"))


def shown(value: object) -> str:
    """Write a value as its file has it, cut where it is long."""
    text = _written(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(part)}" for key, part in value.items()) + "}"
    if type(value) in (list, tuple):
        return "[" + ", ".join(map(_written, cast("list[object]", value))) + "]"
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:
        return f"{'-' if value < 0 else ''}a whole number of more than {_MAX_SHOWN} digits"
    return repr(value)


def decode(content: bytes, place: str) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: the bytes are another encoding or hold a NUL; the message names the line.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError("cannot be read: line 1 begins with the byte order mark of UTF-16; save it as UTF-8", place)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start
        line, byte = _line_of(content, start), content[start]
        raise ConfigError(
            f"cannot be read: line {line} holds the byte 0x{byte:02x}, which is not UTF-8; save it as UTF-8", place
        ) from error
    if (at := content.find(b"\0")) >= 0:
        raise ConfigError(f"cannot be read: line {_line_of(content, at)} holds a NUL byte; save it as UTF-8 text", place)
    return text


def _line_of(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Raises:
        ConfigError: the file is missing, a folder, unreadable or not UTF-8.
    """
    return decode(_content(path), str(path))


def _content(path: Path | str, most_bytes: int = -1) -> bytes:
    """Read a file, or so many bytes of it; ConfigError where that fails."""
    try:
        with Path(path).open("rb") as file:
            return file.read(most_bytes)
    except FileNotFoundError as error:
        raise ConfigError("no such file", str(path)) from error
    except IsADirectoryError as error:
        raise ConfigError("cannot be read: it is a folder, expected a file", str(path)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", str(path)) from error
