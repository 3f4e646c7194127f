"""A site's table by one SELECT from a file of SQLite: read as the contract has it, and nothing but read."""

# ruff: noqa: E501  # a finding is one sentence, and reads best on one line

import sqlite3
import sys

import pytest
from contracts import HEADER, contract
from omop import ROWS, TABLES, check_rows, sections_of_the_page

from p2pfl.data import sql_reading
from p2pfl.data.check import accepted_table, check_table
from p2pfl.data.contract import Contract
from p2pfl.data.sql_source import SqlSource
from p2pfl.data.table_format import SiteTable
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import ConfigError, DataError, MissingExtraError

pytest.importorskip("sqlalchemy")

UNITS = {"units": {"glucose": "mmol/l"}}
QUERY = f"SELECT {HEADER} FROM stay WHERE note LIKE '%' ORDER BY patient;  -- all of them"
SELECT = f"SELECT {HEADER} FROM stay"


@pytest.fixture
def folder(tmp_path):
    """A folder with a database of stays, and another table that is not for the study."""
    database = sqlite3.connect(tmp_path / "stays.db")
    with database:
        database.execute("CREATE TABLE stay (patient TEXT, age INTEGER, glucose REAL, sex TEXT, admitted TEXT, died INTEGER, note TEXT)")
        rows = [
            ("p1", 60, 5.5, "F", "2020-02-29", 0, "50%"),
            ("p2", 71, 7.0, "M", "2021-03-09", 1, ""),
            ("p3", None, None, "2", "2022-12-01", 0, ""),
        ]
        database.executemany("INSERT INTO stay VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        database.execute("CREATE TABLE secret (word TEXT)")
        database.execute("INSERT INTO secret VALUES ('Rumpelstilzchen')")
    database.close()
    return tmp_path


def site(query=QUERY, **said):
    return SiteTable.from_mapping({"sql": {"url": "sqlite:///stays.db", "query": query, **said.pop("sql", {})}, **UNITS, **said}, "table")


def test_the_rows_of_a_query_are_those_of_the_contract(folder):
    raw = read_site_table(site(), contract(), folder)

    assert raw.columns["glucose"] == ("5.5", "7.0", "")
    assert (raw.lines, raw.has_lines, raw.place) == ((1, 2, 3), False, str(folder / "stays.db"))
    table = accepted_table(raw, contract(), site())
    assert (table.patients, table.columns["sex"]) == (("p1", "p2", "p3"), ("female", "male", "female"))
    assert table.columns["glucose"].tolist()[:2] == [5.5, 7.0]


def test_the_query_for_an_omop_cdm_on_the_page_gives_the_table_of_its_contract(tmp_path):
    database = sqlite3.connect(tmp_path / "cdm.db")
    with database:
        for statement in TABLES:
            database.execute(statement)
        for name, rows in ROWS.items():
            database.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    database.close()
    written, _, queried = sections_of_the_page()
    agreed, said = Contract.from_mapping(written, "page"), queried["table"]
    own = SiteTable.from_mapping({**said, "sql": {"url": "sqlite:///cdm.db", "query": said["sql"]["query"]}}, "page")

    check_rows(accepted_table(read_site_table(own, agreed, tmp_path), agreed, own))


def test_numbers_of_the_database_are_not_read_in_the_format_of_texts(folder):
    german = site(decimal="comma", thousands="point", dates="year-month-day")
    agreed = contract(table={"decimal": "comma", "thousands": "point"})

    table = accepted_table(read_site_table(german, agreed, folder), agreed, german)

    assert table.columns["glucose"].tolist()[:2] == [5.5, 7.0]  # and not 55 and 70


WRITES = {
    "two statements": (f"{SELECT}; DELETE FROM stay", "holds more than one statement: expected one SELECT"),
    "two selects": (f"{SELECT}; {SELECT}", "holds more than one statement"),
    "a table of another file": ("SELECT * FROM other.stay", "no such table: other.stay"),
    "loads code": ("SELECT load_extension('evil.so') AS patient FROM stay", "does more than read tables"),
    "a table that is not there": ("SELECT patient FROM stays", "table.sql.query: no such table: stays"),
    "a column that is not there": ("SELECT patient, agge FROM stay", "table.sql.query: no such column: agge"),
    "with a deletion": ("WITH x AS (SELECT 1) DELETE FROM stay", "does more than read tables"),
    "with an insertion": ("WITH x AS (SELECT 1) INSERT INTO stay (patient) SELECT 'x'", "does more than read tables"),
    "with an update": ("WITH x AS (SELECT 1) UPDATE stay SET age = 1", "does more than read tables"),
}


@pytest.mark.parametrize(("query", "sentence"), WRITES.values(), ids=WRITES)
def test_a_query_that_does_more_than_read_is_refused(folder, query, sentence):
    before = (folder / "stays.db").read_bytes()

    with pytest.raises(DataError) as error:
        read_site_table(site(query), contract(), folder)

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1
    assert "Rumpelstilzchen" not in str(error.value)
    assert (folder / "stays.db").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["stays.db"]


NO_SELECT = {
    "attach": "ATTACH DATABASE 'other.db' AS other",
    "pragma": "PRAGMA writable_schema = 1",
    "delete": "DELETE FROM stay",
    "drop": "-- SELECT\nDROP TABLE stay",
    "hidden in a comment": "/* SELECT */ VACUUM INTO 'copy.db'",
    "copy": "COPY stay TO PROGRAM 'sh'",
    "call": "CALL run()",
    "empty": "",
    "a path": "query.sql",
    "explain": "EXPLAIN SELECT 1",
    "values": "VALUES (1)",
    "selecting": "SELECTED",
}


@pytest.mark.parametrize("query", NO_SELECT.values(), ids=NO_SELECT)
def test_what_is_no_select_is_refused_before_anything_is_opened(query):
    with pytest.raises(ConfigError, match=r"sql\.query: expected one SELECT, which may begin with WITH; nothing else is run") as error:
        site(query)
    assert len(error.value.findings) == 1


@pytest.mark.parametrize("query", ["(SELECT 1)", "-- of 2026\n/* all */ with x as (select 1) select * from x", "select\n1"])
def test_a_select_may_be_written_in_any_way(query):
    assert site(query).sql.query == query


def test_a_query_that_takes_too_long_is_stopped(folder):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS patient FROM n"

    with pytest.raises(DataError, match=r"took more than 0\.2 s: make it shorter, or say a longer table\.sql\.timeout_s"):
        read_site_table(site(endless, sql={"timeout_s": 0.2}), contract(), folder)


@pytest.mark.parametrize(
    ("value", "expression", "sentence"),
    [
        ("CAST(x'4d75737465726d616e6eff' AS TEXT)", "note", "the query failed (a text that is not UTF-8)"),
        ("'Mustermann'", "json_extract('{}', note)", "the query failed (SQLITE_ERROR)"),
    ],
)
def test_an_error_while_rows_are_read_shows_no_value(folder, value, expression, sentence):
    database = sqlite3.connect(folder / "stays.db")
    with database:
        database.execute(f"UPDATE stay SET note = {value}")
    database.close()

    with pytest.raises(DataError) as error:
        read_site_table(site(f"SELECT {expression} AS patient FROM stay"), contract(), folder)

    assert sentence in str(error.value)
    assert "Mustermann" not in str(error.value)
    assert error.value.__cause__ is None


def test_the_file_is_opened_for_reading_alone(folder, monkeypatch):
    monkeypatch.setattr(sql_reading, "_restrict", lambda *_: None)

    with pytest.raises(DataError, match=r"the query failed \(SQLITE_READONLY\)"):
        read_site_table(site("WITH x AS (SELECT 1) DELETE FROM stay RETURNING *"), contract(), folder)


COLUMNS = {
    "a floating id": (
        "patient",
        "CAST(rowid AS REAL)",
        "patient: the column has floating-point numbers, and the variable is of type id: cast it",
    ),
    "a floating category": ("sex", "1.0", "sex: the column has floating-point numbers, and the variable is of type category"),
    "a whole date": ("admitted", "18321", "admitted: the column has whole numbers, and the variable is of type date"),
    "bytes": ("patient", "x'00'", "patient: the column has values of type bytes"),
    "texts and numbers": (
        "age",
        "CASE rowid WHEN 1 THEN '60' ELSE 61 END",
        "age: the column has texts and whole numbers, which need not be written alike",
    ),
}


@pytest.mark.parametrize(("name", "expression", "sentence"), COLUMNS.values(), ids=COLUMNS)
def test_a_value_of_another_type_is_never_coerced(folder, name, expression, sentence):
    columns = ", ".join(f"{expression} AS {each}" if each == name else each for each in HEADER.split(","))

    with pytest.raises(DataError) as error:
        read_site_table(site(f"SELECT {columns} FROM stay"), contract(), folder)

    assert [finding for finding in error.value.findings if sentence in finding] == list(error.value.findings)


def test_a_date_with_a_time_is_refused_by_the_check(folder):
    columns = HEADER.replace("admitted", "admitted || ' 00:00:00' AS admitted")

    report, table = check_table(read_site_table(site(f"SELECT {columns} FROM stay"), contract(), folder), contract(), site())

    assert table is None
    assert [str(each) for each in report.violations] == ["admitted: a date with a time of day: expected the date alone: 3 rows, refused"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (f"{SELECT} WHERE 0", "has no rows"),
        ("SELECT patient FROM stay", "the header lacks age, glucose, sex, admitted, died"),
        (f"SELECT {HEADER}, age FROM stay", "the header has 'age' 2 times: say which one by its position"),
    ],
)
def test_a_result_that_is_no_table_of_the_contract_is_refused(folder, query, sentence):
    with pytest.raises(DataError, match=sentence):
        read_site_table(site(query), contract(), folder)


