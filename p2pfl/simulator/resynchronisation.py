"""The values that encoded updates continue: which receivers do not hold them, so that daemons would send a full update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from p2pfl.simulator.tables import Tables


class Resynchronisation:
    """Exchanges whose updates are in the values that rows have, and in those that others hold of them."""

    def __init__(self) -> None:
        self._led_to: dict[tuple[int, int], int] = {}  # by phase and row: the exchange whose update is in its own values
        self._held: dict[tuple[int, int, int], int] = {}  # by phase, receiver and sender: the exchange whose update is in what it holds

    def note(self, exchange: int, phase: int, tables: Tables, present_NK: Tensor, merges_N: Tensor) -> list[tuple[int, int]]:
        """Note an exchange of encoded updates; returns receivers and senders where the values before it were not held."""
        found = []
        for i, k, j in tables.edges():
            if present_NK[i, k]:
                if self._held.get((phase, i, j), -1) != self._led_to.get((phase, j), -1):
                    found.append((i, j))
                self._held[phase, i, j] = exchange
        for j in merges_N.nonzero().flatten().tolist():
            self._led_to[phase, j] = exchange
        return found

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        return {
            "led_to": [[*key, exchange] for key, exchange in self._led_to.items()],
            "held": [[*key, exchange] for key, exchange in self._held.items()],
        }

    def restore(self, led_to: Sequence[Sequence[int]], held: Sequence[Sequence[int]]) -> None:
        """Take up the metadata of a checkpoint."""
        self._led_to = {(phase, row): exchange for phase, row, exchange in led_to}
        self._held = {(phase, receiver, sender): exchange for phase, receiver, sender, exchange in held}
