"""What one member claims about itself moves no other one: lies told by hand to one node's edges, with the time as an argument."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nodes_by_hand import FLOOR_S, FORMAT, Node, alive, hello, meeting_in_pairs

from p2pfl.algorithms.stopping import StopRule
from p2pfl.protocol.deadlines import LATER, SOON
from p2pfl.protocol.edges import Flow
from p2pfl.protocol.pairwise_exchanges import PairwiseExchanges
from p2pfl.protocol.view import NetworkView
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import NO_STOP, Closing, Heartbeat, ProofRequest, Records, Report, StopNews
from p2pfl.wire.round_record import RoundRecord, seal, unseal
from p2pfl.wire.update import ChannelFormat, UpdateFormat
from wire_samples import RECORD

STUDY = b"\xaa" * 32
MEMBERS = "abcd"
"""The node that is looked at, two honest members, and one that lies."""
SECRETS = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in MEMBERS}
TICK_S = 0.1
ROUND_S = 1.0
HOUR_S = 3600.0
LARGE = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(300_000,)),))
"""Three chunks."""


def record(name: str, number: int, **changes) -> RoundRecord:
    return replace(RECORD, **{"member": MEMBERS.index(name), "round": number, "level": 0, "skipped": 0, "without": ()} | changes)


def signed(name: str, number: int, *, key: str | None = None, **changes) -> bytes:
    return seal(record(name, number, **changes), SECRETS[key or name].sign, STUDY)


class Member(Node):
    """A node of a study of four, or of fewer, that hears signed records."""

    def __init__(self, me: str, *peers: str, members: str = MEMBERS, **parts) -> None:
        self.ended = -1
        view = NetworkView(
            me=MEMBERS.index(me),
            keys=[SECRETS[name].public_key().public_bytes_raw() for name in members],
            sign=SECRETS[me].sign,
            study=STUDY,
            neighbours=peers,
            diameter=2,
            last_round=100_000,
            bytes_per_s=None,
        )
        super().__init__(
            me,
            *peers,
            view=view,
            num_others=len(members) - 1,
            places={name: MEMBERS.index(name) for name in peers},
            prove=lambda: None if self.ended < 0 else signed(self.me, self.ended),
            **parts,
        )
        for peer in peers:
            self.hear(peer, replace(hello(member=peer), incarnation=77 + ord(peer)))
        self.protocol.claims.note_company(0, 0.0)

    def update_of(self, peer: str, exchange: int) -> None:
        """An update of a member that has merged this node's one before."""
        before = max(exchange - 2, -1)
        merged = (exchange - 1,) if exchange else ()
        self.hear_update(peer, exchange, report=Report(closed_through=exchange - 1, merged=merged, confirmed=before, settled=before))

    def wait(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s - TICK_S / 2:
            self.now_s += TICK_S
            self.protocol.tick(self.now_s)

    def one_round(self, honest: str, liar=lambda: None, *, train_s: float = ROUND_S, after_s: float = 0.0) -> float:
        """Train, send, and wait for what comes; returns how long it waited.

        Args:
            honest: members whose updates come so long after this node's own is sent.
            liar: does its work at each tick while this node waits.
            train_s: how long this node trains.
            after_s: how long the others need longer.
        """
        for _ in range(round(train_s / TICK_S)):
            self.wait(TICK_S)
            liar()
        self.post()
        began_s, exchange, sent = self.now_s, self.protocol.edges.exchange, False
        while not self.protocol.pace.is_over(self.now_s) and not self.protocol.claims.is_behind():
            if not sent and self.now_s - began_s >= after_s:
                for name in honest:
                    self.update_of(name, exchange)
                sent = True
                continue
            self.now_s = min(
                self.now_s + TICK_S, self.protocol.deadlines.look_again_s(self.now_s, TICK_S, self.protocol.pace.awaited())
            )  # as the daemon does
            self.protocol.tick(self.now_s)
            liar()
            for name in self.protocol.neighbours:
                self.frames_for(name)
        if not self.protocol.claims.is_behind():
            self.close()
            self.ended = exchange
        return self.now_s - began_s

    def jump(self) -> int:
        target = self.protocol.claims.furthest()
        self.protocol.jump(target, self.now_s)
        self.protocol.begin(target, self.now_s)
        return target


def ladder(node: Member, liar: str = "d", top: int = 300):
    """At each tick one more exchange number, each a little further."""
    at = [0]

    def lie() -> None:
        at[0] = min(max(at[0] + 2, node.protocol.edges.exchange + 2, int(at[0] * 1.15)), top)
        node.hear(liar, alive(at[0]))

    return lie


# ---- progress


def test_lies_cost_no_round_where_honest_neighbours_are_in_step():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    lie = ladder(a, top=90_000)
    while a.now_s < HOUR_S / 20:
        a.one_round("bc", lie)
        assert not a.protocol.claims.is_behind()

    assert a.kinds().count("jumped") == 0
    assert a.protocol.edges.exchange > 170


def test_lies_of_the_only_neighbour_cost_no_round():
    """It sends no update any more, so that the node is alone; and it passes on no record of others."""
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    lie = ladder(a, top=90_000)
    while a.now_s < HOUR_S / 4:
        a.one_round("", lie)
        assert not a.protocol.claims.is_behind()

    assert "hurried" in a.kinds()


def test_a_liar_that_signs_what_it_says_is_one_member_all_the_same():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("d", 299),)), alive(300))

    assert not a.protocol.claims.is_behind()


