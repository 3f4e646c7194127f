"""A number or a date is read as its format says, or not at all."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data.table_format import SIGNS, TableFormat
from p2pfl.data.values import EPOCH, read_date, read_number

POINT = TableFormat(decimal="point")
COMMA = TableFormat(decimal="comma")
GERMAN = TableFormat(decimal="comma", thousands="point")
ENGLISH = TableFormat(decimal="point", thousands="comma")
SWISS = TableFormat(decimal="point", thousands="apostrophe")
FRENCH = TableFormat(decimal="comma", thousands="space")
GROUP_SIGNS = {"comma": ",", "point": ".", "space": "\u00a0", "apostrophe": "\u2019"}


@pytest.mark.parametrize(
    ("text", "form", "value"),
    [
        ("7", TableFormat(), 7.0),
        ("-7", TableFormat(), -7.0),
        ("1e3", TableFormat(), 1000.0),
        ("1.234", POINT, 1.234),
        ("1,234", COMMA, 1.234),
        ("1.234", GERMAN, 1234.0),
        ("1,234", ENGLISH, 1234.0),
        ("1.234.567,5", GERMAN, 1234567.5),
        ("1234567,5", GERMAN, 1234567.5),
        ("1'234.5", SWISS, 1234.5),
        ("1\u2019234.5", SWISS, 1234.5),
        ("1 234,5", FRENCH, 1234.5),
        ("1\u00a0234,5", FRENCH, 1234.5),
        ("1\u202f234,5", FRENCH, 1234.5),
        ("1,2E+03", COMMA, 1200.0),
        ("+0.5", POINT, 0.5),
    ],
)
def test_a_number_is_read_as_said(text, form, value):
    assert read_number(text, form) == value


NOT_SAID = "a point or a comma in a number, and nobody has said what it means: say table.decimal"
ODD = "points or commas at places where a number of this format has none"


@pytest.mark.parametrize(
    ("text", "form", "sentence"),
    [
        ("1,234", TableFormat(), NOT_SAID),
        ("1.234", TableFormat(), NOT_SAID),
        ("0.5", TableFormat(), NOT_SAID),
        ("1,234", POINT, "a comma in a number, where table.decimal is point: say table.thousands if it divides groups"),
        ("1.234", COMMA, "a point in a number, where table.decimal is comma: say table.thousands if it divides groups"),
        ("1.5", GERMAN, ODD),
        ("12.34", GERMAN, ODD),
        ("1.2345", GERMAN, ODD),
        ("1.234E5", GERMAN, "something behind the number: expected the number alone, its unit stands in the contract"),
        ("1,234,56", ENGLISH, ODD),
        ("1.234.567", POINT, ODD),
        ("1 234", POINT, "digits in groups: say table.thousands if that is what divides them"),
        ("1'234", POINT, "digits in groups: say table.thousands if that is what divides them"),
        ("1 234'567", FRENCH, "digits in groups: say table.thousands if that is what divides them"),
        ("<5", POINT, "a limit such as <5 is no number: agree what stands for it, and write that"),
        ("5 mg", POINT, "something behind the number: expected the number alone, its unit stands in the contract"),
        ("5%", POINT, "something behind the number: expected the number alone, its unit stands in the contract"),
        ("1_000", POINT, "something behind the number: expected the number alone, its unit stands in the contract"),
        ("nan", POINT, "no number"),
        ("inf", POINT, "no number"),
        ("1e999", POINT, "too large for a number"),
        ("٣", POINT, "no number"),
        (".5", POINT, "no number"),
        ("5.", POINT, ODD),
        ("", POINT, "no number"),
    ],
)
def test_another_text_is_refused_with_a_sentence(text, form, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_number(text, form)

    assert str(caught.value) == sentence


@settings(max_examples=60, deadline=None)
@given(
    value=st.integers(-(10**12), 10**12),
    decimals=st.integers(0, 3),
    form=st.sampled_from([POINT, COMMA, GERMAN, ENGLISH, SWISS, FRENCH]),
    is_grouped=st.booleans(),
)
def test_what_a_program_writes_in_a_format_is_read_back(value, decimals, form, is_grouped):
    whole, _, part = f"{value / 10**decimals:{',' if is_grouped and form.thousands else ''}.{decimals}f}".partition(".")
    text = whole.replace(",", GROUP_SIGNS[form.thousands] if form.thousands else "") + (SIGNS[form.decimal] + part if part else "")

    assert read_number(text, form) == float(f"{value / 10**decimals:.{decimals}f}")


@settings(max_examples=60, deadline=None)
@given(st.text("0123456789.,' +-eE", max_size=8))
def test_no_point_or_comma_is_read_where_nobody_has_said_what_it_is(text):
    try:
        value = read_number(text, TableFormat())
    except ValueError:
        return
    assert (value, set(text) & set(".,' ")) == (float(text), set())


@pytest.mark.parametrize(
    ("text", "order", "day"),
    [
        ("2026-03-09", None, date(2026, 3, 9)),
        ("2026-03-09", "year-month-day", date(2026, 3, 9)),
        ("2026/3/9", "year-month-day", date(2026, 3, 9)),
        ("09.03.2026", "day-month-year", date(2026, 3, 9)),
        ("9/3/2026", "day-month-year", date(2026, 3, 9)),
        ("3/9/2026", "month-day-year", date(2026, 3, 9)),
        ("29.02.2020", "day-month-year", date(2020, 2, 29)),
        ("1969-12-31", None, date(1969, 12, 31)),
    ],
)
def test_a_date_is_read_in_the_order_that_is_said(text, order, day):
    assert read_date(text, TableFormat(dates=order)) == (day - EPOCH).days


@pytest.mark.parametrize(
    ("text", "order", "sentence"),
    [
        ("09.03.2026", None, "a date that is not written as 2026-03-09, and nobody has said its order: say table.dates"),
        ("03/09/2026", None, "a date that is not written as 2026-03-09, and nobody has said its order: say table.dates"),
        ("2026/3/9", None, "a date that is not written as 2026-03-09, and nobody has said its order: say table.dates"),
        ("13/09/2026", "month-day-year", "no day of the calendar in the order month-day-year"),
        ("09/13/2026", "day-month-year", "no day of the calendar in the order day-month-year"),
        ("2026-03-09", "day-month-year", "no date in the order day-month-year"),
        ("09.03.2026", "year-month-day", "no date in the order year-month-day"),
        ("29.02.2021", "day-month-year", "no day of the calendar in the order day-month-year"),
        ("09.03.26", "day-month-year", "a year of two digits: expected four"),
        ("09.03/2026", "day-month-year", "no date in the order day-month-year"),
        ("2026-03-09 00:00", None, "a date with a time of day: expected the date alone"),
        ("2026-03-09T10:00:00Z", "year-month-day", "a date with a time of day: expected the date alone"),
        ("20260309", None, "no date in the order year-month-day"),
        ("46090", "day-month-year", "no date in the order day-month-year"),
        ("0000-01-01", None, "no day of the calendar in the order year-month-day"),
    ],
)
def test_another_date_is_refused_with_a_sentence(text, order, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_date(text, TableFormat(dates=order))

    assert str(caught.value) == sentence
