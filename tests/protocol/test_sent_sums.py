"""What a site has sent into a sum binds it: written before the first byte leaves, and other numbers or sets are refused by name."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from secure_members import STATISTICS, ListStore, Network, drawn_values, identity, signing_key, terms_of

from p2pfl.errors import ConfigError, StoreError
from p2pfl.protocol.sent_sums import note_before_sending, note_heard_sets
from p2pfl.protocol.set_consent import SetConsent, sign_consent
from p2pfl.wire.secure_messages import MaskedDigest, MaskedSubtotal

INTEGERS = STATISTICS.encode([1.0, 2.0, 3.0])
FIVE = terms_of(6, [0, 1, 2, 3, 4])
ANOTHER_STUDY = "bc" * 32


def store_with(terms, integers=INTEGERS):
    store = ListStore()
    note_before_sending(store, terms, 0, [], integers)
    return store


def test_the_same_sum_is_written_once():
    store = store_with(FIVE)
    note_before_sending(store, FIVE, 0, [], INTEGERS)

    assert len(store.entries) == 1
    note_before_sending(store, FIVE, 1, [], INTEGERS)
    note_before_sending(store, FIVE, 1, [0.5], INTEGERS)
    assert len(store.entries) == 3


def test_what_is_written_tells_no_number():
    mine, others = ListStore(b"a"), ListStore(b"b")
    for store in (mine, others):
        note_before_sending(store, FIVE, 0, [], INTEGERS)

    assert mine.entries[0].integers != others.entries[0].integers


@pytest.mark.parametrize(
    ("terms", "integers", "said"),
    [
        (FIVE, STATISTICS.encode([1.0, 2.0, 4.0]), "sum 0: this site has sent other numbers into it"),
        (terms_of(6, [0, 1, 2, 3]), INTEGERS, "sum 0: this site has sent it over another set of members; clinic-4 make the difference"),
        (replace(FIVE, sums=FIVE.sums[:1]), INTEGERS, "sum 0: this site has sent it under another plan"),
        (terms_of(6, [0, 1, 2, 3], study=ANOTHER_STUDY), INTEGERS, "the sum over clinic-4 alone would be known; at least 3"),
        (terms_of(6, study=ANOTHER_STUDY), INTEGERS, "the sum over clinic-5 alone would be known"),
    ],
    ids=["numbers", "set", "plan", "set without one in another study", "set with one more in another study"],
)
def test_something_else_is_refused_by_name(terms, integers, said):
    store = store_with(FIVE)
    with pytest.raises(ConfigError, match=said):
        note_before_sending(store, terms, 0, [], integers)

    assert len(store.entries) == 1


def test_who_is_alone_in_an_atom_can_consent():
    store = store_with(FIVE)
    fewer = terms_of(6, [0, 1, 2, 3], study=ANOTHER_STUDY)
    consent = SetConsent(identity=identity(4), question_id=fewer.question_id(0), participants=fewer.participant_identities)
    elsewhere = [replace(consent, question_id=fewer.question_id(1)), replace(consent, participants=FIVE.participant_identities)]
    others = [sign_consent(each, signing_key(4)) for each in elsewhere]
    others.append(sign_consent(replace(consent, identity=identity(3)), signing_key(3)))
    with pytest.raises(ConfigError, match="clinic-4 alone"):
        note_before_sending(store, fewer, 0, [], INTEGERS, consents=others)
    for forged in (consent, sign_consent(consent, signing_key(3))):
        with pytest.raises(ConfigError, match="has not signed; leave it out"):
            note_before_sending(store, fewer, 0, [], INTEGERS, consents=[forged])
    assert len(store.entries) == 1
    note_before_sending(store, fewer, 0, [], INTEGERS, consents=[sign_consent(consent, signing_key(4))])

    assert len(store.entries) == 2


class FullStore(ListStore):
    def append_sent(self, entry):
        raise StoreError("the disk is full")


@pytest.mark.parametrize("check", [False, True])
def test_nothing_leaves_that_could_not_be_written(check):
    terms = terms_of(3, check=check)
    stores = [ListStore(), FullStore(), ListStore()]
    found = Network(nx.path_graph(3), terms, drawn_values(terms), stores=stores)
    found.open()
    with pytest.raises(StoreError):
        found.run()

    assert not [
        each for sender, _, each in found.arrived + found.waiting if sender == 1 and isinstance(each, MaskedSubtotal | MaskedDigest)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, 2e6])
def test_nothing_leaves_of_a_number_beyond_its_bound(value):
    terms = terms_of(3)
    values = drawn_values(terms)
    values[0][2] = np.array([1.0, value, 1.0])
    found = Network(nx.path_graph(3), terms, values)
    found.open()
    with pytest.raises(ConfigError, match="sum 0: a number of this site is"):
        found.run()

    assert found.stores[2].entries == []


class ForgetfulStore(ListStore):
    def heard(self):
        return []


@pytest.mark.parametrize(("store", "expected"), [(ForgetfulStore, []), (ListStore, [2])])
def test_sets_of_others_count_as_well(store, expected):
    """The third and the fourth sum give clinic-0 alone, which nobody sees in the sets that it is in itself."""
    sets = [[0, 1, 2, 3, 4, 5, 6], [4, 5, 6], [1, 2, 3, 7, 8, 9], [7, 8, 9]]
    stores = [store(b"key %d" % each) for each in range(10)]
    refused = {}
    for number, participants in enumerate(sets):
        terms = terms_of(10, participants, num_sums=1, study=f"{number:02x}" * 32)
        found = Network(nx.cycle_graph(10), terms, drawn_values(terms), stores=stores)
        found.open(participants[0])
        try:
            found.run()
        except ConfigError as error:
            refused[number] = str(error)

    assert list(refused) == expected
    assert all("the sum over clinic-0 alone would be known" in said for said in refused.values())


def test_a_set_of_others_is_written_once():
    store = ListStore()
    note_heard_sets(store, FIVE)
    note_heard_sets(store, FIVE)

    assert len(store.sets) == len(FIVE.sums)
