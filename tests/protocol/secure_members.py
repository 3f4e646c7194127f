"""Members of a study that add numbers: their terms, and stores that outlive a restart."""

from __future__ import annotations

import random
from functools import cache, reduce

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.errors import BadMessage
from p2pfl.privacy.fixed_point import FixedPoint, added
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.paced_answers import PACE_S
from p2pfl.protocol.secure_member import SecureMember
from p2pfl.protocol.sum_terms import SumTerms

STATISTICS = FixedPoint(bits=128, fraction_bits=60)
STUDY = "5a" * 32


@cache
def signing_key(member):
    return Ed25519PrivateKey.from_private_bytes(bytes([member + 1] * 32))


def identity(member):
    return signing_key(member).public_key().public_bytes_raw().hex()


def terms_of(num_members, participants=None, *, num_sums=2, shape=(3,), bound=1e6, study=STUDY, number_format=STATISTICS, **more):
    sums = [PlannedSum(statistic=f"sum {each}", shape=shape, number_format=number_format, bound=bound) for each in range(num_sums)]
    return SumTerms(
        study=study,
        sums=tuple(sums),
        participants=tuple(range(num_members) if participants is None else participants),
        names=tuple(f"clinic-{each}" for each in range(num_members)),
        identities=tuple(identity(each) for each in range(num_members)),
        **more,
    )


class ListStore:
    """What a site remembers, in lists; what is restored from a backup is an earlier copy of them."""

    def __init__(self, key=b"site key"):
        self.key, self.entries, self.sets, self.sessions, self.blocks = key, [], [], {}, {}

    def copy(self):
        other = ListStore(self.key)
        other.entries, other.sets = [*self.entries], [*self.sets]
        other.sessions, other.blocks = {**self.sessions}, {**self.blocks}
        return other

    def heard(self):
        return self.sets

    def append_heard(self, entry):
        self.sets.append(entry)

    def sent(self):
        return self.entries

    def append_sent(self, entry):
        self.entries.append(entry)

    def last_session(self, study):
        return self.sessions.get(study, 0)

    def append_session(self, study, number):
        assert number > self.last_session(study)
        self.sessions[study] = number

    def blocked_until(self, study):
        return self.blocks.get(study, -1)

    def append_block(self, study, position):
        self.blocks[study] = position


class Network:
    """Members of a study and the messages between them, which arrive in any order."""

    def __init__(self, graph, terms, values, *, seed=0, stores=None, patience_s=60.0):
        self.graph, self.terms, self.values = [set(graph[each]) for each in range(len(graph))], terms, values
        self.draw, self.patience_s, self.now_s = random.Random(seed), patience_s, 0.0
        self.stores = stores or [ListStore(b"key %d" % each) for each in range(len(self.graph))]
        self.waiting, self.arrived, self.away, self.refused = [], [], set(), []
        self.members = [self.member(each) for each in range(len(self.graph))]
        self.change = lambda _sender, _receiver, message: message

    def member(self, me, *, totals=None):
        key = signing_key(me)
        return SecureMember(self.terms, self.graph, me, key, self.stores[me], patience_s=self.patience_s, totals=totals)

    def restart(self, me, *, totals=None, store=None):
        """Kill a member and start it again: its links, and what was on them, are new."""
        self.stores[me] = store or self.stores[me]
        self.waiting = [each for each in self.waiting if me not in each[:2]]
        self.now_s += 2 * PACE_S  # nobody is back at once
        self.members[me] = self.member(me, totals=totals)

    def post(self, sender, messages):
        self.waiting += [(sender, receiver, message) for receiver, message in messages]

    def open(self, me=0):
        self.post(me, self.members[me].open(self.now_s))

    def contribute(self, me):
        """Let a member give its numbers to the first sum without a total, if it is a participant and can."""
        member = self.members[me]
        for position in range(len(self.terms.sums)):
            sum_id = self.terms.sum_id(position, [])
            if sum_id in member.totals:
                continue
            mine = member._sum
            if me in self.terms.participants and member.is_ready and not (mine and mine.position >= position):
                self.post(me, member.contribute(position, [], self.values[position][me], self.now_s))
            return

    def step(self):
        """Deliver one message, whichever; whether there was one."""
        ready = [each for each in self.waiting if not self.away & set(each[:2])]
        if not ready:
            return False
        chosen = self.draw.choice(ready)
        self.waiting.remove(chosen)
        sender, receiver, message = chosen
        message = self.change(sender, receiver, message)
        if message is None:
            return True
        self.arrived.append((sender, receiver, message))
        try:
            self.post(receiver, self.members[receiver].receive(sender, message, self.now_s))
        except BadMessage as error:
            self.refused.append(error.reason)
        return True

    def resend(self):
        """Send again what a lost or refused message may have been, as when links are back."""
        for me, member in enumerate(self.members):
            self.post(me, [(each, message) for each in sorted(self.graph[me]) for message in member.outstanding(each)])

    def run(self, *, until=lambda _network: False):
        """Deliver messages and let members contribute, until nothing more happens or something has."""
        for _ in range(200_000):
            for me in range(len(self.members)):
                if me not in self.away:
                    self.contribute(me)
            if until(self) or not self.step():
                return
        raise AssertionError("messages without an end")

    def finish(self):
        """Run to the last sum, with links that come back and whoever is ready opening the next session."""
        for turn in range(8):
            self.run()
            if all(each is not None for position in range(len(self.terms.sums)) for each in self.totals_of(position)):
                return
            if turn % 2 and all(each.session is None or each.session.is_over for each in self.members):
                self.open(self.terms.participants[0])
            self.resend()
        raise AssertionError("sums without a total")

    def look(self, after_s):
        """Let time pass, while the members that are there hear of each other."""
        self.now_s += after_s
        for me, member in enumerate(self.members):
            for other in self.graph[me] - self.away:
                member.note_heard(other, self.now_s)
        for me, member in enumerate(self.members):
            if me not in self.away:
                self.post(me, member.look(self.now_s))

    def totals_of(self, position):
        """What the participants hold of a sum; None where one holds nothing."""
        sum_id = self.terms.sum_id(position, [])
        return [self.members[each].totals.get(sum_id) for each in self.terms.participants]

    def plain(self, position):
        """The plain sum of fixed-point numbers."""
        form = self.terms.sums[position].number_format
        return reduce(added, [form.encode(self.values[position][each]) for each in self.terms.participants])

    def assert_exact(self, *positions):
        for position in positions or range(len(self.terms.sums)):
            expected = self.plain(position).tolist()
            found = [None if each is None else each.tolist() for each in self.totals_of(position)]
            assert found == [expected] * len(self.terms.participants)


def drawn_values(terms, seed=0, scale=1e3):
    """Numbers of all members for all sums."""
    draws = np.random.default_rng(seed)
    return [[draws.normal(scale=scale, size=planned.shape) for _ in terms.names] for planned in terms.sums]