URLS = {
    "sqlite://": "expected sqlite:///FILE",
    "sqlite:///": "without settings behind it",
    "sqlite:///:memory:": "without settings behind it",
    "sqlite:///stays.db?mode=rwc": "without settings behind it",
    "mysql://reader@db/stays": "expected sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE",
    "postgresql://reader@db": "expected sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE",
    "postgresql://reader@db:x/stays": "cannot be read",
    "postgresql://reader:hunter2@db/stays": "a password stands in it, and whoever sees the file has it: say password_file or password_variable",
    "postgresql://reader@db/stays?options=-c%20default_transaction_read_only%3Doff": "the setting options: expected host, sslmode, sslrootcert",
    "postgresql://reader@db/stays?password=hunter2": "the setting password: expected host, sslmode, sslrootcert",
}


@pytest.mark.parametrize(("url", "sentence"), URLS.items(), ids=URLS)
def test_a_faulty_url_is_one_sentence_that_does_not_show_it(url, sentence):
    with pytest.raises(ConfigError) as error:
        site(sql={"url": url})

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        (
            {"url": "sqlite:///x", "query": "SELECT 1", "password": "hunter2"},
            "sql.password: unknown key, and a password does not stand in this file",
        ),
        ({"url": "sqlite:///x", "query": "SELECT 1", "pwd": "hunter2"}, "sql.pwd: unknown key, and a password does not stand"),
        ({"url": "sqlite:///x", "query": "SELECT 1", "querry": "hunter2"}, "sql.querry: unknown key, did you mean query?"),
        ("postgresql://reader:hunter2@db/stays", "sql: expected a mapping with url and query"),
        ({"url": ["postgresql://reader:hunter2@db/stays"], "query": "SELECT 1"}, "sql.url: expected a text"),
        (
            {"url": "postgresql://r@db/x", "query": "SELECT 1", "password_variable": "hunter2!"},
            "expected the name of an environment variable",
        ),
        ({"url": "sqlite:///x", "query": "SELECT 1", "password_file": "hunter2"}, "a file of SQLite has no password"),
        ({"url": "sqlite:///x"}, "sql.query: required, but missing"),
        ({"url": "sqlite:///x", "query": "SELECT 1", "timeout_s": 0}, "sql.timeout_s = 0: must be > 0"),
    ],
)
def test_a_faulty_section_is_one_sentence_without_a_password(sql, sentence):
    with pytest.raises(ConfigError) as error:
        SiteTable.from_mapping({"sql": sql}, "table")

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in repr(SqlSource(url="postgresql://a:hunter2@b/c", query="SELECT 1"))


