"""Commands that take long: a bar on the terminal, and exit codes where a signal ends them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer

from p2pfl.errors import Paused

_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextmanager
def terminal_bar(count: str, *, width: int, enabled: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Give what shows (completed, total, note) on a bar on standard error; None where that is no terminal, or nothing may be shown.

    What it counts is said with {task.completed} and {task.total}; the bar itself is so many columns wide.
    """
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from p2pfl.cli.terminal import open_console

    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn(count), BarColumn(bar_width=width), note, TimeElapsedColumn())
    with Progress(*columns, console=open_console(stderr=True)) as bar:

        def show(completed: int, total: int, note: str) -> None:
            if not bar.task_ids:
                bar.add_task("", total=total, note=note)
            bar.update(bar.task_ids[0], completed=completed, note=note)

        yield show


@contextmanager
def pausable(*, hears: bool = False) -> Iterator[None]:
    """Context of a run that may raise Paused, for which the command prints a sentence and exits with code 0.

    Where it *hears*, SIGTERM and SIGHUP interrupt as Ctrl-C does, unless somebody has them ignored; else the run hears them itself.

    Raises:
        typer.Exit: with code 0, after a pause; with 128 and the signal's number, where there is nothing to go on with.
    """
    heard: list[signal.Signals] = []

    def interrupt(number: int, _: object) -> None:
        heard.append(signal.Signals(number))
        raise KeyboardInterrupt

    mine = [number for number in _ENDING if hears and signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    except Paused as paused:
        by = f" by {(heard or [paused.by])[0].name}"
        if os.environ.get("RANK", "0") == "0":  # of those that torchrun has started
            with suppress(OSError):  # the terminal is gone
                sys.stderr.write(f"p2pfl: paused{by}; {paused.go_on}\n")
                sys.stderr.flush()
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + (heard or [signal.SIGINT])[0]) from None
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
