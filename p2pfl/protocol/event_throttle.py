"""How often events about one neighbour are written down: the first ones at once, then ever more rarely, with a count of those between.

One place for all kinds, so that no neighbour fills the disk whatever it makes happen. Nothing is lost but repetitions: what is held back is
counted, and the newest of it is written when its time has come, or at the end. Without a clock and without input or output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pfl.runs.events import EventKind
from p2pfl.runs.rows import Row

_ONE_STORY: Mapping[str, str] = {EventKind.LEFT: "presence", EventKind.HANDSHAKE: "presence"}
"""Kinds of which the newest alone tells how a neighbour is: they are held back and written together, or one would belie the other."""

FIRST = 4
"""So many events of one kind and neighbour are written at once, if they do not follow each other closely."""

CLOSELY_S = 1.0
PAUSE_S = 60.0
"""Then one after so long, the next one after twice as long, and so on."""

PAUSE_AT_MOST_S = 3600.0
QUIET_S = 900.0
"""Where nothing of the kind has happened for so long, the next ones are the first again."""

EXCLUDED_FOR_S = 3600.0
"""So long after it was disconnected no event of a neighbour is one of the first."""


@dataclass(slots=True)
class _Told:
    """What has been written of one kind and neighbour."""

    rows: int = 0
    row_s: float = float("-inf")
    """When the last row was written."""
    event_s: float = float("-inf")
    """When it last happened."""
    kind: str = ""
    """Of the event that was the last one."""
    pause_s: float = PAUSE_S
    held: Row | None = None
    """The newest that is not written."""
    count: int = 0
    """How many there are that are not written."""


class EventThrottle:
    """Decides which events about neighbours become rows; owned by one node."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Told] = {}
        self._held: dict[tuple[str, str], _Told] = {}
        """Those of `_told` that hold something back, in the order in which it last happened."""
        self._excluded_s: dict[str, float] = {}

    def offer(self, kind: str, member: str, row: Row, now_s: float, *, is_settled: bool = False) -> Row | None:
        """Take an event about a neighbour; the row to write now, or None.

        Args:
            kind: of the event.
            member: the neighbour that it is about.
            row: as it would be written, with its detail.
            now_s: on the caller's clock.
            is_settled: it has lasted, so that how closely it follows another one says nothing.
        """
        key = _ONE_STORY.get(kind, kind), member
        told = self._told.setdefault(key, _Told())
        if now_s - told.event_s >= QUIET_S and told.held is None:
            told.rows, told.pause_s = 0, PAUSE_S
        excluded_s = self._excluded_s.get(member, float("-inf"))
        is_apart = is_settled or kind != told.kind or now_s - told.event_s >= CLOSELY_S
        is_first = told.rows < FIRST and is_apart and now_s - excluded_s >= EXCLUDED_FOR_S
        told.event_s, told.kind = now_s, kind
        self._held.pop(key, None)
        told.held = row
        told.count += 1
        if not is_first and now_s - max(told.row_s, excluded_s) < told.pause_s:
            self._held[key] = told
            return None
        if kind == EventKind.EXCLUDED and now_s - excluded_s >= EXCLUDED_FOR_S:
            self._excluded_s[member] = now_s
        return self._written(told, now_s, is_first=is_first)

    def due(self, now_s: float) -> list[Row]:
        """Rows that were held back and whose time has come."""
        return [self._released(key, now_s) for key in list(self._held) if self._is_due(key, now_s)]

    def rest(self, now_s: float) -> list[Row]:
        """All rows that are held back: the node ends."""
        return [self._released(key, now_s) for key in list(self._held)]

    def _is_due(self, key: tuple[str, str], now_s: float) -> bool:
        told = self._held[key]
        return now_s - max(told.row_s, self._excluded_s.get(key[1], float("-inf"))) >= told.pause_s

    def _released(self, key: tuple[str, str], now_s: float) -> Row:
        return self._written(self._held.pop(key), now_s, is_first=False)

    def _written(self, told: _Told, now_s: float, *, is_first: bool) -> Row:
        assert told.held is not None
        row, before = told.held, told.count - 1
        told.held, told.count, told.row_s = None, 0, now_s
        told.rows += 1
        if not is_first and told.rows > 1:
            told.pause_s = min(2 * told.pause_s, PAUSE_AT_MOST_S)
        return {**row, "detail": f"{row['detail']} (and {before:,} times before)"} if before else row
