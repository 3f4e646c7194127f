"""The whole network as one node knows it: round records that spread from neighbour to neighbour, and what they come to round by round.

No clock, no socket. A node passes on what is new to it, once to each neighbour that has not said it itself. What that costs is bounded:
where records of every round would cost more bytes a second than the site allows, a node speaks, and passes on, only of rounds that a power
of two divides, so that all nodes still speak of the same rounds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from statistics import median
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pfl.errors import BadMessage
from p2pfl.protocol.allowance import TokenBucket
from p2pfl.protocol.equivocation import KEPT_OF_MANY, KEPT_ROUNDS, Equivocation, Witness
from p2pfl.wire.messages import MAX_RECORDS
from p2pfl.wire.round_record import RoundRecord, Sign, seal, unseal, verify

FLUSH_S: Final = 1.0
"""Records that have come in between two rounds are passed on after so long."""

MAX_LEVEL: Final = 12
_MESSAGE_BYTES = 24  # of a message around its records
_PER_RECORD_BYTES = 3
_RECORD_BYTES = 130  # as long as none has been seen
_BURST_S = 5.0  # of the allowance may be saved up
_HEARD_BYTES_PER_S = 64_000.0  # from a neighbour: some five hundred records, whose signatures take a twentieth of a core
_SPARE_ROUNDS = 8
_PENDING_EACH = 16  # records of one member that wait for a neighbour; several rounds of a far one may come at once
_SLACK = 4  # so many times as long as news need at this node's level a round stays open: others may speak more rarely

_PROOF = 3  # members whose newest records prove where the others are: one of them may lie, one may be who asks

_Key = tuple[int, int, bool]
"""Member, round, whether it is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatestRecord:
    """The newest record of a member."""

    record: RoundRecord
    sealed: bytes
    at_s: float
    """When it came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRound:
    """Sum of the members' records of one round."""

    number: int
    records: Mapping[int, RoundRecord]
    """By place in the roster, in its order."""
    known_in: int
    """The round that this node was in when the last of them came."""
    num_members: int

    @property
    def is_whole(self) -> bool:
        """Whether every member has spoken and every distance over every edge is in it."""
        return len(self.records) == self.num_members and all(r.disagreement is not None and not r.skipped for r in self.records.values())

    @property
    def disagreement(self) -> float | None:
        """The sum over edges of ||x_i - x_j||**2, as far as it is known; None where nothing is."""
        known = [record.disagreement for record in self.records.values() if record.disagreement is not None]
        return math.fsum(known) if known else None


