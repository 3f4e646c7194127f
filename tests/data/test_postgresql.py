"""A site's table by one SELECT from PostgreSQL: a real server, an account that may only read, and queries that try to do more."""

# ruff: noqa: E501  # a finding is one sentence, and reads best on one line

import logging

import pytest
from contracts import HEADER, contract
from omop import ROWS as OMOP_ROWS
from omop import TABLES, check_rows, sections_of_the_page

from p2pfl.data.check import accepted_table
from p2pfl.data.contract import Contract
from p2pfl.data.table_format import SiteTable
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import DataError
from postgresql import SUPERUSER_PASSWORD, PostgreSQL

pytest.importorskip("sqlalchemy")
pytest.importorskip("psycopg")

PASSWORD = "hunter2 is no good 'one"
SELECT = f"SELECT {HEADER} FROM stay"
MADE = (
    "CREATE TABLE stay (patient bigint, age integer, glucose numeric(6, 2), sex char(4), admitted date, died smallint, at timestamp, name text)",
    "CREATE TABLE secret (word text)",
    "INSERT INTO secret VALUES ('Rumpelstilzchen')",
    f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD.replace(chr(39), 2 * chr(39))}'",
    "GRANT SELECT ON stay TO reader",
    "CREATE SEQUENCE counter",
    "GRANT ALL ON SEQUENCE counter TO reader",
    "GRANT CREATE ON SCHEMA public TO reader",
)
ROWS = [
    (7, 60, 5.50, "F", "2020-02-29", 0, "2020-02-29 10:00", "Mustermann"),
    (8, 71, 7, "M", "2021-03-09", 1, "2020-02-29 10:00", "Mustermann"),
    (9, None, None, "2", "2022-12-01", 0, "2020-02-29 10:00", "Mustermann"),
]


@pytest.fixture(scope="module")
def server():
    found = PostgreSQL()
    try:
        found.start()
        found.run(*MADE, rows=[("INSERT INTO stay VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", ROWS)])
        yield found
    finally:
        found.close()


@pytest.fixture
def read(server, tmp_path, monkeypatch):
    """Read by a query, as one account."""
    monkeypatch.setenv("STUDY_PASSWORD", PASSWORD)

    def table(query=SELECT, user="reader", **said):
        url = f"postgresql://{user}@127.0.0.1:{server.port}/postgres"
        section = {"url": url, "query": query, **({"password_variable": "STUDY_PASSWORD"} if "password_file" not in said else {}), **said}
        site = SiteTable.from_mapping({"sql": section, "units": {"glucose": "mmol/l"}}, "table")
        return read_site_table(site, contract(), tmp_path), site

    return table


