"""Statements that contradict each other: what a member has signed of its update, held against what it has signed elsewhere and sent.

A round record carries a digest of the update that its member sent to all in that round. Two records of one member, run and round with
different digests prove, to anybody who has its key, that it said different things to different neighbours. An update that is not the one
of the record proves nothing to others, because updates are not signed; whoever has received it reports it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pfl.wire.round_record import DIGEST_BYTES, RoundRecord

KEPT_ROUNDS: Final = 32
"""So many rounds of each member's statements and updates are remembered."""

KEPT_OF_MANY: Final = 4
"""So many rounds of each are remembered in a network of very many members."""

MOST_EACH: Final = 3
"""So many equivocations of one member are kept as evidence and passed on; more prove nothing more."""


def update_digest(digests: Iterable[bytes]) -> bytes:
    """Digest that a record carries of a round's updates, from the digests of their payloads by phase."""
    return hashlib.sha256(b"".join(digests)).digest()[:DIGEST_BYTES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivocation:
    """Two records that one member has signed of one round, with different updates."""

    member: int
    """Its place in the roster."""
    round: int
    sealed: tuple[bytes, bytes]


@dataclass(slots=True)
class Witness:
    """One node's memory of the members' statements, and the equivocations it has found."""

    kept_rounds: int = KEPT_ROUNDS
    found: list[Equivocation] = field(default_factory=list)
    """At most MOST_EACH of each member."""
    _statements: dict[int, dict[int, tuple[RoundRecord, bytes]]] = field(default_factory=dict)
    """Records and how they came sealed, by member and round."""
    _updates: dict[int, dict[int, Sequence[bytes]]] = field(default_factory=dict)
    """Digests of what came, by phase: the record's is made of them only where there is a record."""
    _differing: list[tuple[int, int]] = field(default_factory=list)

    def conflicts_with(self, record: RoundRecord) -> bool:
        """Whether a record says otherwise than one that is remembered; its signature need not have been looked at."""
        said, _ = self._statements.get(record.member, {}).get(record.round, (None, b""))
        return said is not None and record.update is not None and said.began == record.began and said.update != record.update

    def note(self, record: RoundRecord, sealed: bytes) -> Equivocation | None:
        """Remember a record whose signature holds; an equivocation that it makes, if that is to be kept."""
        if record.update is None:
            return None
        said = self._statements.setdefault(record.member, {})
        if any(record.began > other.began for other, _ in said.values()):  # it has begun again without its state
            said.clear()
            self._updates.pop(record.member, None)
        before = said.get(record.round)
        if before is None:
            said[record.round] = record, sealed
            self._forget_oldest(said)
            self._compare(record.member, record.round)
            return None
        if not self.conflicts_with(record) or sum(each.member == record.member for each in self.found) >= MOST_EACH:
            return None
        if any((each.member, each.round) == (record.member, record.round) for each in self.found):
            return None
        equivocation = Equivocation(member=record.member, round=record.round, sealed=(before[1], sealed))
        self.found.append(equivocation)
        return equivocation

    def note_update(self, member: int, number: int, digests: Sequence[bytes]) -> None:
        """Remember the digests, by phase, of what came from a member itself in a round."""
        updates = self._updates.setdefault(member, {})
        if updates.get(number) == digests:
            return
        updates[number] = digests
        self._forget_oldest(updates)
        self._compare(member, number)

    def differing(self) -> list[tuple[int, int]]:
        """Members and rounds, since the last call, in which an update was another one than its sender has signed."""
        found, self._differing = self._differing, []
        return found

    def _compare(self, member: int, number: int) -> None:
        said, came = self._statements.get(member, {}).get(number), self._updates.get(member, {}).get(number)
        if said is None or came is None or len(self._differing) >= KEPT_ROUNDS:
            return
        if said[0].update != update_digest(came):
            self._differing.append((member, number))

    def _forget_oldest(self, by_round: dict[int, tuple[RoundRecord, bytes]] | dict[int, Sequence[bytes]]) -> None:
        while len(by_round) > self.kept_rounds:
            del by_round[min(by_round)]
