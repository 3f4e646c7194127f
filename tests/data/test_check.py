"""A table is held against its contract: every violation is counted under its column and rule, and nothing is coerced in silence."""

# ruff: noqa: E501  # a finding is one sentence, and reads best on one line

import json
import re

import numpy as np
import pytest
from contracts import HEADER, ROWS, contract, site, table_of
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data.check import accepted_table, check_table, example_rows
from p2pfl.data.raw_table import RawTable
from p2pfl.data.table_format import TableFormat
from p2pfl.data.variables import Variable
from p2pfl.errors import DataError
from p2pfl.statistics.design import design
from p2pfl.statistics.formula import parse_formula

FILL = {"patient": "q", "age": "50", "glucose": "5", "sex": "F", "admitted": "2020-01-01", "died": "0"}
NAMES = tuple(FILL)


def written(*rows, separator=",", header=NAMES):
    """A table with one row for each mapping, the other cells as FILL has them."""
    lines = [separator.join(header)]
    for number, row in enumerate(rows):
        cells = {**FILL, "patient": f"p{number}", **row}
        lines.append(separator.join(cells[name] for name in header if name in cells))
    return "\n".join(lines) + "\n"


def checked(tmp_path, text, agreed=None, own=None):
    agreed, own = agreed or contract(), own or site()
    return check_table(table_of(tmp_path, text, agreed, own), agreed, own)


def findings_of(tmp_path, text, agreed, own):
    """Every finding, those of reading or else those of the check."""
    try:
        report, table = checked(tmp_path, text, agreed, own)
    except DataError as error:
        return list(error.findings)
    assert (table is None) == any(each.effect == "refused" for each in report.violations)
    return [str(each) for each in report.violations]


def test_a_table_becomes_typed_columns(tmp_path):
    report, table = checked(tmp_path, "\n".join([HEADER, *ROWS]))

    assert (report.num_rows, report.num_patients, report.violations, report.is_accepted) == (3, 3, (), True)
    assert report.num_missing == {"patient": 0, "age": 1, "glucose": 1, "sex": 0, "admitted": 0, "died": 0}
    np.testing.assert_array_equal(table.columns["age"], [60.0, 71.0, np.nan])
    np.testing.assert_array_equal(table.columns["glucose"], [5.5, 7.0, np.nan])
    np.testing.assert_array_equal(table.columns["admitted"], [18321.0, 18695.0, 19327.0])
    assert (table.columns["sex"], table.patients) == (("female", "male", "female"), ("p1", "p2", "p3"))
    assert list(table.columns) == [*NAMES, "glucose.absent"]
    assert all(values.dtype == np.float64 for values in table.columns.values() if isinstance(values, np.ndarray))


def test_the_columns_are_ready_for_a_formula(tmp_path):
    table = accepted_table(table_of(tmp_path, "\n".join([HEADER, *ROWS])), contract(), site())

    found = design(parse_formula("died ~ age + sex + admitted"), table.columns, table.levels)

    assert found.names == ("(Intercept)", "age", "sexmale", "admitted")
    np.testing.assert_array_equal(found.columns_MP[:, 2], [0.0, 1.0, 0.0])


def test_a_unit_is_converted_where_the_site_says_it(tmp_path):
    report, table = checked(tmp_path, written({"glucose": "100"}, {"glucose": ""}), own=site(units={"glucose": "mg/dl"}))

    np.testing.assert_array_equal(table.columns["glucose"], [100 * 0.0555, np.nan])
    assert report.converted == {"glucose": "mg/dl"}


def test_a_temperature_is_converted_with_its_offset(tmp_path):
    fahrenheit = {"type": "number", "unit": "C", "range": [30, 45], "convert": {"F": {"factor": 5 / 9, "offset": -160 / 9}}}
    agreed = contract(variables__temperature=fahrenheit)
    own = site(units={"glucose": "mmol/l", "temperature": "F"})

    _, table = checked(tmp_path, written({"temperature": "98.6"}, header=(*NAMES, "temperature")), agreed, own)

    assert table.columns["temperature"] == pytest.approx([37.0], abs=1e-12)


