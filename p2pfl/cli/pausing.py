"""Exit codes of commands that a signal ends: 0 where what there is can be gone on with, which is said; else as a shell expects."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from p2pfl.errors import Paused

_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextmanager
def pausable(*, hears: bool = False) -> Iterator[None]:
    """Turn a pause into its sentence and exit code 0; inside of it a run may raise Paused.

    Args:
        hears: SIGTERM and SIGHUP interrupt as Ctrl-C does, unless somebody has them ignored; False: the run hears them itself.

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
