"""Times at which neighbours' updates came, beside the time at which a node sent its own.

A node that records how much later than its own update each neighbour's came needs no clock but its own. At both ends of an edge these
times are s_j - s_i + d_ji and s_i - s_j + d_ij, with s the times of sending and d the ways of an update; their sum is d_ij + d_ji.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(slots=True)
class Arrivals:
    """When updates of this exchange and of the next ones came, at the pace of nodes that go in step."""

    sent_s: float | None = None
    """When this node sent its update of the exchange that it is in; None: not yet."""
    _came_s: dict[int, dict[str, float]] = field(default_factory=dict)

    def begin(self, exchange: int) -> None:
        """Be at an exchange from now on, and forget earlier ones."""
        self.sent_s = None
        self._came_s = {number: came for number, came in self._came_s.items() if number >= exchange}

    def note_sent(self, now_s: float) -> None:
        """Note that this node's own update of the exchange is on its way."""
        self.sent_s = now_s

    def note_came(self, name: str, exchange: int, now_s: float) -> None:
        """Note that a neighbour's update is here as a whole; the first one counts."""
        self._came_s.setdefault(exchange, {}).setdefault(name, now_s)

    def lateness(self, exchange: int, names: Collection[str]) -> dict[str, float]:
        """Seconds from this node's own sending until the updates of some neighbours came, negative where they came before."""
        came, sent_s = self._came_s.get(exchange, {}), self.sent_s
        return {} if sent_s is None else {name: came[name] - sent_s for name in names if name in came}
