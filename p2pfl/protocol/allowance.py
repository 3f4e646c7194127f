"""The part of this node that one neighbour may use: messages, bytes and nonsense, each with a limit; without input or output.

What is above the limits is dropped before it is decoded: an honest neighbour is asked again for what it is needed for. Who goes on all the
same, or sends what no honest member sends, is disconnected, each time for longer. The limits follow from what an honest member can need,
and are several times as large: most of what a node may send is bounded by its own rounds, of which each ends with a checkpoint on its disk.
"""

from __future__ import annotations

from p2pfl.wire.codec import CHUNK_BYTES

MESSAGES_PER_S = 1000.0
"""More than 300 rounds a second, each with an update, round records and a request: a checkpoint for each exchange allows no more."""

MESSAGES_AT_ONCE = 2000.0
"""Seconds' worth of messages that may come at once: they wait in a link while this node itself is held up."""

ROUNDS_PER_S = 500.0
"""A neighbour that does not wait for this node sends it an update for each round of its own."""

UPDATE_BYTES_PER_S = 128 * 2.0**20
"""Updates of a neighbour that goes ahead may come as fast as a link of 1 Gbit/s; one that is in step earns more with each exchange."""

OTHER_BYTES_PER_S = 2.0**20
"""Everything but updates: a thousand messages of a kilobyte."""

BYTES_AT_ONCE = 16 * 2.0**20
"""And updates: those of all exchanges that a neighbour may be ahead."""

UPDATES_AT_ONCE = 10
"""Updates that may come at once after an outage: a node keeps nine where the graph changes."""

UPDATES_PER_EXCHANGE = 2
"""In each exchange of this node: the update, and the full one or one that is sent again."""

PROBES_PER_S, PROBES_AT_ONCE = 10.0, 100.0
"""Questions of a doctor that are answered: each asks 64 at most, and does so again after ten seconds at the earliest."""

PROBE_BYTES_PER_S, PROBE_BYTES_AT_ONCE = 0.4e6, 4e6
"""And their bytes, as many as their answers have: no cap on updates holds those up."""

DROPPED_FRACTION = 0.25
"""A neighbour may go on above its limits at this fraction of them, without being disconnected: all of that is dropped."""

NONSENSE_PER_S = 4.0
"""A neighbour with another version of the schema greets twice a second."""

NONSENSE_AT_ONCE = 32.0

EXCLUDED_S = 10.0
"""How long a neighbour is disconnected the first time; twice as long each further time."""

EXCLUDED_AT_MOST_S = 3600.0
_DOUBLINGS = 16

FORGIVEN_AFTER_S = 3600.0
"""A neighbour that keeps to the limits for so long is treated as at the first time."""

NONSENSE = frozenset(
    {
        "bad_message",
        "bad_record",
        "frame_count",
        "routing_id",
        "wrong_digest",
        "wrong_format",
        "wrong_report",
        "wrong_schema",
        "wrong_signature",
        "wrong_size",
    }
)
"""Reasons of refusals for which no honest member gives cause. It may hold another study, be restarted, diverge, or say more than needed."""


class TokenBucket:
    """A rate with a limited reserve: so many tokens come back each second, and it holds so many at most; full at first."""

    def __init__(self, per_s: float, most: float) -> None:
        self.per_s, self.most, self.left = per_s, most, most
        self._looked_at_s = float("-inf")

    def take(self, amount: float, now_s: float) -> bool:
        """Take tokens out, if there are so many; whether there were."""
        if self.refill(now_s) < amount:
            return False
        self.left -= amount
        return True

    def add(self, amount: float) -> None:
        """Put tokens in that were earned otherwise than by time."""
        self.left = min(self.most, self.left + amount)

    def refill(self, now_s: float) -> float:
        """Tokens that are there at this time."""
        if now_s > self._looked_at_s:
            self.left = min(self.most, self.left + (now_s - self._looked_at_s) * self.per_s)
            self._looked_at_s = now_s
        return self.left


