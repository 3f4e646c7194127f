"""The way of a computation through the package's files, counted while it runs.

A file counts where it hands work on to another file; a look-up in a file that hands nothing on does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from test_layers import PACKAGE, room_of, row_of


@dataclass
class Visit:
    """A time in one file, with the visits to other files that were made from it."""

    file: str
    visits: list[Visit] = field(default_factory=list)

    def stays(self, before: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        """Ways from the beginning to every file that hands work on, each counted once however often it is gone."""
        found = set()
        for visit in self.visits:
            if visit.visits:
                way = (*before, visit.file)
                found |= {way} | visit.stays(way)
        return found

    def climbs(self) -> set[tuple[str, str]]:
        """Calls from a lower room into a higher one."""
        here = {(self.file, visit.file) for visit in self.visits if self.file and _row(visit.file) > _row(self.file)}
        return here.union(*(visit.climbs() for visit in self.visits))


@contextmanager
def way() -> Iterator[Visit]:
    """The visits of this thread to the package's files inside the block."""
    start = Visit("")
    open_visits, frames = [start], []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (file := _file(frame.f_code.co_filename)) is not None and not frame.f_code.co_name.startswith("<"):
            is_new = open_visits[-1].file != file
            if is_new:
                visit = Visit(file)
                open_visits[-1].visits.append(visit)
                open_visits.append(visit)
            frames.append((frame, is_new))
        elif event == "return" and frames and frames[-1][0] is frame and frames.pop()[1]:
            open_visits.pop()

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(note)
    try:
        yield start
    finally:
        sys.setprofile(before)


@cache
def _file(name: str) -> str | None:
    path = Path(name)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def _row(file: str) -> int:
    return row_of(room_of(Path(file)))
