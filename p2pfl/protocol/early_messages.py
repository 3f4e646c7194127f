"""Messages of secure sums that came before their time: kept, in bounds, until a session or a sum has begun here as well."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from p2pfl.errors import BadMessage
from p2pfl.wire.secure_messages import MaskedSubtotal, SessionMessage, Total, message_key

_PER_MEMBER: Final = 8
_ARRAYS_PER_SENDER: Final = 4
"""Arrays may be large; a neighbour is at most one sum ahead, or in the next session."""


class EarlyMessages:
    """A bounded number of messages, one of each kind, member and position of a session.

    Args:
        num_members: of the study.
    """

    def __init__(self, num_members: int) -> None:
        self._most = _PER_MEMBER * (num_members + 1)
        self._kept: dict[tuple[bytes, tuple[str, int, int]], tuple[int, SessionMessage]] = {}

    def keep(self, sender: int, message: SessionMessage) -> None:
        """Keep a message; BadMessage where there are more than there can be, reason "too_early"."""
        is_array = isinstance(message, (MaskedSubtotal, Total))
        num_arrays = sum(of == sender and isinstance(each, (MaskedSubtotal, Total)) for of, each in self._kept.values()) if is_array else 0
        if len(self._kept) >= self._most or num_arrays >= _ARRAYS_PER_SENDER:
            raise BadMessage("more messages before their time than there can be", reason="too_early")
        self._kept.setdefault((message.transcript, message_key(sender, message)), (sender, message))

    def take_all(self) -> list[tuple[int, SessionMessage]]:
        """Take out all messages with their senders, in the order in which they came."""
        kept, self._kept = self._kept, {}
        return [*kept.values()]

    def forget(self, transcripts: Collection[bytes]) -> None:
        """Leave out messages of sessions that are over."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] not in transcripts}
