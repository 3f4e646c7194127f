"""A node's status as JSON over HTTP, to callers that show the token in its state folder; /live and /ready answer everybody with one word.

Asking changes nothing, and the answer holds counts and aggregates, never a weight, a key or a row of data. Who connects and says nothing
holds nobody up: when there are too many, the oldest of those that have not asked yet has to go.
"""

from __future__ import annotations

import asyncio
import hmac
import http.client
import ipaddress
import json
import logging
import os
import re
import secrets
import stat
import urllib.error
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, MissingExtraError, TransportError
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.prometheus import CONTENT_TYPE, exposition
from p2pfl.runs.checkpoint import mode_in
from p2pfl.runs.open_files import replace_file
from p2pfl.runs.records import read_summary
from p2pfl.runs.status_client import ADDRESS, REQUEST_S, TOKEN, address_in, checked_token, fetch_page, has_ended, token_in
from p2pfl.runs.text import plain

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

_MAX_REQUEST_BYTES, _TOKEN_BYTES = 8192, 32
_MOST_SILENT = 32
"""Connections at once that have not asked for anything yet."""
_MOST_AT_ONCE = 8
"""Answers at once."""
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PAGES = ("/", "/status", "/run", "/metrics", "/edges")
_WORDS = ("/live", "/ready")
_WORDS_OF_A_REQUEST = 3
_ONCE = ("host", "authorization", "origin", "sec-fetch-site")
_SHOW_IT = "show the token: Authorization: Bearer and what is in the state folder's status.token"
_HEADERS = (
    "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nCross-Origin-Resource-Policy: same-origin\r\n"
    "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\nReferrer-Policy: no-referrer\r\nConnection: close\r\n"
)

Status = Callable[[], Mapping[str, Any]]
Records = Callable[[], Callable[[], Mapping[str, Any]] | None]
Measure = Callable[[], Awaitable[Mapping[str, Any]]]


async def _no_edges() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in HTTP."""

    code: int
    body: bytes
    kind: str = _JSON
    more: str = ""
    """Further header lines."""

    def to_bytes(self) -> bytes:
        """Bytes that are sent for it."""
        first = f"HTTP/1.1 {self.code} {http.client.responses[self.code]}"
        head = f"{first}\r\nContent-Type: {self.kind}\r\nContent-Length: {len(self.body)}\r\n{_HEADERS}{self.more}\r\n"
        return head.encode() + self.body


@dataclass
class _Page:
    """The endpoint itself, with all its connections."""

    token: str
    status: Status
    records: Records
    is_ready: Callable[[], bool]
    edges: Measure
    silent: dict[asyncio.StreamWriter, None] = field(default_factory=dict)
    """Connections that have not asked yet, the oldest first."""
    answers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST_AT_ONCE))

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Answer at an address; OSError where that cannot be."""
        answer = partial(self._answer, local=ipaddress.ip_address(host).is_loopback)
        return await asyncio.start_server(answer, host, port, limit=_MAX_REQUEST_BYTES)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, local: bool) -> None:
        while len(self.silent) >= _MOST_SILENT:
            oldest = next(iter(self.silent))
            del self.silent[oldest]
            oldest.transport.abort()
        self.silent[writer] = None
        try:
            async with asyncio.timeout(REQUEST_S):
                request = await reader.readuntil(b"\r\n\r\n")
                self.silent.pop(writer, None)
                async with self.answers:
                    writer.write((await self._respond(request, local=local)).to_bytes())
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # whoever asked has gone, does not read, or did not ask in HTTP
        finally:
            self.silent.pop(writer, None)
            writer.close()

    async def _respond(self, request: bytes, *, local: bool) -> Answer:
        path = requested(request, self.token, local=local)
        if isinstance(path, Answer):
            return path
        if path in _WORDS:
            code, word = (200, path[1:]) if path == "/live" or self.is_ready() else (503, "leaving")
            return Answer(code, f"{word}\n".encode(), _TEXT)
        if path == "/metrics":
            return self._metrics()
        if path == "/run":
            gather = self.records()
            if gather is None:
                return _refusal(404, "this node takes no part in the view of the network")
            return Answer(200, await asyncio.to_thread(lambda: _document(gather())))
        return Answer(200, _document(await self.edges() if path == "/edges" else self.status()))

    def _metrics(self) -> Answer:
        """Figures of a node in Prometheus's format."""
        try:
            return Answer(200, exposition(self.status()), CONTENT_TYPE)
        except MissingExtraError as error:
            return _refusal(501, str(error))


