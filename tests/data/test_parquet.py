"""A site's table from a Parquet file: each value becomes its text exactly, or its column is refused."""

# ruff: noqa: E501  # a finding is one sentence, and reads best on one line

import datetime as dt
import os
from decimal import Decimal

import pytest
from contracts import contract

from p2pfl.data.check import accepted_table, check_table
from p2pfl.data.table_format import SiteTable
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "patient": ["007", " 8", "9"],
    "age": [60, 71, None],
    "glucose": [5.5, 7.0, None],
    "sex": pa.array(["F", "M", "2"]).dictionary_encode(),
    "admitted": [dt.date(2020, 2, 29), dt.date(2021, 3, 9), dt.date(2022, 12, 1)],
    "died": pa.array([0, 1, 0], pa.int8()),
    "note": ["a", "b", "c"],
}


@pytest.fixture
def read(tmp_path):
    """Write columns to a file, and read them as the site's table."""

    def table(changes=None, agreed=None, **said):
        pq.write_table(pa.table({**COLUMNS, **(changes or {})}), tmp_path / "table.parquet")
        site = SiteTable.from_mapping({"parquet": "table.parquet", "units": {"glucose": "mmol/l"}, **said}, "table")
        return read_site_table(site, agreed or contract(), tmp_path), site

    return table


def test_the_columns_are_those_of_the_contract(read, tmp_path):
    raw, site = read()

    assert raw.columns == {
        "patient": ("007", "8", "9"),
        "age": ("60", "71", ""),
        "glucose": ("5.5", "7.0", ""),
        "sex": ("F", "M", "2"),
        "admitted": ("2020-02-29", "2021-03-09", "2022-12-01"),
        "died": ("0", "1", "0"),
    }
    assert (raw.place, raw.lines, raw.has_lines) == (str(tmp_path / "table.parquet"), (1, 2, 3), False)
    table = accepted_table(raw, contract(), site)
    assert (table.patients, table.columns["admitted"].tolist()) == (("007", "8", "9"), [18321.0, 18695.0, 19327.0])


def test_typed_columns_are_exact_whatever_the_format_of_texts(read):
    agreed = contract(table={"decimal": "comma", "thousands": "point", "dates": "day-month-year"})
    large = {"glucose": [Decimal("5.125"), Decimal("7.000"), None], "age": ["60", "71", "1.000"]}

    raw, site = read(large, agreed)
    report, _ = check_table(raw, agreed, site)

    assert raw.columns["glucose"] == ("5.125", "7.000", "")
    assert [str(each) for each in report.violations] == ["age: outside of 18 to 110 year: 1 row, refused"]  # a text: one thousand
    assert accepted_table(read({**large, "age": ["60", "71", "NA"]}, agreed)[0], agreed, site).columns["glucose"].tolist()[:2] == [
        5.125,
        7.0,
    ]


REFUSED = {
    "a floating id": (
        {"patient": [7.0, 8.0, 9.0]},
        "patient: the column has floating-point numbers, and the variable is of type id: cast it in the query, or where the file is made, to a text or a whole number",
    ),
    "a floating category": ({"sex": [1.0, 2.0, None]}, "sex: the column has floating-point numbers, and the variable is of type category"),
    "a decimal id": ({"patient": [Decimal("7.0"), Decimal("8.0"), None]}, "patient: the column has decimal numbers with decimals"),
    "a boolean outcome": ({"died": [True, False, True]}, "died: the column has true or false, and the variable is of type integer"),
    "a date with a time": (
        {"admitted": pa.array([0, 1, 2], pa.timestamp("us"))},
        "admitted: the column has dates with a time of day, and the variable is of type date: cast it",
    ),
    "nanoseconds": ({"admitted": pa.array([1, 2, 3], pa.timestamp("ns"))}, "admitted: the column has dates with a time of day"),
    "a number of days": ({"admitted": [18321, 18695, 19327]}, "admitted: the column has whole numbers, and the variable is of type date"),
    "a date as a number": ({"age": [dt.date(2020, 2, 29)] * 3}, "age: the column has dates, and the variable is of type integer"),
    "bytes": ({"patient": [b"a", b"b", b"c"]}, "patient: the column has values of type binary"),
    "lists": ({"age": [[60], [71], [80]]}, "age: the column has values of type list<"),
    "halves": ({"glucose": pa.array([5.5, 7, 9], pa.float64()).cast(pa.float16())}, "glucose: the column has values of type halffloat"),
    "no rows": ({name: pa.array(column)[:0] for name, column in COLUMNS.items()}, "has no rows"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_value_of_another_type_is_never_coerced(read, changes, sentence):
    with pytest.raises(DataError) as error:
        read(changes)

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1


def test_a_number_that_is_none_is_found_by_the_check(read):
    raw, site = read({"glucose": [5.5, float("nan"), float("inf")], "age": [60.0, 60.5, None]})

    report, _ = check_table(raw, contract(), site)

    assert [str(each) for each in report.violations] == ["age: no whole number: 1 row, refused", "glucose: no number: 2 rows, refused"]


def test_a_header_that_stands_twice_is_read_by_position(tmp_path):
    table = pa.table(
        [pa.array(COLUMNS[name]) if isinstance(COLUMNS[name], list) else COLUMNS[name] for name in [*COLUMNS, "age"]],
        names=[*COLUMNS, "age"],
    )
    pq.write_table(table, tmp_path / "table.parquet")
    said = {"parquet": "table.parquet", "units": {"glucose": "mmol/l"}}

    with pytest.raises(DataError, match=r"the header has 'age' 2 times: say which one by its position, such as table\.columns\.age: 2"):
        read_site_table(SiteTable.from_mapping(said, "table"), contract(), tmp_path)
    site = SiteTable.from_mapping({**said, "columns": {"age": 8}}, "table")
    assert read_site_table(site, contract(), tmp_path).columns["age"] == ("60", "71", "")


def test_a_file_that_is_none_is_a_sentence(tmp_path):
    site = SiteTable.from_mapping({"parquet": "table.parquet", "units": {"glucose": "mmol/l"}}, "table")
    path = tmp_path / "table.parquet"

    with pytest.raises(DataError, match=r"table\.parquet: no such file"):
        read_site_table(site, contract(), tmp_path)
    path.write_text("patient,age\n7,Mustermann\n")
    with pytest.raises(DataError, match="is no Parquet file that can be read") as error:
        read_site_table(site, contract(), tmp_path)
    assert "Mustermann" not in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is no plain file"):
        read_site_table(site, contract(), tmp_path)
    with pytest.raises(DataError, match="is no plain file"):
        read_site_table(SiteTable.from_mapping({"file": "table.parquet", "units": {"glucose": "mmol/l"}}, "table"), contract(), tmp_path)


def test_another_kind_of_file_says_under_which_key_it_belongs(read, tmp_path):
    read()

    with pytest.raises(DataError, match=r"is no CSV file: say it as table\.parquet"):
        read_site_table(SiteTable.from_mapping({"file": "table.parquet", "units": {"glucose": "mmol/l"}}, "table"), contract(), tmp_path)
    (tmp_path / "stays.db").write_bytes(b"SQLite format 3\0" + bytes(100))
    with pytest.raises(DataError, match=r"is no CSV file: say it as table\.sql"):
        read_site_table(SiteTable.from_mapping({"file": "stays.db", "units": {"glucose": "mmol/l"}}, "table"), contract(), tmp_path)