ABSENT = [name for name in NAMES if name != "glucose"]


@pytest.mark.parametrize(("rule", "names"), [("indicator", [*NAMES, "glucose.absent"]), ("value", list(NAMES))])
def test_a_site_without_a_variable_takes_the_agreed_value(tmp_path, rule, names):
    agreed = contract(variables__glucose__absent=rule)

    report, table = checked(tmp_path, written({}, {}, header=ABSENT), agreed, site(units={}, absent=["glucose"]))

    assert (list(table.columns), report.absent) == (names, ("glucose",))
    np.testing.assert_array_equal(table.columns["glucose"], [6.0, 6.0])
    assert rule == "value" or table.columns["glucose.absent"].tolist() == [1.0, 1.0]


def test_an_absent_category_takes_the_agreed_label(tmp_path):
    agreed = contract(variables__sex__absent="value", variables__sex__absent_value="male")
    header = [name for name in NAMES if name != "sex"]

    _, table = checked(tmp_path, written({}, {}, header=header), agreed, site(absent=["sex"]))

    assert table.columns["sex"] == ("male", "male")


OUT = {"variables__age__out_of_range": "missing"}
GERMAN = {"separator": "semicolon", "decimal": "comma", "thousands": "point", "dates": "day-month-year"}

MALFORMED = {
    # encodings
    "latin-1 not said": (written({"patient": "ü"}).encode("latin-1"), {}, {}, ["line 2 holds the byte 0xfc, which is not utf-8; say table.encoding, such as latin-1 or windows-1252"]),
    "utf-8 called latin-1": (written({"patient": "ü"}), {}, {"encoding": "latin-1"}, ["all its bytes are UTF-8, and table.encoding is latin-1: say utf-8"]),
    "windows-1252 called latin-1": (written({"patient": "€"}).encode("cp1252"), {}, {"encoding": "latin-1"}, ["line 2 holds the byte 0x80, which is no letter of latin-1: is it windows-1252 or utf-8?"]),
    "utf-16 not said": (written({}).encode("utf-16"), {}, {}, ["begins with the byte order mark of utf-16, and table.encoding is not said: say utf-16"]),
    # separators and structure
    "semicolons not said": (written({}, separator=";"), {}, {}, ["the header is one field, which holds semicolon: say table.separator: semicolon, if it separates the columns"]),
    "tabs not said": (written({}, separator="\t"), {}, {}, ["the header is one field, which holds tab: say table.separator: tab, if it separates the columns"]),
    "decimal comma in a table with commas": (written({"glucose": "5,5"}), {}, {}, ["line 2: not 6 fields, as the header has: a separator within a field, such as a decimal comma, needs quotes around the field"]),
    "a field too few": (written({}) + "p9,50\n", {}, {}, ["line 3: not 6 fields, as the header has: a field is lost, or a line end within a field has no quotes around the field"]),
    "a line end without quotes": (written({"sex": "F\n"}), {}, {}, ["lines 2, 3: not 6 fields, as the header has: a field is lost, or a line end within a field has no quotes around the field"]),
    "a quote that never ends": (written({"patient": '"p'}), {}, {}, ["line 2: cannot be read as CSV (unexpected end of data): a quoted field ends with a quote, and a quote within it is written twice"]),
    "a header twice": (written({}, header=(*NAMES, "age")), {}, {}, ["the header has 'age' 2 times: say which one by its position, such as table.columns.age: 2"]),
    "a column that is not there": (written({}, header=NAMES[:-1]), {}, {}, ["the header lacks died: say in table.columns what the column is called, or in table.absent that there is none"]),
    "no header": ("p1,50,5,F,2020-01-01,0\np2,50,5,F,2020-01-01,0\n", {}, {}, ["the header lacks patient, age, glucose, sex, admitted, died: say in table.columns what the column is called, or in table.absent that there is none"]),
    # numbers
    "thousands or decimals": (written({"glucose": '"1,234"'}), {}, {}, ["glucose: a comma in a number, where table.decimal is point: say table.thousands if it divides groups: 1 row, refused"]),
    "a decimal sign that nobody said": (written({"glucose": "5.5"}, {"glucose": "6"}), {"table": {}}, {}, ["glucose: a point or a comma in a number, and nobody has said what it means: say table.decimal: 1 row, refused"]),
    "a point in German numbers": (written({"glucose": "5.5", "admitted": "01.02.2020"}, separator=";"), {}, GERMAN, ["glucose: points or commas at places where a number of this format has none: 1 row, refused"]),
    "a comma in German thousands": (written({"glucose": "1.0000", "admitted": "01.02.2020"}, separator=";"), {}, GERMAN, ["glucose: points or commas at places where a number of this format has none: 1 row, refused"]),
    "a limit of detection": (written({"glucose": "<2"}), {}, {}, ["glucose: a limit such as <5 is no number: agree what stands for it, and write that: 1 row, refused"]),
    "a unit in the cell": (written({"glucose": "5 mmol/l"}), {}, {}, ["glucose: something behind the number: expected the number alone, its unit stands in the contract: 1 row, refused"]),
    "a text for a number": (written({"glucose": "high"}, {"glucose": "low"}), {}, {}, ["glucose: no number: 2 rows, refused"]),
    "nan for a number": (written({"glucose": "nan"}), {}, {}, ["glucose: no number: 1 row, refused"]),
    "infinity": (written({"glucose": "1e999"}), {}, {}, ["glucose: too large for a number: 1 row, refused"]),
    "half a year": (written({"age": "50.5"}), {}, {}, ["age: no whole number: 1 row, refused"]),
    # ranges and units
    "out of range": (written({"age": "17"}, {"age": "111"}, {}, {}), {}, {}, ["age: outside of 18 to 110 year: 2 rows, refused"]),
    "out of range, for missing": (written({"age": "17"}, {}, {}), OUT, {}, ["age: outside of 18 to 110 year: 1 row, taken for missing"]),
    "another unit, not said": (written({"glucose": "90"}, {"glucose": "110"}, {"glucose": "40"}), {}, {}, ["glucose: outside of 1 to 60 mmol/l; is it in mmol/l at this site?: 2 rows, refused"]),
    "the agreed unit, called another": (written({"glucose": "5"}, {"glucose": "6"}), {}, {"units": {"glucose": "mg/dl"}}, ["glucose: outside of 1 to 60 mmol/l; is it in mg/dl at this site?: 2 rows, refused"]),
    "an unknown unit": (written({}), {}, {"units": {"glucose": "g/l"}}, ["units.glucose = 'g/l': the contract has no conversion for it; expected one of mmol/l, mg/dl"]),
    "no unit where there are two": (written({}), {}, {"units": {}}, ["units.glucose: required, but missing: sites have it in different units; expected one of mmol/l, mg/dl"]),
    # categories
    "an unseen category": (written({"sex": "W"}, {"sex": "X"}), {}, {}, ["sex: a text that is no category's code: 2 rows, refused"]),
    "another case": (written({"sex": "f"}), {}, {}, ["sex: a text that is no category's code: 1 row, refused"]),
    "a code as a decimal": (written({"sex": "1.0"}), {}, {}, ["sex: a text that is no category's code: 1 row, refused"]),
    "a label that is no code": (written({"sex": "female"}), {}, {}, ["sex: a text that is no category's code: 1 row, refused"]),
    "unseen, for missing": (written({"sex": "X"}, {}), {"variables__sex__unseen": "missing"}, {}, ["sex: a text that is no category's code: 1 row, taken for missing"]),
    "unseen, for a category": (written({"sex": "X"}), {"variables__sex__unseen": "category", "variables__sex__unseen_category": "male"}, {}, ["sex: a text that is no category's code: 1 row, taken for a category"]),
    # missing
    "another code for missing": (written({"age": "k.A."}), {}, {}, ["age: no number: 1 row, refused"]),
    "another case of missing": (written({"age": "na"}), {}, {}, ["age: no number: 1 row, refused"]),
    "a number for missing that nobody said": (written({"age": "999"}, {}, {}), {}, {}, ["age: outside of 18 to 110 year: 1 row, refused"]),
    "nothing but missing": (written({"age": "NA"}, {"age": ""}), {}, {}, ["age: no row has a value: the contract refuses a site without it: 2 rows, refused"]),
    "an empty column": (written({"glucose": ""}), {}, {}, ["glucose: no row has a value: take the column away and say table.absent: [glucose]: 1 row, refused"]),
    "absent and there": (written({}), {}, {"units": {}, "absent": ["glucose"]}, ["table.absent has glucose, and the header has it as well: expected one of both"]),
    "absent where it may not": (written({}, header=NAMES[:-1]), {}, {"absent": ["died"]}, ["absent: died: the contract refuses a site without it"]),
    # dates
    "a date in no said order": (written({"admitted": "03.04.2020"}), {}, {}, ["admitted: a date that is not written as 2026-03-09, and nobody has said its order: say table.dates: 1 row, refused"]),
    "an American date called European": (written({"admitted": "04/13/2020"}, {"admitted": "04/03/2020"}), {}, {"dates": "day-month-year"}, ["admitted: no day of the calendar in the order day-month-year: 1 row, refused"]),
    "an ISO date called European": (written({}), {}, {"dates": "day-month-year"}, ["admitted: no date in the order day-month-year: 1 row, refused"]),
    "a year of two digits": (written({"admitted": "03.04.20"}), {}, {"dates": "day-month-year"}, ["admitted: a year of two digits: expected four: 1 row, refused"]),
    "a time of day": (written({"admitted": "2020-04-03 12:30"}), {}, {}, ["admitted: a date with a time of day: expected the date alone: 1 row, refused"]),
    "29 February": (written({"admitted": "2021-02-29"}), {}, {}, ["admitted: no day of the calendar in the order year-month-day: 1 row, refused"]),
    "a day's number of a spreadsheet": (written({"admitted": "43831"}), {}, {}, ["admitted: no date in the order year-month-day: 1 row, refused"]),
    "a date before the study": (written({"admitted": "1900-01-01"}, {}), {}, {}, ["admitted: outside of 2015-01-01 to 2026-12-31: 1 row, refused"]),
    # patients
    "no patient": (written({"patient": ""}, {"patient": "NA"}), {}, {}, ["patient: no patient id, which every row needs: 2 rows, refused"]),
    "a patient twice": (written({"patient": "p"}, {"patient": "p "}, {"patient": "P"}), {}, {}, ["patient: more than one row of a patient, where the contract has rows: one-per-patient: 1 row, refused"]),
    "a line end in an id": (written({"patient": '"p\n1"'}), {}, {}, ["patient: an id with a line end or a character that cannot be seen: 1 row, refused"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_table_has_the_finding_expected(tmp_path, name):
    text, changes, said, findings = MALFORMED[name]

    assert findings_of(tmp_path, text, contract(**changes), site(**said)) == findings


def test_there_are_forty_malformed_tables():
    assert len(MALFORMED) >= 40


def test_every_violation_is_found_at_once(tmp_path):
    text = written({"age": "x", "glucose": "99", "sex": "?", "admitted": "soon"}, {"age": "5", "died": "2"}, {"patient": "p0"})

    with pytest.raises(DataError) as caught:
        accepted_table(table_of(tmp_path, text), contract(), site())

    assert [finding.split(":")[0] for finding in caught.value.findings] == ["age", "age", "glucose", "sex", "admitted", "died", "patient"]


def test_rules_that_do_not_refuse_give_the_agreed_values(tmp_path):
    agreed = contract(variables__age__out_of_range="missing", variables__sex__unseen="missing", rows="several-per-patient")

    report, table = checked(tmp_path, written({"age": "5", "sex": "?", "patient": "a"}, {"patient": "a"}), agreed)

    np.testing.assert_array_equal(table.columns["age"], [np.nan, 50.0])
    assert (table.columns["sex"], report.num_missing["age"], report.num_patients) == (("", "female"), 1, 1)


@pytest.mark.parametrize(
    ("name", "text", "rule", "sentence"),
    [
        (
            "age",
            "720",
            {"variables__age__out_of_range": "missing"},
            "age: outside of 18 to 110 year; is it in year at this site?: 119 rows, refused",
        ),
        (
            "glucose",
            "110",
            {"variables__glucose__out_of_range": "missing"},
            "glucose: outside of 1 to 60 mmol/l; is it in mmol/l at this site?: 119 rows, refused",
        ),
        ("sex", "W", {"variables__sex__unseen": "missing"}, "sex: a text that is no category's code: 119 rows, refused"),
    ],
)
def test_a_rule_for_single_values_takes_no_column_away(name, text, rule, sentence, tmp_path):
    rows = [{name: text}] * 119 + [{}]

    report, table = checked(tmp_path, written(*rows), contract(**rule))
    half, taken = checked(tmp_path, written(*rows[60:], *[{}] * 60), contract(**rule))

    assert [str(each) for each in report.violations] == [sentence]
    assert table is None
    assert report.violations[0].remedy.startswith("most values would be missing: ")
    assert ("take the column away" in report.violations[0].remedy) == (name == "glucose")
    assert (taken is not None, half.violations[0].effect) == (True, "taken for missing")


@pytest.mark.parametrize("text", ["-9", "-9.0", "NA", "", "  "])
def test_a_code_for_missing_is_known_in_each_spelling(tmp_path, text):
    report, table = checked(tmp_path, written({"age": text}, {}))

    np.testing.assert_array_equal(table.columns["age"], [np.nan, 50.0])
    assert report.violations == ()


def test_a_report_shows_no_value_and_the_examples_do(tmp_path):
    text = written({"age": "171", "patient": "Meier", "sex": "diverse"}, {"glucose": "secret"}, {"patient": "Meier"}, {})
    raw = table_of(tmp_path, text)

    report, _ = check_table(raw, contract(), site())
    shown = json.dumps(report.as_dict()) + "".join(map(str, report.violations))

    assert [word for word in ("171", "Meier", "diverse", "secret", "p1") if word in shown] == []
    assert [(each.line, each.column, each.text) for each in example_rows(raw, contract(), site())] == [
        (2, "age", "171"), (3, "glucose", "secret"), (2, "sex", "diverse"), (4, "patient", "Meier"),
    ]  # fmt: skip
    assert len(list(example_rows(table_of(tmp_path, written(*[{"age": "1"}] * 9)), contract(), site(), most=2))) == 2


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.text("0123456789.,-e FMNAab<%", max_size=6).map(str.strip), min_size=1, max_size=5), name=st.sampled_from(NAMES[1:])
)
def test_a_cell_is_read_is_missing_or_is_counted(cells, name):
    agreed = contract(variables__age__range=[0, 100000])
    columns = {each: tuple(f"p{i}" for i in range(len(cells))) if each == "patient" else (FILL[each],) * len(cells) for each in NAMES}
    raw = RawTable(place="x", columns={**columns, name: tuple(cells)}, lines=tuple(range(len(cells))), form=TableFormat(decimal="point"))

    report, table = check_table(raw, agreed, site())

    refused = sum(each.count for each in report.violations if each.column == name and "no row" not in each.rule)
    assert refused == sum(not _is_right(agreed.variables[name], cell) for cell in cells)
    if table is not None and name != "sex":
        np.testing.assert_array_equal(
            table.columns[name], [np.nan if cell in ("", "NA") or float(cell) == -9 else float(cell) for cell in cells]
        )


def _is_right(variable: Variable, cell: str) -> bool:
    """Say by a rule of this test whether a cell is right."""
    if cell in ("", "NA", "-9") or variable.type in ("category", "date"):
        return cell in ("", "NA", "-9") or (variable.type == "category" and cell in ("F", "2", "M", "1"))
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", cell) is None:
        return False
    value = float(cell)
    is_whole = variable.type == "number" or value.is_integer()
    return value == -9 or (is_whole and variable.range[0] <= value <= variable.range[1])
