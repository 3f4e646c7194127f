"""Round records: what is sealed, what is refused, how they spread, and what that costs."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import networkx as nx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.errors import BadMessage, PeerError
from p2pfl.protocol.view import FLUSH_S, NetworkView
from p2pfl.wire.codec import encode
from p2pfl.wire.messages import MAX_RECORDS, Records
from p2pfl.wire.round_record import RoundRecord, seal, unseal, verify
from thorough import first_fast
from wire_samples import KEY, RECORD

STUDY = b"\xaa" * 32
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"\x22" * 32)


def record(member: int, round: int, **changes) -> RoundRecord:
    return replace(RECORD, **{"member": member, "round": round, "level": 0, "skipped": 0, "without": ()} | changes)


def test_a_member_that_begins_once_more_is_told_once():
    gossip = Gossip(nx.path_graph(3))
    gossip.round(0, 1.0)
    gossip.round(1, 2.0)
    assert [view.begun_again() for view in gossip.views] == [set()] * 3
    later = replace(record(0, 5), began=RECORD.began + 1)
    gossip.views[0].publish(later, 3.0)
    gossip.round(6, 3.5, away={0})
    gossip.views[2].hear("1", [seal(later, gossip.secrets[0].sign, STUDY)], 4.0)

    assert gossip.views[2].begun_again() == {0}
    assert gossip.views[2].begun_again() == set()


class Gossip:
    """Views of the nodes of a graph, whose messages arrive within a round, unless they are lost."""

    def __init__(self, graph: nx.Graph, *, bytes_per_s: float | None = None, last_round: int = 10_000) -> None:
        self.graph, self.num_nodes = graph, graph.number_of_nodes()
        self.secrets = [Ed25519PrivateKey.from_private_bytes(bytes([place % 251, place // 251]) * 16) for place in range(self.num_nodes)]
        keys = [secret.public_key().public_bytes_raw() for secret in self.secrets]
        self.views = [
            NetworkView(
                me=me,
                keys=keys,
                sign=self.secrets[me].sign,
                study=STUDY,
                neighbours=[str(j) for j in graph[me]],
                diameter=nx.diameter(graph),
                last_round=last_round,
                bytes_per_s=bytes_per_s,
            )
            for me in graph
        ]
        self.known = {place: {} for place in graph}
        self.lost = set()
        self.sent = np.zeros(self.num_nodes)

    def round(self, number: int, now_s: float, *, away=frozenset(), **changes) -> None:
        """Every node ends a round and says what is new; everybody hears it within the next round."""
        messages = []
        for me, view in enumerate(self.views):
            if me not in away:
                view.begin(number + 1, now_s)
                if view.speaks_of(number):
                    view.publish(record(me, number, level=view.level, disagreement=float(me + number), **changes), now_s)
                messages += self.said(me, now_s)
        self.deliver(messages, now_s, away)

    def said(self, me: int, now_s: float):
        for name in map(str, self.graph[me]):
            while sealed := self.views[me].take(name, now_s):
                self.sent[me] += sum(len(frame) for frame in encode(Records(sealed=tuple(sealed))))
                yield me, int(name), sealed

    def flush(self, now_s: float) -> None:
        due = [(me, name) for me, view in enumerate(self.views) for name in map(str, self.graph[me]) if view.is_due(name, now_s)]
        self.deliver([m for me in sorted({me for me, _ in due}) for m in self.said(me, now_s)], now_s)

    def deliver(self, messages, now_s: float, away=frozenset()) -> None:
        for sender, receiver, sealed in messages:
            if (sender, receiver) not in self.lost and receiver not in away:
                self.views[receiver].hear(str(sender), sealed, now_s)
        for me, view in enumerate(self.views):
            self.known[me] |= {known.number: known for known in view.known_rounds()}


def refusal(view: NetworkView, sealed: bytes) -> str:
    with pytest.raises(PeerError) as caught:
        view.hear(next(iter(view._pending)), [sealed], 0.0)
    return caught.value.reason


def test_a_record_says_what_was_sealed():
    found = unseal(seal(RECORD, KEY.sign, STUDY))
    verify(seal(RECORD, KEY.sign, STUDY), KEY.public_key(), STUDY)

    assert found == RECORD


def test_the_disagreement_keeps_every_bit():
    assert unseal(seal(replace(RECORD, disagreement=1 / 3), KEY.sign, STUDY)).disagreement == 1 / 3


def test_a_record_of_a_usual_round_is_short():
    assert len(seal(replace(RECORD, round=1000, sent=31_800, disagreement=1 / 3), KEY.sign, STUDY)) <= 130


@pytest.mark.parametrize("study", [b"\xab" * 32, b""])
def test_a_record_counts_in_its_own_study_only(study):
    with pytest.raises(BadMessage, match="wrong_signature"):
        verify(seal(RECORD, KEY.sign, STUDY), KEY.public_key(), study)


@given(st.binary(max_size=600))
def test_random_bytes_are_no_record(content):
    with pytest.raises(PeerError):
        unseal(content)


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_record_of_which_a_bit_is_changed_is_refused(place, change):
    sealed = bytearray(seal(RECORD, KEY.sign, STUDY))
    sealed[place % len(sealed)] ^= change
    with pytest.raises(BadMessage, match="wrong_signature"):
        verify(bytes(sealed), KEY.public_key(), STUDY)


@pytest.mark.parametrize(
    "changes",
    [
        {"disagreement": -1.0},
        {"disagreement": float("inf")},
        {"norm": float("nan")},
        {"round": -1},
        {"skipped": True},
        {"closing": 1},
        {"without": tuple(range(17))},
        {"metrics": (0.5,) * 9},
        {"milliseconds": (1, 2, 3)},
        {"level": 33},
        {"rows": (1.5, 2)},
    ],
)
def test_a_record_with_a_wrong_field_is_refused(changes):
    with pytest.raises(BadMessage, match="bad_record"):
        unseal(seal(replace(RECORD, **changes), KEY.sign, STUDY))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: seal(record(3, 0), KEY.sign, STUDY), "bad_record"),
        (lambda: seal(record(1, 10_001), KEY.sign, STUDY), "bad_record"),
        (lambda: seal(record(1, 0), OTHER_KEY.sign, STUDY), "wrong_signature"),
        (lambda: b"x" * 65, "bad_record"),
    ],
)
def test_a_node_refuses_what_is_not_a_members_own(made, reason):
    gossip = Gossip(nx.cycle_graph(3))

    assert refusal(gossip.views[0], made()) == reason
    assert gossip.views[0].newest == {}


def test_a_number_that_no_sum_can_hold_is_no_record():
    for name in ("norm", "disagreement", "loss"):
        assert refusal(Gossip(nx.cycle_graph(3)).views[0], sealed_plainly({name: 1e200})) == "bad_record"


def sealed_plainly(changes) -> bytes:
    """With 64 bits in every number, as a stranger might."""
    body = msgpack.packb([changes.get(field.name, getattr(record(1, 0), field.name)) for field in fields(RoundRecord)])
    return bytes(64) + body


def test_one_member_decides_neither_what_is_collected_nor_how_far_others_are():
    gossip = Gossip(nx.cycle_graph(8))
    lie = seal(record(1, 10_000, level=32), gossip.secrets[1].sign, STUDY)
    for number in range(30):
        for view in gossip.views:
            if view.me != 1:
                view.hear(str((view.me + 1) % 8), [lie], float(number), furthest=number + 16)
        gossip.round(number, float(number))

    assert sum(known.is_whole for known in gossip.known[5].values()) >= 20
    assert all(heard.record.round < 30 for heard in gossip.views[5].newest.values())


@pytest.mark.no_cover
def test_a_member_that_never_stops_talking_does_not_drown_the_others():
    graph = nx.path_graph(12)
    gossip, passed = Gossip(graph, bytes_per_s=1000.0), 0
    for second in range(60):
        if second % 3 == 0:
            gossip.round(second // 3, float(second))
        flood = [seal(record(0, 1000 + 10 * second + k), gossip.secrets[0].sign, STUDY) for k in range(10)]
        gossip.views[1].hear("0", flood, float(second))
        gossip.flush(float(second))
    passed = [gossip.views[11].newest[member].record.round for member in range(2, 11)]

    assert min(passed) >= 10


def test_what_was_signed_in_an_earlier_run_is_past_once_the_member_is_heard():
    gossip = Gossip(nx.cycle_graph(3))
    view = gossip.views[0]
    old = [seal(record(1, number, began=5, closing=number == 9), gossip.secrets[1].sign, STUDY) for number in range(10)]
    view.hear("2", old, 0.0)
    assert view.newest[1].record.closing
    view.hear("1", [seal(record(1, 0, began=6, disagreement=7.0), gossip.secrets[1].sign, STUDY)], 1.0)
    view.hear("2", old, 2.0)

    assert (view.newest[1].record.round, view.newest[1].record.closing) == (0, False)
    assert {r.disagreement for r in view.open_records() if r.member == 1 and r.round == 0} == {7.0}


def test_after_its_end_a_node_passes_on_last_records_only_beyond_its_allowance():
    gossip = Gossip(nx.path_graph(3), bytes_per_s=1000.0)
    view = gossip.views[1]
    view.publish(record(1, 0, closing=True), 0.0)
    said = 0
    for number in range(1, 400):
        view.hear("0", [seal(record(0, number), gossip.secrets[0].sign, STUDY)], number * 0.05)
        said += sum(map(len, view.take("2", number * 0.05)))

    assert said <= 20 * 1000 + 5 * 1000 + MAX_RECORDS * 150


def test_no_neighbour_makes_a_node_check_signatures_for_ever():
    gossip = Gossip(nx.cycle_graph(3), bytes_per_s=1000.0)
    flood = [seal(record(1, number), gossip.secrets[1].sign, STUDY) for number in range(5000)]
    with pytest.raises(BadMessage, match="too_many_records"):
        gossip.views[0].hear("1", flood, 0.0)

    assert len(gossip.views[0].newest) == 1
    gossip.views[0].hear("1", [flood[-1]], 60.0)
    assert gossip.views[0].newest[1].record.round == 4999


def test_rounds_that_come_at_once_are_all_passed_on():
    """A busy node hears several rounds of a member before it gets to say anything: none of them may lose its certificate."""
    gossip = Gossip(nx.path_graph(3))
    gossip.views[1].hear("0", [seal(record(0, number), gossip.secrets[0].sign, STUDY) for number in range(9)], 0.0)

    assert sorted(unseal(sealed).round for _, _, sealeds in gossip.said(1, 0.0) for sealed in sealeds) == list(range(9))


def test_what_a_node_keeps_of_a_member_is_bounded():
    gossip = Gossip(nx.cycle_graph(3))
    for number in range(0, 10_000, 7):
        gossip.views[0].hear("1", [seal(record(1, number), gossip.secrets[1].sign, STUDY)], 0.0)
    kept = len(gossip.views[0]._rounds), max(len(pending) for pending in gossip.views[0]._pending.values())

    assert max(kept) <= 2 * 1 + 8 + 4 * 3


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "graph", first_fast([nx.cycle_graph(12), nx.path_graph(7), nx.star_graph(7), nx.hypercube_graph(4), nx.complete_graph(5)])
)
def test_every_node_knows_every_round_within_the_diameter(graph):
    graph = nx.convert_node_labels_to_integers(graph)
    gossip, rounds, diameter = Gossip(graph), 40, nx.diameter(graph)
    for number in range(rounds):
        gossip.round(number, float(number))
        for view in gossip.views:
            assert len(view.newest) == gossip.num_nodes or number < diameter - 1
            assert all(number - heard.record.round <= diameter for heard in view.newest.values())

    whole = range(rounds - diameter)
    for known in gossip.known.values():
        assert set(whole) <= known.keys()
        assert all(known[r].is_whole and known[r].known_in - r <= diameter + 1 for r in whole)
        assert [known[r].disagreement for r in whole] == [sum(i + r for i in graph) for r in whole]


@pytest.mark.no_cover
def test_a_record_crosses_each_link_of_a_ring_about_once():
    gossip = Gossip(nx.cycle_graph(16))
    for number in range(50):
        gossip.round(number, float(number))

    assert gossip.sent.max() / 50 <= (16 + 2) * 130


@pytest.mark.parametrize("graph", first_fast([nx.star_graph(9), nx.cycle_graph(10), nx.random_regular_graph(4, 20, seed=1)]))
@pytest.mark.parametrize("round_s", [0.2, 20.0])
def test_the_cost_keeps_below_the_allowance_and_everybody_is_still_heard(graph, round_s):
    gossip = Gossip(nx.convert_node_labels_to_integers(graph), bytes_per_s=1000.0)
    seconds = 120.0
    for number in range(int(seconds / round_s)):
        gossip.round(number, number * round_s)
        if round_s > FLUSH_S:
            for step in range(1, int(round_s)):
                gossip.flush(number * round_s + step * FLUSH_S)

    assert gossip.sent.max() / seconds < 1000
    for view in gossip.views:
        assert len(view.newest) == gossip.num_nodes
    assert all(sum(known.is_whole for known in known_here.values()) >= 1 for known_here in gossip.known.values())


def test_bytes_are_counted_as_they_are_sent():
    gossip = Gossip(nx.cycle_graph(5))
    for number in range(20):
        gossip.round(number, float(number))

    for me, view in enumerate(gossip.views):
        assert view.bytes_sent == pytest.approx(gossip.sent[me], rel=0.1)


def test_a_round_without_somebody_is_known_once_nobody_can_speak_of_it_any_more():
    gossip = Gossip(nx.cycle_graph(6))
    for number in range(60):
        gossip.round(number, float(number), away={2} if number >= 5 else frozenset())
    known = gossip.known[0]

    assert known[4].is_whole
    assert not known[20].is_whole
    assert sorted(known[20].records) == [0, 1, 3, 4, 5]


def test_a_round_in_which_somebody_was_skipped_is_not_whole():
    gossip = Gossip(nx.cycle_graph(6))
    for number in range(12):
        gossip.round(number, float(number), **({"skipped": 1, "without": (0,)} if number == 3 else {}))

    assert [number for number, known in sorted(gossip.known[0].items()) if not known.is_whole] == [3]


def test_a_neighbour_that_comes_back_hears_of_everybody():
    gossip = Gossip(nx.path_graph(4))
    gossip.lost = {(1, 0)}
    for number in range(10):
        gossip.round(number, float(number))
    assert gossip.views[0].newest.keys() == {0}
    gossip.lost = set()
    gossip.views[1].say_again("0", 10.0)
    gossip.deliver(list(gossip.said(1, 10.0)), 10.0)

    assert gossip.views[0].newest.keys() == {0, 1, 2, 3}


def test_a_message_holds_no_more_records_than_it_may():
    gossip = Gossip(nx.star_graph(40))
    for number in range(3):
        gossip.round(number, float(number))
    view = gossip.views[0]
    view.say_again("1", 4.0)
    said = []
    while sealed := view.take("1", 4.0):
        said.append(len(sealed))

    assert max(said) == MAX_RECORDS
    assert sum(said) >= 40


def test_the_last_records_pass_whatever_the_allowance():
    gossip = Gossip(nx.cycle_graph(8), bytes_per_s=1.0)
    for number in range(4):
        gossip.round(number, number * 0.01)
    for me, view in enumerate(gossip.views):
        view.publish(record(me, 3, closing=True), 0.05)
    for _ in range(8):
        for me in range(8):
            gossip.deliver(list(gossip.said(me, 0.05)), 0.05)

    assert all(view.is_told_of_the_end({str(j) for j in gossip.graph[me]}) for me, view in enumerate(gossip.views))
    assert all(gossip.known[me][3].is_whole for me in range(8))
