"""The one kind of console that commands print on."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from p2pfl.cli.streams import VisibleText
from p2pfl.errors import visible


class VisibleConsole(Console):
    """A console that styles its own output, and shows control characters in what it prints as escapes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of something to print."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == (safe := visible(segment.text)):
                yield segment
            else:
                yield Segment(safe, segment.style)


def open_console(*, stderr: bool = False, **options: Any) -> Console:
    """A console on standard output, or standard error; letters that the terminal lacks are replaced."""
    stream: Any = sys.stderr if stderr else sys.stdout
    if isinstance(stream, VisibleText):
        stream = stream.inner
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return VisibleConsole(file=stream, **options)