class NeighbourAllowance:
    """Messages and bytes that one neighbour, whose largest update has *update_bytes*, may still send. Times are on the caller's clock."""

    def __init__(self, update_bytes: int = 0) -> None:
        self.update_bytes = update_bytes
        self.num_dropped = 0
        """Messages above the limits so far."""
        self.times_excluded = 0
        """Since it last kept to the limits for long."""
        self.excluded_until_s = float("-inf")
        self.broken = ""
        """The limit that it has just broken for good; empty where there is none."""
        bytes_per_s = OTHER_BYTES_PER_S + min(ROUNDS_PER_S * update_bytes, UPDATE_BYTES_PER_S)
        bytes_at_once = BYTES_AT_ONCE + UPDATES_AT_ONCE * update_bytes
        messages_at_once = MESSAGES_AT_ONCE + UPDATES_AT_ONCE * self._further_chunks
        self._earned_bytes = UPDATES_PER_EXCHANGE * update_bytes
        self._earned_messages = UPDATES_PER_EXCHANGE * self._further_chunks
        self._messages = TokenBucket(MESSAGES_PER_S, messages_at_once)
        self._bytes = TokenBucket(bytes_per_s, bytes_at_once)
        self._dropped_messages = TokenBucket(DROPPED_FRACTION * MESSAGES_PER_S, messages_at_once)
        self._dropped_bytes = TokenBucket(DROPPED_FRACTION * bytes_per_s, bytes_at_once)
        self._nonsense = TokenBucket(NONSENSE_PER_S, NONSENSE_AT_ONCE)
        self._probes = TokenBucket(PROBES_PER_S, PROBES_AT_ONCE)
        self._probe_bytes = TokenBucket(PROBE_BYTES_PER_S, PROBE_BYTES_AT_ONCE)

    def earn(self) -> None:
        """Note that this node has begun an exchange, for which the neighbour sends an update, however fast that comes."""
        self._bytes.add(self._earned_bytes)
        if self._earned_messages:
            self._messages.add(self._earned_messages)

    def admits(self, size_bytes: int, now_s: float) -> bool:
        """Whether a message may be decoded; one that may not is to be dropped."""
        if now_s < self.excluded_until_s:  # on its way when the connection was ended
            return False
        if self._bytes.refill(now_s) >= size_bytes and self._messages.take(1, now_s):
            self._bytes.left -= size_bytes
            return True
        self.num_dropped += 1
        if not self._dropped_messages.take(1, now_s):
            self.broken = "more messages than any round needs"
        elif not self._dropped_bytes.take(size_bytes, now_s):
            self.broken = "more bytes than any round needs"
        return False

    def answers(self, size_bytes: int, now_s: float) -> bool:
        """Whether a doctor's question of this size is answered; nobody is disconnected for one that is not."""
        if self._probe_bytes.refill(now_s) < size_bytes or not self._probes.take(1, now_s):
            return False
        return self._probe_bytes.take(size_bytes, now_s)

    def refused(self, reason: str, now_s: float, *, times: int = 1) -> None:
        """Note that what came was no message that may count."""
        if reason in NONSENSE and not self._nonsense.take(times, now_s):
            self.broken = f"messages that no member sends ({reason})"

    @property
    def _further_chunks(self) -> int:
        """Messages of one update, but for the first."""
        return max(0, self.update_bytes - 1) // CHUNK_BYTES

    def exclusion(self, now_s: float) -> tuple[float, str] | None:
        """How long the neighbour is to be disconnected from now on, and why; None: not at all. Each exclusion is told once."""
        if not self.broken or now_s < self.excluded_until_s:
            return None
        if now_s - self.excluded_until_s > FORGIVEN_AFTER_S:
            self.times_excluded = 0
        for_s = min(EXCLUDED_S * 2.0 ** min(self.times_excluded, _DOUBLINGS), EXCLUDED_AT_MOST_S)
        why, self.broken = self.broken, ""
        self.times_excluded += 1
        self.excluded_until_s = now_s + for_s
        return for_s, why
