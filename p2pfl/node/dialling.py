"""Settings of a site's links in its site.yaml: the proxy by which it dials out, and the relay that it offers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast

from pydantic import AfterValidator, Field

from p2pfl.errors import ConfigError
from p2pfl.governance.identity import read_private
from p2pfl.governance.names import split_address
from p2pfl.transports.proxies import MOST_SOCKS_BYTES, Proxy

PASSWORD_VARIABLE = "P2PFL_PROXY_PASSWORD"  # noqa: S105 - the name of a variable
_ADDRESS = re.compile(r"(http|socks5)://(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9][A-Za-z0-9._-]*)):([0-9]{1,5})/?")
_LAST_PORT = 65535


def checked_listen(text: str) -> str:
    """Return a place to listen at, tcp://address:port; ValueError for any other text."""
    if not text.startswith("tcp://"):
        raise ValueError("expected tcp://address:port, such as tcp://0.0.0.0:7700")
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    split_address(f"tcp://listens.here:{port}")  # the port; a host may be a wildcard here
    if not host:
        raise ValueError("expected tcp://address:port, such as tcp://0.0.0.0:7700")
    return text


def _checked_address(text: str) -> str:
    found = _ADDRESS.fullmatch(text)
    if "@" in text:
        return text  # an error here would print it, password and all: `faults` says it
    if found is None or not 1 <= int(found[4]) <= _LAST_PORT:
        raise ValueError("expected http://host:port or socks5://host:port, such as http://proxy.hospital.example:3128")
    return text


def _checked_user(text: str) -> str:
    if not text or ":" in text or not text.isprintable() or len(text.encode()) > MOST_SOCKS_BYTES:
        raise ValueError(f"expected 1 to {MOST_SOCKS_BYTES} bytes without a colon")
    return text


@dataclass(frozen=True, kw_only=True)
class RelaySettings:
    """The settings of a relay that a site offers to others."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    mbit_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """At most so many megabits a second are passed on in all, both directions together."""

    listen: Annotated[str, AfterValidator(checked_listen)] | None = None
    """tcp://address:port to bind; None: the port of the relay's address on the card, on all interfaces."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """The settings of a site's proxy."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    address: Annotated[str, AfterValidator(_checked_address)]
    """http://host:port (a proxy that allows CONNECT) or socks5://host:port."""

    user: Annotated[str, AfterValidator(_checked_user)] | None = None
    """Name to log in with; None: nobody has to."""

    password_file: Path | None = None
    """Holds the user's password; None: P2PFL_PROXY_PASSWORD."""

    def faults(self) -> list[str]:
        """Find what must be said without showing the value."""
        if "@" in self.address:
            return ["proxy.address: no user and no password belong into it, for it is printed; write proxy.user and proxy.password_file"]
        return []

    def proxy(self) -> Proxy:
        """Make the proxy with its password.

        Raises:
            ConfigError: there is a user and no password or a password and no user; others can read the file; or it is no password.
        """
        found = cast("re.Match[str]", _ADDRESS.fullmatch(self.address))
        kind = cast(Literal["http", "socks5"], found[1])
        return Proxy(kind=kind, host=found[2] or found[3], port=int(found[4]), user=self.user, password=self._password())

    def _password(self) -> str:
        if self.user is None:
            if self.password_file is not None:
                raise ConfigError(f"proxy.password_file = {str(self.password_file)!r}: whose password is it? Write proxy.user, too")
            return ""
        return read_password("proxy", f"proxy.user = {self.user!r}", self.password_file, PASSWORD_VARIABLE)


def read_password(of: str, user: str, file: Path | None, variable: str) -> str:
    """Read the password of a proxy or a broker from its file, or from a variable of the environment.

    Args:
        of: key of site.yaml to which it belongs.
        user: whose it is, as site.yaml says it.
        file: holds it; None: the variable does.
        variable: of the environment.

    Raises:
        ConfigError: there is none; others can read the file; or it is no password.
    """
    if file is None:
        place, raw = variable, os.fsencode(os.environ.get(variable, ""))
        if not raw:
            raise ConfigError(f"{user}: no password; write {of}.password_file, a file that only this account can read, or set {variable}")
    else:
        place = str(file)
        if not file.exists():
            raise ConfigError(f"{of}.password_file = {place!r}: no such file; write the password into it, and run: chmod 600")
        raw = read_private(file).rstrip(b"\r\n")
    try:
        password = raw.decode()
    except UnicodeDecodeError:
        password = ""
    if not password or not password.isprintable() or len(raw) > MOST_SOCKS_BYTES:
        raise ConfigError(f"the password of {of}: expected one line of 1 to {MOST_SOCKS_BYTES} bytes in UTF-8", place)
    return password
