"""How long a neighbour's update is waited for: the deadline of an exchange, and the patience with each neighbour."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.runs.events import EventKind

STALL_S = 5.0
"""An update that is coming in is not asked for as long as no pause between two chunks is longer."""

PATIENCE_FACTOR = 2.0
"""An update of which a part is here is waited for, past the deadline, until for so many times the deadline's floor no more has come.
It is for links that carry a chunk of 1 MiB in a minute, and for one that was cut in the middle of an update."""

LEAST_BYTES_PER_S = 2**16
"""An update that takes longer than at so many bytes a second is not waited for to its end."""

LITTLE_PATIENCE = 1 / 16
"""With less than this fraction of the usual patience a neighbour is waited for rarely, for a round's usual time."""

IN_SYNC = 2
"""A neighbour whose update came to one of so many exchanges before this one is with the others."""

LATER_THAN_USUAL = 2.0
"""Such a neighbour may be so many times as late as updates usually are."""

SOON = 2
"""So many complete updates in a row double the patience with a neighbour after its first miss."""

LATER = 64
"""So many do after further misses."""

MOST_MISSES = 8
"""So many misses count; more of them change nothing."""

FORGIVEN_AFTER_S = 3600.0
"""A miss counts for so long at most."""

REST_FACTOR = 4
"""After a miss with little patience a neighbour is not waited for in so many exchanges, after the next one in that many times more."""

HELD_AFTER = 3
"""A neighbour that speaks and does not come to so many exchanges that waited for it has held this node."""

WINDOW = 20
"""How many recent durations count."""

QUANTILE = 0.95
"""Quantile of these durations that the deadline is a multiple of."""

CEILING_S = 3600.0
"""However slow recent rounds were: a neighbour that comes ever later must not stretch the deadline without end."""

BACKLOG_FOR_S = 30.0
"""Messages that were sent to a process that stood still come in within so long after it goes on."""

_NEVER_S = float("-inf")


class RoundDurations:
    """A deadline for the next round: a multiple of what nearly all recent rounds needed, with a floor.

    Args:
        factor: at least 1; what a round may take beyond the 95th percentile.
        floor_s: never less than this, and exactly this before the first round.
    """

    def __init__(self, *, factor: float, floor_s: float, window: int) -> None:
        if factor < 1 or floor_s <= 0 or window < 1:
            raise ValueError(f"factor {factor}, floor {floor_s} s, window {window}: expected at least 1, above 0, at least 1")
        self._factor = factor
        self.floor_s = floor_s
        self._durations_s: deque[float] = deque(maxlen=window)
        self._usual_s = 0.0

    def record(self, duration_s: float) -> None:
        """A round in which everybody came took so long.

        Record a straggler as well, when its update comes after the deadline, with the time it would have taken to wait for it: else a pace
        that is too fast for a neighbour would never find out.
        """
        self._durations_s.append(duration_s)
        ordered = sorted(self._durations_s)  # it is asked for more often than there are new ones
        self._usual_s = ordered[math.ceil(QUANTILE * len(ordered)) - 1]

    def allowance_s(self, own_s: float = 0.0) -> float:
        """How long the next round may wait: max(floor, factor * q95); before there was one in which everybody came *own_s* counts."""
        return max(self.floor_s, self._factor * (self.usual_s() if self._durations_s else own_s))

    def usual_s(self) -> float:
        """How long nearly all recent rounds needed, by nearest rank; 0 before the first."""
        return self._usual_s


