"""A node's status as JSON over HTTP on 127.0.0.1: who has an account on this machine can read it, and nobody else.

Asking changes nothing, and the answer holds counts and aggregates, never a weight, a key or a row of data.
"""

from __future__ import annotations

import asyncio
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, MissingExtraError, TransportError
from p2pfl.node.prometheus import CONTENT_TYPE, exposition
from p2pfl.node.store import CHECKPOINT
from p2pfl.records import replace_file

_REQUEST_S = 5.0
_MAX_REQUEST_BYTES = 8192
_MOST_AT_ONCE = 8
_ENDPOINT = "status.url"
_JSON = "application/json"


Records = Callable[[], Callable[[], Mapping[str, Any]] | None]


async def serve_status(status: Callable[[], Mapping[str, Any]], port: int, state: Path, records: Records = lambda: None) -> None:
    """Answer GET requests until cancelled; the URL stands in the state folder's status.url.

    Args:
        status: of the node, for / and /metrics.
        port: 0: chosen by the system.
        state: the node's folder.
        records: what it knows of the whole run, for /run: something that gathers it, in any thread; None where it knows nothing of that.
    """
    busy = asyncio.Semaphore(_MOST_AT_ONCE)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if busy.locked():  # who asks without end must not take the node's memory
            writer.transport.abort()
            return
        await busy.acquire()
        try:
            async with asyncio.timeout(_REQUEST_S):
                request = await reader.readuntil(b"\r\n\r\n")
                code, kind, body = await _respond(request, status, records)
                head = f"HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # whoever asked has gone, does not read, or did not ask in HTTP
        finally:
            busy.release()
            writer.close()

    try:
        server = await asyncio.start_server(answer, "127.0.0.1", port, limit=_MAX_REQUEST_BYTES)
    except OSError as error:
        raise ConfigError(
            f"status_port = {port}: cannot listen on it ({error.strerror}); choose another, or 0 for any", "site.yaml"
        ) from error
    place = state / _ENDPOINT
    real_port = server.sockets[0].getsockname()[1]
    replace_file(place, f"http://127.0.0.1:{real_port}/\n")
    try:
        await asyncio.Event().wait()
    finally:
        place.unlink(missing_ok=True)
        # a server that is closed between letting somebody in and speaking to them never does: first nobody more is let in
        for listening in server.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        await asyncio.sleep(0)
        server.close()


def read_status(state: Path) -> dict[str, Any]:
    """Ask the node with this state folder how it is now.

    Raises:
        ConfigError: no node runs there.
        TransportError: it does not answer.
    """
    place = state / _ENDPOINT
    if not place.exists():
        raise ConfigError(f"no node is running here: {_last_words(state)}", str(state))
    url = place.read_text(encoding="utf-8").strip()
    if not url.startswith("http://127.0.0.1:"):
        raise ConfigError(f"{url!r}: expected an address on 127.0.0.1", str(place))
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_S) as response:  # noqa: S310  # checked above
            found = json.load(response)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TransportError(
            f"{url}: the node does not answer ({error}); it may have been killed, or its machine restarted: {_last_words(state)}"
        ) from error
    assert isinstance(found, dict)
    return found


def _last_words(state: Path) -> str:
    """When a node that does not run gave its last sign of life, and how it is started."""
    run = state / "run"
    if (run / "summary.json").exists() and json.loads((run / "summary.json").read_text()).get("stop_reason") == "members_missing":
        return "it ended without training because too few members were ready; start it with p2pfl node start, and it waits anew"
    if (run / "summary.json").exists():
        return f"it has finished, and its result is in {run}"
    written = [path.stat().st_mtime for path in (state / CHECKPOINT, run / "nodes.jsonl", run / "events.jsonl") if path.exists()]
    if not written:
        return "it was never started; start it with p2pfl node start"
    then = datetime.fromtimestamp(max(written), UTC)
    return f"its last sign of life was at {then:%Y-%m-%d %H:%M:%S} UTC; start it with p2pfl node start, and it goes on where it was"


async def _respond(request: bytes, status: Callable[[], Mapping[str, Any]], records: Records) -> tuple[str, str, bytes]:
    """Status line, content type and body."""
    lines = request.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
    host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
    if host not in ("127.0.0.1", "localhost"):  # a page in a browser on this machine must not read it under another name
        return "403 Forbidden", _JSON, b'{"error": "ask as 127.0.0.1 or localhost"}\n'
    if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):  # nor make it work
        return "403 Forbidden", _JSON, b'{"error": "no page of another origin may ask"}\n'
    if method != "GET":
        return "405 Method Not Allowed", _JSON, b'{"error": "only GET"}\n'
    return await _page(rest.split(" ")[0].split("?")[0], status, records)


async def _page(path: str, status: Callable[[], Mapping[str, Any]], records: Records) -> tuple[str, str, bytes]:
    if path == "/metrics":
        try:
            return "200 OK", CONTENT_TYPE, exposition(status())
        except MissingExtraError as error:
            return "501 Not Implemented", _JSON, json.dumps({"error": str(error)}).encode() + b"\n"
    if path == "/run" and (gather := records()) is not None:
        return "200 OK", _JSON, await asyncio.to_thread(lambda: _document(gather()))
    if path in ("/", "/status"):
        return "200 OK", _JSON, _document(status())
    return "404 Not Found", _JSON, b'{"error": "only /, /status, /run and /metrics"}\n'


def _document(content: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(content), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
