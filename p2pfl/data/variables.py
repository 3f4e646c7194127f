"""Variables of a data contract: type, unit, range, categories, and what becomes of a value that is not as agreed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.data.table_format import TableFormat
from p2pfl.data.values import EPOCH, read_date, read_number
from p2pfl.errors import UNSAFE_OR_BREAK, ConfigError
from p2pfl.yaml_files import check, shown, text_keys

Type = Literal["number", "integer", "category", "date", "id"]

_NUMERIC = ("number", "integer")
_RANGED = (*_NUMERIC, "date")
_MOST_CATEGORIES = 1000
_LARGEST_CODE = 10**18
_LARGEST_WHOLE = 2**53
_ISO_DATE = TableFormat()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Conversion of another unit to the agreed one: value times factor, plus offset."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    factor: float
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Category:
    """One category of a variable, with the texts that stand for it in a table."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    label: str
    codes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """One variable that every institution has in its table."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    type: Type
    description: str = ""
    """For people alone."""
    unit: str | None = None
    """Agreed unit of a number, such as mmol/l; "1" for a count or a ratio."""
    convert: dict[str, Conversion] = field(default_factory=dict)
    """Other units in which a site may have it."""
    range: tuple[float, float] | None = None
    """Least and largest value, in the agreed unit; a date in days since 1970-01-01."""
    out_of_range: Literal["refuse", "missing"] = "refuse"
    """Clipping is not offered: it would write down a value that nobody has measured."""
    categories: tuple[Category, ...] = ()
    """In the order of the levels; the first one is the reference."""
    unseen: Literal["refuse", "missing", "category"] = "refuse"
    """Treatment of a text that is no category's code."""
    unseen_category: str | None = None
    """Label that such a text takes."""
    missing: tuple[str, ...] = ()
    """Texts that stand for a missing value of this variable, beside those of the contract."""
    absent: Literal["refuse", "indicator", "value"] = "refuse"
    """Treatment of a site that does not have the variable: an agreed value for all its rows, with a column that says so, or without."""
    absent_value: Annotated[float | str, Field(union_mode="left_to_right")] | None = None
    """Agreed value: a number in the agreed unit, a date in days since 1970-01-01, or a label."""

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers with a unit."""
        return self.type in _NUMERIC

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the categories, in the order of the levels."""
        return tuple(each.label for each in self.categories)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], place: str) -> Variable:
        """Check one variable as the contract's file holds it; ConfigError with every fault that its values have one by one."""
        content, findings = dict(raw), list[str]()
        for key, convert in (
            ("unit", plain_text),
            ("description", plain_text),
            ("missing", _texts),
            ("categories", _categories),
            ("convert", _conversions),
        ):
            if key in content:
                content[key] = convert(content[key], key, findings)
        if content.get("type") == "date":
            for key in ("range", "absent_value"):
                content[key] = _days(content.get(key), key, findings)
        try:
            variable = check(cls, content, place)
        except ConfigError as error:
            said = {finding.partition(" = ")[0].split(".")[0] for finding in findings}
            findings += [each for each in error.findings if re.split(r"[.: ]", each)[0] not in said]
        if findings:
            raise ConfigError(list(dict.fromkeys(findings)), place)
        return variable

    def faults(self, missing: tuple[str, ...] = ()) -> Iterator[str]:
        """Find values that are right one by one and wrong together.

        Args:
            missing: texts that stand for a missing value in the whole contract.
        """
        yield from self._faults_of_keys()
        if self.is_numeric:
            yield from self._faults_of_numbers((*missing, *self.missing))
        if self.type == "date":
            yield from (fault for code in (*missing, *self.missing) for fault in self._faults_of_missing_code(code))
        if self.type in _RANGED and self.range is not None and self.range[0] >= self.range[1]:
            yield f"range = {shown(self._said_range())}: the least value comes first, and is smaller: one value alone would select patients"
        if self.type == "category":
            yield from self._faults_of_categories((*missing, *self.missing))
        yield from self._faults_of_absence()

    def as_dict(self) -> dict[str, Any]:
        """Every key that the type has, defaults written out: one meaning, one form."""
        content: dict[str, Any] = {"type": self.type, "description": self.description, "missing": list(self.missing)}
        content["absent"] = self.absent
        if self.absent != "refuse":
            is_day = self.type == "date" and isinstance(self.absent_value, float)
            content["absent_value"] = _day_text(self.absent_value) if is_day else self.absent_value
        if self.type in _RANGED:
            content |= {"range": self._said_range(), "out_of_range": self.out_of_range}
        if self.is_numeric:
            content["unit"] = self.unit
            content["convert"] = {unit: {"factor": each.factor, "offset": each.offset} for unit, each in self.convert.items()}
        if self.type == "category":
            content["categories"] = [{"label": each.label, "codes": list(each.codes)} for each in self.categories]
            content["unseen"] = self.unseen
            if self.unseen == "category":
                content["unseen_category"] = self.unseen_category
        return content

    def _said_range(self) -> list[Any] | None:
        if self.range is None:
            return None
        return [_day_text(each) for each in self.range] if self.type == "date" else list(self.range)

    def _faults_of_keys(self) -> Iterator[str]:
        """Find keys that the type does not have, and those that it lacks."""
        given = {
            "unit": (self.unit is not None, _NUMERIC),
            "convert": (bool(self.convert), _NUMERIC),
            "range": (self.range is not None, _RANGED),
            "out_of_range": (self.out_of_range != "refuse", _RANGED),
            "categories": (bool(self.categories), ("category",)),
            "unseen": (self.unseen != "refuse", ("category",)),
            "unseen_category": (self.unseen_category is not None, ("category",)),
            "absent": (self.absent != "refuse", ("number", "integer", "category", "date")),
        }
        for key, (is_there, types) in given.items():
            if is_there and self.type not in types:
                yield f"{key}: a variable of type {self.type} has none; leave it out, or is it of type {' or '.join(types)}?"
            if not is_there and self.type in types and key in ("unit", "range", "categories"):
                such = {"unit": '"1" for a count', "range": "[least, largest]", "categories": "{label: [codes]}"}[key]
                yield f"{key}: required for a variable of type {self.type}, such as {such}"

    def _faults_of_numbers(self, missing: tuple[str, ...]) -> Iterator[str]:
        if self.type == "integer" and self.range is not None and not all(each.is_integer() for each in self.range):
            yield f"range = {shown(list(self.range))}: expected whole numbers for type integer"
        if self.type == "integer" and self.range is not None and max(map(abs, self.range)) > _LARGEST_WHOLE:
            yield f"range = {shown(list(self.range))}: whole numbers beyond 2^53 lose digits; is it of type id?"
        for unit, each in self.convert.items():
            if unit == self.unit:
                yield f"convert.{unit}: it is the agreed unit itself; leave it out"
            if each.factor == 0:
                yield f"convert.{unit}.factor = 0: every value would become the offset"
            if self.type == "integer" and not (each.factor.is_integer() and each.offset.is_integer()):
                yield f"convert.{unit}: whole numbers would not stay whole; expected a whole factor and offset, or type number"
        for code in missing:
            yield from self._faults_of_missing_code(code)

    def _faults_of_missing_code(self, code: str) -> Iterator[str]:
        """Find a code for missing that is a value that patients may have, in the agreed unit or in another one."""
        value = _code_date(code) if self.type == "date" else code_number(code)
        if value is None or self.range is None:
            return
        for unit, each in ({self.unit: Conversion(factor=1.0)} | self.convert).items():
            if self.range[0] <= value * each.factor + each.offset <= self.range[1]:
                where = "" if unit is None else f" in {unit}"
                yield f"missing: {code!r} is a value within the range{where}, and true values would be lost; expected another code"

    def _faults_of_categories(self, missing: tuple[str, ...]) -> Iterator[str]:
        if len(self.categories) > _MOST_CATEGORIES:
            yield f"categories: {len(self.categories)} of them; {_MOST_CATEGORIES} are the most"
            return
        labels = self.labels
        codes = [code for each in self.categories for code in each.codes]
        for label in dict.fromkeys(labels):
            if labels.count(label) > 1:
                yield f"categories: the label {label!r} is given {labels.count(label)} times; expected once"
        for code in dict.fromkeys(codes):
            owners = [each.label for each in self.categories if code in each.codes]
            if codes.count(code) > 1:
                yield f"categories: the code {code!r} is given more than once ({', '.join(owners)}); expected once"
            if code in missing:
                yield f"categories.{owners[0]}: the code {code!r} stands for missing as well; expected one of both"
        if self.unseen == "category" and self.unseen_category not in labels:
            yield f"unseen_category = {shown(self.unseen_category)}: expected one of {', '.join(labels)}"
        if self.unseen != "category" and self.unseen_category is not None:
            yield f"unseen_category = {shown(self.unseen_category)}: it counts only with unseen: category"

    def _faults_of_absence(self) -> Iterator[str]:
        value = self.absent_value
        if self.absent == "refuse":
            if value is not None:
                yield f"absent_value = {shown(value)}: it counts only with absent: value or indicator"
        elif value is None:
            yield f"absent_value: required, as absent is {self.absent}: the value that all rows of such a site take"
        elif self.type == "category":
            if value not in self.labels:
                yield f"absent_value = {shown(value)}: expected one of {', '.join(self.labels)}"
        elif not isinstance(value, float):
            yield f"absent_value = {shown(value)}: expected a number"
        elif self.range is not None and not self.range[0] <= value <= self.range[1]:
            yield f"absent_value = {shown(value)}: outside of the range"
        elif self.type == "integer" and not value.is_integer():
            yield f"absent_value = {shown(value)}: expected a whole number"


