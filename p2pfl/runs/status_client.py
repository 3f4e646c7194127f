"""Client of a node's status endpoint on this machine, with the token that the endpoint asks for.

Both stand in its state folder, which nobody else may enter.
"""

from __future__ import annotations

import fcntl
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from p2pfl.errors import ConfigError

ADDRESS, TOKEN, LOCK = "status.url", "status.token", "lock"
"""In a node's state folder: where it answers while it runs, what one shows it, and what it holds as long as it runs."""

REQUEST_S = 5.0
_MOST_BYTES = 256 * 2**20
_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_PLAIN_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,256}")


_OPENER = urllib.request.OpenerDirector()
"""Without the proxy that a hospital's machines use for everything else: it would be shown the token. It follows no redirection either."""
for _handler in (urllib.request.HTTPHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor):
    _OPENER.add_handler(_handler())


def fetch_page(url: str, page: str, token: str | None) -> bytes:
    """Fetch a page, such as /status, of a node's status endpoint on this machine.

    Raises:
        ConfigError: the address is not on this machine, so that it is not asked.
        OSError: nobody answers there, or with a refusal (urllib.error.HTTPError).
        http.client.HTTPException: what answers does not speak HTTP.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in _HOSTS:
        raise ConfigError(f"{url!r}: a node answers only on its own machine: expected http://127.0.0.1:PORT/, as status.url has it")
    request = urllib.request.Request(f"http://{parts.netloc.rpartition('@')[2]}{page}")  # checked above
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with _OPENER.open(request, timeout=REQUEST_S) as response:
            content: bytes = response.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    return content


def address_in(state: Path) -> str | None:
    """Address at which the node with a state folder answers; None where none runs there.

    Raises:
        ConfigError: this account may not read it.
    """
    text = _text(state / ADDRESS)
    return text.strip() if text is not None else None


def token_in(state: Path) -> str | None:
    """Token that the node with a state folder asks for; None where there is none yet.

    Raises:
        ConfigError: this account may not read it, or it is damaged.
    """
    text = _text(state / TOKEN)
    return checked_token(text, str(state / TOKEN)) if text is not None else None


def checked_token(text: str, place: str) -> str:
    """Check that a token can stand in a header; a ConfigError does not show it."""
    token = text.strip()
    if not _PLAIN_TOKEN.fullmatch(token):
        raise ConfigError(
            "expected 32 to 256 of A-Z a-z 0-9 _ -, as a node writes it; without status.token its next start makes a new one", place
        )
    return token


def has_ended(state: Path) -> bool:
    """Tell whether the node with a state folder has certainly ended, so that another program may answer at its address."""
    try:
        with (state / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or cannot be seen
        return False
    return True


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is damaged"
        raise ConfigError(f"cannot be read ({reason}): ask as the account that runs the node", str(path)) from error
