"""`p2pfl` in a process of its own, and in this one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pfl.cli import main


def hear_interrupts() -> None:
    """For a new process: what a shell starts with & ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_command(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """`p2pfl` with some arguments, its output to be read as text."""
    command = [sys.executable, "-m", "p2pfl", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_interrupts, **options)  # noqa: PLW1509


def run_here(*arguments: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`p2pfl` with some arguments in this process: its exit code, what it printed, and what it said on standard error."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["p2pfl", *map(str, arguments)])
        for name in ("stdout", "stderr"):
            patched.setattr(sys, name, getattr(sys, name))  # put back what main wraps
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, said.out, said.err
