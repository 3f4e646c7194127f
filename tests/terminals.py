"""A program behind a real pseudo-terminal, and what stands on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Self

import pyte

DEADLINE_S = 60.0
_SECOND_PAGE = 1049
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")


class _Screen(pyte.Screen):
    """With a second page, as programs have it that fill the screen and leave it as it was."""

    is_second = False

    def set_mode(self, *modes: int, **options: bool) -> None:
        super().set_mode(*modes, **options)
        if _SECOND_PAGE in modes and options.get("private"):
            self._first, self.is_second = (deepcopy(self.buffer), deepcopy(self.cursor)), True
            self.erase_in_display(2)
            self.cursor_position()

    def reset_mode(self, *modes: int, **options: bool) -> None:
        super().reset_mode(*modes, **options)
        if _SECOND_PAGE in modes and options.get("private") and self.is_second:
            (self.buffer, self.cursor), self.is_second = self._first, False


class Terminal:
    """p2pfl on a terminal of so many columns and rows.

    Args:
        arguments: of p2pfl.
        columns: of the screen.
        rows: of the screen.
        environment: besides this process's own; None takes a name away.
        before: code that runs first in the program's process.
    """

    def __init__(
        self, *arguments: object, columns: int, rows: int = 200, environment: Mapping[str, str | None] | None = None, before: str = ""
    ) -> None:
        self.screen, self.columns = _Screen(columns, rows), columns
        self._stream, self.written = pyte.ByteStream(self.screen), b""
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        measured_elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        wanted = {**measured_elsewhere, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parent.parent), "LANG": "C.UTF-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI"):
            wanted.pop(name, None)
        wanted |= {name: value for name, value in (environment or {}).items() if value is not None}
        program = ["-c", f"from p2pfl.cli import main; {before}; main()"] if before else ["-m", "p2pfl"]
        self._process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=wanted,
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def until(self, holds: Callable[[Terminal], bool]) -> None:
        """Read what the program writes until something holds of the screen."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not holds(self):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, "\n".join(self.lines)
            assert self._read(left_s) or holds(self), "\n".join(["it has ended:", *self.lines])

    def to_its_end(self) -> int:
        """Read all that the program writes; its exit code."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self._read(deadline_s - time.monotonic()):
            assert time.monotonic() < deadline_s, "\n".join(self.lines)
        return self._process.wait(timeout=max(deadline_s - time.monotonic(), 1.0))

    def _read(self, at_most_s: float) -> bool:
        """Whether there was anything, or may still be."""
        if not select.select([self._master], [], [], max(at_most_s, 0.0))[0]:
            return True
        found = b""
        with contextlib.suppress(OSError):  # Linux says so when the last one has closed its end
            found = os.read(self._master, 65536)
        self.written += found
        self._stream.feed(found)
        return bool(found)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, without blanks at the ends of lines and without empty lines at the bottom."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    @property
    def printed(self) -> list[str]:
        """The lines as the program wrote them, without what moves and colours."""
        return [line.rstrip("\r") for line in _ESCAPE.sub("", self.written.decode()).split("\n")]
