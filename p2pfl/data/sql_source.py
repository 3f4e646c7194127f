"""Where a site's table comes from by SQL: the database, the one query, and where the password stands. It is in the site's file alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pydantic import Field

from p2pfl.errors import UNSAFE_OR_BREAK, ConfigError
from p2pfl.yaml_files import check, nearest

SQLITE = "sqlite:///"

_POSTGRESQL = "postgresql"
_SETTINGS = ("host", "sslmode", "sslrootcert")
"""Settings that may stand behind the ? of a URL: others, such as options, could undo what keeps the connection to reading."""
_BEGIN = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*(?:select|with)\b", re.IGNORECASE | re.DOTALL)
_NO_TEXT = re.compile("[\\x00\ud800-\udfff]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_LETTERS = 100_000
_PASSWORD = "say password_file or password_variable"  # noqa: S105  # advice
_FORMS = "sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class SqlSource:
    """Section `sql:` of a site's table. Its values are never shown: a URL or a query may hold what others should not see."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    url: str
    """sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE, without a password."""
    query: str
    """One SELECT, whose columns are the table's."""
    password_file: Annotated[str, Field(min_length=1)] | None = None
    """File of mode 0600 with the password."""
    password_variable: str | None = None
    """Environment variable with the password."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How long the query may take."""

    @classmethod
    def from_mapping(cls, raw: Any) -> SqlSource:
        """Check the section as the site's file has it; ConfigError with every fault, none of which shows a value."""
        if not isinstance(raw, Mapping):
            raise ConfigError("sql: expected a mapping with url and query")
        names = [each.name for each in fields(cls)]
        findings = [f"sql.{key}: unknown key, {_meant(str(key), names)}" for key in raw if key not in names]
        for key in ("url", "query", "password_file", "password_variable"):
            if raw.get(key) is None and key in ("url", "query"):
                findings.append(f"sql.{key}: required, but missing")
            elif raw.get(key) is not None and not isinstance(raw[key], str):
                findings.append(f"sql.{key}: expected a text")
        if not findings:
            try:
                source = check(cls, raw, "sql")
                findings += source.faults()
            except ConfigError as error:
                findings += [f"sql.{finding}" for finding in error.findings]
        if findings:
            raise ConfigError(findings)
        return source

    def faults(self) -> Iterator[str]:
        """Find what is wrong with URL, query and password."""
        yield from (f"sql.url: {fault}" for fault in self._faults_of_url())
        if _NO_TEXT.search(self.query):
            yield "sql.query: it holds a letter that no database takes"
        elif len(self.query) > _MOST_LETTERS:
            yield f"sql.query: {len(self.query)} letters, {_MOST_LETTERS} are the most"
        elif not _BEGIN.match(self.query):
            yield "sql.query: expected one SELECT, which may begin with WITH; nothing else is run"
        if self.password_file is not None and self.password_variable is not None:
            yield "sql.password_file and sql.password_variable: expected one of both"
        if self.password_variable is not None and not _VARIABLE.fullmatch(self.password_variable):
            yield "sql.password_variable: expected the name of an environment variable, not the password"
        if self.is_sqlite and (self.password_file or self.password_variable):
            yield "sql.password_file, sql.password_variable: a file of SQLite has no password"

    def _faults_of_url(self) -> Iterator[str]:
        if UNSAFE_OR_BREAK.search(self.url):
            yield "it holds a character that cannot be seen"
            return
        if self.is_sqlite:
            if self.url == SQLITE or self.url.endswith(":memory:") or set(self.url) & {"?", "#"}:
                yield "expected sqlite:///FILE, without settings behind it"
            return
        try:
            parts = urlsplit(self.url)
            is_fit = bool(parts.port is None or parts.port)
        except ValueError:
            yield f"cannot be read: expected {_FORMS}"
            return
        if parts.scheme != _POSTGRESQL or not is_fit or parts.fragment or not parts.path.strip("/"):
            yield f"expected {_FORMS}"
            return
        if parts.password is not None:
            yield f"a password stands in it, and whoever sees the file has it: {_PASSWORD}"
        if strange := [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if key not in _SETTINGS]:
            yield f"the setting {strange[0]}: expected {', '.join(_SETTINGS)}"

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of SQLite."""
        return self.url.startswith(SQLITE)

    @property
    def sqlite_file(self) -> str:
        """Path of a file of SQLite, as the URL has it."""
        return self.url.removeprefix(SQLITE)

    @property
    def server(self) -> SplitResult:
        """Parts of the URL of a server."""
        return urlsplit(self.url)

    @property
    def database(self) -> str:
        """Name of the database at a server."""
        return unquote(self.server.path.strip("/"))

    @property
    def settings(self) -> dict[str, str]:
        """Settings of the connection to a server."""
        return dict(parse_qsl(self.server.query))

    def __repr__(self) -> str:
        return f"SqlSource({'sqlite' if self.is_sqlite else _POSTGRESQL})"


def _meant(key: str, names: list[str]) -> str:
    if "password" in key.lower() or key.lower() in ("pass", "pwd", "secret"):
        return f"and a password does not stand in this file: {_PASSWORD}"
    return f"{nearest(key, names)}one of {', '.join(names)}"