def test_a_record_that_another_member_has_not_signed_confirms_nothing():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("c", 299, key="d"),)), alive(300))

    assert a.protocol.edges.refused["wrong_signature"] == 1
    assert not a.protocol.claims.is_behind()


def test_a_true_record_of_another_member_takes_a_node_no_further_than_that_one_is():
    a = Member("a", "d")
    for _ in range(5):
        a.one_round("d")
    a.hear("d", Records(sealed=(signed("c", 5),)), alive(300))
    assert not a.protocol.claims.is_behind()
    a.hear("d", Records(sealed=(signed("c", 19),)), alive(300))

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() == 20


def test_a_member_that_is_as_far_ahead_as_the_links_to_it_explain_confirms_no_claim():
    """It is two links away: it goes on when its neighbour is one exchange ahead of this node, and both are in step all the same."""
    a = Member("a", "b", "d")
    for _ in range(5):
        a.one_round("bd")
    a.hear("b", alive(6), Records(sealed=(signed("c", 6),)))
    a.hear("d", alive(90_000))
    assert not a.protocol.claims.is_behind()
    a.hear("b", Records(sealed=(signed("c", 7),)))

    assert a.protocol.claims.furthest() == 8


def test_a_first_round_that_takes_longer_than_a_deadline_makes_no_claim_plausible():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.wait(FLOOR_S)
        a.hear("d", alive(90_000))

    assert not a.protocol.claims.is_behind()


def test_two_neighbours_that_say_the_same_are_believed_at_once():
    a = Member("a", "b", "c", "d")
    a.one_round("bcd")
    a.hear("d", alive(90_000))
    assert not a.protocol.claims.is_behind()
    a.hear("b", alive(1000))

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() == 1000


def test_a_node_that_was_cut_off_asks_for_proof_and_jumps_to_where_the_network_is():
    a, b = Member("a", "b"), Member("b", "a", "c")
    for _ in range(3):
        a.one_round("b")
    while a.now_s < HOUR_S / 10:  # the cable is cut
        a.one_round("")
    b.now_s, b.ended = a.now_s, 3598
    b.protocol.begin(3600, b.now_s)
    a.frames_for("b")
    b.frames_for("a")
    a.hear("b", alive(3600))
    a.protocol.tick(a.now_s)
    assert not a.protocol.claims.is_behind()
    asked = [message for message in a.said_to("b") if isinstance(message, ProofRequest)]
    assert asked == [ProofRequest(relayed=False)]

    b.hear("a", *asked)
    assert [message for message in b.said_to("c") if isinstance(message, ProofRequest)] == [ProofRequest(relayed=True)]
    b.frames_for("a")
    b.hear("c", Records(sealed=(signed("c", 3599),)))
    answers = [message for message in b.said_to("a") if isinstance(message, Records)]
    assert [(unseal(each).member, unseal(each).round) for each in answers[-1].sealed] == [(1, 3598), (2, 3599)]
    a.hear("b", *answers)

    assert a.protocol.claims.is_behind()
    assert a.jump() == 3600


def test_who_is_asked_for_somebody_else_answers_with_its_own_record_and_asks_nobody():
    c = Member("c", "b", "d")
    c.ended = 41
    for peer in "bd":
        c.frames_for(peer)
    for _ in range(10):
        c.hear("b", ProofRequest(relayed=True))

    answers = [message for message in c.said_to("b") if isinstance(message, Records)]
    assert [[unseal(each).round for each in answer.sealed] for answer in answers] == [[41]]
    assert not any(isinstance(message, ProofRequest) for message in c.said_to("d"))


