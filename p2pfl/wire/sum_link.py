"""The link to one neighbour in secure sums: what has come is counted, so that both ends know of what was lost.

Messages of one connection arrive in their order or not at all. Each end says now and then how many it has sent; what has not come by then
is lost, and its sender sends all again that still matters. Messages may come twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from p2pfl.errors import BadMessage
from p2pfl.wire.codec import Frame
from p2pfl.wire.secure_messages import Message
from p2pfl.wire.sum_codec import MOST_COUNTED, SumAssembly, SumPresence

_BITS = 8


def as_bits(members: Collection[int], num_members: int) -> bytes:
    """Write a set of members with one bit for each, the lowest bit of the first byte for the first."""
    bits = bytearray(-(-num_members // _BITS))
    for each in members:
        bits[each // _BITS] |= 1 << each % _BITS
    return bytes(bits)


def from_bits(bits: bytes, num_members: int) -> set[int]:
    """Read a set of members; bits that are none's are left out."""
    return {each for each in range(min(num_members, _BITS * len(bits))) if bits[each // _BITS] >> each % _BITS & 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedOfSums:
    """Meaning of one message from a neighbour."""

    message: Message | None = None
    """A whole message of sums."""
    done: bytes | None = None
    """Bits of the members that need nothing more, where it was a presence."""
    is_new: bool = False
    """The neighbour's process is one that was not known: it may lack everything."""
    has_lost: bool = False
    """The neighbour says that something sent to it has been lost."""


class SumLink:
    """Counts of one link, and the array that is coming in over it; no clock and no socket.

    Args:
        incarnation: drawn at random in [1, 2**63) when this process started.
        most_bytes: size of the largest array that is planned.
    """

    def __init__(self, incarnation: int, most_bytes: int) -> None:
        self._incarnation, self._most_bytes = incarnation, most_bytes
        self._peer_incarnation = 0
        self._assembly = SumAssembly(most_bytes)
        self._sent = 0
        self._received: int | None = None
        """Messages of what the neighbour counts; None until it counts for this incarnation."""
        self._num_said = 0
        """Messages that the neighbour has said to have sent for this incarnation."""
        self._lost = 0
        self._lost_there = 0

    def note_sent(self) -> None:
        """Count a message that is handed to the transport, whether it arrives or not."""
        self._sent += 1

    def note_lost(self) -> None:
        """Count a message that came and could not be used yet, so that it is sent again."""
        self._count_lost(1)

    def _count_lost(self, num: int) -> None:
        self._lost = min(self._lost + num, MOST_COUNTED)  # whatever a neighbour says, this is a number that can be sent

    def presence(self, done: bytes) -> SumPresence:
        """Make the presence to send now, after all that has been counted."""
        return SumPresence(incarnation=self._incarnation, echo=self._peer_incarnation, sent=self._sent, lost=self._lost, done=done)

    def receive(self, frames: Sequence[Frame]) -> ReceivedOfSums:
        """Take one message of the neighbour.

        Raises:
            BadMessage: it is none that can be taken, or a presence that has sent fewer messages than the one before; it is counted on from
                there.
        """
        if self._received is not None:
            self._received += 1  # also what is refused has come
        message = self._assembly.receive(frames)
        if not isinstance(message, SumPresence):
            return ReceivedOfSums(message=message)
        if self._received is not None:
            self._received -= 1
        is_new = message.incarnation != self._peer_incarnation
        if is_new:
            self._peer_incarnation, self._sent, self._received, self._lost, self._lost_there = message.incarnation, 0, None, 0, 0
            self._num_said = 0
            self._assembly = SumAssembly(self._most_bytes)
        has_lost = False
        if message.echo == self._incarnation:
            num_before, self._num_said = self._num_said, message.sent
            missing, self._received = message.sent - (self._received or 0), message.sent
            if message.sent < num_before:
                raise BadMessage(f"{message.sent} messages sent: {num_before} were sent before", reason="wrong_count")
            self._count_lost(max(0, missing))
            has_lost, self._lost_there = message.lost > self._lost_there, message.lost
        return ReceivedOfSums(done=message.done, is_new=is_new, has_lost=has_lost)
