"""Answers to a neighbour that may have missed something, at most one in a time for the same thing: whoever asks often costs no more.

An answer that comes too soon after the one before is owed, and given when its time has come. None is left out: a member that was restored
from a backup may depend on it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from p2pfl.protocol.signed_history import SignedHistory
from p2pfl.wire.secure_messages import Message, Opening

PACE_S: Final = 1.0
"""A neighbour is answered the same thing once in so long."""


class PacedAnswers:
    """Answers that are owed to neighbours, and when each was given last.

    Args:
        history: the newest that members have signed.
    """

    def __init__(self, history: SignedHistory) -> None:
        self._history = history
        self._answered_s: dict[tuple[int, int | None], float] = {}
        self._owed: dict[tuple[int, int | None], None] = {}

    def ask(self, neighbour: int, *members: int | None) -> None:
        """Note that a neighbour is to have the newest that a member has signed, where that is known; None: the session's openings."""
        for member in members:
            if member is None or self._history.answer(member):
                self._owed[neighbour, member] = None

    def take_due(self, now_s: float, openings: Collection[Opening]) -> list[tuple[int, Message]]:
        """Take the answers whose time has come, in the order in which they were asked for, with the neighbours that they are for."""
        self._answered_s = {key: at_s for key, at_s in self._answered_s.items() if now_s - at_s < PACE_S}
        found: list[tuple[int, Message]] = []
        for key in [each for each in self._owed if each not in self._answered_s]:
            neighbour, member = key
            del self._owed[key]
            self._answered_s[key] = now_s
            found += [(neighbour, each) for each in (openings if member is None else self._history.answer(member))]
        return found