def test_the_rows_of_a_query_are_those_of_the_contract(read, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    raw, site = read(f"{SELECT} WHERE name LIKE '%mann' AND at::time <> '12:30' ORDER BY patient; -- all")

    assert raw.columns["glucose"] == ("5.50", "7.00", "")
    assert raw.columns["sex"] == ("F", "M", "2")  # without the blanks of char(4)
    table = accepted_table(raw, contract(), site)
    assert (table.patients, table.columns["admitted"].tolist()) == (("7", "8", "9"), [18321.0, 18695.0, 19327.0])
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    password.chmod(0o600)
    assert read(password_file="password")[0].columns == raw.columns
    assert PASSWORD not in caplog.text
    assert "Mustermann" not in caplog.text


def test_the_query_for_an_omop_cdm_on_the_page_gives_the_table_of_its_contract(server, tmp_path, monkeypatch):
    inserted = [(f"INSERT INTO {name} VALUES ({', '.join(['%s'] * len(rows[0]))})", rows) for name, rows in OMOP_ROWS.items()]
    server.run(*TABLES, *[f"GRANT SELECT ON {name} TO reader" for name in OMOP_ROWS], rows=inserted)
    (tmp_path / "omop-password").write_text(PASSWORD)
    (tmp_path / "omop-password").chmod(0o600)
    written, _, queried = sections_of_the_page()
    agreed, said = Contract.from_mapping(written, "page"), queried["table"]
    sql = {**said["sql"], "url": f"postgresql://reader@127.0.0.1:{server.port}/postgres"}
    own = SiteTable.from_mapping({**said, "sql": sql}, "page")

    check_rows(accepted_table(read_site_table(own, agreed, tmp_path), agreed, own))


REFUSED = {
    "two statements": (f"{SELECT}; DROP TABLE stay", "cannot insert multiple commands into a prepared statement"),
    "a deletion": ("WITH gone AS (DELETE FROM stay RETURNING *) SELECT * FROM gone", "must not contain data-modifying statements in WITH"),
    "a new table": ("SELECT * INTO copy FROM stay", "expected one SELECT on tables that this account may read"),
    "a lock": (f"{SELECT} FOR UPDATE", "the query would write, and it may only read"),
    "a sequence": ("SELECT nextval('counter') AS patient", "the query would write, and it may only read"),
    "writes allowed": ("SELECT set_config('transaction_read_only', 'off', true) AS patient", "25001"),
    "a file of the server": ("SELECT pg_read_file('/etc/passwd') AS patient", "permission denied for function pg_read_file"),
    "another table": ("SELECT word AS patient FROM secret", "permission denied for table secret"),
    "a table that is not there": ("SELECT patient FROM stays", 'relation "stays" does not exist'),
    "no SELECT at all": ("WITH x AS (SELECT 1) INSERT INTO stay (patient) VALUES (1)", "table.sql.query: syntax error at or near"),
    "a date that Python has not": ("SELECT 'infinity'::date AS patient", "a value cannot be read, or the connection is lost"),
    "a value that quotes a patient": ("SELECT name::integer AS patient FROM stay", "a value does not suit the query"),
}


@pytest.mark.parametrize(("query", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_query_that_does_more_than_read_is_refused(read, query, sentence):
    with pytest.raises(DataError) as error:
        read(query)

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1
    assert not [secret for secret in ("Rumpelstilzchen", "Mustermann", "root:", PASSWORD) if secret in str(error.value)]
    assert error.value.__cause__ is None
    assert read()[0].columns["patient"] == ("7", "8", "9")


def test_what_a_function_writes_is_rolled_back(read, server):
    with pytest.raises(DataError, match="the header lacks age"):  # versions before 16 let it write in a transaction that may only read
        read("SELECT lo_from_bytea(0, 'x') AS patient")

    assert server.one("SELECT count(*) FROM pg_largeobject_metadata") == 0


def test_an_account_that_may_read_files_of_the_server_is_refused(read, monkeypatch):
    monkeypatch.setenv("STUDY_PASSWORD", SUPERUSER_PASSWORD)

    with pytest.raises(DataError, match="this account may read files of the server or run programs there: use one that may only read"):
        read("SELECT pg_read_file('/etc/passwd') AS patient", user="postgres")


def test_a_query_that_takes_too_long_is_stopped_by_the_server(read):
    with pytest.raises(DataError, match=r"took more than 0\.3 s: make it shorter, or say a longer table\.sql\.timeout_s"):
        read("SELECT pg_sleep(60) AS patient", timeout_s=0.3)


def test_no_connection_is_a_sentence_without_the_password(read, server, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r'no connection: .*password authentication failed for user "nobody"') as error:
        read(user="nobody")
    assert PASSWORD not in str(error.value)
    monkeypatch.delenv("STUDY_PASSWORD")
    with pytest.raises(DataError, match="the environment has no variable of that name"):
        read()
    with pytest.raises(DataError, match=r"no such file, which table\.sql\.password_file names"):
        read(password_file="password")
    (tmp_path / "password").write_text("x")
    (tmp_path / "password").chmod(0o644)
    with pytest.raises(Exception, match="others may use it; run: chmod 600"):
        read(password_file="password")


@pytest.mark.parametrize(
    ("name", "expression", "sentence"),
    [
        ("patient", "patient::float8", "patient: the column has floating-point numbers, and the variable is of type id"),
        ("patient", "patient::numeric(8, 1)", "patient: the column has decimal numbers with decimals"),
        ("admitted", "at", "admitted: the column has dates with a time of day, and the variable is of type date: cast it"),
        ("died", "died = 1", "died: the column has true or false, and the variable is of type integer"),
        ("age", "ARRAY[age]", "age: the column has values of type list"),
    ],
)
def test_a_value_of_another_type_is_never_coerced(read, name, expression, sentence):
    columns = ", ".join(f"{expression} AS {each}" if each == name else each for each in HEADER.split(","))

    with pytest.raises(DataError) as error:
        read(f"SELECT {columns} FROM stay")

    assert sentence in str(error.value)
    assert len(error.value.findings) == 1