@dataclass(slots=True)
class Patience:
    """Patience with one neighbour: less after each miss, more again with complete updates."""

    fraction: float = 1.0
    """Fraction of the usual time for which it is waited for: halved by each miss, doubled by complete updates."""
    misses: int = 0
    """How often it was waited for in vain and has not made up for it."""
    complete: int = 0
    """Complete updates in a row since its last miss."""
    rests: int = 0
    """How often it was waited for in vain with so little patience that it could not have caught up in a round's usual time."""
    rests_until: int = -1
    """Before this exchange nobody waits for it, because of that."""
    came_to: int = -(2**53)
    """The last exchange that its update came to."""
    missed_s: float = _NEVER_S
    """When it was last waited for in vain."""
    behind_s: float = _NEVER_S
    """When it last said that it is still at an earlier exchange than this node, which has sent its own: it waits for somebody else."""
    extended_s: float = 0.0
    """How long this exchange has waited for it beyond its own time, for an update that was coming in or because it said that it waits."""
    held: int = 0
    """Exchanges that waited for it in vain although it spoke."""
    held_s: float = 0.0
    """Seconds that they took."""

    def note_miss(self, now_s: float, *, was_held_up: bool) -> None:
        """It was waited for in vain: the next time it is waited for half as long, or a quarter where it has used up more than its time.

        A first time only half, where somebody else held it up: it waits less for that one then than it is waited for itself.
        """
        halvings = 2 if self.extended_s > 0 and not (was_held_up and not self.misses) else 1
        self.misses = min(self.misses + halvings, MOST_MISSES)
        self.fraction = max(self.fraction / 2**halvings, 2.0**-MOST_MISSES)
        self.complete, self.missed_s = 0, now_s

    def note_complete(self) -> None:
        """Its update came in time: enough of them in a row double the patience with it, and then make its misses forgotten."""
        if not self.misses:
            return
        self.complete += 1
        if self.complete < (SOON if self.misses == 1 and self.fraction < 1 else LATER):
            return
        self.complete = 0
        if self.fraction < 1:
            self.fraction = min(1.0, 2 * self.fraction)
        else:
            self.misses = self.rests = 0

    def forgive(self, now_s: float) -> None:
        """Take back one miss for each hour since the last one."""
        while self.misses and now_s - self.missed_s >= FORGIVEN_AFTER_S:
            self.missed_s += FORGIVEN_AFTER_S
            self.misses, self.rests = self.misses - 1, max(0, self.rests - 1)
            self.fraction = min(1.0, 2 * self.fraction) if self.misses else 1.0