async def serve_status(
    status: Status,
    state: Path,
    *,
    records: Records = lambda: None,
    is_ready: Callable[[], bool] = lambda: True,
    edges: Measure = _no_edges,
    host: str = LOOPBACK,
    port: int = 0,
) -> None:
    """Answer GET requests until cancelled; an address on this machine stands in the state folder's status.url.

    Where the port is taken, or the address is not this machine's, it says so and answers at any free port of 127.0.0.1: another account
    that takes a port must not keep the node from its work.

    Args:
        status: of the node, for / and /metrics.
        state: the node's folder.
        records: of the whole run, for /run: a function that gathers them, in any thread; None where it has none.
        is_ready: whether the node takes part.
        edges: measures the edges, for /edges; what it sends for that changes nothing at either end.
        host: an address of this machine, or 0.0.0.0 or :: for all of them.
        port: 0: chosen by the system.

    Raises:
        ConfigError: status.token in the state folder is not its owner's alone, or is damaged.
    """
    servers = await _listen(_Page(_own_token(state), status, records, is_ready, edges), state, host, port)
    if not servers:
        return
    place = state / ADDRESS
    name, own_port = servers[-1].sockets[0].getsockname()[:2]  # :: and 0.0.0.0 listen at this machine's own address, too
    replace_file(place, f"http://{'[::1]' if ':' in name else LOOPBACK}:{own_port}/\n")
    try:
        await asyncio.Event().wait()
    finally:
        place.unlink(missing_ok=True)
        # a server that is closed between letting somebody in and speaking to them never does: first nobody more is let in
        for server in servers:
            for listening in server.sockets:
                asyncio.get_running_loop().remove_reader(listening)
        await asyncio.sleep(0)
        for server in servers:
            server.close()


async def _listen(page: _Page, state: Path, host: str, port: int) -> list[asyncio.Server]:
    """Servers of a page, the last one at an address that only this machine reaches; none where the system has none to give."""
    servers: list[asyncio.Server] = []
    address = ipaddress.ip_address(host)
    try:
        servers.append(await page.listen(host, port))
    except OSError as error:
        log.warning(
            "the status page cannot listen at %s, port %s (%s), and who asks there reaches another program; its address is in %s instead",
            host,
            port,
            error.strerror,
            state / ADDRESS,
        )
    if servers and not address.is_loopback:
        log.warning("the status page at %s is not encrypted: who listens in on that network learns its token and its figures", host)
    if not servers or not (address.is_loopback or address.is_unspecified):
        try:
            servers.append(await page.listen(LOOPBACK, 0))  # for this machine's own commands
        except OSError as error:
            log.warning("there is no status page for this machine's own commands: %s", error.strerror)
            for server in servers:
                server.close()
            return []
    return servers


