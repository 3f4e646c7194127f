"""The agreed start: nobody trains before enough members are known to be there and linked. No clock, no socket.

Each member spreads a signed record of which links to its neighbours are up; neighbours pass records on, and say them again until there is a
receipt. A member is there where records of both ends show a way of links that are up from here to it. It is ready where its links to all
neighbours that are there are up. A node starts once all members are ready; or, after a time, once so many are ready as were agreed; or
where it knows of everybody in whose company another node says that it has started. The last keeps nodes together whose clocks differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from p2pfl.errors import BadMessage
from p2pfl.experiment.graph import diameter_bound
from p2pfl.experiment.plan import Plan
from p2pfl.protocol.allowance import TokenBucket
from p2pfl.protocol.link_watch import LinkReport
from p2pfl.topology import Topology, is_spectrum_quick
from p2pfl.wire.messages import MAX_READY, Ready
from p2pfl.wire.ready_record import ReadyRecord, packed, receipt, seal, unpacked, unseal, verify
from p2pfl.wire.round_record import Sign

RESEND_S: Final = 0.5
"""After so long a record that a neighbour has given no receipt for is said again."""

CHANGE_S: Final = 0.5
"""A node whose links come and go makes no more than one record in this time."""

_BURST_EACH: Final = 16
_BURST: Final = 64
_PER_S_EACH: Final = 0.5
"""New records of each member that a neighbour may pass on: at once, and a second."""

GRACE_S = 1.0
"""Time that news may need beside one repetition on each link of their way."""

_LONG_WAY = 50  # links, where the diameter is not known
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Signing:
    """A node's own key to sign with, and the others' to check by."""

    keys: Mapping[str, bytes]
    """Every member's Ed25519 public key, 32 bytes."""
    sign: Sign


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """Members and links that keep a node from starting."""

    absent: frozenset[int]
    """Members that were never heard of although a neighbour of theirs was."""
    behind: frozenset[int]
    """Members that could only be heard of through those; nobody here knows anything of them."""
    gone: frozenset[int]
    """Members that were heard of, and that no way of links leads to now."""
    broken: frozenset[tuple[int, int]]
    """Neighbours that are both there and have no link with each other, the smaller place first."""


