"""Values of a table's cells: numbers and dates as a format says, each read whole or refused with a sentence."""

from __future__ import annotations

import math
import re
from datetime import date

from p2pfl.data.table_format import SIGNS, TableFormat

EPOCH = date(1970, 1, 1)

_BLANKS = " \u00a0\u2009\u202f"
"""Space, and the spaces that do not break a line or are narrow, which programs put between groups of digits."""
_GROUPS = {"point": r"\.", "comma": ",", "space": f"[{_BLANKS}]", "apostrophe": "['\u2019]"}
_PLAIN = re.compile(r"[+-]?[0-9]+(?:[eE][+-]?[0-9]+)?")
_ISO = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_DATES = {
    "year-month-day": re.compile(r"(?P<y>[0-9]{4})(?P<sign>[-./])(?P<m>[0-9]{1,2})(?P=sign)(?P<d>[0-9]{1,2})"),
    "day-month-year": re.compile(r"(?P<d>[0-9]{1,2})(?P<sign>[-./])(?P<m>[0-9]{1,2})(?P=sign)(?P<y>[0-9]{4})"),
    "month-day-year": re.compile(r"(?P<m>[0-9]{1,2})(?P<sign>[-./])(?P<d>[0-9]{1,2})(?P=sign)(?P<y>[0-9]{4})"),
}
_SHORT_YEAR = re.compile(r"[0-9]{1,2}([-./])[0-9]{1,2}\1[0-9]{2}")
_WITH_TIME = re.compile(r"[0-9]{1,4}[-./][0-9]{1,2}[-./][0-9]{1,4}[T ].+")


class NumberReader:
    """Reader of numbers in one format."""

    def __init__(self, form: TableFormat) -> None:
        self._is_said = form.decimal is not None
        self._decimal = form.decimal
        self._thousands = form.thousands if form.thousands != "none" else None
        self._pattern = _number_pattern(form.decimal, self._thousands)

    def __call__(self, text: str) -> float:
        """Read a number; ValueError with what was expected, never with the text, which is a patient's."""
        if not self._is_said and _PLAIN.fullmatch(text) is None and re.fullmatch(r"[+-]?[0-9.,]+(?:[eE][+-]?[0-9]+)?", text):
            raise ValueError("a point or a comma in a number, and nobody has said what it means: say table.decimal")
        if self._pattern.fullmatch(text) is None:
            raise ValueError(self._expected(text))
        if self._thousands is not None:
            text = re.sub(_GROUPS[self._thousands], "", text)
        if self._decimal is not None:
            text = text.replace(SIGNS[self._decimal], ".")
        value = float(text)
        if not math.isfinite(value):
            raise ValueError("too large for a number")
        return value

    def _expected(self, text: str) -> str:
        if text.startswith(("<", ">", "≤", "≥")):
            return "a limit such as <5 is no number: agree what stands for it, and write that"
        if re.fullmatch(r"[+-]?[0-9][0-9.,]*", text):
            others = [sign for sign in ("point", "comma") if SIGNS[sign] in text and sign not in (self._decimal, self._thousands)]
            if others:
                return f"a {others[0]} in a number, where table.decimal is {self._decimal}: say table.thousands if it divides groups"
            return "points or commas at places where a number of this format has none"
        if re.fullmatch(rf"[+-]?[0-9]+(?:[{_BLANKS}'\u2019][0-9]+)+(?:[.,][0-9]+)?", text):
            return "digits in groups: say table.thousands if that is what divides them"
        if re.match(r"[+-]?[0-9]", text):
            return "something behind the number: expected the number alone, its unit stands in the contract"
        return "no number"


def read_number(text: str, form: TableFormat) -> float:
    """Read a number as a format writes it; for ValueError see `NumberReader`."""
    return NumberReader(form)(text)


def read_date(text: str, form: TableFormat) -> float:
    """Read a date as days since 1970-01-01; ValueError with what was expected, never with the text, which is a patient's."""
    order = form.dates
    found = _ISO.fullmatch(text) if order is None else _DATES[order].fullmatch(text)
    if found is None:
        if _WITH_TIME.fullmatch(text):
            raise ValueError("a date with a time of day: expected the date alone")
        if _SHORT_YEAR.fullmatch(text):
            raise ValueError("a year of two digits: expected four")
        if order is None and any(pattern.fullmatch(text) for pattern in _DATES.values()):
            raise ValueError("a date that is not written as 2026-03-09, and nobody has said its order: say table.dates")
        raise ValueError(f"no date in the order {order or 'year-month-day'}")
    parts = found.groups() if order is None else (found["y"], found["m"], found["d"])
    try:
        return float((date(*map(int, parts)) - EPOCH).days)
    except ValueError as error:
        raise ValueError(f"no day of the calendar in the order {order or 'year-month-day'}") from error


def _number_pattern(decimal: str | None, thousands: str | None) -> re.Pattern[str]:
    """Pattern of a number; groups, where there are any, are of three digits, and none is broken off."""
    fraction = "" if decimal is None else rf"(?:{re.escape(SIGNS[decimal])}[0-9]+)?"
    pattern = rf"[0-9]+{fraction}(?:[eE][+-]?[0-9]+)?"
    if thousands is not None:  # and no exponent: 1.234E5 is hardly 123,400,000
        pattern = rf"(?:{pattern}|[0-9]{{1,3}}(?P<sign>{_GROUPS[thousands]})[0-9]{{3}}(?:(?P=sign)[0-9]{{3}})*{fraction})"
    return re.compile(rf"[+-]?{pattern}")
