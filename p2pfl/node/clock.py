"""Time of one node: the clock of its loops, the times that it allows, and the seconds that it has spent."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from p2pfl.runs.stopwatch import with_rest

_PARTS = ("train", "wait", "mix", "evaluate")
"""Parts of a round; checkpoints belong to the next recorded one."""


class LoopClock:
    """Clock that all loops of one node share; whoever waits on it is woken when something was heard or sent."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self.stopped_why: str | None = None
        """Reason why the loops are to leave, empty where none was given; None: they are not to."""

    @property
    def is_stopping(self) -> bool:
        """Whether the loops are to leave."""
        return self.stopped_why is not None

    def now_s(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._woken.set()

    def stop(self, why: str) -> None:
        """Ask the loops to leave after what is in hand."""
        self.stopped_why = why
        self.wake()

    async def wait(self, until_s: float) -> None:
        """Wait until something was heard or sent, at most until a time and never long."""
        self._woken.clear()
        timer = asyncio.get_running_loop().call_later(max(0.0, min(until_s - self.now_s(), 1.0)), self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Times that a node allows itself and its neighbours."""

    start_within_s: float | None = None
    """How long this node waits for all members before it starts; None: as the experiment's `require.within_s` says."""
    deadline_floor_s: float = 30.0
    """The least time that a neighbour has for a round, counted from when this node has sent its own model."""
    deadline_factor: float = 5.0
    """Or so many times what recent rounds took, where that is more."""
    linger_s: float = 30.0
    """How long a stopped node stays for neighbours that have not acknowledged everything."""
    round_at_least_s: float = 0.0
    """A round's training takes at least so long, for rehearsals with slow nodes."""


class RunSeconds:
    """Seconds of a node's run, earlier processes included."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._made_s = self._await_from_s = time.monotonic()
        self._earlier_s = 0.0  # of the process that wrote the checkpoint
        self._round = dict.fromkeys((*_PARTS, "checkpoint"), 0.0)

    def begin_waiting(self, now_s: float) -> None:
        """Everything is set up, and the other members are waited for."""
        self._await_from_s = now_s

    def note_start(self, now_s: float) -> None:
        """Tell the seconds until everything was set up from those spent waiting for the other members."""
        self.spent["setup"], self.spent["waiting"] = self._await_from_s - self._made_s, now_s - self._await_from_s

    def begin_round(self) -> None:
        """Count a round's seconds from nothing."""
        self._round |= dict.fromkeys(_PARTS, 0.0)

    def spend(self, part: str, seconds: float) -> None:
        """Add to a part of the round, or to its checkpoints."""
        self._round[part] += seconds

    def end_round(self) -> dict[str, float]:
        """Add the parts of a round to those of the run; returns them with the checkpoints since the last one."""
        ended, self._round = self._round, dict.fromkeys(self._round, 0.0)
        self._add(ended)
        return ended

    def total(self) -> dict[str, float]:
        """All seconds until now, those without a name as `other`."""
        self._add({"checkpoint": self._round["checkpoint"]})
        self._round["checkpoint"] = 0.0
        return with_rest(self.spent, self._earlier_s + time.monotonic() - self._made_s)

    def restore(self, spent: Mapping[str, float]) -> None:
        """Take up what an earlier process has spent."""
        self.spent = dict(spent)
        self._earlier_s = math.fsum(spent.values())

    def _add(self, seconds: Mapping[str, float]) -> None:
        for name, spent in seconds.items():
            self.spent[name] = self.spent.get(name, 0.0) + spent