class NetworkView:
    """One node's view, and its part in everybody else's.

    Args:
        keys: every member's Ed25519 public key, 32 bytes, in the roster's order.
        neighbours: names of those whom records are exchanged with.
        last_round: nobody can be further.
        bytes_per_s: what this node may send for the view; None: as much as there is to say.
        sums: whether records are summed round by round; of many members only the newest of each are kept.
    """

    def __init__(
        self,
        *,
        me: int,
        keys: Sequence[bytes],
        sign: Sign,
        study: bytes,
        neighbours: Sequence[str],
        diameter: int | None,
        last_round: int,
        bytes_per_s: float | None,
        sums: bool = True,
    ) -> None:
        self._sums = sums
        self.me, self.last_round = me, last_round
        self._keys = [Ed25519PublicKey.from_public_bytes(key) for key in keys]
        self._sign, self._study = sign, study
        self.news_rounds = 2 * (diameter if diameter is not None else len(keys)) + _SPARE_ROUNDS
        self.newest: dict[int, LatestRecord] = {}
        """By place in the roster."""
        self._begun_again: set[int] = set()
        self._furthest: dict[int, tuple[int, int, bytes]] = {}  # by member: when its run began, rounds that it has ended, its sealed record
        self._ranked: list[tuple[int, int, bytes]] | None = None  # of the furthest: rounds, member, record; None: to be found out anew
        self.level = 0
        """This node speaks of rounds that 2**level divides."""
        self.bytes_sent = 0
        self._rounds: dict[int, dict[int, RoundRecord]] = {}  # records so far, by round and member
        self._concluded: set[int] = set()  # those of which everybody's record has come
        self._known: list[NetworkRound] = []
        self._pending: dict[str, dict[_Key, bytes]] = {name: {} for name in neighbours}
        self.witness = Witness(kept_rounds=KEPT_ROUNDS if sums else KEPT_OF_MANY)
        self._evidence: dict[str, deque[Equivocation]] = {name: deque() for name in neighbours}  # to be passed on
        self._since_s: dict[str, float] = {}
        self._now_round = self._oldest = 0
        self._began_s: float | None = None
        self._recent_s: deque[float] = deque(maxlen=9)
        self._sealed_bytes = float(_RECORD_BYTES)
        burst = (bytes_per_s or 0.0) * _BURST_S
        self._allowance = _bucket(bytes_per_s, burst)
        everybody = 4.0 * len(keys) * _RECORD_BYTES * 8
        heard_per_s = None if bytes_per_s is None else _HEARD_BYTES_PER_S
        self._heard = {name: _bucket(heard_per_s, everybody + burst) for name in neighbours}

    # ---- what this node says itself

    def begin(self, number: int, now_s: float) -> None:
        """This node is in a round from now on."""
        if self._began_s is not None and number == self._now_round + 1:
            self._recent_s.append(now_s - self._began_s)
        self._now_round, self._began_s = number, now_s
        self.level = self._level()
        self._oldest = max(self._oldest, number - self._window)  # what has been given up is not opened again
        self._concluded = {concluded for concluded in self._concluded if concluded >= self._oldest}
        for old in [r for r in self._rounds if r < self._oldest]:
            self._give_up(old)

    def speaks_of(self, number: int) -> bool:
        """Whether records of a round are made and passed on here."""
        return number % (1 << self.level) == 0

    def publish(self, record: RoundRecord, now_s: float) -> None:
        """Seal and spread this node's own record of a round."""
        sealed = seal(record, self._sign, self._study)
        self._sealed_bytes += (len(sealed) - self._sealed_bytes) / 8
        self._take_in(record, sealed, now_s)
        for name in self._pending:
            self._to_say(name, record, sealed, now_s)

    # ---- what comes and goes

    def hear(self, peer: str, sealed_records: Sequence[bytes], now_s: float, *, furthest: int | None = None) -> None:
        """Take in what a neighbour passes on; records of a round later than *furthest* only prove where a member is.

        Raises:
            BadMessage: one of them is no record, of nobody in the roster, not signed by whom it is of, of a round that cannot be, or more
                came than anybody needs to say; those before it stand.
        """
        allowance = self._heard[peer]
        for sealed in sealed_records:
            if not allowance.take(len(sealed), now_s):
                raise BadMessage("more round records than there can be to say", reason="too_many_records")
            record = unseal(sealed)
            if record.member >= len(self._keys) or record.round > self.last_round:
                raise BadMessage("a record of nobody in the roster, or of a round that cannot be", reason="bad_record")
            self._pending[peer].pop(_key(record), None)  # it knows
            too_far = furthest is not None and record.round > furthest
            is_new = self._is_further(record) if too_far else self._is_new(record)
            if record.member == self.me or not (is_new or self.witness.conflicts_with(record)):
                continue
            verify(sealed, self._keys[record.member], self._study)
            self._witness(record, sealed)
            self._note_furthest(record, sealed)
            if too_far or not is_new:
                continue
            self._take_in(record, sealed, now_s)
            if self.speaks_of(record.round) or record.closing:
                for name in self._pending:
                    if name != peer:
                        self._to_say(name, record, sealed, now_s)

    def _witness(self, record: RoundRecord, sealed: bytes) -> None:
        """Hold a record against what its member has signed before, and pass on what proves that it says different things."""
        equivocation = self.witness.note(record, sealed)
        if equivocation is not None:
            for evidence in self._evidence.values():
                evidence.append(equivocation)

    def furthest(self) -> dict[int, int]:
        """How many rounds the members that are furthest have ended, by their own signed records, by place in the roster."""
        return {member: rounds for rounds, member, _ in self._in_front()}

    def num_closed(self, other_than: Collection[int]) -> int:
        """How many members have signed that they have stopped, beside some that do not count."""
        return sum(heard.record.closing and member not in other_than for member, heard in self.newest.items())

    def proof(self, own: bytes | None, *, without: int | None) -> list[bytes]:
        """Sealed records of the members that are furthest, *without* one that knows its own, and this node's own of its last round."""
        others = [sealed for _, member, sealed in self._in_front() if member != without]
        return [*([] if own is None else [own]), *others]

    def _in_front(self) -> list[tuple[int, int, bytes]]:
        if self._ranked is None:
            self._ranked = nlargest(_PROOF, ((rounds, member, sealed) for member, (_, rounds, sealed) in self._furthest.items()))
        return self._ranked

    def sealed(self, record: RoundRecord) -> bytes:
        """This node's own record of a round, as it was published or would have been."""
        newest = self.newest.get(self.me)
        return newest.sealed if newest is not None and newest.record == record else seal(record, self._sign, self._study)

    def is_due(self, name: str, now_s: float) -> bool:
        """Whether it is time to say what is new to a neighbour, between two rounds."""
        pending = self._pending[name]
        if self._evidence[name] or any(is_last for _, _, is_last in pending):
            return True
        if not pending or self._allowance.refill(now_s) <= 0:
            return False
        return len(pending) >= MAX_RECORDS or now_s - self._since_s[name] >= FLUSH_S

    def take(self, name: str, now_s: float) -> list[bytes]:
        """Take the records to say to a neighbour now; empty where there are none, or the allowance is spent.

        Every member's newest record comes before the second newest of any. A member's last one passes whatever the allowance.
        """
        pending, is_spent = self._pending[name], self._allowance.refill(now_s) <= 0
        newer: Counter[int] = Counter()
        ranked: list[tuple[int, int, _Key]] = []
        for key in sorted(pending, key=lambda key: (-key[1], not key[2])):
            if key[2] or not is_spent:
                ranked.append((newer[key[0]], -key[1], key))
                newer[key[0]] += 1
        proof = self._evidence[name].popleft().sealed if self._evidence[name] else ()
        said = [*proof, *(pending.pop(key) for _, _, key in sorted(ranked)[: MAX_RECORDS - len(proof)])]
        if not said:
            return []
        spent = _MESSAGE_BYTES + sum(len(sealed) + _PER_RECORD_BYTES for sealed in said)
        self._allowance.add(-spent)
        self.bytes_sent += spent
        return said

    def spend(self, size_bytes: int, now_s: float) -> bool:
        """Whether the allowance has room for something else that is said for the view."""
        if self._allowance.refill(now_s) <= 0:
            return False
        self._allowance.add(-size_bytes)
        self.bytes_sent += size_bytes
        return True

    def say_again(self, name: str, now_s: float) -> None:
        """A neighbour may have missed what was said: everybody's newest record once more."""
        for heard in self.newest.values():
            self._to_say(name, heard.record, heard.sealed, now_s)

    # ---- what it comes to

    def known_rounds(self) -> list[NetworkRound]:
        """Rounds, in the order in which they became known since the last call: everybody's record has come, or the rest will not come."""
        known, self._known = self._known, []
        return known

    def begun_again(self) -> set[int]:
        """Members that have started again without their state, as records since the last call show."""
        members, self._begun_again = self._begun_again, set()
        return members

    def open_records(self) -> list[RoundRecord]:
        """Records of the rounds that not everybody has spoken of yet."""
        return [record for so_far in self._rounds.values() for record in so_far.values()]

    def is_told_of_the_end(self, nearby: Collection[str]) -> bool:
        """Whether everybody's last record is here, and said to those neighbours."""
        ended = len(self.newest) == len(self._keys) and all(heard.record.closing for heard in self.newest.values())
        return ended and not any(is_last for name in nearby for _, _, is_last in self._pending[name])

    def _is_new(self, record: RoundRecord) -> bool:
        newest = self.newest.get(record.member)
        if newest is None or _age(record) > _age(newest.record):
            return True
        if record.began < newest.record.began or (record.closing and newest.record.closing):
            return False
        is_open = record.round not in self._concluded and record.member not in self._rounds.get(record.round, {})
        return is_open and self._counts(record.round)

    @property
    def _window(self) -> int:
        """Rounds for which one stays open."""
        return _SLACK * (self.news_rounds << self._usual_level()) if self._usual_level() else self.news_rounds

    def _counts(self, number: int) -> bool:
        """Whether a round is one that most speak of, and not too far away."""
        is_near = self._oldest <= number <= self._now_round + self._window
        return self._sums and is_near and number % (1 << self._usual_level()) == 0

    def _usual_level(self) -> int:
        """The middle of what the members say, so that none of them decides it."""
        levels = sorted(heard.record.level for heard in self.newest.values())
        return min(MAX_LEVEL, levels[len(levels) // 2]) if levels else self.level

    def _is_further(self, record: RoundRecord) -> bool:
        """Whether a record shows that its member is further than its others do, in the same run or a later one."""
        newest, known = self.newest.get(record.member), self._furthest.get(record.member, (-1, 0, b""))
        is_past = newest is not None and record.began < newest.record.began
        return not is_past and (record.began, record.round + 1) > known[:2]

    def _note_furthest(self, record: RoundRecord, sealed: bytes) -> None:
        if self._is_further(record):
            self._furthest[record.member] = record.began, record.round + 1, sealed
            self._ranked = None

    def _take_in(self, record: RoundRecord, sealed: bytes, now_s: float) -> None:
        newest = self.newest.get(record.member)
        if newest is not None and record.began > newest.record.began:
            self._begun_again.add(record.member)
        if newest is None or _age(record) >= _age(newest.record):
            self.newest[record.member] = LatestRecord(record=record, sealed=sealed, at_s=now_s)
        is_last = record.closing and self._sums and self._oldest <= record.round <= self._now_round + self._window
        if record.round in self._concluded or not (is_last or self._counts(record.round)):
            return
        so_far = self._rounds.setdefault(record.round, {})
        before = so_far.get(record.member)
        if before is not None and before.began >= record.began:
            return
        so_far[record.member] = record
        if len(so_far) == len(self._keys):
            self._concluded.add(record.round)
            self._conclude(record.round)

    def _give_up(self, number: int) -> None:
        """Nobody will speak of that round any more. It counts without those who have been silent since, not without who left it out."""
        absent = [place for place in range(len(self._keys)) if place not in self._rounds[number]]
        if all(place not in self.newest or self.newest[place].record.round < number for place in absent):
            self._conclude(number)
        else:
            del self._rounds[number]

    def _conclude(self, number: int) -> None:
        records = dict(sorted(self._rounds.pop(number).items()))  # sums run in the roster's order
        self._known.append(NetworkRound(number=number, records=records, known_in=self._now_round, num_members=len(self._keys)))

    def _to_say(self, name: str, record: RoundRecord, sealed: bytes, now_s: float) -> None:
        pending = self._pending[name]
        if not pending:
            self._since_s[name] = now_s
        pending[_key(record)] = sealed
        of_member = [key for key in pending if key[0] == record.member and not key[2]]
        if len(of_member) > _PENDING_EACH:
            del pending[min(of_member)]

    def _level(self) -> int:
        """So that everybody's records of the rounds that are spoken of keep within the allowance."""
        allowance = self._allowance.per_s
        if math.isinf(allowance) or not self._recent_s:
            return self.level
        others = max(len(self._pending) - 1, 1)  # a record comes from one neighbour and goes to the others
        one_round = (self._sealed_bytes + _PER_RECORD_BYTES) * (len(self._keys) * others + 2) + 2 * _MESSAGE_BYTES * len(self._pending)
        wanted_s = one_round / max(allowance, 1.0)
        rounds = wanted_s / max(median(self._recent_s), 1e-4)
        return min(MAX_LEVEL, max(0, math.ceil(math.log2(rounds))) if rounds > 0 else 0)


def _bucket(per_s: float | None, most: float) -> TokenBucket:
    return TokenBucket(math.inf, math.inf) if per_s is None else TokenBucket(per_s, most)


def _key(record: RoundRecord) -> _Key:
    return record.member, record.round, record.closing


def _age(record: RoundRecord) -> tuple[int, int, bool]:
    return record.began, record.round, record.closing
