"""Processes forked from one that has imported what a daemon needs: each is its own, and the pages that none of them changes are there once.

The server reads lines of JSON and answers in lines of JSON; a process goes by the name that it was asked for by.

    {"read": FILE}                                      the study, which every process will load: it is read once
    {"start": NAME, "arguments": [...], "log": FILE}    fork one that runs this command line, its output added to the file
    {"signal": NAME, "number": N}                       pass it on, if the process is still there
    {"ready": true, "unfit": null}                      everything is imported; not null: why nothing can be forked here
    {"started": NAME, "pid": N}                         it runs
    {"ended": NAME, "code": N}                          its exit code, or minus the number of the signal that ended it

When the lines end, the processes are told so by the end of their standard input; those that stay longer than `PATIENCE_S` are killed. If
the server itself is killed the system kills them with it. Each of them holds the answers' pipe open, so that the end of the answers means
that none is left.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PATIENCE_S = 15.0

SHARED = (
    "p2pfl.node.start",
    "numpy.random",
    "scipy.sparse.csgraph",
    "scipy.sparse.linalg",
    "sklearn.datasets",
    "scipy.stats",
    "sklearn.model_selection",
)
"""Modules that daemons import, some of them only where their task or their graph needs it."""

ROOM = 4096
"""Bytes of a command line that processes have for showing their own."""

_NO_THREAD = "background_thread:false"
"""Setting of jemalloc: memory goes back to the system without a thread of its own."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ARGUMENTS_BEGIN, _ARGUMENTS_END = 45, 46  # in /proc/self/stat, counted from behind the name

Program = Callable[[Sequence[str]], None]
"""Runs the command line with some arguments."""


def serve(program: Program, *, shared: Sequence[str] = SHARED, prepare: Callable[[], None] | None = None) -> None:
    """Serve standard input until it ends and every process has.

    Args:
        program: runs a command line in a forked process.
        shared: modules to import before the first fork.
        prepare: called after that, and before the first fork; it must leave no thread behind.
    """
    _show(["node", "fork-server"])
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what an import prints is no answer
    gc.disable()  # a collection writes to every object, and so to every page
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", _NO_THREAD)  # of pyarrow, which scikit-learn imports by way of pandas where they are
    for name in shared:
        import_module(name)
    if prepare is not None:
        prepare()
    gc.freeze()
    _Server(program, sys.stdin.fileno(), answers).run()


@dataclass
class _Server:
    """The loop of the one process that forks."""

    program: Program
    commands: int
    """Descriptors, these two."""
    answers: int
    _running: dict[int, str] = field(default_factory=dict)
    """Names by process id."""
    _line: bytes = b""
    """The beginning of a command."""

    def run(self) -> None:
        """Until the commands have ended and every process has."""
        self._lifeline = os.pipe()
        self._woken = os.pipe()
        for end in self._woken:
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # what matters is that the pipe below is written to
        signal.set_wakeup_fd(self._woken[1], warn_on_full_buffer=False)
        self._kernel = ctypes.CDLL(None, use_errno=True)
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads > 1:
            self._answer(ready=True, unfit=f"{threads} threads run in it, and what they hold at a fork nobody would ever let go of")
            return
        self._answer(ready=True, unfit=None)
        kill_at_s = float("inf")
        watched = [self.commands, self._woken[0]]
        while self.commands in watched or self._running:
            left_s = None if kill_at_s == float("inf") else max(0.0, kill_at_s - time.monotonic())
            ready, _, _ = select.select(watched, [], [], left_s)
            if self._woken[0] in ready:
                os.read(self._woken[0], 4096)
                self._reap()
            if self.commands in ready and not self._obey():
                watched.remove(self.commands)
                os.close(self._lifeline[1])
                kill_at_s = time.monotonic() + PATIENCE_S
            if time.monotonic() >= kill_at_s:
                for pid in self._running:
                    os.kill(pid, signal.SIGKILL)
                kill_at_s = float("inf")

    def _obey(self) -> bool:
        """Take what has come; False: nothing more will."""
        content = os.read(self.commands, 65536)
        *lines, self._line = (self._line + content).split(b"\n")
        self._gate = os.pipe()
        for line in lines:
            command = json.loads(line)
            if "start" in command:
                self._fork(command["start"], command["arguments"], command["log"])
            elif "read" in command:
                _read(command["read"])
            else:
                for pid in [pid for pid, name in self._running.items() if name == command["signal"]]:
                    os.kill(pid, command["number"])
        for end in self._gate:
            os.close(end)
        return bool(content)

    def _fork(self, name: str, arguments: Sequence[str], log: str) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            with Path(log).open("a", encoding="utf-8") as output:
                output.write(f"p2pfl: {name} cannot be forked: {error.strerror}\n")
            self._answer(ended=name, code=1)
            return
        if not pid:
            _run(lambda: self._become(arguments, log, server), self.program, arguments)
        self._running[pid] = name
        self._answer(started=name, pid=pid)

    def _become(self, arguments: Sequence[str], log: str, server: int) -> None:
        """Let go of what is the server's, but for the answers' pipe."""
        self._kernel.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != server:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.close(self._gate[1])
        os.read(self._gate[0], 1)  # until all are there: the first ones would take the time that the others need for their start
        for mine, standard in ((self._lifeline[0], 0), (output, 1), (output, 2)):
            os.dup2(mine, standard)
        for servers in (*self._lifeline, *self._woken, self._gate[0], output):
            os.close(servers)
        _show(arguments)
        import numpy as np

        np.random.seed()  # noqa: NPY002  # numpy's own generator, which a task may use, would go on in the same way in all of them
        gc.enable()

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            name = self._running.pop(pid)
            self._answer(ended=name, code=os.waitstatus_to_exitcode(status))

    def _answer(self, **line: Any) -> None:
        with suppress(BrokenPipeError):  # whoever asked is gone; the end of the commands says so as well
            os.write(self.answers, json.dumps(line).encode() + b"\n")


def _read(file: str) -> None:
    from p2pfl.errors import ConfigError
    from p2pfl.experiment.loading import load_study
    from p2pfl.training.backends.compiled import load_for_forks
    from p2pfl.yaml_files import keep_yaml

    with suppress(ConfigError):  # each process will say so itself
        keep_yaml(file)
        study = load_study(file)  # each process will; what checks a file's types is made once
        if study.experiment.get("compiled") == "on":
            load_for_forks()
    gc.freeze()


def _show(arguments: Sequence[str]) -> None:
    """Be listed as the command line that this process runs, where the server's is long enough to write it there."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    begin, end = int(fields[_ARGUMENTS_BEGIN]), int(fields[_ARGUMENTS_END])
    words = b"".join(os.fsencode(word) + b"\0" for word in (sys.orig_argv[0], "-m", "p2pfl", *arguments))
    if len(words) <= end - begin:
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, words, len(words))


def _run(become: Callable[[], None], program: Program, arguments: Sequence[str]) -> NoReturn:
    """One process's life. It ends here: what is further up the stack is the server's."""
    code = 1
    try:
        try:
            become()
            program(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001  # as the interpreter ends a process
            sys.excepthook(*sys.exc_info())
        # not all of the interpreter's own end, which writes to every object and so to every page
        atexit._run_exitfuncs()  # noqa: SLF001
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
