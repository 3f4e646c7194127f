"""`p2pfl` in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def hear_interrupts() -> None:
    """For a new process: what a shell starts with & ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_command(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """`p2pfl` with some arguments, its output to be read as text."""
    command = [sys.executable, "-m", "p2pfl", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_interrupts, **options)  # noqa: PLW1509
