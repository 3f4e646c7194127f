"""Standard streams on which no text from a foreign file can steer the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from p2pfl.errors import on_one_line, visible


class VisibleText(io.TextIOBase):
    """A stream that shows control characters as escapes. It has no `buffer`, past which bytes could go."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.inner = stream

    def write(self, text: str) -> int:
        """Write a text; returns the number of its characters."""
        self.inner.write(visible(text))
        return len(text)

    def flush(self) -> None:
        """Hand on what the inner stream holds."""
        self.inner.flush()

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return self.inner.isatty()

    def fileno(self) -> int:
        """The descriptor of the inner stream."""
        return self.inner.fileno()

    def writable(self) -> bool:
        """It is there to be written to."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the inner stream."""
        return self.inner.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How the inner stream treats what it cannot encode."""
        return self.inner.errors


class OneLineFormatter(logging.Formatter):
    """A log's lines, each message on one, so that no name in it can pretend to be another line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line without what follows it, such as a traceback."""
        record.message = on_one_line(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """A log's lines as JSON objects, one a line: time in UTC, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; letters outside ASCII are escaped, and with them all that could steer a terminal."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json() -> None:
    """Write what is logged from now on as JSON lines."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())


def guard_streams() -> None:
    """From now on nothing that this process prints steers the terminal, unless a console styles it."""
    if not isinstance(sys.stdout, VisibleText):
        sys.stdout = VisibleText(sys.stdout)
    if not isinstance(sys.stderr, VisibleText):
        sys.stderr = VisibleText(sys.stderr)
