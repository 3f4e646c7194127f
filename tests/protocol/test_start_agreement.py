"""The rule of the agreed start, without sockets: records are carried by hand and time is an argument."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.errors import BadMessage
from p2pfl.protocol.agreed_start import CHANGE_S, RESEND_S, StartAgreement
from p2pfl.wire.messages import Ready
from p2pfl.wire.ready_record import ReadyRecord, packed, seal, unpacked, unseal, verify

STUDY = b"\xaa" * 32
WITHIN_S, GRACE_S = 30.0, 3.0
RING_OF_8 = tuple((n, (n + 1) % 8) for n in range(8))


class Members:
    """A graph of members, of which some are there; links are up where both ends are there and the test has not cut them."""

    def __init__(self, edges=RING_OF_8, *, needed: int = 8, there=None) -> None:
        self.edges = {tuple(sorted(edge)) for edge in edges}
        self.num = 1 + max(max(edge) for edge in self.edges)
        self.needed = needed
        self.neighbours = [sorted({b for a, b in self.both() if a == n}) for n in range(self.num)]
        self.secrets = [Ed25519PrivateKey.generate() for _ in range(self.num)]
        self.now_s, self.cut, self.lost, self.agreements = 0.0, set(), set(), {}
        for member in range(self.num) if there is None else there:
            self.comes(member)

    def both(self):
        return [edge for a, b in self.edges for edge in ((a, b), (b, a))]

    def comes(self, member: int, began_ms: int = 1000) -> StartAgreement:
        agreement = StartAgreement(
            me=member,
            neighbours=self.neighbours,
            names={str(other): other for other in self.neighbours[member]},
            keys=[secret.public_key().public_bytes_raw() for secret in self.secrets],
            sign=self.secrets[member].sign,
            study=STUDY,
            needed=self.needed,
            within_s=WITHIN_S,
            grace_s=GRACE_S,
            began_ms=began_ms,
        )
        agreement.begin(self.now_s)
        self.agreements[member] = agreement
        for other in self.neighbours[member]:
            if other in self.agreements:
                self.agreements[other].say_again(str(member))
        return agreement

    def goes(self, member: int) -> None:
        del self.agreements[member]

    def is_up(self, a: int, b: int) -> bool:
        return {a, b} <= self.agreements.keys() and tuple(sorted((a, b))) not in self.cut

    def talk(self, *, decide: bool = True) -> None:
        """Everything that there is to say now, until all is quiet; who can start does."""
        is_busy = True
        while is_busy:
            is_busy = False
            for member, agreement in self.agreements.items():
                agreement.note_links([str(other) for other in self.neighbours[member] if self.is_up(member, other)], self.now_s)
                if decide and (company := agreement.decide(self.now_s)) is not None:
                    agreement.start(company, self.now_s)
                for other in self.neighbours[member]:
                    if self.is_up(member, other) and agreement.is_due(str(other), self.now_s):
                        message = agreement.take(str(other), self.now_s)
                        is_busy = True
                        if (member, other) not in self.lost:
                            self.agreements[other].hear(str(member), message, self.now_s)

    def at(self, now_s: float) -> Members:
        self.now_s = now_s
        self.talk()
        return self

    @property
    def started(self) -> dict[int, set[int]]:
        return {member: set(a.started) for member, a in sorted(self.agreements.items()) if a.started is not None}


EVERYBODY = set(range(8))


def all_with(num: int) -> dict[int, set[int]]:
    """Each of the first members has started in the company of all of them."""
    return {member: set(range(num)) for member in range(num)}


def test_all_start_at_once_when_all_are_there():
    assert Members().at(0.0).started == all_with(8)


def test_nobody_starts_while_one_is_missing_and_all_do_when_it_comes():
    ring = Members(there=range(7))
    assert ring.at(0.0).started == ring.at(29.0).started == {}

    ring.comes(7)

    assert ring.at(29.5).started == all_with(8)


def test_a_link_that_is_blocked_keeps_everybody_waiting_though_records_go_the_other_way_round():
    ring = Members()
    ring.cut = {(3, 4)}
    assert ring.at(0.0).started == {}
    assert all(agreement.awaited().broken == {(3, 4)} for agreement in ring.agreements.values())

    ring.cut = set()

    assert ring.at(20.0).started == all_with(8)


def test_a_member_that_died_after_it_was_ready_is_missing():
    ring = Members()
    ring.talk(decide=False)
    ring.goes(5)
    ring.now_s = CHANGE_S
    ring.talk(decide=False)

    assert ring.at(1.0).started == {}
    assert all(agreement.awaited().gone == {5} for agreement in ring.agreements.values())


def test_where_all_are_required_nobody_starts_without_one_and_everybody_gives_up_after_the_grace():
    ring = Members(there=range(7))
    ring.at(0.0)

    assert ring.at(WITHIN_S + GRACE_S - 0.1).started == {}
    assert not any(agreement.is_hopeless(ring.now_s) for agreement in ring.agreements.values())
    assert ring.at(WITHIN_S + GRACE_S).started == {}
    assert all(agreement.is_hopeless(ring.now_s) for agreement in ring.agreements.values())
    assert all(agreement.awaited().absent == {7} for agreement in ring.agreements.values())


def test_seven_of_eight_start_after_the_time_and_know_who_is_missing():
    ring = Members(needed=7, there=range(7))

    assert ring.at(WITHIN_S - 0.1).started == {}
    assert ring.at(WITHIN_S).started == all_with(7)


def test_six_of_eight_are_not_enough_where_seven_are_required():
    ring = Members(needed=7, there=range(6))
    ring.at(0.0)

    assert ring.at(10 * WITHIN_S).started == {}


def test_two_halves_of_a_ring_do_not_train_apart_and_both_name_the_two_absent():
    ring = Members(needed=6, there=(1, 2, 3, 5, 6, 7))
    ring.at(0.0)

    assert ring.at(10 * WITHIN_S).started == {}
    for member, agreement in ring.agreements.items():
        assert agreement.awaited().absent == {0, 4}
        assert agreement.awaited().behind == ({5, 6, 7} if member < 4 else {1, 2, 3})


def test_who_has_given_up_is_told_from_who_never_came():
    ring = Members(there=range(7))
    ring.at(0.0)
    ring.goes(6)
    ring.at(1.0)
    awaited = ring.agreements[4].awaited()

    assert (awaited.absent, awaited.gone, awaited.behind) == ({7}, {6}, set())


def test_whose_clock_began_later_starts_upon_another_ones_start_record():
    ring = Members(needed=7, there=range(6))
    ring.at(0.0)
    ring.now_s = 20.0
    ring.comes(6)

    assert ring.at(WITHIN_S).started == all_with(7)


def test_a_start_record_alone_is_not_enough():
    ring = Members(needed=7, there=(0, 1))
    ring.at(0.0)
    claim = ReadyRecord(member=2, began=1, number=0, links=b"", started=packed(range(7)))
    ring.agreements[1].hear("2", Ready(sealed=(seal(claim, ring.secrets[2].sign, STUDY),), receipts=()), 0.0)

    assert ring.at(0.0).started == {}


def test_a_start_in_too_small_company_moves_nobody():
    ring = Members(needed=7, there=range(7))
    ring.talk(decide=False)
    claim = ReadyRecord(member=2, began=2000, number=0, links=packed([0, 1]), started=packed(range(6)))
    ring.agreements[1].hear("2", Ready(sealed=(seal(claim, ring.secrets[2].sign, STUDY),), receipts=()), 0.0)

    assert ring.at(0.0).started == {}


def test_a_latecomer_starts_at_once_in_a_network_that_is_under_way():
    ring = Members(needed=7, there=range(7))
    ring.at(0.0)
    ring.at(WITHIN_S)
    ring.now_s = 1000.0
    ring.comes(7)

    assert ring.at(1000.0).started[7] == set(range(7))


def test_a_node_that_lost_its_memory_starts_at_once_in_a_network_that_is_under_way():
    ring = Members()
    ring.at(0.0)
    ring.now_s = 100.0
    ring.comes(3, began_ms=900)  # and its clock has been put back

    assert ring.at(100.0 + 2 * RESEND_S).started[3] == EVERYBODY


def test_what_is_lost_is_said_again_and_what_has_a_receipt_is_not():
    pair = Members(edges=[(0, 1)], needed=2)
    pair.lost = {(0, 1)}
    assert pair.at(0.0).started == {0: {0, 1}}

    pair.lost = set()
    assert pair.at(RESEND_S / 2).started == {0: {0, 1}}
    assert pair.at(RESEND_S).started == {0: {0, 1}, 1: {0, 1}}
    pair.at(2 * RESEND_S)
    assert not pair.agreements[0]._unacknowledged["1"]
    assert not pair.agreements[0].is_due("1", 1000.0)


def test_news_on_the_way_when_time_is_up_is_waited_for_and_the_start_is_the_same_for_all():
    line = Members(edges=[(0, 1), (1, 2)], needed=3)
    line.lost = {(1, 0), (1, 2)}
    line.at(WITHIN_S + GRACE_S - 0.2)
    assert not any(agreement.is_hopeless(line.now_s) for agreement in line.agreements.values())
    assert line.started == {1: {0, 1, 2}}

    line.lost = set()

    assert line.at(WITHIN_S + GRACE_S + 0.5).started == all_with(3)


def test_who_knows_of_a_start_and_not_yet_of_the_company_waits_on_for_news():
    ring = Members(needed=7, there=(0, 1))
    ring.at(0.0)
    claim = ReadyRecord(member=2, began=1, number=0, links=b"", started=packed(range(7)))
    ring.now_s = WITHIN_S + GRACE_S - 0.5
    ring.agreements[1].hear("2", Ready(sealed=(seal(claim, ring.secrets[2].sign, STUDY),), receipts=()), ring.now_s)

    assert not ring.agreements[1].is_hopeless(WITHIN_S + GRACE_S)
    assert ring.agreements[1].is_hopeless(WITHIN_S + 2 * GRACE_S)


def test_one_dead_link_costs_one_of_the_members_that_are_required():
    ring = Members(needed=7)
    ring.cut = {(3, 4)}
    ring.at(0.0)

    assert ring.at(WITHIN_S).started == all_with(8)


def test_a_hub_that_is_missing_is_named_and_not_its_leaves():
    star = Members(edges=[(0, n) for n in range(1, 5)], needed=5, there=(1, 2, 3, 4))
    star.at(0.0)

    assert star.agreements[3].awaited().absent == {0}
    assert star.agreements[3].awaited().behind == {1, 2, 4}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signer": 1}, "wrong_signature"),
        ({"study": b"\xbb" * 32}, "wrong_signature"),
        ({"member": 99}, "bad_record"),
    ],
)
def test_a_record_that_is_not_its_members_own_is_refused(change, reason):
    ring = Members(there=(0,))
    member, signer = change.get("member", 2), change.get("signer", 2)
    record = ReadyRecord(member=member, began=1, number=0, links=b"", started=None)
    sealed = seal(record, ring.secrets[signer].sign, change.get("study", STUDY))

    with pytest.raises(BadMessage) as refused:
        ring.agreements[0].hear("1", Ready(sealed=(sealed,), receipts=()), 0.0)
    assert refused.value.reason == reason


def test_a_neighbour_that_passes_on_records_without_end_is_refused():
    ring = Members(there=(0,))
    record = ReadyRecord(member=2, began=1, number=0, links=b"", started=None)

    def flood():
        for number in range(10_000):
            sealed = seal(replace(record, number=number), ring.secrets[2].sign, STUDY)
            ring.agreements[0].hear("1", Ready(sealed=(sealed,), receipts=()), 0.0)

    with pytest.raises(BadMessage) as refused:
        flood()
    assert refused.value.reason == "too_many_records"


def test_an_older_record_does_not_replace_a_newer_one():
    ring = Members(edges=[(0, 1), (1, 2)], needed=3, there=(0,))
    old = seal(ReadyRecord(member=1, began=1, number=0, links=packed([0, 1]), started=None), ring.secrets[1].sign, STUDY)
    new = seal(ReadyRecord(member=1, began=1, number=1, links=b"", started=None), ring.secrets[1].sign, STUDY)
    agreement = ring.agreements[0]
    agreement.note_links(["1"], 0.0)
    for sealed in (new, old):
        agreement.hear("1", Ready(sealed=(sealed,), receipts=()), 0.0)

    assert agreement.there() == {0}


def test_sets_of_places_keep_what_is_in_them():
    for places in ((), (0,), (7, 8), (3, 64, 1000)):
        assert unpacked(packed(places)) == set(places)


@pytest.mark.parametrize("bad", [b"", b"\x00" * 64, b"\x00" * 64 + b"\xc0", b"\x00" * 64 + b"\x95\x01\x02\x03\x04\x05", b"\x00" * 3000])
def test_what_is_no_ready_record_is_refused(bad):
    with pytest.raises(BadMessage) as refused:
        unseal(bad)
    assert refused.value.reason == "bad_record"


def test_a_sealed_record_says_what_was_sealed():
    key = Ed25519PrivateKey.generate()
    record = ReadyRecord(member=3, began=5, number=7, links=packed([0, 2]), started=packed(range(8)))
    sealed = seal(record, key.sign, STUDY)
    verify(sealed, key.public_key(), STUDY)

    assert unseal(sealed) == record
