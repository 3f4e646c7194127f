"""Members that alter, drop or lie: the sum does not count, and they are named."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import networkx as nx
import numpy as np
import pytest
from secure_members import Network, drawn_values, signing_key, terms_of

from p2pfl.errors import BadMessage
from p2pfl.privacy.fixed_point import added
from p2pfl.protocol.early_messages import EarlyMessages
from p2pfl.protocol.secure_sum import SecureSum
from p2pfl.wire.secure_messages import MaskedDigest, MaskedSubtotal, SignedTotal, Total, sign


def network(graph, *, seed=0, **more):
    terms = terms_of(len(graph), **more)
    found = Network(graph, terms, drawn_values(terms, seed), seed=seed)
    found.open()
    return found


def ends_of(found):
    return {(each.ended.reason, each.ended.names) for each in found.members if each.ended}


def assert_void(found, reason, names):
    """Every session is over for that reason, and nobody holds a total."""
    assert all(each.session.is_over for each in found.members)
    assert {(said.partition(": ")[2], named) for said, named in ends_of(found)} == {(reason, names)}
    assert found.totals_of(0) == [None] * len(found.terms.participants)


def adding(member, delta):
    """How a member adds up that puts a number on top."""

    def subtotal(self, parts):
        total = reduce(added, parts)
        if self._me == member:
            extra = np.zeros_like(total)
            extra[0, 0] = delta
            total = added(total, extra)
        return total

    return subtotal


@pytest.mark.parametrize("member", [0, 1, 2, 3])
def test_a_member_that_adds_to_a_checked_sum_is_named(monkeypatch, member):
    monkeypatch.setattr(SecureSum, "_subtotal", adding(member, 1 << 50))
    found = network(nx.path_graph(4), check=True)
    found.run()

    assert_void(found, f"clinic-{member} altered or dropped a part of it", (member,))


def test_without_a_check_it_is_not_noticed(monkeypatch):
    monkeypatch.setattr(SecureSum, "_subtotal", adding(1, 1 << 50))
    found = network(nx.path_graph(4), num_sums=1)
    found.run()

    assert (found.totals_of(0)[0] != found.plain(0)).any()
    assert ends_of(found) == set()


def dropping(self, parts):
    return parts[0] if self._me == 1 else reduce(added, parts)


def test_a_member_that_drops_a_part_of_a_checked_sum_is_named_where_the_range_does_not_show_it(monkeypatch):
    monkeypatch.setattr(SecureSum, "_subtotal", dropping)
    monkeypatch.setattr("p2pfl.privacy.fixed_point.FixedPoint.decode", lambda _, total: np.zeros(total.shape[:-1]))
    found = network(nx.path_graph(4), check=True)
    found.run()

    assert_void(found, "clinic-1 altered or dropped a part of it", (1,))


def test_a_part_that_is_missing_makes_noise_that_the_range_shows(monkeypatch):
    monkeypatch.setattr(SecureSum, "_subtotal", dropping)
    found = network(nx.path_graph(4))
    found.run()

    assert_void(found, "the total is beyond what the sites agreed; a part was lost or altered", ())


def altering(kind, sender, receiver):
    """A link on which arrays of one kind become other ones."""

    def change(from_, to, message):
        if (from_, to) != (sender, receiver) or not isinstance(message, kind):
            return message
        return replace(message, limbs=added(message.limbs, np.full_like(message.limbs, 1)))

    return change


def test_two_members_of_which_one_lies_about_an_array_are_named(monkeypatch):
    found = network(nx.path_graph(4), check=True, bound=2.0**62)
    found.change = altering(MaskedSubtotal, 2, 1)
    found.run()

    assert_void(found, "clinic-1 or clinic-2 altered or dropped a part of it", (1, 2))


@pytest.mark.parametrize("check", [False, True])
def test_the_edge_at_which_totals_differ_is_named(check):
    found = network(nx.path_graph(4), check=check, bound=2.0**62)
    found.change = altering(Total, 1, 2)
    found.run()

    assert_void(found, "clinic-1 and clinic-2 hold different totals", (1, 2))


def test_two_totals_that_members_kept_of_one_sum_are_named():
    found = network(nx.path_graph(4), num_sums=1)
    found.run()
    kept = found.members[2].totals
    (sum_id,) = kept
    found.restart(2, totals={sum_id: added(kept[sum_id], kept[sum_id])})
    found.open(2)
    found.run()

    assert ends_of(found) == {("clinic-0 and clinic-2 hold different totals of one sum", (0, 2))}


def captured(found, kind):
    """The first message of a kind that is on its way to a member that has begun the sum, and its ends."""

    def those(network):
        begun = [each for each, member in enumerate(network.members) if member._sum]
        return [each for each in network.waiting if isinstance(each[2], kind) and each[1] in begun]

    found.run(until=those)
    return those(found)[0]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"transcript": bytes(32)}, "wrong_transcript"),
        ({"sum_id": "another"}, "wrong_sum"),
        ({"position": 9}, "wrong_sum"),
        ({"limbs": np.zeros((4, 2), dtype=np.uint64)}, "wrong_shape"),
        ({"limbs": np.zeros((3, 2), dtype=np.int64)}, "wrong_shape"),
    ],
)
def test_an_array_of_something_else_is_refused(changed, reason):
    found = network(nx.star_graph(3))
    sender, receiver, message = captured(found, MaskedSubtotal)
    with pytest.raises(BadMessage) as refused:
        found.members[receiver].receive(sender, replace(message, **changed), 0.0)

    assert refused.value.reason == reason
    found.run()
    found.assert_exact()


def test_arrays_come_from_their_place_in_the_tree_and_once():
    found = network(nx.star_graph(3))
    sender, receiver, message = captured(found, MaskedSubtotal)
    hub = found.members[receiver]
    with pytest.raises(BadMessage, match="wrong_place"):
        found.members[sender].receive(receiver, message, 0.0)
    hub.receive(sender, message, 0.0)
    hub.receive(sender, message, 0.0)
    with pytest.raises(BadMessage, match="two things"):
        hub.receive(sender, replace(message, limbs=added(message.limbs, message.limbs)), 0.0)
    found.run()
    found.assert_exact()


def test_a_statement_counts_under_its_members_signature_and_once():
    found = network(nx.path_graph(3))
    sender, receiver, message = captured(found, SignedTotal)
    member = found.members[receiver]
    with pytest.raises(BadMessage, match="wrong_signature"):
        member.receive(sender, replace(message, mac=bytes(32)), 0.0)
    with pytest.raises(BadMessage, match="not planned"):
        member.receive(sender, sign(replace(message, position=9), signing_key(message.member)), 0.0)
    with pytest.raises(BadMessage, match="another set"):
        member.receive(sender, sign(replace(message, participants=(0, 1)), signing_key(message.member)), 0.0)


def test_more_messages_before_their_time_than_there_can_be_are_refused():
    found = network(nx.path_graph(3))
    head = {"member": 0, "sum_id": "", "digest": bytes(32), "position": 0}
    for number in range(8 * (3 + 1)):
        found.members[1].receive(0, MaskedDigest(transcript=bytes([number] * 32), **head), 0.0)
    with pytest.raises(BadMessage, match="too_early"):
        found.members[1].receive(0, MaskedDigest(transcript=bytes([99] * 32), **head), 0.0)
    found.run()
    found.assert_exact()


def test_a_neighbour_fills_little_memory_with_arrays_before_their_time():
    early = EarlyMessages(50)
    limbs = np.zeros((3, 2), dtype=np.uint64)
    arrays = [MaskedSubtotal(transcript=bytes([each] * 32), sum_id="cc" * 32, position=0, limbs=limbs) for each in range(9)]
    for each in arrays[:4]:
        early.keep(1, each)
    with pytest.raises(BadMessage, match="too_early"):
        early.keep(1, arrays[4])
    early.keep(2, arrays[5])

    assert [sender for sender, _ in early.take_all()] == [1, 1, 1, 1, 2]