def test_two_members_believe_each_other_as_far_as_one_that_is_alone_can_be():
    a = Member("a", "b", members="ab")
    for _ in range(3):
        a.one_round("b")
    a.wait(FLOOR_S)
    for exchange in range(5, 300):
        a.hear("b", alive(exchange))
    assert not a.protocol.claims.is_behind()
    for _ in range(5):
        a.wait(FLOOR_S)

    assert a.protocol.claims.is_behind()
    assert a.protocol.claims.furthest() <= 3 + 6


def test_a_node_that_has_stood_still_knows_how_far_the_others_can_be():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    a.now_s += 60.0
    a.hear("b", alive(60))
    assert a.protocol.claims.is_behind()
    a.hear("d", alive(90_000))

    assert a.protocol.claims.furthest() <= 5 + 60 / ROUND_S + 1


def test_a_jump_uses_up_what_standing_still_has_earned():
    a = Member("a", "b", "c", "d")
    for _ in range(5):
        a.one_round("bcd")
    a.now_s += 60.0
    a.hear("d", alive(90_000))
    target = a.jump()
    for _ in range(10):
        a.hear("d", alive(90_000))

    assert target <= 66
    assert not a.protocol.claims.is_behind()


# ---- the clock


def endless_update(node: Member):
    """Begins an update, sends a second chunk, begins again, for ever."""
    node.protocol.neighbours["d"].session = LinkSession(peer="d", member="a", terms=node_terms(node), incarnation=1, formats=(LARGE,))
    node.hear("d", hello(member="d"))
    step = [0]

    def lie() -> None:
        exchange = node.protocol.edges.exchange
        step[0] += 1
        frames = [*LARGE.pack(exchange, {"x": np.zeros(300_000)}).messages(alive(exchange).report, NO_STOP)]
        if step[0] % 10 == 1:
            node.protocol.hear("d", tuple(map(memoryview, frames[0])), node.now_s)
        elif step[0] % 10 == 5:
            node.protocol.hear("d", tuple(map(memoryview, frames[1])), node.now_s)

    return lie


def node_terms(node: Member):
    return node.protocol.neighbours["b"].session._terms


def only_alive(node: Member):
    return lambda: node.hear("d", alive(node.protocol.edges.exchange))


def says_that_it_waits(node: Member):
    return lambda: node.hear("d", alive(max(node.protocol.edges.exchange - 1, 0)))


def restarts(node: Member):
    step = [1000]

    def lie() -> None:
        step[0] += 1
        node.hear("d", replace(hello(member="d", exchange=node.protocol.edges.exchange), incarnation=step[0]))

    return lie


def two_updates_and_a_miss(node: Member):
    """Makes up for each miss as cheaply as it can."""

    def lie() -> None:
        exchange = node.protocol.edges.exchange
        node.hear("d", alive(exchange))
        if exchange % 3:
            node.update_of("d", exchange)

    return lie


PROGRAMS = [endless_update, only_alive, says_that_it_waits, restarts, two_updates_and_a_miss]


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_member_costs_more_than_three_deadlines_in_forty_rounds(program):
    a = Member("a", "b", "c", "d")
    lie = program(a)
    lost_s = sum(a.one_round("bc", lie, train_s=TICK_S) for _ in range(40))

    assert a.protocol.edges.exchange == 40
    assert lost_s <= 3 * FLOOR_S


def test_the_first_round_waits_for_a_member_that_only_speaks_no_longer_than_news_need():
    a = Member("a", "b", "c", "d", starting_exchanges=4)
    a.protocol.deadlines.wait_at_start(0.0, 2.5 + FLOOR_S, 2.5 + FLOOR_S)
    lie = only_alive(a)
    lost_s = sum(a.one_round("bc", lie, train_s=TICK_S) for _ in range(40))

    assert lost_s <= 3 * FLOOR_S


def test_a_member_that_speaks_and_does_not_come_is_said_to_hold_the_node():
    a = Member("a", "b", "c", "d")
    lie = only_alive(a)
    for _ in range(10):
        a.one_round("bc", lie, train_s=TICK_S)

    assert a.kinds().count("held") == 1
    assert next(detail for kind, detail in a.events if kind == "held").startswith("d spoke and did not come to 3 exchanges")


def test_an_honest_member_that_stood_still_is_waited_for_again_within_two_rounds():
    a = Member("a", "b", "c", "d")
    for _ in range(10):
        a.one_round("bcd")
    end_s = a.now_s + 60.0
    while a.now_s < end_s:
        a.one_round("bc")
    assert a.protocol.neighbours["d"].missed
    at = a.protocol.edges.exchange
    waited_s = [a.one_round("bcd" if number else "bc", lambda: a.hear("d", alive(at)), after_s=2.0) for number in range(2)]

    assert a.protocol.edges.exchange == at + 2
    assert a.protocol.admitted() == {}
    assert waited_s[1] >= 2.0
    assert [kind for kind in a.kinds() if kind == "skipped"] == ["skipped"] * 2


