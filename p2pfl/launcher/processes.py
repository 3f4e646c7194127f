"""The processes of `p2pfl up`: forked from one that has imported what they need, or each a Python of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from p2pfl.launcher.fork_server import PATIENCE_S, ROOM

PYTHON = (sys.executable, "-P")
"""Our own Python. Without -P, modules of the current folder, which somebody may have sent, would take the place of installed ones."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

POLL_S = 0.05
READY_S = 300.0
"""For importing everything from a slow disk."""


def own_path() -> dict[str, str]:
    """Where a Python that we start looks for modules: where the environment says, then where this one does; an empty part would be here."""
    said, ours = os.environ.get("PYTHONPATH", "").split(os.pathsep), Path(__file__).parents[2]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, [*said, *sys.path, str(ours)])))}


def can_fork() -> bool:
    """Whether a ForkServer works here: only Linux ends processes together with the one that forked them."""
    return sys.platform == "linux"


def start_plainly(name: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:  # noqa: ARG001  # as ForkServer.start has it
    """Run p2pfl's command line in a Python and a session of its own, its output added to a file.

    It is told by the end of its standard input that whoever started it is gone.
    """
    with log.open("ab") as output:
        running = subprocess.Popen(  # noqa: S603  # our own command
            [*PYTHON, "-m", "p2pfl", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={"OMP_NUM_THREADS": "1", **os.environ, **own_path(), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    assert running.stdin is not None
    weakref.finalize(running, running.stdin.close)  # with us, or once nobody asks for the process any more
    return running


@dataclass
class ForkedProcess:
    """Process of the fork server's."""

    name: str
    server: ForkServer
    code: int | None = None
    pid: int | None = None
    """Its number, once the fork server has said it."""

    def poll(self) -> int | None:
        """Give the exit code, or minus the number of the signal that ended it; None while it runs."""
        self.server.exchange()
        return self.code

    def send_signal(self, number: int, /) -> None:
        """Send the process a signal; one that has ended ignores it."""
        if self.code is None:
            self.server.say(signal=self.name, number=int(number))


Process = subprocess.Popen[bytes] | ForkedProcess


@dataclass
class ForkServer:
    """The process that the others are forked from, at work inside of a `with`; on leaving it ends, and they with it.

    Nothing here waits for it, but `is_fit` and leaving. It is spoken with when a process is polled. Once it is gone, however it ended,
    none of its processes is left (fork_server.py says how), and polling them says so.
    """

    command: Sequence[str] = (*PYTHON, "-m", "p2pfl", "--verbose", "node", "fork-server", " " * ROOM)
    """Command line that runs `fork_server.serve`."""
    unfit: str | None = None
    """Why it cannot fork, in its own words; known once it is ready."""
    _is_ready: bool = False
    _is_gone: bool = False
    _forked: dict[str, ForkedProcess] = field(default_factory=dict)
    _unsaid: bytes = b""
    _line: bytes = b""
    """The beginning of an answer."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603  # our own command
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **own_path(), **_ONE_THREAD, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._commands, self._answers):
            os.set_blocking(descriptor, False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._process:  # closes the pipes
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                if self._is_ready:
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(2 * PATIENCE_S)
            finally:
                self._process.kill()  # where it is still importing it has no processes

    async def is_fit(self) -> bool:
        """Wait until it has imported everything. False: it cannot fork, and `unfit` says why."""
        async with asyncio.timeout(READY_S):
            while not self._is_ready and not self._is_gone:
                self.exchange()
                await asyncio.sleep(POLL_S)
        return self.unfit is None

    def start(self, name: str, arguments: Sequence[str], log: Path) -> ForkedProcess:
        """Fork a process, as `start_plainly` starts one. Of processes that run at the same time each has another name."""
        self._forked[name] = ForkedProcess(name, self)
        self.say(start=name, arguments=list(arguments), log=str(log.absolute()))
        return self._forked[name]

    def say(self, **command: Any) -> None:
        """Give it a command, see fork_server.py; it hears of it when a process is polled next, of several at once."""
        self._unsaid += json.dumps(command).encode() + b"\n"

    def exchange(self) -> None:
        """Say what there is to be said as far as it is taken, and hear what has been answered."""
        with suppress(BlockingIOError, BrokenPipeError):  # it is busy; or gone, which the end of its answers says
            while self._unsaid:
                self._unsaid = self._unsaid[os.write(self._commands, self._unsaid) :]
        with suppress(BlockingIOError):
            while content := os.read(self._answers, 65536):
                *lines, self._line = (self._line + content).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            self._is_gone = True
            for process in self._forked.values():
                process.code = -signal.SIGKILL if process.code is None else process.code

    def _hear(self, answer: Mapping[str, Any]) -> None:
        match answer:
            case {"ready": _, "unfit": unfit}:
                self._is_ready, self.unfit = True, unfit
            case {"started": name, "pid": pid}:
                self._forked[name].pid = pid
            case {"ended": name, "code": code}:
                self._forked[name].code = code

    def fate(self) -> str | None:
        """Say in words how the fork server ended; None while it is at work."""
        if not self._is_gone:
            return None
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the process that the daemons are forked from {how}, and they ended with it"
