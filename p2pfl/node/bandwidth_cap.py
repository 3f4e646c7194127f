"""Cap on what a node sends of models in a second, over all of its links together."""

from __future__ import annotations

_BITS = 8


class BandwidthCap:
    """Hands out times at which chunks of updates may go, in the order in which they are asked for.

    Args:
        mbit_s: megabits a second, headers of messages and of the network apart; None: there is no cap.
    """

    def __init__(self, mbit_s: float | None) -> None:
        self._bytes_per_s = None if mbit_s is None else mbit_s * 1e6 / _BITS
        self._free_s = 0.0

    def reserve(self, num_bytes: int, now_s: float) -> float:
        """Reserve the time that so many bytes take; returns when they may go, on the clock of *now_s*."""
        if self._bytes_per_s is None:
            return now_s
        begins_s = max(now_s, self._free_s)
        self._free_s = begins_s + num_bytes / self._bytes_per_s
        return begins_s