def code_number(code: str) -> float | None:
    """Value of a code for missing that is a number, written with a point; None for another text."""
    try:
        return read_number(code, TableFormat(decimal="point"))
    except ValueError:
        return None


def _code_date(code: str) -> float | None:
    try:
        return read_date(code, _ISO_DATE)
    except ValueError:
        return None


def text_of_number(value: Any) -> Any:
    """Write a whole number as the text that it stands for, up to 18 digits; anything else stays as it is."""
    return str(value) if type(value) is int and abs(value) < _LARGEST_CODE else value


def plain_text(value: Any, key: str, findings: list[str]) -> Any:
    """Take a text or a whole number as a text; anything else YAML may have made of a text is a finding."""
    value = text_of_number(value)
    if not isinstance(value, str):
        findings.append(f"{key} = {shown(value)}: expected a text: write it in quotes")
    elif UNSAFE_OR_BREAK.search(value):
        findings.append(f"{key} = {shown(value)}: a text with a character that cannot be seen; expected one line of plain text")
    elif value != value.strip():
        findings.append(f"{key} = {shown(value)}: spaces around it are not read from a table either; leave them out")
    return value


def _texts(value: Any, key: str, findings: list[str]) -> Any:
    """Take a list of texts; an empty one among them says what holds anyway."""
    if not isinstance(value, list):
        findings.append(f"{key} = {shown(value)}: expected a list")
        return value
    texts = [plain_text(each, f"{key}.{position}", findings) for position, each in enumerate(value)]
    return [each for each in texts if each != ""]


