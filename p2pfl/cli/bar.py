"""How far something is, on a terminal."""

from __future__ import annotations

import sys
from typing import Any, Self


class Bar:
    """A bar on standard error where that is a terminal, nothing otherwise. Used inside `with`.

    Args:
        count: what it counts, with {task.completed} and {task.total}.
        width: of the bar itself, in columns.
        enabled: whether anything may be shown at all.
    """

    def __init__(self, count: str, *, width: int, enabled: bool) -> None:
        self._count, self._width, self.enabled = count, width, enabled
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            from p2pfl.cli.terminal import open_console

            self._bar = Progress(
                TextColumn(self._count),
                BarColumn(bar_width=self._width),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                console=open_console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    @property
    def is_there(self) -> bool:
        """Whether there is a terminal to show it on."""
        return self._bar is not None

    def show(self, completed: int, total: int, note: str) -> None:
        """How far it is."""
        if self._task is None:
            self._task = self._bar.add_task("", total=total, note=note)
        self._bar.update(self._task, completed=completed, note=note)
