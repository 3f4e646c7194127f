"""Standard streams on which no text from a foreign file can steer the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from types import TracebackType
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


class JsonLines(VisibleText):
    """A stream that makes a JSON line of a log of every text that is printed on it.

    A text is over where a write ends with the end of a line, and when the stream is flushed.

    Args:
        stream: where the lines go.
        level: of the lines, as in `logging`.
    """

    def __init__(self, stream: TextIO, level: int) -> None:
        super().__init__(stream)
        self._level, self._begun, self._formatter = level, "", JsonFormatter()

    def write(self, text: str) -> int:
        """Write a text; returns the number of its characters."""
        self._begun += text
        if self._begun.endswith("\n"):
            self._end()
        return len(text)

    def flush(self) -> None:
        """Write what has begun, and hand on what the inner stream holds."""
        self._end()
        self.inner.flush()

    def _end(self) -> None:
        said, self._begun = self._begun.strip("\n"), ""
        if said:
            record = logging.LogRecord("p2pfl", self._level, "", 0, said, None, None)
            self.inner.write(self._formatter.format(record) + "\n")

    def isatty(self) -> bool:
        """Nobody styles what a machine reads."""
        return False


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether a command line has `--log-format json`; it is known before the line is parsed, as an error in it is printed, too."""
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)


def print_json_lines() -> None:
    """From now on all that this process prints is JSON lines: results, errors, warnings of Python, and an error that nobody catches."""
    sys.stdout, sys.stderr = JsonLines(sys.stdout, logging.INFO), JsonLines(sys.stderr, logging.ERROR)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("p2pfl").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def log_handler() -> logging.Handler:
    """Handler that writes what is logged on standard error, in the form of what is printed there."""
    if isinstance(sys.stderr, JsonLines):
        handler = logging.StreamHandler(sys.stderr.inner)
        handler.setFormatter(JsonFormatter())
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def guard_streams() -> None:
    """From now on nothing that this process prints steers the terminal, unless a console styles it."""
    if not isinstance(sys.stdout, VisibleText):
        sys.stdout = VisibleText(sys.stdout)
    if not isinstance(sys.stderr, VisibleText):
        sys.stderr = VisibleText(sys.stderr)