def texts_of_missing(value: Any, findings: list[str]) -> Any:
    """Check the contract's own list of texts that stand for missing; the empty one stands for it anyway."""
    return _texts(value, "missing", findings)


def _categories(value: Any, key: str, findings: list[str]) -> Any:
    """Categories from a list of labels that are codes themselves, or from labels with their codes."""
    if isinstance(value, list):
        if all(isinstance(each, dict) and set(each) == {"label", "codes"} for each in value) and value:
            value = [(each["label"], each["codes"]) for each in value]  # as the canonical form has it, which keeps the order
        else:
            value = [(each, None) for each in value]
    elif isinstance(value, dict):
        value = list(value.items())
    else:
        findings.append(f"{key} = {shown(value)}: expected labels with their codes, such as {{female: [F, 2], male: [M, 1]}}")
        return value
    found = []
    for position, (given, codes) in enumerate(value):
        label = plain_text(given, f"{key}.{position}", findings)
        if label == "":
            findings.append(f"{key}.{position}: an empty label stands for missing; expected a text")
        read = [label] if codes is None else _texts(codes, f"{key}.{label}", findings)
        if read == []:
            findings.append(
                f"{key}.{label} = {shown(codes)}: expected at least one code that is not empty, or nothing for the label itself"
            )
        found.append({"label": label, "codes": read})
    return found


def _conversions(value: Any, key: str, findings: list[str]) -> Any:
    """Units as texts, also where YAML read a number."""
    if not isinstance(value, dict):
        return value
    for unit in value:
        plain_text(unit, key, findings)
    return text_keys({text_of_number(unit): each for unit, each in value.items()})


def _days(value: Any, key: str, findings: list[str]) -> Any:
    """Days since 1970-01-01 of one date or a list of dates."""
    if isinstance(value, list):
        return [_days(each, f"{key}.{position}", findings) for position, each in enumerate(value)]
    if value is None:
        return None
    try:
        return read_date(value, _ISO_DATE)
    except (ValueError, TypeError):
        findings.append(f"{key} = {shown(value)}: expected a date such as 2026-03-09")
        return value


def _day_text(days: Any) -> str:
    return date.isoformat(EPOCH + timedelta(days=int(days)))