def _own_token(state: Path) -> str:
    """The token in a state folder, which stays the same over restarts; a new one where there is none."""
    path = state / TOKEN
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode_in(state))
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise ConfigError(f"mode {stat.S_IMODE(found.st_mode):04o}: other accounts may know it; remove it", str(path))
            return checked_token(file.read(_MAX_REQUEST_BYTES), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError("cannot be read; remove it, and the node makes a new one", str(path)) from error


def read_status(state: Path) -> dict[str, Any]:
    """Ask the node with this state folder how it is now.

    Raises:
        ConfigError: no node runs there, or this account may not ask it.
        TransportError: it does not answer.
    """
    return _ask(state, "/status")


def read_edges(state: Path) -> dict[str, Any]:
    """Ask the node with this state folder to measure its edges; empty where it is of a version that does not.

    Raises:
        ConfigError: no node runs there, or this account may not ask it.
        TransportError: it does not answer.
    """
    try:
        return _ask(state, "/edges")
    except TransportError as error:
        if isinstance(error.__cause__, urllib.error.HTTPError):
            return {}
        raise


def _ask(state: Path, page: str) -> dict[str, Any]:
    url = address_in(state)
    if url is None:
        raise ConfigError(f"no node is running here: {_last_words(state)}", str(state))
    if has_ended(state):
        raise TransportError(f"{url}: the node has ended; it may have been killed, or its machine restarted: {_last_words(state)}")
    try:
        found = json.loads(fetch_page(url, page, token_in(state)))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise TransportError(
            f"{url}: the node does not answer ({error}); it may have been killed, or its machine restarted: {_last_words(state)}"
        ) from error
    assert isinstance(found, dict)
    return found


def _last_words(state: Path) -> str:
    """Say when a node that does not run gave its last sign of life, and how it is started."""
    run = state / "run"
    if (summary := read_summary(run)) is not None:
        if summary.get("stop_reason") == "members_missing":
            return "it ended without training because too few members were ready; start it with p2pfl node start, and it waits anew"
        return f"it has finished, and its result is in {run}"
    written = [path.stat().st_mtime for path in (state / CHECKPOINT, run / "nodes.jsonl", run / "events.jsonl") if path.exists()]
    if not written:
        return "it was never started; start it with p2pfl node start"
    then = datetime.fromtimestamp(max(written), UTC)
    return f"its last sign of life was at {then:%Y-%m-%d %H:%M:%S} UTC; start it with p2pfl node start, and it goes on where it was"


def requested(request: bytes, token: str, *, local: bool) -> str | Answer:
    """Find the path that a request may have, or the answer that it gets instead.

    Args:
        request: everything up to the empty line.
        token: without it there is one word at most.
        local: it came to an address of this machine alone. Then only this machine's names are answered to, so that a page in a browser
            here cannot read it under a name of its own (DNS rebinding); elsewhere the token keeps such a page out.
    """
    lines = request.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = lines[0].split(" ")
    fields = [line.partition(":") for line in lines[1:]]
    names = [name.lower() for name, _, _ in fields]
    headers = {name.lower(): value.strip() for name, _, value in fields}
    path = words[1].split("?")[0] if len(words) > 1 else ""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    is_known = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), token.encode("ascii"))
    found: str | Answer = path
    if len(words) != _WORDS_OF_A_REQUEST or not words[2].startswith("HTTP/1.") or not all(c and _NAME.fullmatch(n) for n, c, _ in fields):
        found = _refusal(400, "this is not HTTP/1.1")
    elif any(names.count(name) > 1 for name in _ONCE):
        found = _refusal(400, "a header that may stand once stands twice")
    elif local and not _OWN_HOST.fullmatch(headers.get("host", "")):
        found = _refusal(403, "ask as 127.0.0.1 or localhost")
    elif "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        found = _refusal(403, "no page of another origin may ask")
    elif words[0] != "GET":
        found = _refusal(405, "only GET", "Allow: GET\r\n")
    elif path not in _WORDS and not is_known:
        found = _refusal(401, _SHOW_IT, "WWW-Authenticate: Bearer\r\n")
    elif path not in (*_WORDS, *_PAGES):
        found = _refusal(404, f"only {', '.join((*_PAGES, *_WORDS))}")
    return found


def _refusal(code: int, why: str, more: str = "") -> Answer:
    return Answer(code, json.dumps({"error": why}).encode() + b"\n", more=more)


def _document(content: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(content), allow_nan=False).encode() + b"\n"
