"""Seconds that a node spends on its run, by what they are spent on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from p2pfl.runs.stopwatch import with_rest

_PARTS = ("train", "wait", "mix", "evaluate")
"""Parts of a round; checkpoints belong to the next recorded one."""


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
