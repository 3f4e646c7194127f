"""Virtual time for whole networks in one process: an event loop whose clock moves on only when nobody has anything to do.

Work in threads is done in the loop and takes virtual seconds. Each task belongs to a process, as its context says; a process can stand
still as by SIGSTOP, or be killed, and has a wall clock of its own. A loop that turns without time going on is a hang, and so is one that
waits for nothing: both end with the names of the tasks.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import selectors
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from p2pfl.node import workplace

TURNS = 20_000
"""So many turns of the loop at one moment are a hang: eight nodes that have much to say to each other need some hundred."""

EPOCH_S = 1.8e9
STEP_S = 1e-9
_NAMED = 5


class HangError(AssertionError):
    """Virtual time does not go on."""


@dataclass(eq=False)
class VirtualProcess:
    """Tasks that stand still and end together, and their wall clock."""

    name: str
    clock_offset_s: float = 0.0
    is_stopped: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _held: list[tuple[asyncio.Handle, Callable[..., object], tuple[Any, ...], contextvars.Context]] = field(default_factory=list)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        context = contextvars.copy_context()
        context.run(_PROCESS.set, self)
        return asyncio.get_running_loop().create_task(work, name=self.name, context=context)

    def stop(self) -> None:
        """As SIGSTOP does: nothing of it runs until `go_on`."""
        self.is_stopped = True

    def go_on(self) -> None:
        """As SIGCONT does: all that it would have done meanwhile it does now."""
        self.is_stopped = False
        held, self._held = self._held, []
        for handle, callback, arguments, context in held:
            asyncio.get_running_loop().call_soon(_unless_cancelled, handle, callback, arguments, context=context)

    async def kill(self) -> None:
        """End every task of it at once."""
        for task in self.tasks:
            task.cancel()
        self.go_on()
        while self.tasks:
            await asyncio.wait(self.tasks)

    def hold(
        self, handle: asyncio.Handle, callback: Callable[..., object], arguments: tuple[Any, ...], context: contextvars.Context
    ) -> None:
        self._held.append((handle, callback, arguments, context))


_PROCESS: contextvars.ContextVar[VirtualProcess | None] = contextvars.ContextVar("process", default=None)


def _unless_cancelled(handle: asyncio.Handle, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if not handle.cancelled():
        callback(*arguments)


class _Selector(selectors.SelectSelector):
    """Waits for nothing but time, which goes on at once."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.pass_s(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop of all processes; *work_s* draws how long each piece of work in a thread takes."""

    def __init__(self, work_s: Callable[[], float]) -> None:
        selector = _Selector()
        selector.loop = self
        self._now_s, self._work_s, self._turns = 0.0, work_s, 0
        self._runs: Counter[str] = Counter()
        super().__init__(selector)
        self._clock_resolution = STEP_S
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._now_s

    def pass_s(self, timeout_s: float | None) -> None:
        """Let time go on to the next timer; at once where something is to be done."""
        if timeout_s is None:
            raise HangError(f"nobody will ever go on at {self._now_s:.3f} s: {_described(asyncio.all_tasks(self))}")
        if timeout_s > 0:
            self._now_s += timeout_s + STEP_S
            self._turns = 0
            self._runs.clear()
            return
        self._turns += 1
        if self._turns > TURNS:
            self._turns = 0  # for the end of the tasks
            often = ", ".join(f"{name} ({count} times)" for name, count in self._runs.most_common(_NAMED))
            raise HangError(f"time stands still at {self._now_s:.3f} s, while these run: {often}; {_described(asyncio.all_tasks(self))}")

    def call_soon(self, callback: Any, *arguments: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        return self._gated(super().call_soon, (), callback, arguments, context)

    def call_at(self, when: float, callback: Any, *arguments: Any, context: contextvars.Context | None = None) -> Any:
        return self._gated(super().call_at, (when,), callback, arguments, context)

    def _gated(self, call: Any, when: tuple[float, ...], callback: Any, arguments: tuple[Any, ...], given: Any) -> Any:
        context = given if given is not None else contextvars.copy_context()
        process = context.get(_PROCESS)

        def run() -> None:
            if process is not None and process.is_stopped:
                process.hold(handle, callback, arguments, context)
                return
            if isinstance(task := getattr(callback, "__self__", None), asyncio.Task):
                self._runs[f"{process.name + ': ' if process is not None else ''}{task.get_name()}"] += 1
            callback(*arguments)

        handle = call(*when, run, context=context)
        return handle

    def run_in_executor(self, executor: Any, func: Any, *arguments: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return  # its process was killed before
            try:
                found = func(*arguments)
            except Exception as error:  # noqa: BLE001 - as an executor does
                future.set_exception(error)
            else:
                future.set_result(found)

        self.call_later(self._work_s(), work)
        return future


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
    process = (context if context is not None else contextvars.copy_context()).get(_PROCESS)
    if process is not None:
        process.tasks.add(task)
        task.add_done_callback(process.tasks.discard)
    return task


def _described(tasks: set[asyncio.Task[Any]]) -> str:
    """Where each task waits."""
    said = []
    for task in sorted(tasks, key=asyncio.Task.get_name):
        frames = task.get_stack()
        where = f"{frames[-1].f_code.co_name}, line {frames[-1].f_lineno}" if frames else "its end"
        said.append(f"{task.get_name()} in {where}")
    return "; ".join(said)


def run_virtually(
    test: Coroutine[Any, Any, Any], *, seed: int, at_most_s: float = math.inf, work_s: tuple[float, float] = (0.005, 0.05)
) -> Any:
    """Run a test in virtual time, which it ends within; each piece of work in a thread takes between these seconds.

    Raises:
        HangError: time does not go on, or no end comes within the virtual seconds that are allowed; the message names the tasks.
    """
    chance = np.random.default_rng([seed, 1])
    loop = VirtualLoop(lambda: float(chance.uniform(*work_s)))

    def wall_s() -> float:
        process = _PROCESS.get()
        return EPOCH_S + loop.time() + (process.clock_offset_s if process is not None else 0.0)

    async def within() -> Any:
        task = asyncio.create_task(test, name="test")
        done, _ = await asyncio.wait([task], timeout=None if at_most_s == math.inf else at_most_s)
        if not done:
            raise HangError(f"no end within {at_most_s:g} virtual seconds: {_described(asyncio.all_tasks())}")
        return task.result()

    with (
        patch.object(time, "monotonic", loop.time),
        patch.object(time, "time", wall_s),
        patch.object(workplace, "SHORT_S", 0.0),  # all work is done in threads
        asyncio.Runner(loop_factory=lambda: loop) as runner,
    ):
        return runner.run(within())
