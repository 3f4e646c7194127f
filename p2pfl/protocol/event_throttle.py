"""Limit on recorded events about one neighbour: the first are written at once, later ones ever more rarely, with a count of those between.

One place for all kinds, so that no neighbour fills the disk whatever it makes happen, and however fast: in any minute and a half its rows
have so many bytes in all. Nothing is lost but repetitions: what is held back is counted, and the newest of it is written when its time has
come, or at the end. Without a clock and without input or output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from p2pfl.runs.events import EventKind
from p2pfl.runs.text import Row, line_of

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

SPAN_S = 90.0
SPAN_BYTES = 690
"""Rows about one neighbour, of all kinds, in any span of SPAN_S: a minute of them, 1,440 times, is less than a megabyte.

Four to six rows. One that alone is larger is written where the neighbour has caused no other in the span."""

RESERVED_BYTES = 150
"""Part of these that only the end of an outage may take: a reader must not believe for longer than it lasts that a link is down."""


@dataclass(slots=True)
class _Told:
    """Events that have been written of one kind and neighbour."""

    rows: int = 0
    row_s: float = float("-inf")
    """When the last row was written."""
    event_s: float = float("-inf")
    """When it last happened."""
    kind: str = ""
    """Kind of the last event."""
    pause_s: float = PAUSE_S
    held: Row | None = None
    """The newest that is not written."""
    count: int = 0
    """How many there are that are not written."""
    room_s: float = float("-inf")
    """Before it there is no room for a row."""

    def row(self) -> Row:
        """As it would be written now."""
        assert self.held is not None
        before = self.count - 1
        return {**self.held, "detail": f"{self.held['detail']} (and {before:,} times before)"} if before else self.held


class EventThrottle:
    """Decides which events about neighbours become rows; owned by one node."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Told] = {}
        self._held: dict[tuple[str, str], _Told] = {}
        """Those of `_told` that hold something back, in the order in which it last happened."""
        self._written: dict[str, deque[tuple[float, int]]] = {}
        """When rows about each neighbour were written within the last span, and of how many bytes."""

    def offer(self, kind: str, member: str, row: Row, now_s: float, *, has_lasted: bool = False) -> Row | None:
        """Take an event about a neighbour; returns the row to write now, or None. One that *has_lasted* may follow another closely."""
        key = _ONE_STORY.get(kind, kind), member
        told = self._told.setdefault(key, _Told())
        if now_s - told.event_s >= QUIET_S and told.held is None:
            told.rows, told.pause_s = 0, PAUSE_S
        is_apart = has_lasted or kind != told.kind or now_s - told.event_s >= CLOSELY_S
        is_first = told.rows < FIRST and is_apart
        told.event_s, told.kind = now_s, kind
        self._held.pop(key, None)
        told.held = row
        told.count += 1
        if (not is_first and now_s - told.row_s < told.pause_s) or not self._has_room(told, member, now_s):
            self._held[key] = told
            return None
        return self._write(told, member, now_s, is_first=is_first)

    def due(self, now_s: float) -> list[Row]:
        """Rows that were held back and whose time has come; kinds of which there is none yet go before others."""
        if not self._held:
            return []
        rows = []
        for key in sorted(self._held, key=lambda key: self._held[key].rows > 0):
            told = self._held[key]
            if now_s - told.row_s >= told.pause_s and self._has_room(told, key[1], now_s):
                del self._held[key]
                rows.append(self._write(told, key[1], now_s, is_first=False))
        return rows

    def rest(self, now_s: float) -> list[Row]:
        """All rows that are held back: the node ends."""
        held, self._held = self._held, {}
        return [self._write(told, member, now_s, is_first=False) for (_, member), told in held.items()]

    def num_held_back(self, member: str) -> int:
        """How many events about a neighbour happened and are in no row yet."""
        return sum(told.count for (_, name), told in self._held.items() if name == member)

    def _has_room(self, told: _Told, member: str, now_s: float) -> bool:
        if now_s < told.room_s:
            return False
        written = self._written.setdefault(member, deque())
        while written and now_s - written[0][0] >= SPAN_S:
            written.popleft()
        most = SPAN_BYTES if told.kind == EventKind.LINK_UP else SPAN_BYTES - RESERVED_BYTES
        if not written or sum(size for _, size in written) + len(line_of(told.row()).encode()) <= most:
            return True
        told.room_s = written[0][0] + SPAN_S
        return False

    def _write(self, told: _Told, member: str, now_s: float, *, is_first: bool) -> Row:
        row = told.row()
        self._written.setdefault(member, deque()).append((now_s, len(line_of(row).encode())))
        told.held, told.count, told.row_s = None, 0, now_s
        told.rows += 1
        if not is_first and told.rows > 1:
            told.pause_s = min(2 * told.pause_s, PAUSE_AT_MOST_S)
        return row
