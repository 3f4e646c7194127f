"""Columns of one SELECT, read by SQLAlchemy over a connection that cannot write, and written as texts.

The database itself holds the query to reading. SQLite opens the file read-only and asks at each step of the query whether it is allowed.
PostgreSQL runs it in a read-only transaction, as the query of a cursor, which can be one SELECT and nothing else.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from p2pfl.data.contract import Contract
from p2pfl.data.header import column_positions
from p2pfl.data.plain_files import check_plain_file
from p2pfl.data.raw_table import RawTable
from p2pfl.data.site_section import beside
from p2pfl.data.sql_source import SqlSource
from p2pfl.data.table_format import SiteTable
from p2pfl.data.typed_columns import typed_table
from p2pfl.errors import DataError, MissingExtraError
from p2pfl.governance.identity import read_private

_CONNECT_S = 10
_ROWS_AT_ONCE = 10_000
_STEPS_AT_ONCE = 20_000
_READS = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE))
_REACHES_OUT = ("load_extension", "readfile", "writefile", "fts3_tokenizer")
_MAY_READ_FILES = "SELECT " + " OR ".join(
    f"pg_has_role(current_user, 'pg_{role}', 'member')" for role in ("read_server_files", "write_server_files", "execute_server_program")
)
_SYNTAX, _NOT_AVAILABLE, _CANCELLED = "42", "0A", "57014"
_SAYS = {
    "25006": "the query would write, and it may only read: expected one SELECT",
    "22": "a value does not suit the query, such as a text that is cast to a number",
    "53": "the database has no room or no connection left",
    "57": "the database has ended the connection",
    "08": "the connection to the database is lost",
}
"""SQLSTATE or its class to a sentence: the server's own one may quote a patient's value."""


def read_sql(source: SqlSource, contract: Contract, site: SiteTable, folder: Path) -> RawTable:
    """Read a site's table by its query; rows are numbered in the order in which they come.

    Args:
        source: the section `sql:` of the site's table.
        contract: whose columns are kept.
        site: the section `table:`.
        folder: of the site's file; relative paths are beside it.

    Raises:
        DataError: the database cannot be reached, refuses the query, or the table is not as contract and site say it is; without a value
            of a patient, and without the password.
        MissingExtraError: SQLAlchemy or psycopg is not installed.
    """
    try:
        import sqlalchemy as sql
    except ImportError as error:
        raise MissingExtraError("table.sql needs SQLAlchemy: pip install 'p2pfl-mesh[sql]'") from error
    until_s = time.monotonic() + source.timeout_s
    with _opened(sql, source, folder, until_s) as (place, connection):
        header, rows = _fetched(sql, source, connection, place, until_s)
    positions = column_positions(header, contract, site, place)
    values = {name: [row[position] for row in rows] for name, position in positions.items()}
    return typed_table(values, {}, contract, site, place)


@contextmanager
def _opened(sql: Any, source: SqlSource, folder: Path, until_s: float) -> Iterator[tuple[str, Any]]:
    """Open a connection that can only read; yields its name for messages as well."""
    place, engine = _sqlite(sql, source, folder) if source.is_sqlite else _postgresql(sql, source, folder)
    try:
        with closing(_connected(sql, engine, source, place)) as connection:
            if source.is_sqlite:
                _restrict(connection.connection.driver_connection, until_s)
            yield place, connection
    finally:
        engine.dispose()


def _connected(sql: Any, engine: Any, source: SqlSource, place: str) -> Any:
    connection = None
    try:
        connection = engine.connect()
        if source.is_sqlite:
            return connection
        connection = connection.execution_options(postgresql_readonly=True)
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, int(source.timeout_s * 1000))}")
        if not connection.exec_driver_sql(_MAY_READ_FILES).scalar():
            return connection
        fault = "this account may read files of the server or run programs there: use one that may only read these tables"
    except (sql.exc.DBAPIError, sqlite3.Error) as error:
        fault = _of_connection(error, source)
    except (sql.exc.SQLAlchemyError, ValueError):  # such as a letter that the driver cannot encode
        fault = "no connection: url, account or password cannot be used as they are"
    if connection is not None:
        connection.close()
    raise DataError(fault, place)


def _fetched(sql: Any, source: SqlSource, connection: Any, place: str, until_s: float) -> tuple[list[str], list[Any]]:
    """Header and rows of the query."""
    late = f"the query took more than {source.timeout_s:g} s: make it shorter, or say a longer table.sql.timeout_s"
    options = {"no_parameters": True, **({} if source.is_sqlite else {"stream_results": True, "max_row_buffer": _ROWS_AT_ONCE})}
    is_begun = False
    rows: list[Any] = []
    try:
        if source.is_sqlite:  # its errors, before a row is read, can only quote the query
            connection.exec_driver_sql(f"EXPLAIN {source.query}", execution_options=options).close()
            is_begun = True
        with connection.exec_driver_sql(source.query, execution_options=options) as result:
            is_begun, header = True, list(result.keys())
            for part in result.partitions(_ROWS_AT_ONCE):
                rows += part
                if time.monotonic() > until_s:
                    raise DataError(late, place)
    except (sql.exc.SQLAlchemyError, sqlite3.Error, sqlite3.Warning) as error:
        inner = getattr(error, "orig", None) or error
        if time.monotonic() > until_s or getattr(inner, "sqlstate", None) == _CANCELLED:
            raise DataError(late, place) from None
        fault = (_of_sqlite if source.is_sqlite else _of_postgresql)(inner, is_begun=is_begun)
        raise DataError(fault, place) from None  # the error may quote a value
    return header, rows


def _sqlite(sql: Any, source: SqlSource, folder: Path) -> tuple[str, Any]:
    path = beside(folder, source.sqlite_file)
    place = str(path)
    check_plain_file(path)
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    return place, sql.create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=sql.NullPool)


def _restrict(connection: sqlite3.Connection, until_s: float) -> None:
    """Let SQLite refuse all but reading, and stop after the time allowed."""

    def allowed(action: int, _first: str | None, function: str | None, *_: object) -> int:
        is_reading = action in _READS and not (action == sqlite3.SQLITE_FUNCTION and str(function).lower() in _REACHES_OUT)
        return sqlite3.SQLITE_OK if is_reading else sqlite3.SQLITE_DENY

    connection.execute("PRAGMA trusted_schema = OFF")  # a view of the file cannot call more than the query can
    connection.set_authorizer(allowed)
    connection.set_progress_handler(lambda: time.monotonic() > until_s, _STEPS_AT_ONCE)


def _postgresql(sql: Any, source: SqlSource, folder: Path) -> tuple[str, Any]:
    server = source.server
    place = f"postgresql://{server.hostname or ''}/{source.database}"
    address = sql.URL.create(
        "postgresql+psycopg",
        username=server.username,
        password=_password(source, folder),
        host=server.hostname,
        port=server.port,
        database=source.database,
        query=source.settings,
    )
    arguments = {"connect_timeout": _CONNECT_S, "application_name": "p2pfl data"}
    try:
        return place, sql.create_engine(address, connect_args=arguments, poolclass=sql.NullPool, hide_parameters=True)
    except ImportError:
        raise MissingExtraError("table.sql with postgresql needs psycopg: pip install 'p2pfl-mesh[sql]'") from None


def _password(source: SqlSource, folder: Path) -> str | None:
    if source.password_variable is not None:
        password = os.environ.get(source.password_variable)
        if not password:
            raise DataError("table.sql.password_variable: the environment has no variable of that name")
        return password
    if source.password_file is None:
        return None
    path = beside(folder, source.password_file)
    check_plain_file(path, "no such file, which table.sql.password_file names")
    password = read_private(path).decode("utf-8", "replace").rstrip("\r\n")
    if not password:
        raise DataError("is empty; expected a password", str(path))
    return password


def _of_connection(error: Exception, source: SqlSource) -> str:
    """Say why there is no connection, in the first line of the driver's own words: they have host and user, and no password."""
    said = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    if source.is_sqlite:
        return f"cannot be opened as a file of SQLite: {said}"
    return f"no connection: {said}; expected url, account and password as the database's administrator has them"


def _of_sqlite(inner: Any, *, is_begun: bool) -> str:
    """Say why SQLite refuses the query; its own words where they can only quote the query."""
    said = str(inner)
    if "one statement" in said:
        return "table.sql.query holds more than one statement: expected one SELECT"
    if "not authorized" in said or "prohibited" in said:
        return "table.sql.query does more than read tables: expected one SELECT"
    if is_begun or getattr(inner, "sqlite_errorname", "") != "SQLITE_ERROR":
        return f"the query failed ({getattr(inner, 'sqlite_errorname', None) or 'a text that is not UTF-8'})"
    return f"table.sql.query: {said}"


def _of_postgresql(inner: Any, *, is_begun: bool) -> str:
    """Say why PostgreSQL refuses the query; its own words where they can only quote the query."""
    state = getattr(inner, "sqlstate", None)
    if state is None:  # the driver's own error
        return "the query failed: a value cannot be read, or the connection is lost"
    if not is_begun and state[:2] in (_SYNTAX, _NOT_AVAILABLE):
        return f"table.sql.query: {inner.diag.message_primary}: expected one SELECT on tables that this account may read"
    return f"the query failed: {_SAYS.get(state) or _SAYS.get(state[:2], 'the database refused it')} (SQLSTATE {state})"
