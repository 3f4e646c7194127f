"""How the links to the neighbours are, in words for the people at this node: what is said when, without input or output."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from p2pfl.protocol.neighbour import Neighbour
from p2pfl.runs.events import EventKind
from p2pfl.transports import LinkCondition, LinkState

SETTLE_S = 3.0
"""A link is not spoken of before it has been so for so long: what passes by itself is no news."""

AGAIN_AFTER_S = 30.0
"""A problem that lasts is said again after so long, then after twice as long, and so on."""

AGAIN_AT_MOST_S = 6 * 3600.0

_ALWAYS_SAID = 16
_WORDS = {
    LinkCondition.CLOSED: "this node's links are not open",
    LinkCondition.AWAITED: "it has not dialled this node yet",
    LinkCondition.RESOLVING: "its host name is being looked up",
    LinkCondition.CONNECTING: "it is being dialled",
}
_MAY_BE_STARTING = frozenset({*_WORDS, LinkCondition.REFUSED})
"""States that are everyday before a neighbour was ever there: it has not been started yet."""

HANDSHAKING, OTHER_STUDY, LOST, LEFT, PAUSED = "greeting", "other study", "state lost", "left", "paused"
STATES = (*(condition.value for condition in LinkCondition), HANDSHAKING, OTHER_STUDY, LOST, LEFT, PAUSED)
"""Every state that a neighbour's link can be said to be in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReport:
    """How a neighbour's link is, with what the two have said to each other taken into account."""

    name: str

    state: str
    """One of STATES."""
    detail: str
    """The cause as far as it is known; empty where there is nothing to say."""
    since_s: float
    """When it came to be so, on the clock of time.monotonic."""
    is_good: bool
    """Whether neighbour and node can talk."""
    was_good: bool
    """Whether they could, at any time since this node started."""


Saying = tuple[int, str, tuple[EventKind, str] | None]
"""Level and text for the log; kind and detail for the run's events, where this is a change and no repetition."""


def report(neighbour: Neighbour, link: LinkState, *, num_unknown_keys: int = 0) -> LinkReport:
    """Put together how a neighbour's link is; *num_unknown_keys*: connections that were refused for a key that is no neighbour's."""
    state, detail = link.state.value, link.detail or _WORDS.get(link.state, "")
    is_good = link.state == LinkCondition.UP and neighbour.session.is_open
    if neighbour.left:
        state, detail = LEFT, "it has finished"
    elif neighbour.state_lost:
        state, detail = LOST, f"its state went back: {neighbour.state_lost}"
    elif link.is_up and neighbour.refusal:
        state, detail = OTHER_STUDY, neighbour.refusal
    elif link.state == LinkCondition.UP and not is_good:
        state, detail = HANDSHAKING, "connected, and the handshake is not over yet"
    elif neighbour.is_paused and not link.is_up:
        state, detail = PAUSED, f"it said that it pauses; {detail}"
    elif link.state == LinkCondition.AWAITED and num_unknown_keys:
        detail += f", and {num_unknown_keys} connections with a key that is no neighbour's were refused: a new card, or another study"
    return LinkReport(
        name=neighbour.name, state=state, detail=detail, since_s=link.since_s, is_good=is_good, was_good=neighbour.handshakes > 0
    )


@dataclass(slots=True)
class _Told:
    """Last words that were said of one neighbour."""

    state: str | None = None
    """None: nothing that is not over."""
    was_good: bool = False
    good_until_s: float = 0.0
    next_s: float = 0.0
    pause_s: float = AGAIN_AFTER_S
    changes: int = 0
    candidate: str = ""
    candidate_since_s: float = 0.0


class LinkWatch:
    """Decides when a link is worth a line in the log: once when it has changed, and ever more rarely while a problem lasts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._told = {name: _Told() for name in names}

    def look(self, now: LinkReport, now_s: float, *, is_closing: bool = False) -> Saying | None:
        """Say what has changed about a neighbour's link, if anything has; while this node *is_closing* a neighbour may go."""
        told = self._told[now.name]
        if now.is_good:
            return self._good(now.name, told, now_s)
        if now.state == LEFT:
            told.state = None
            return None
        if told.candidate != now.state:
            told.candidate, told.candidate_since_s = now.state, now_s
        is_new = told.state != now.state
        if is_new and now_s - told.candidate_since_s < SETTLE_S:
            return None
        if not is_new and now_s < told.next_s:
            return None
        told.pause_s = AGAIN_AFTER_S if is_new else min(2 * told.pause_s, AGAIN_AT_MOST_S)
        told.next_s = now_s + told.pause_s
        told.state = now.state
        if now.was_good and not told.was_good:  # it was, between two looks
            told.was_good, told.good_until_s = True, now.since_s
        out_s = now_s - told.good_until_s if told.was_good else None
        if out_s is None:
            lasting = "" if is_new else f" for {_words_of(now_s - now.since_s)}"
            text = f"waiting for {now.name}{lasting}: {now.detail}"
        else:
            text = f"{now.name} is out for {_words_of(out_s)}: {now.detail}"
        everyday = is_closing or now.state == PAUSED or (out_s is None and now.state in _MAY_BE_STARTING)
        level, event = logging.INFO if everyday else logging.WARNING, None
        if is_new:
            told.changes += 1
            event = (EventKind.WAITING if out_s is None else EventKind.LINK_DOWN, f"{now.name}: {now.detail}")
        return _unless_too_often(told.changes, (level, text, event))

    def _good(self, name: str, told: _Told, now_s: float) -> Saying | None:
        was_out_s = now_s - told.good_until_s if told.was_good else 0.0
        before, told.state, told.candidate = told.state, None, ""
        told.was_good, told.good_until_s = True, now_s
        if before is None:
            return None
        text = f"{name} is back after {_words_of(was_out_s)}" if was_out_s else f"{name} is here"
        return _unless_too_often(told.changes, (logging.INFO, text, (EventKind.LINK_UP, text)))


def _unless_too_often(changes: int, saying: Saying) -> Saying:
    """For debugging only where a link goes up and down without end: it must not fill the disk."""
    if changes <= _ALWAYS_SAID or changes & (changes - 1) == 0:
        return saying
    return logging.DEBUG, saying[1], None


def _words_of(seconds: float) -> str:
    for size_s, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"