class StartAgreement:
    """One node's part in agreeing to start.

    Args:
        neighbours: for each member the places of its neighbours, rising.
        names: this node's neighbours by name, with their places.
        keys: every member's Ed25519 public key, 32 bytes, in the roster's order.
        needed: how many members must be ready once within_s is over.
        grace_s: how long after that news may still be on the way.
    """

    def __init__(
        self,
        *,
        me: int,
        neighbours: Sequence[Sequence[int]],
        names: Mapping[str, int],
        keys: Sequence[bytes],
        sign: Sign,
        study: bytes,
        needed: int,
        within_s: float,
        grace_s: float,
        began_ms: int,
    ) -> None:
        self.me, self.needed = me, needed
        self.deadline_s = math.inf
        """From then on not all members are needed."""
        self.started: frozenset[int] | None = None
        """Members that were ready when this node started; None: it has not."""
        self._neighbours, self._places = neighbours, dict(names)
        self._keys = [Ed25519PublicKey.from_public_bytes(key) for key in keys]
        self._sign, self._study, self._within_s = sign, study, within_s
        self.grace_s = grace_s
        """How long news of the start may be on the way."""
        self._began_ms, self._number = began_ms, 0
        self._newest: dict[int, tuple[ReadyRecord, bytes]] = {}
        per_s, most = 1 + _PER_S_EACH * len(keys), _BURST + _BURST_EACH * len(keys)
        self._allowances = {name: TokenBucket(per_s, most) for name in names}
        """New records that each neighbour may still pass on."""
        self._unacknowledged: dict[str, dict[int, tuple[bytes, float]]] = {name: {} for name in names}
        """By neighbour and member the record that there is no receipt for, and when it was last said."""
        self._receipts: dict[str, list[bytes]] = {name: [] for name in names}
        self._up: frozenset[str] = frozenset()
        self._published_s = self._news_s = -math.inf
        self._there: frozenset[int] | None = None  # None: to be found out anew
        self._broken: frozenset[tuple[int, int]] = frozenset()

    # ---- what this node says itself

    def begin(self, now_s: float) -> None:
        """The time for all members runs from now on."""
        self.deadline_s = now_s + self._within_s

    def note_links(self, up: Collection[str], now_s: float) -> None:
        """Take up which neighbours this node has a link to, and tell the network where that has changed."""
        up = frozenset(up)
        is_urgent = len(up) == len(self._places) or not self._newest
        if self.me not in self._newest or (up != self._up and (is_urgent or now_s - self._published_s >= CHANGE_S)):
            self._up = up
            self._publish(now_s)

    def start(self, members: Collection[int], now_s: float) -> None:
        """This node starts, in the company of some members; it says so and decides no more."""
        self.started = frozenset(members)
        self._publish(now_s)

    def _publish(self, now_s: float) -> None:
        own = self._neighbours[self.me]
        record = ReadyRecord(
            member=self.me,
            began=self._began_ms,
            number=self._number,
            links=packed(own.index(self._places[name]) for name in self._up),
            started=None if self.started is None else packed(self.started),
        )
        self._number += 1
        self._published_s = now_s
        self._take_in(record, seal(record, self._sign, self._study), now_s)

    # ---- what comes and goes

    def hear(self, peer: str, message: Ready, now_s: float) -> None:
        """Take in what a neighbour passes on.

        Raises:
            BadMessage: one of the records is none, of nobody in the roster, not signed by whom it is of, or more came than anybody needs
                to say; those before it stand.
        """
        got, receipts = set(message.receipts), self._receipts[peer]
        self._unacknowledged[peer] = {member: said for member, said in self._unacknowledged[peer].items() if receipt(said[0]) not in got}
        for sealed in message.sealed:
            record = unseal(sealed)
            if record.member >= len(self._keys):
                raise BadMessage("a ready record of nobody in the roster", reason="bad_record")
            held = self._newest.get(record.member)
            if held is not None and held[1] != sealed and record.age <= held[0].age:
                continue  # it is told of the newer one
            if held is None or held[1] != sealed:
                if not self._allowances[peer].take(1, now_s):  # each costs a signature's check and is told to everybody
                    raise BadMessage("more ready records than there can be to say", reason="too_many_records")
                verify(sealed, self._keys[record.member], self._study)
                if record.member == self.me:  # of an earlier process, which had a later clock
                    self._began_ms = record.began + 1
                    self._publish(now_s)
                else:
                    self._take_in(record, sealed, now_s)
            if self._unacknowledged[peer].get(record.member, (b"", 0.0))[0] == sealed:
                del self._unacknowledged[peer][record.member]  # it has it
            if receipt(sealed) not in receipts:
                receipts.append(receipt(sealed))

    def is_due(self, name: str, now_s: float) -> bool:
        """Whether there is something to say to a neighbour now."""
        return bool(self._receipts[name]) or any(now_s - said_s >= RESEND_S for _, said_s in self._unacknowledged[name].values())

    def take(self, name: str, now_s: float) -> Ready | None:
        """Take the next message to a neighbour; None: there is none. As long as `is_due` there is more."""
        unacknowledged, receipts = self._unacknowledged[name], self._receipts[name]
        due = [member for member, (_, said_s) in unacknowledged.items() if now_s - said_s >= RESEND_S][:MAX_READY]
        receipts, self._receipts[name] = receipts[:MAX_READY], receipts[MAX_READY:]
        if not due and not receipts:
            return None
        sealed = tuple(unacknowledged[member][0] for member in due)
        unacknowledged |= {member: (unacknowledged[member][0], now_s) for member in due}
        return Ready(sealed=sealed, receipts=tuple(receipts))

    def say_again(self, name: str) -> None:
        """A neighbour's process is another one: it knows nothing of what was said."""
        self._unacknowledged[name] = {member: (sealed, -math.inf) for member, (_, sealed) in self._newest.items()}

    def _take_in(self, record: ReadyRecord, sealed: bytes, now_s: float) -> None:
        self._newest[record.member] = record, sealed
        self._there, self._news_s = None, now_s
        for unacknowledged in self._unacknowledged.values():
            unacknowledged[record.member] = sealed, -math.inf

    # ---- what it comes to

    def decide(self, now_s: float) -> frozenset[int] | None:
        """Members to start with now; None: the start has to wait, or has been."""
        if self.started is not None or self.me not in self._newest:
            return None
        named = {record.started for record, _ in self._newest.values() if record.started is not None}  # nearly all name the same
        companies = [unpacked(bits) for bits in named]
        known = [company for company in companies if len(company) >= self.needed and company <= self._newest.keys()]
        if known:
            return max(known, key=lambda company: (len(company), sorted(company)))
        there = self.there()
        num_ready = len(there) - _cover(self._broken)
        if num_ready == len(self._keys) or (now_s >= self.deadline_s and num_ready >= self.needed):
            return there
        return None

    def is_hopeless(self, now_s: float) -> bool:
        """Whether time is up, also for what may have been on the way: this node is not going to train."""
        if self.started is not None or now_s < self.deadline_s + self.grace_s:
            return False
        has_started = any(record.started is not None for record, _ in self._newest.values())
        return not (has_started and now_s < self._news_s + self.grace_s)

    def there(self) -> frozenset[int]:
        """Members to which a way of links leads that are up by both ends' newest records, this one among them."""
        if self._there is None:
            said = {member: self._linked(record) for member, (record, _) in self._newest.items()}
            links = {member: {other for other in to if member in said.get(other, ())} for member, to in said.items()}
            found, edge = {self.me}, [self.me]
            while edge:
                following = links.get(edge.pop(), set()) - found
                found |= following
                edge += following
            pairs = ((member, other) for member in found for other in self._neighbours[member] if other in found and member < other)
            self._there = frozenset(found)
            self._broken = frozenset((one, other) for one, other in pairs if other not in links.get(one, ()))
        return self._there

    def _linked(self, record: ReadyRecord) -> frozenset[int]:
        """Members that one has a link to, as it says."""
        own = self._neighbours[record.member]
        return frozenset(own[k] for k in unpacked(record.links) if k < len(own))

    def awaited(self) -> Awaited:
        """Members and links for which this node waits before it starts, or would wait if its time were not up."""
        there, heard = self.there(), self._newest.keys()
        unheard = frozenset(range(len(self._keys))) - heard - there
        absent = frozenset(member for member in unheard if any(other in heard for other in self._neighbours[member]))
        return Awaited(absent=absent, behind=unheard - absent, gone=frozenset(heard) - there, broken=self._broken)