class Deadlines:
    """How long one node waits, learnt from how long its exchanges took.

    Args:
        starting_exchanges: so many exchanges after the start everybody has gone through one: as many as news need links.
        waits_for_others: whether a third member has signed that a neighbour may be waiting for somebody in a round.
        was_held_up: whether a neighbour has signed that in a round it waited in vain for somebody other than this node.
    """

    def __init__(
        self,
        edges: Edges,
        durations: RoundDurations,
        *,
        starting_exchanges: int = 1,
        waits_for_others: Callable[[str, int], bool] = lambda _name, _round: False,
        was_held_up: Callable[[str, int], bool] = lambda _name, _round: False,
    ) -> None:
        self._edges, self._durations = edges, durations
        self._starting_exchanges, self._waits_for_others, self._was_held_up = starting_exchanges, waits_for_others, was_held_up
        self.patience = {name: Patience() for name in edges.neighbours}
        """By neighbour."""
        self.deadline_s = float("inf")
        """Until when this exchange waits for a neighbour with full patience; not before its own update has been sent."""
        self.began_s = 0.0
        """When this exchange began."""
        self.clock_s = float("nan")
        """The newest time that this node knows of."""
        self.away_exchanges = 0.0
        """How many exchanges the others can have made while this process stood still or did not run."""
        self._woke_s, self._still_s = _NEVER_S, 0.0
        """When this process last went on after it had stood still, and for how long it had."""
        self._recent_s: deque[float] = deque(maxlen=20)
        self._start_by_s = _NEVER_S
        self._stood_still = False
        """Whether this process has stood still since it sent its last update: nobody else is to blame for what did not come."""
        self._untrained_before = 0
        """Exchanges before this one are of a round that was jumped to: they take less time than others."""
        self._posted_s = 0.0
        self._waits_s: deque[float] = deque(maxlen=20)
        """From this node's own update to the last one of the others, of exchanges to which everybody came."""
        self._own_s = 0.0
        """How long this node took to send its last update."""
        self._last_came_s = _NEVER_S
        """When the last update of this exchange was complete."""

    # ---- what happens

    def note_time(self, now_s: float) -> None:
        """Take up the time; a gap that is as long as a deadline shows that this process has stood still, or did not run."""
        gap_s = now_s - self.clock_s
        if gap_s >= self._durations.floor_s:
            self._stood_still, self._woke_s = True, now_s
            self._still_s = gap_s if self.began_s else 0.0  # to a process that did not run nothing was sent
            self.away_exchanges += gap_s / (self.usual_s() or self.allowance_s())
        self.clock_s = now_s

    def backlog_s(self, now_s: float) -> float:
        """How long this process stood still, where messages of that time may still be coming; else 0."""
        return self._still_s if now_s - self._woke_s < BACKLOG_FOR_S else 0.0

    def note_backlog_heard(self) -> None:
        """Note that nothing old comes any more, until this process stands still again."""
        self._still_s = 0.0

    def wait_at_start(self, now_s: float, within_s: float, grace_s: float) -> None:
        """Wait in the first exchanges for neighbours that are alive: news of the start may still be on their way to them."""
        self._start_by_s = now_s + min(within_s, grace_s + self.allowance_s())

    def begin(self, now_s: float) -> None:
        """Begin an exchange, without a deadline yet."""
        self.note_time(now_s)
        self.began_s, self.deadline_s = now_s, float("inf")

    def start_waiting(self, now_s: float) -> None:
        """Wait from now on: this node's own update is on its way."""
        self.deadline_s = now_s + self.allowance_s()
        self.note_time(now_s)
        self._posted_s = self._last_came_s = now_s
        self._stood_still, self._own_s = False, now_s - self.began_s
        for patience in self.patience.values():
            patience.forgive(now_s)
            patience.extended_s = 0.0

    def start_asking(self, now_s: float) -> None:
        """Wait from now on for the answer of one neighbour alone."""
        self.note_time(now_s)
        self._stood_still, self.began_s = False, now_s

    def note_update(self, now_s: float) -> None:
        """Note that an update is complete."""
        self._last_came_s = now_s

    def note_late(self, neighbour: Neighbour, now_s: float) -> None:
        """Note an update after its exchange: a deadline that is too short for a neighbour must find that out."""
        if neighbour.missed and not neighbour.is_faulty and self.patience[neighbour.name].misses <= 1:
            self._durations.record(now_s - self.began_s)

    def note_behind(self, name: str, now_s: float) -> None:
        """Note that a neighbour says it is at an earlier exchange."""
        self.patience[name].behind_s = now_s

    def note_complete(self, name: str) -> None:
        """Note that a neighbour's update has been merged in this exchange."""
        self.patience[name].note_complete()
        self.patience[name].came_to = self._edges.exchange

    def note_answered(self, name: str, now_s: float) -> None:
        """Note that the one neighbour that was asked has answered."""
        self._durations.record(now_s - self.began_s)
        self.note_complete(name)

    def close(self, merged: Collection[str], skipped: Sequence[str], now_s: float) -> None:
        """End an exchange, and learn from it."""
        for name in merged:
            self.note_complete(name)
        if not skipped:
            self._durations.record(now_s - self.began_s)
            self._waits_s.append(max(0.0, self._last_came_s - self._posted_s))
            if self._edges.exchange >= self._untrained_before:
                self._recent_s.append(now_s - self.began_s)
        self.away_exchanges = 0.0 if merged else max(0.0, self.away_exchanges - 1)

    def jump(self, exchange: int) -> None:
        """Leave out the exchanges before this one."""
        self.away_exchanges = max(0.0, self.away_exchanges - (exchange - self._edges.exchange))
        self._untrained_before = exchange + self._edges.phases

    def note_miss(self, neighbour: Neighbour, now_s: float) -> None:
        """A neighbour was waited for in vain; one that speaks all the same holds this node."""
        if self._stood_still or not self.patience_with(neighbour.name):
            return
        patience = self.patience[neighbour.name]
        if self._is_little(patience) and not self._is_in_sync(patience):  # a shorter time would never let it catch up
            patience.rests = min(patience.rests + 1, MOST_MISSES)
            patience.rests_until = self._edges.exchange + 1 + REST_FACTOR**patience.rests
        patience.note_miss(now_s, was_held_up=self._was_held_up(neighbour.name, self._last_round))
        if neighbour.last_seen_s is None or neighbour.last_seen_s < self.began_s:
            return
        patience.held += 1
        patience.held_s += now_s - self.began_s
        if patience.held >= HELD_AFTER and is_power_of_two(patience.held // HELD_AFTER) and patience.held % HELD_AFTER == 0:
            spoke = f"{neighbour.name} spoke and did not come to {patience.held} exchanges"
            self._edges.on_event(EventKind.HELD, f"{spoke}, which waited for it for {patience.held_s:.0f} s in all", neighbour.name)

    # ---- how long

    def has_time(self, name: str, now_s: float) -> bool:
        """Whether a neighbour that has not come still has time."""
        neighbour, patience, deadline_s = self._edges.neighbours[name], self.patience[name], self._deadline_of(name)
        if now_s < deadline_s:
            return True
        if self._is_little(patience):
            return False
        longer = (
            self._is_flowing(neighbour, now_s)
            or now_s < self._deadline_after_waiting(name)
            or (
                self._edges.exchange < self._starting_exchanges
                and now_s < self._start_by_s
                and not patience.misses
                and neighbour.heard_exchange <= self._edges.exchange
                and neighbour.was_seen(now_s, self.allowance_s())
            )
        )
        if longer and now_s - deadline_s > self.patience_with(name) / 2:
            patience.extended_s = now_s - deadline_s
        return longer

    def patience_with(self, name: str) -> float:
        """How long a neighbour has for an exchange.

        Where the patience with it is little, it has as long as updates usually need where it came to one of the last exchanges. Else it may
        be late by a round, and needs a round's usual time to catch up: it has that, but more and more rarely, and in between none.
        """
        patience = self.patience[name]
        if not self._is_little(patience):
            return patience.fraction * self.allowance_s()
        usual_s = self._durations.usual_s()
        if self._is_in_sync(patience):
            return min(usual_s, LATER_THAN_USUAL * max(self._waits_s, default=usual_s))
        return 0.0 if self._edges.exchange < patience.rests_until else usual_s

    def allowance_s(self, *, is_training: bool = False) -> float:
        """How long a neighbour has for an exchange, with full patience; *is_training*: this node's training by now counts, too."""
        own_s = max(self._own_s, self.clock_s - self.began_s) if is_training else self._own_s
        return min(self._durations.allowance_s(own_s), max(CEILING_S, self._durations.floor_s))

    def usual_s(self) -> float | None:
        """How long recent exchanges took; None where that is not known."""
        return median(self._recent_s) if self._recent_s else None

    def may_rest_s(self, neighbour: Neighbour) -> float:
        """How long a neighbour's update of which a part is here may rest: at least as long as it has come in, which a cut would cost."""
        return max(STALL_S, PATIENCE_FACTOR * self._durations.floor_s, neighbour.flowed_s)

    def look_again_s(self, now_s: float, soon_s: float, awaited: Iterable[str]) -> float:
        """When this exchange may be over if nothing comes: the next deadline of anybody, or soon where none is left."""
        deadlines_s = [self.deadline_s, *map(self._deadline_of, awaited)]
        return min((each for each in deadlines_s if each > now_s), default=now_s + soon_s)

    def _deadline_of(self, name: str) -> float:
        """Until when a neighbour is waited for; sooner for one that was waited for in vain before."""
        return self.deadline_s - self.allowance_s() + self.patience_with(name)

    def _deadline_after_waiting(self, name: str) -> float:
        """Until when a neighbour is waited for that has itself waited for somebody else.

        Its time for this exchange begins when it has left the one before; it has at most as much once more. With one deadline for all,
        a node that is gone would make its neighbours late for theirs, and those for the next. A neighbour that was waited for in vain
        before has that time only where a third member has signed that somebody near it did not come.
        """
        patience = self.patience[name]
        if patience.misses and not self._waits_for_others(name, self._last_round):
            return _NEVER_S
        return min(patience.behind_s, self._deadline_of(name)) + self.patience_with(name)

    @property
    def _last_round(self) -> int:
        return self._edges.exchange // self._edges.phases - 1

    def _is_flowing(self, neighbour: Neighbour, now_s: float) -> bool:
        """Whether a neighbour's update is coming in, and is not slower than a link may be.

        Its time for that begins with the deadline, or when the last update of another neighbour was complete: they share a link.
        """
        fraction = self.patience[neighbour.name].fraction
        if not neighbour.is_flowing(self._edges.exchange, now_s, self.may_rest_s(neighbour) * fraction):
            return False
        began_s = max(self._deadline_of(neighbour.name), self._last_came_s)
        return now_s <= began_s + fraction * neighbour.session.announced_bytes / LEAST_BYTES_PER_S

    def _is_in_sync(self, patience: Patience) -> bool:
        return self._edges.exchange - patience.came_to <= IN_SYNC

    def _is_little(self, patience: Patience) -> bool:
        allowance_s = self.allowance_s()
        return patience.fraction * allowance_s < max(self._durations.usual_s(), LITTLE_PATIENCE * allowance_s)

    # ---- checkpoints

    def snapshot(self) -> dict[str, list[float]]:
        """Metadata for a checkpoint."""
        return {"recent_s": list(self._recent_s)}

    def restore(self, recent_s: Iterable[float], since_s: float) -> None:
        """Take up what `snapshot` gave at a moment of this process's clock."""
        self._recent_s.extend(recent_s)
        self.clock_s = since_s


def is_power_of_two(count: int) -> bool:
    """Whether an event that repeats itself is told this time."""
    return count & (count - 1) == 0
