"""Files that people write: numbers as people write them, and every fault in a sentence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from p2pfl import yaml_files
from p2pfl.errors import ConfigError
from p2pfl.yaml_files import check, dump_yaml, keep_yaml, load_yaml, parse_yaml, unknown_name

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

FORBID = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Motor:
    __pydantic_config__: ClassVar = FORBID

    power_kw: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    kind: Literal["electric", "diesel"] = "electric"


@dataclass(frozen=True, kw_only=True)
class Boat:
    __pydantic_config__: ClassVar = FORBID

    name: str
    length_m: Annotated[float, Field(ge=2, le=30)] = 5.0
    crew: Annotated[int, Field(ge=1, lt=10)] = 2
    motor: Motor | None = None
    spare: Motor = field(default_factory=Motor)
    ports: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    sails: bool = True


def faults_of(value):
    with pytest.raises(ConfigError) as caught:
        check(Boat, value, "boat.yaml")
    assert caught.value.place == "boat.yaml"
    return list(caught.value.findings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2e+3", -2000.0),
        ("1.0e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("1_000.5", 1000.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("10", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        # texts that are no numbers, and dates, which nobody means as such here
        ("e5", "e5"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("2024-01-31", "2024-01-31"),
        # YAML 1.1 has octal numbers and numbers to the base of 60; a clinic's code or a time of day is none
        ("010", "010"),
        ("-007", "-007"),
        ("0", 0),
        ("-0", 0),
        ("+12", 12),
        ("0b11", 3),
        ("1:30", "1:30"),
        ("12:30:00", "12:30:00"),
        ("'1e5'", "1e5"),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: 1e-1}", {"a": 0.1}),
    ],
)
def test_values_are_what_a_person_means(text, expected):
    value = parse_yaml(text, "here")

    assert (value, type(value)) == (expected, type(expected))


def test_not_a_number_is_a_number():
    assert math.isnan(parse_yaml(".nan", "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "line 2, column 1: the key 'a' is given twice"),
        ("a: {10: 1, '10': 2}", "line 1, column 12: the key '10' is given twice"),
        ("a: {b: 1, b: 2}", "line 1, column 11: the key 'b' is given twice"),
        ("a: [1, 2", "line 1, column 9: expected ',' or ']'"),
        ("a: *nowhere", "line 1, column 4: found undefined alias"),
        ("a: !!python/object:os.system x", "line 1, column 4: could not determine a constructor"),
        ("\x00", "not readable as YAML"),
        ("[" * 5000, "not readable as YAML"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_place(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "some.yaml")

    assert caught.value.findings[0].startswith(message)
    assert str(caught.value).startswith("some.yaml: ")


def test_a_file_must_be_a_mapping_with_texts_as_keys(tmp_path):
    def fault(content):
        path = tmp_path / "file.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_yaml(path)
        assert caught.value.place == str(path)
        return list(caught.value.findings)

    assert fault(b"- 1\n") == ["holds [1]: expected a mapping (key: value)"]
    assert fault(b"") == ["is empty: expected a mapping (key: value)"]
    assert fault(b"1: a\n2: b\n") == ["the key 1: expected a text", "the key 2: expected a text"]
    assert fault("a: 1".encode("utf-16")) == ["cannot be read: line 1 begins with the byte order mark of UTF-16; save it as UTF-8"]
    assert fault(b"a: 1\nb: \x002\n") == ["cannot be read: line 2 holds a NUL byte; save it as UTF-8 text"]
    assert fault(b"a: \xff\xfe")[0].startswith("cannot be read: line 1 holds the byte 0xff")
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


def test_aliases_and_merged_keys_are_taken_where_they_are_few():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, x: 3}", "here") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 2},
        "c": {"x": 3, "y": 2},
    }


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"crew": True}, "crew = true: expected a whole number"),
        ({"crew": 3.0}, "crew = 3.0: expected a whole number"),
        ({"crew": "3"}, "crew = '3': expected a whole number"),
        ({"length_m": "7"}, "length_m = '7': expected a number"),
        ({"length_m": False}, "length_m = false: expected a number"),
        ({"length_m": math.inf}, "length_m = inf: expected a finite number"),
        ({"sails": "yes"}, "sails = 'yes': expected true or false"),
        ({"sails": 1}, "sails = 1: expected true or false"),
        ({"motor": {"power_kw": True}}, "motor.power_kw = true: expected a number"),
    ],
)
def test_no_value_is_taken_for_one_of_another_kind(change, finding):
    assert faults_of({"name": "Anna", **change}) == [finding]


TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs")))  # nobody writes control characters; PyYAML loses some of them
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(TEXTS, VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_again(value):
    assert parse_yaml(dump_yaml(value), "here") == value


@pytest.mark.parametrize("text", ["1e5", "1e-3", "2024-01-31", "null", "true", "0x1F", ".inf", "12:30:00", "São Paulo", ""])
def test_a_text_that_looks_like_something_else_stays_a_text(text):
    assert parse_yaml(dump_yaml({"name": text}), "here") == {"name": text}


def test_keys_keep_their_order():
    assert list(parse_yaml(dump_yaml({"z": 1, "a": 2, "m": 3}), "here")) == ["z", "a", "m"]


def test_what_is_right_becomes_the_object():
    boat = check(Boat, {"name": "Anna", "length_m": 7, "motor": {"power_kw": 1e-3}, "ports": ["Kiel", "Lübeck"]}, "boat.yaml")

    assert boat == Boat(name="Anna", length_m=7.0, motor=Motor(power_kw=0.001), ports=("Kiel", "Lübeck"))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"name": None}, "name = null: expected a text"),
        ({"length_m": 1}, "length_m = 1: must be >= 2.0"),
        ({"length_m": 31}, "length_m = 31: must be <= 30.0"),
        ({"length_m": "long"}, "length_m = 'long': expected a number"),
        ({"crew": 10}, "crew = 10: must be < 10"),
        ({"crew": 1.5}, "crew = 1.5: expected a whole number"),
        ({"crew": []}, "crew = []: expected a whole number"),
        ({"sails": "many"}, "sails = 'many': expected true or false"),
        ({"ports": 3}, "ports = 3: expected a list"),
        ({"ports": ["Kiel", 4]}, "ports.1 = 4: expected a text"),
        ({"notes": 3}, "notes = 3: expected a mapping (key: value)"),
        ({"spare": None}, "spare = null: expected a mapping (key: value)"),
        ({"spare": {"power_kw": 0}}, "spare.power_kw = 0: must be > 0.0"),
        ({"spare": {"power_kw": math.inf}}, "spare.power_kw = inf: expected a finite number"),
        ({"motor": {"kind": "steam"}}, "motor.kind = 'steam': one of 'electric' or 'diesel'"),
        ({"motor": {"powr_kw": 3}}, "motor.powr_kw = 3: unknown key, did you mean power_kw? one of power_kw, kind"),
        (
            {"lenght_m": 3},
            "lenght_m = 3: unknown key, did you mean length_m? one of name, length_m, crew, motor, spare, ports, notes, sails",
        ),
        ({"xyz": "v" * 100}, f"xyz = '{'v' * 58}…: unknown key, one of name, length_m, crew, motor, spare, ports, notes, sails"),
    ],
)
def test_a_fault_is_a_sentence_with_key_value_and_what_is_allowed(change, finding):
    assert faults_of({"name": "Anna", **change}) == [finding]


def test_what_is_missing_is_said_to_be_missing():
    assert faults_of({}) == ["name: required, but missing"]


def test_all_faults_come_at_once():
    assert faults_of({"length_m": -1, "crew": 0, "colour": "red", "spare": {"kind": "steam", "x": 1}}) == [
        "name: required, but missing",
        "length_m = -1: must be >= 2.0",
        "crew = 0: must be >= 1",
        "spare.kind = 'steam': one of 'electric' or 'diesel'",
        "spare.x = 1: unknown key, one of power_kw, kind",
        "colour = 'red': unknown key, one of name, length_m, crew, motor, spare, ports, notes, sails",
    ]


def test_an_unknown_name_comes_with_the_nearest_known_one():
    known = ["dpsgd", "choco"]

    assert unknown_name("algorithm.name", "chocko", known) == "algorithm.name = 'chocko': did you mean choco? one of dpsgd, choco"
    assert unknown_name("algorithm.name", 7, known) == "algorithm.name = 7: one of dpsgd, choco"


def test_one_fault_is_one_line_and_several_are_a_list_under_their_file():
    assert str(ConfigError("crew = 0: must be >= 1", "boat.yaml")) == "boat.yaml: crew = 0: must be >= 1"
    assert str(ConfigError(["a", "b"], "boat.yaml")) == "boat.yaml:\n  a\n  b"
    assert str(ConfigError(["a", "b"])) == "a\nb"


def test_what_is_kept_is_not_read_again_until_the_file_changes_and_nobody_can_change_it(tmp_path, monkeypatch):
    path = tmp_path / "study.yaml"
    path.write_text("members: [{name: a}]")
    keep_yaml(path)
    with monkeypatch.context() as patched:
        patched.setattr(yaml_files, "parse_yaml", lambda text, place: {"read": place})
        kept = load_yaml(path)
        kept["members"][0]["name"] = "changed"

        assert load_yaml(path) == {"members": [{"name": "a"}]}
        path.write_text("members: [{name: b}]")

        assert load_yaml(path) == {"read": str(path)}
    assert load_yaml(path) == {"members": [{"name": "b"}]}


def test_what_is_no_yaml_is_not_kept(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("members: [")
    for read in (keep_yaml, load_yaml):
        with pytest.raises(ConfigError, match="line 1, column 11"):
            read(path)


def test_unknown_keys_with_capitals_or_brackets_are_named():
    for key in ("Lr", "a[b]", "int", "", "x.y"):
        with pytest.raises(ConfigError, match=re.escape(f"{key} = 1: unknown key")):
            check(Motor, {key: 1}, "file")


def test_many_unknown_keys_are_refused_without_looking_for_what_each_was_meant_to_be(monkeypatch):
    looked_for = []
    monkeypatch.setattr("difflib.get_close_matches", lambda text, *_, **__: looked_for.append(text) or [])
    with pytest.raises(ConfigError) as refused:
        check(Motor, {f"unknown_{i}": i for i in range(50_000)}, "file")

    assert len(refused.value.findings) == 50_000
    assert str(refused.value).endswith("and 49,990 more")
    assert len(looked_for) <= 100