def test_patience_halves_at_each_miss_and_doubles_after_two_complete_updates():
    a = Member("a", "b", "d")
    lie = only_alive(a)
    d = a.protocol.deadlines.patience["d"]
    lost_s = a.one_round("b", lie, train_s=TICK_S)
    assert d.fraction == 0.5
    assert lost_s == pytest.approx(FLOOR_S, abs=2 * TICK_S)

    for _ in range(SOON):
        assert d.fraction == 0.5
        a.one_round("bd", train_s=TICK_S)
    assert d.fraction == 1.0
    a.one_round("b", lie, train_s=TICK_S)
    for _ in range(LATER):
        assert d.fraction == 0.5
        a.one_round("bd", train_s=TICK_S)
    assert d.fraction == 1.0


def test_a_member_that_missed_often_still_gets_the_time_to_catch_up():
    """It is a round behind, trains as long as the others, and so comes a round's time after them: half of that would never do."""
    train_s = 2.0
    a = Member("a", "b", "d")
    d = a.protocol.deadlines.patience["d"]
    for _ in range(20):
        a.one_round("bd", train_s=train_s)
    d.fraction, d.misses, d.missed_s = 1 / 16, 4, a.now_s  # its site had a bad hour
    lost_s, last = [], [-1]

    def late() -> None:
        exchange = a.protocol.edges.exchange
        a.hear("d", alive(exchange))
        if (
            exchange in a.protocol.transfers.sent
            and exchange != last[0]
            and a.now_s - a.protocol.deadlines.deadline_s + FLOOR_S >= train_s - 0.2
        ):
            last[0] = exchange
            a.update_of("d", exchange)

    while last[0] < 0 and len(lost_s) < 10:
        lost_s.append(a.one_round("b", late, train_s=train_s))

    assert last[0] >= 0


def test_a_member_that_never_catches_up_is_given_the_time_more_and_more_rarely():
    a = Member("a", "b", "d")
    d = a.protocol.deadlines.patience["d"]
    for _ in range(20):
        a.one_round("bd", train_s=2.0)
    d.fraction, d.misses, d.missed_s = 1 / 16, 4, a.now_s
    lie = only_alive(a)
    lost_s = [a.one_round("b", lie, train_s=2.0) for _ in range(90)]

    waited = [number for number, seconds in enumerate(lost_s) if seconds > 1.0]
    assert [after - before for before, after in pairwise(waited)] == [5, 17, 65]


def test_late_updates_of_a_member_that_is_not_waited_for_do_not_shorten_the_deadline():
    a = Member("a", "b", "d")
    for _ in range(20):
        a.one_round("bd", train_s=4.0)
    d, before_s = a.protocol.neighbours["d"], a.protocol.deadlines.allowance_s()
    d.note_fault()
    for _ in range(20):
        a.update_of("d", a.protocol.edges.exchange - 1)

    assert before_s > FLOOR_S
    assert a.protocol.deadlines.allowance_s() == before_s


def test_a_miss_is_forgotten_after_an_hour():
    a = Member("a", "b", "d")
    a.one_round("b", only_alive(a), train_s=TICK_S)
    assert a.protocol.deadlines.patience["d"].fraction == 0.5
    a.now_s += HOUR_S
    a.post()

    assert a.protocol.deadlines.patience["d"].fraction == 1.0


def test_a_node_that_stood_still_itself_blames_nobody():
    a = Member("a", "b", "c")
    a.one_round("bc")
    a.post()
    a.now_s += 60.0
    assert a.protocol.pace.is_over(a.now_s)
    a.close()

    assert [each.fraction for each in a.protocol.deadlines.patience.values()] == [1.0, 1.0]


def test_after_a_miss_the_word_that_a_member_waits_counts_where_a_third_one_confirms_it():
    confirmed = set()
    a = Member("a", "b", "d", waits_for_others=lambda name, number: (name, number) in confirmed)
    a.one_round("b", only_alive(a), train_s=TICK_S)
    lie = says_that_it_waits(a)
    a.hear("d", alive(1))
    unconfirmed_s = a.one_round("b", lie, train_s=TICK_S)
    confirmed.add(("d", a.protocol.edges.exchange - 1))
    its_time_s = a.protocol.deadlines.patience_with("d")
    confirmed_s = a.one_round("b", lie, train_s=TICK_S)

    assert unconfirmed_s == pytest.approx(FLOOR_S / 2, abs=2 * TICK_S)
    assert confirmed_s == pytest.approx(2 * its_time_s, abs=2 * TICK_S)