class AgreedStart:
    """One node's start, agreed on with the others; it waits for all members for *within_s*, None: for as long as the experiment says."""

    def __init__(self, plan: Plan, me: str, signing: Signing, *, study_digest: str, within_s: float | None, began_ms: int) -> None:
        self.members, self._me = plan.names, me
        places = {name: place for place, name in enumerate(plan.names)}
        self._neighbours = [plan.undirected.neighbours(place).tolist() for place in range(len(plan.names))]
        require = plan.experiment.require
        self.within_s = require.within_s if within_s is None else within_s
        self.way = longest_way(plan.topology)
        """The most links that news cross."""
        self.agreement = StartAgreement(
            me=places[me],
            neighbours=self._neighbours,
            names={name: places[name] for name in plan.neighbours(me)},
            keys=[signing.keys[name] for name in plan.names],
            sign=signing.sign,
            study=bytes.fromhex(study_digest),
            needed=require.at_least(len(plan.names)),
            within_s=self.within_s,
            grace_s=GRACE_S + RESEND_S * self.way,
            began_ms=began_ms,
        )
        self._said: list[str] | None = None
        self._verdict = ""

    @property
    def company(self) -> list[str] | None:
        """Members that were ready when this node started, in the roster's order; None: it has not."""
        return self._names(self.agreement.started)

    @property
    def missing(self) -> list[str]:
        """Members without whom this node started."""
        company = self.company
        return [] if company is None else [name for name in self.members if name not in company]

    def decide(self, now_s: float) -> list[str] | None:
        """Names of the members to start with now; None: the start has to wait."""
        return self._names(self.agreement.decide(now_s))

    def start(self, company: Collection[str], now_s: float) -> None:
        """This node starts, in the company of some members."""
        self.agreement.start([place for place, name in enumerate(self.members) if name in company], now_s)

    def waiting_for(self, reports: Mapping[str, LinkReport]) -> dict[str, str]:
        """Why this node does not start yet, by the member that it waits for; *reports*: on the links to its own neighbours."""
        if self.agreement.started is not None:
            return {}
        awaited = self.agreement.awaited()
        reasons = {place: f"no neighbour has a link with it: {self._list(self._neighbours[place])}" for place in awaited.absent}
        reasons |= dict.fromkeys(awaited.gone, "it was heard of, and no way of links to it is known now")
        for place in awaited.behind:
            reasons[place] = f"nobody here has heard of it: it can only be heard through {self._list(awaited.absent)}"
        for one, other in sorted(awaited.broken):
            for place, end in ((one, other), (other, one)):
                if self.members[place] != self._me:
                    reasons[place] = f"it has no link with {self.members[end]}"
        words = {self.members[place]: reasons[place] for place in sorted(reasons)}
        never = {self.members[place] for place in awaited.absent}
        return words | {name: _state_of(now) for name, now in reports.items() if name in words and (name in never or not now.is_good)}

    def news(self, waiting_for: Mapping[str, str]) -> str | None:
        """One line about whom this node waits for, where that has changed since the last call."""
        if list(waiting_for) == self._said:  # reasons change with every attempt to connect
            return None
        self._said = list(waiting_for)
        named = [f"{name} ({why})" for name, why in list(waiting_for.items())[:_MOST_NAMED]]
        more = [f"{len(waiting_for) - len(named)} more"] if len(waiting_for) > len(named) else []
        there = f"{len(self.members) - len(waiting_for)} of {len(self.members)} members are ready"
        return f"{there}; waiting for {', '.join([*named, *more]) or 'news of the start'}"

    def verdict(self, reports: Mapping[str, LinkReport], now_s: float) -> str | None:
        """One sentence about who was missing when time was up, as it was at the first call after that; None: it is not up yet."""
        if not self._verdict and now_s >= self.agreement.deadline_s:  # not later: who gives up is missing for the others
            self._verdict = self._verdict_now(reports)
        return self._verdict or None

    def _verdict_now(self, reports: Mapping[str, LinkReport]) -> str:
        awaited, needed, total = self.agreement.awaited(), self.agreement.needed, len(self.members)
        parts = []
        if awaited.absent:
            names = [self.members[place] for place in sorted(awaited.absent)][:_MOST_NAMED]
            own = [f"{name} ({_state_of(reports[name])})" if name in reports else name for name in names]
            parts.append(f"missing: {', '.join(own)}")
        if awaited.gone:
            parts.append(f"no link leads now to {self._list(awaited.gone)}")
        if awaited.behind:
            parts.append(f"not heard of, as they are behind those: {self._list(awaited.behind)}")
        if awaited.broken:
            pairs = [f"{self.members[one]} and {self.members[other]}" for one, other in sorted(awaited.broken)]
            parts.append(f"no link between {', '.join(pairs[:_MOST_NAMED])}")
        who = f"all {total} members" if needed == total else f"{needed} of {total} members"
        return f"this node has not trained: {who} must be ready within {self.within_s:g} s; {'; '.join(parts) or 'time was up'}"

    def _names(self, places: frozenset[int] | None) -> list[str] | None:
        return None if places is None else [self.members[place] for place in sorted(places)]

    def _list(self, places: Collection[int]) -> str:
        names = [self.members[place] for place in sorted(places)]
        return ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")


def longest_way(topology: Topology) -> int:
    """The most links that news cross in a graph, or a guess where it is too large to look."""
    return diameter_bound(topology) if is_spectrum_quick(topology) else _LONG_WAY


def _state_of(report: LinkReport) -> str:
    """How the link to a neighbour is that is not ready."""
    if report.is_good:
        return "connected, and it has not told that it is ready"
    return f"{report.state}: {report.detail}" if report.detail else report.state


def _cover(broken: Collection[tuple[int, int]]) -> int:
    """Number of members without whom no broken pair would be left; the most often broken ones go first."""
    left, count = set(broken), 0
    while left:
        often = Counter(member for pair in left for member in pair)
        worst = max(often, key=lambda member: (often[member], member))
        left = {pair for pair in left if worst not in pair}
        count += 1
    return count
