"""The files that people write: YAML read with numbers as people write them, checked against frozen dataclasses with all faults at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from p2pfl.errors import ConfigError

T = TypeVar("T")

_MAX_SHOWN = 60
_TYPE_WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "dict_type": "a mapping (key: value)",
    "mapping_type": "a mapping (key: value)",
    "dataclass_type": "a mapping (key: value)",
    "list_type": "a list",
    "tuple_type": "a list",
    "missing": "required, but missing",
    "finite_number": "a finite number",
}

_NUMBER = re.compile(
    r"^(?:[-+]?(?:\d[\d_]*)\.[\d_]*(?:[eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.\d+(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes 1e-3 for a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {  # pyyaml's own way
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    _NUMBER,
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts a text in quotes where _Loader, too, would take it for something else: '1e5' is a name here."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parse_yaml(text: str, place: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ConfigError: it is not YAML; the message names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # derives from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem or error.context}", place) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not readable as YAML: {error}", place) from error


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML or not a mapping with text keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file", str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", str(path)) from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"holds {_shown(value)}: expected a mapping (key: value)", str(path))
    strange = [key for key in value if not isinstance(key, str)]
    if strange:
        raise ConfigError([f"the key {key!r}: expected a text" for key in strange], str(path))
    return value


def dump_yaml(value: Mapping[str, Any]) -> str:
    """A mapping as YAML text, keys in the order given."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def check(kind: type[T], value: Mapping[str, Any], place: str) -> T:
    """An instance of a frozen dataclass from a mapping.

    Raises:
        ConfigError: one finding for each fault, each with the key, the value given and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(value))
    except ValidationError as error:
        raise ConfigError(findings(kind, error), place) from error


def findings(kind: type[Any], error: ValidationError) -> list[str]:
    """Each fault that pydantic found as one sentence for the person who wrote the file."""
    sentences: list[str] = []
    for fault in error.errors():
        location = [part for part in fault["loc"] if isinstance(part, (str, int)) and not _is_type_name(part)]
        sentence = _sentence(kind, location, fault)
        if sentence not in sentences:
            sentences.append(sentence)
    return sentences


def unknown_name(key: str, given: object, allowed: list[str]) -> str:
    """A finding for a name that nothing is registered under."""
    return f"{key} = {_shown(given)}: {_one_of(given, allowed)}"


def _sentence(kind: type[Any], location: list[str | int], fault: Any) -> str:
    key = ".".join(str(part) for part in location)
    code, given = fault["type"], fault["input"]
    if code == "unexpected_keyword_argument":
        allowed = [f.name for f in fields(_owner(kind, location[:-1]))]
        return f"{key} = {_shown(given)}: unknown key, {_one_of(location[-1], allowed)}"
    if code == "missing":
        return f"{key}: required, but missing"
    context = fault.get("ctx", {})
    if code in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        sign = {"greater_than_equal": (">=", "ge"), "greater_than": (">", "gt"), "less_than_equal": ("<=", "le"), "less_than": ("<", "lt")}[
            code
        ]
        expected = f"must be {sign[0]} {context[sign[1]]}"
    elif code == "literal_error":
        expected = f"one of {context['expected']}"
    elif code == "value_error":
        expected = str(context.get("error", fault["msg"]))
        return f"{key} = {_shown(given)}: {expected}" if key else expected
    else:
        expected = f"expected {_TYPE_WORDS[code]}" if code in _TYPE_WORDS else fault["msg"]
    return f"{key} = {_shown(given)}: {expected}"


def _one_of(given: object, allowed: list[str]) -> str:
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}one of {', '.join(allowed)}"


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


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