def test_an_update_that_drips_in_is_waited_for_no_longer_than_the_slowest_link_needs():
    a = Member("a", "b", "d")
    format_ = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(1_200_000,)),))  # ten chunks
    a.protocol.neighbours["d"].session = LinkSession(peer="d", member="a", terms=node_terms(a), incarnation=1, formats=(format_,))
    a.hear("d", hello(member="d"))
    frames = [*format_.pack(0, {"x": np.zeros(1_200_000)}).messages(alive(0).report, NO_STOP)]

    def drip() -> None:
        if int(a.now_s * 10) % 190 == 0 and frames:  # just before patience ends
            a.protocol.hear("d", tuple(map(memoryview, frames.pop(0))), a.now_s)

    assert a.one_round("b", drip, train_s=TICK_S) <= FLOOR_S + format_.size_bytes / 2**16 + 1.0


def test_a_member_that_did_not_answer_has_half_the_time_in_the_next_meeting():
    node = meeting_in_pairs(ahead=1000)
    protocol = node.protocol
    exchanges = PairwiseExchanges(protocol.edges, protocol.pace, protocol.deadlines, protocol.transfers)
    exchanges.ask(FORMAT.pack(protocol.pace.ask("a"), {"x": np.zeros(2)}), 0.0)
    exchanges.give_up("a", 0, missed=True)
    assert protocol.deadlines.patience_with("a") == FLOOR_S / 2

    for number in range(1, 1 + SOON):
        node.hear("a", alive(number))
        exchanges.ask(FORMAT.pack(protocol.pace.ask("a"), {"x": np.zeros(2)}), 1.0)
        exchanges.merged("a", Flow(exchange=number, amounts={}), 1.1)

    assert protocol.deadlines.patience_with("a") == FLOOR_S


# ---- stopping

RULE = StopRule(tolerance=0.1, patience=2, diameter=2, lambda_2=1.0)


def stop(exchange: int, stop_round: int) -> Heartbeat:
    return replace(alive(exchange), stop=StopNews(agreed_for=50, stop_round=stop_round))


def mixing(counters: list[int]) -> Member:
    """A node after some rounds that only mix, with what its own consensus counter was."""
    a = Member("a", "b", "d", stop_rule=RULE, earliest_stop=RULE.earliest(0))
    for number, counter in enumerate(counters):
        a.protocol.stopping.agree(number, counter, None)
    return a


def test_a_stop_that_was_announced_by_nobody_is_refused():
    a = mixing([0] * 20)
    for stop_round in range(RULE.earliest(0), 26):
        a.hear("d", stop(20, stop_round))

    assert a.protocol.stopping.stop_round is None
    assert a.protocol.edges.refused["implausible_stop"] == 26 - RULE.earliest(0)


def test_a_true_stop_is_believed():
    """Announced after round 10 by a member two links away, which then has agreed for four rounds."""
    counters = [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    a = mixing(counters)
    a.hear("b", stop(13, 14))

    assert a.protocol.stopping.stop_round == 14


def test_a_stop_that_cannot_be_judged_yet_is_judged_when_it_can():
    a = mixing([0] * 5)
    a.hear("d", stop(5, 13))
    a.hear("b", stop(5, 14))
    assert a.protocol.stopping.stop_round is None
    for number, counter in [(5, 0), (6, 0), (7, 1), (8, 2)]:
        a.protocol.stopping.agree(number, counter, None)

    assert a.protocol.stopping.stop_round == 14
    assert a.protocol.edges.refused["implausible_stop"] == 1


def test_a_node_that_was_away_believes_two_members_that_have_stopped():
    a = mixing([0, 0, 0])
    closing = Closing(exchange=31, report=alive(31).report, stop=StopNews(agreed_for=9, stop_round=30), reason="converged")
    a.hear("d", closing)
    assert a.protocol.stopping.stop_round is None
    a.hear("d", Records(sealed=(signed("d", 2, closing=True),)), closing)
    assert a.protocol.stopping.stop_round is None
    a.hear("d", Records(sealed=(signed("c", 2, closing=True),)), closing)

    assert a.protocol.stopping.stop_round == 30


def test_a_node_that_was_away_ends_once_its_own_test_passes():
    a = mixing([0, 0, 0])
    a.protocol.stopping.agree(40, 0, None)
    a.hear("b", stop(41, 30))
    assert a.protocol.stopping.stop_round is None
    a.protocol.stopping.agree(41, 1, None)

    assert a.protocol.stopping.stop_round == 30
