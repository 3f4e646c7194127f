"""Serves the page on 127.0.0.1 until it is interrupted."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import webbrowser
from collections.abc import Callable, Sequence
from typing import Any

from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.inspector.dashboard.board import Board
from p2pfl.inspector.dashboard.guard import Guard

_PATIENCE_S = 60.0
"""For laying out the page of a large run."""
_ALL_ENDED = re.compile(r"Could not cancel \d+ tasks within timeout: ")
_GOODBYE_S = 1
"""For open connections when it ends: a page in a browser never closes its own."""


def serve(places: Sequence[str], *, port: int, say: Callable[[str], object], opens: bool = False) -> None:
    """Serve the dashboard of run folders and nodes' addresses until interrupted.

    Port 0 is one that is free. *say* gets the address with its token, once it can be opened; *opens* it in this user's browser.

    Raises:
        ConfigError: the port is taken, or a source cannot be read.
        MissingExtraError: NiceGUI or plotly is not installed.
        KeyboardInterrupt: it was interrupted.
    """
    try:
        import plotly  # noqa: F401  # an extra
        import uvicorn
        from fastapi import FastAPI
        from nicegui import ui
    except ImportError as error:
        raise MissingExtraError("p2pfl dashboard needs NiceGUI and plotly: pip install 'p2pfl-mesh[dashboard]'") from error
    from p2pfl.inspector.dashboard.page import Page

    board = Board.of(places)
    board.look()
    for source in board.sources:
        if isinstance(source.error, ConfigError):  # anything else may come right while the page is open
            raise source.error
    with listening(port) as door:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        ui.page("/", title="p2pfl dashboard", language="en-US", response_timeout=_PATIENCE_S)(lambda: Page(board).build())
        # without Tailwind: it is compiled anew in the browser at each visit, and the page has a style sheet of its own;
        # uncompressed: nothing leaves the machine; patient: a browser that is slow for a moment finds its page as it was
        ui.run_with(app, show_welcome_message=False, tailwind=False, gzip_middleware_factory=None, reconnect_timeout=_PATIENCE_S)
        guard = Guard(app=app, port=door.getsockname()[1])
        logging.getLogger("nicegui").addFilter(_names_its_tasks)
        # the log of requests would hold the token
        options = {"log_level": "warning", "access_log": False, "server_header": False, "timeout_graceful_shutdown": _GOODBYE_S}
        server = uvicorn.Server(uvicorn.Config(guard, **options))
        say(f"{guard.url}?token={guard.token}")  # the socket listens already: whoever comes before the server has started waits
        asyncio.run(_run(server, door, board, f"{guard.url}?token={guard.ticket()}" if opens else None))


def _names_its_tasks(record: logging.LogRecord) -> bool:
    """Keep out a complaint that a busy machine draws at the end: tasks could not be cancelled, and none is named, as all had ended."""
    return _ALL_ENDED.fullmatch(record.getMessage()) is None


async def _run(server: Any, door: socket.socket, board: Board, opened: str | None) -> None:
    async with asyncio.TaskGroup() as tasks:
        others: list[asyncio.Task[Any]] = [tasks.create_task(board.follow(), name="looking at the sources")]
        if opened is not None:
            others.append(tasks.create_task(asyncio.to_thread(webbrowser.open, opened), name="opening a browser"))
        await server.serve(sockets=[door])
        for task in others:
            task.cancel()


def listening(port: int) -> socket.socket:
    """A socket of 127.0.0.1 that listens already.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        why = os.strerror(error.errno or 0)  # the error's own text has the address, too
        raise ConfigError(f"{port}: cannot listen on 127.0.0.1 ({why}); choose another, or 0 for any", "--port") from error