def test_a_database_that_is_not_there_is_not_made(folder):
    with pytest.raises(DataError, match=r"gone\.db: no such file"):
        read_site_table(site(sql={"url": "sqlite:///gone.db"}), contract(), folder)
    assert not (folder / "gone.db").exists()
    (folder / "text.db").write_text("patient,age\n" * 100)
    with pytest.raises(DataError, match=r"file is not a database|the query failed \(SQLITE_NOTADB\)"):
        read_site_table(site(sql={"url": "sqlite:///text.db"}), contract(), folder)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"units": {}}, "file: required, or one of parquet, sql"),
        ({"file": "a.csv", "parquet": "a.parquet"}, "file and parquet: expected one of them"),
        ({"parquet": "a.parquet", "encoding": "latin-1"}, "encoding: only a CSV file has one; leave it out"),
        ({"sql": {"url": "sqlite:///x", "query": "SELECT 1"}, "separator": "tab"}, "separator: only a CSV file has one"),
    ],
)
def test_a_table_is_of_one_kind(section, sentence):
    with pytest.raises(ConfigError) as error:
        SiteTable.from_mapping(section, "table")
    assert error.value.findings == tuple(each for each in error.value.findings if sentence in each)


@pytest.mark.parametrize(
    ("extra", "section", "missing"),
    [
        ("sql", {"sql": {"url": "sqlite:///stays.db", "query": SELECT}}, "sqlalchemy"),
        ("sql", {"sql": {"url": "postgresql://a@127.0.0.1/b", "query": SELECT}}, "psycopg"),
        ("parquet", {"parquet": "a.parquet"}, "pyarrow"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(folder, monkeypatch, extra, section, missing):
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(MissingExtraError, match=rf"table\.{extra} .*needs .*: pip install 'p2pfl-mesh\[{extra}\]'"):
        read_site_table(SiteTable.from_mapping({**section, **UNITS}, "table"), contract(), folder)
