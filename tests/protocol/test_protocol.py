"""One node's side of its edges, without sockets: messages are carried by hand and time is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from p2pfl.errors import BadMessage
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.protocol.neighbour import OUTBOX_LIMIT, RESEND_AFTER_S, Neighbour, SendUpdate
from p2pfl.protocol.protocol import Flow, Protocol
from p2pfl.protocol.round_pace import RoundPace
from p2pfl.topology.links import Links
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkSession, LinkState, Terms
from p2pfl.wire.messages import (
    NO_STOP,
    NOTHING_CLOSED,
    NOTHING_REMEMBERED,
    NOTHING_SAID,
    Busy,
    Closing,
    Goodbye,
    Heartbeat,
    Hello,
    Report,
    ResendRequest,
    Sent,
    StopNews,
)
from p2pfl.wire.update import ChannelFormat, UpdateFormat, Whole

FORMAT = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(2,)),))
ENCODED = UpdateFormat(channels=(ChannelFormat(name="q", dtype="int8", shape=(2,)),), whole=FORMAT)
TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
NUM_EXCHANGES = 100_000
EARLIEST_STOP = 10
FLOOR_S = 10.0


def want(exchange: int, *, whole: bool = False, lost: bool = False, offset: int = 0, digest: bytes | None = None) -> ResendRequest:
    return ResendRequest(exchange=exchange, whole=whole, lost=lost, offset=offset, digest=digest)


class Node:
    """A protocol, what it said happened, and a clock that the test moves."""

    def __init__(self, me: str, *peers: str, terms: Terms = TERMS, incarnation: int = 1, update_format: UpdateFormat = FORMAT) -> None:
        self.me, self.now_s, self.update_format = me, 0.0, update_format
        self.events: list[tuple[str, str]] = []
        neighbours = {}
        for peer in sorted(peers):
            session = LinkSession(peer=peer, member=me, terms=terms, incarnation=incarnation, formats=(update_format,))
            neighbours[peer] = Neighbour(name=peer, session=session)
        self.protocol = Protocol(
            me=me,
            neighbours=neighbours,
            links=lambda _: Links(weights=dict.fromkeys(sorted(peers), 0.25), receivers=frozenset(peers), self_weight=0.5),
            num_exchanges=NUM_EXCHANGES,
            train_exchanges=NUM_EXCHANGES,
            earliest_stop=EARLIEST_STOP,
            pace=RoundPace(factor=5.0, floor_s=FLOOR_S, window=20),
            on_event=lambda kind, detail, about="": self.events.append((kind, detail)),
        )
        self.protocol.begin(0, 0.0)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def frames_for(self, peer: str) -> list[tuple]:
        """Empty the outbox, as the daemon's sender does."""
        neighbour = self.protocol.neighbours[peer]
        messages = []
        while neighbour.outbox:
            item = neighbour.outbox.popleft()
            if isinstance(item, SendUpdate):
                messages += list(self.protocol.frames_of(neighbour, item))
                self.protocol.handed_over(neighbour, item)
            else:
                messages.append(encode(item))
        return messages

    def said_to(self, peer: str) -> list:
        return [decode(frames)[0] for frames in self.frames_for(peer)]

    def hear(self, peer: str, *messages) -> None:
        for message in messages:
            self.protocol.hear(peer, tuple(map(memoryview, encode(message))), self.now_s)

    def hear_update(self, peer: str, exchange: int, *, report: Report | None = None, stop: StopNews = NO_STOP, value: float = 1.0) -> None:
        report = report or Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
        for frames in FORMAT.pack(exchange, {"x": np.full(2, value)}).messages(report, stop):
            self.protocol.hear(peer, tuple(map(memoryview, frames)), self.now_s)

    def hear_encoded(self, peer: str, exchange: int, after: bytes | None, mark: bytes) -> None:
        """An update that continues something, or one that stands by itself."""
        report = Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
        update_format, arrays = (FORMAT, {"x": np.ones(2)}) if after is None else (ENCODED, {"q": np.ones(2, dtype=np.int8)})
        for frames in update_format.pack(exchange, arrays, (after, mark)).messages(report, NO_STOP):
            self.protocol.hear(peer, tuple(map(memoryview, frames)), self.now_s)

    def post(self) -> None:
        exchange, peers = self.protocol.exchange, self.protocol.neighbours
        if self.update_format.whole is None:
            update = self.update_format.pack(exchange, {"x": np.zeros(self.update_format.channels[0].shape)})
            self.protocol.post(dict.fromkeys(peers, update), self.now_s)
            return
        after, mark = self.protocol.marks.get(0, NOTHING_SAID), mark_of(exchange)
        update = ENCODED.pack(exchange, {"q": np.zeros(2, dtype=np.int8)}, (after, mark))
        whole = Whole(FORMAT, exchange, {"x": np.full(2, float(exchange))}, mark)
        self.protocol.post(dict.fromkeys(peers, update), self.now_s, wholes=dict.fromkeys(peers, whole), mark=mark)

    def close(self, *, keep: bool = True) -> list[str]:
        """Merge what is there, write it down, and be at the next exchange."""
        protocol = self.protocol
        for name, received in protocol.came().items():
            protocol.hold(name, received, {"x": f"of exchange {received.exchange}"})
        protocol.advance()
        merged = {name: Flow(exchange=protocol.exchange, amounts=a.arrays) for name, a in protocol.arrivals().items()}
        skipped = protocol.close(merged, self.now_s)
        if keep:
            protocol.checkpointed(protocol.ledgers())
        protocol.begin(protocol.exchange + 1, self.now_s)
        return skipped

    def alone_until_the_deadline(self) -> None:
        self.post()
        assert self.protocol.barrier is not None
        self.now_s = max(self.now_s, self.protocol.barrier.deadline_s)
        assert self.protocol.is_over(self.now_s)
        self.close()


def mark_of(exchange: int) -> bytes:
    """Of what a node's updates have led to in tests where all is regular."""
    return b"exchange"[:7] + bytes([exchange])


def carry(one: Node, other: Node) -> None:
    """Everything that two nodes have to say to each other."""
    while one.protocol.neighbours[other.me].outbox or other.protocol.neighbours[one.me].outbox:
        for sender, receiver in ((one, other), (other, one)):
            for frames in sender.frames_for(receiver.me):
                receiver.protocol.hear(sender.me, tuple(map(memoryview, frames)), receiver.now_s)


def greeted(*nodes: Node) -> None:
    for node in nodes:
        node.protocol.tick(node.now_s)
    for i, one in enumerate(nodes):
        for other in nodes[i + 1 :]:
            carry(one, other)


def pair(update_format: UpdateFormat = FORMAT) -> tuple[Node, Node]:
    a, b = Node("a", "b", update_format=update_format), Node("b", "a", incarnation=2, update_format=update_format)
    greeted(a, b)
    return a, b


def hello(*, exchange: int = 0, member: str = "b", terms: Terms = TERMS, report: Report | None = None, echo: int = 1) -> Hello:
    return Hello(
        member=member,
        study=bytes.fromhex(terms.study),
        layout=bytes.fromhex(terms.layout),
        start=bytes.fromhex(terms.start),
        incarnation=77,
        echo=echo,
        is_open=True,
        anew=0,
        remembered=NOTHING_REMEMBERED,
        exchange=exchange,
        report=report or Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1),
        stop=NO_STOP,
    )


def alive(exchange: int, **report: int) -> Heartbeat:
    said = {"closed_through": exchange - 1, "merged": (), "confirmed": -1, "settled": -1, **report}
    return Heartbeat(exchange=exchange, report=Report(**said), stop=NO_STOP)


# ---- greeting and waiting


def test_two_nodes_greet_each_other_and_exchange():
    a, b = pair()

    assert [(kind, detail) for kind, detail in a.events] == [("greeted", "b at exchange 0")]
    for node in (a, b):
        node.post()
    carry(a, b)
    assert a.protocol.is_over(0.0)
    assert b.protocol.is_over(0.0)
    assert (a.close(), b.close()) == ([], [])
    assert a.protocol.exchange == 1


def test_a_chunk_that_only_makes_an_update_grow_gives_nothing_to_decide():
    large = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(300_000,)),))
    a, _ = pair(large)
    a.post()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    first, second, last = (tuple(map(memoryview, f)) for f in large.pack(0, {"x": np.ones(300_000)}).messages(report, NO_STOP))
    news = [a.protocol.hear("b", frames, 0.0) for frames in (first, second, second, last)]

    assert news == [True, False, True, True]  # the news in the first one, one chunk twice, and the last one, which completes it
    assert a.protocol.is_over(0.0)


def test_a_node_that_is_not_greeted_gets_nothing_but_greetings():
    a = Node("a", "b")
    a.post()
    a.protocol.tick(0.0)

    assert [type(message) for message in a.said_to("b")] == [Hello]


def waiting_for_one_that_waits() -> Node:
    """A node in exchange 1 whose neighbour b says until short of the deadline that it still waits in exchange 0 for somebody else."""
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    assert a.protocol.is_over(a.now_s)
    a.close()
    a.post()
    while a.now_s < FLOOR_S - 0.5:
        a.now_s += 0.5
        a.hear("b", alive(0))
    return a


def test_a_neighbour_that_itself_waits_until_its_deadline_has_its_time_after_that():
    a = waiting_for_one_that_waits()
    a.hear("b", alive(1))  # it has gone on without whom it waited for, and trains

    assert not a.protocol.is_over(FLOOR_S + 0.1)
    assert not a.protocol.is_over(2 * FLOOR_S - 0.6)
    a.now_s = FLOOR_S + 3.0
    a.hear_update("b", 1)
    assert a.protocol.is_over(a.now_s)
    assert a.close() == []


def test_the_more_time_of_a_neighbour_that_waits_ends_once_it_says_so_no_more():
    a = waiting_for_one_that_waits()

    assert not a.protocol.is_over(2 * FLOOR_S - 0.6)
    assert a.protocol.is_over(2 * FLOOR_S - 0.5)


def test_a_neighbour_that_waits_without_end_has_one_allowance_more_and_no_second():
    a = waiting_for_one_that_waits()
    while a.now_s < 2 * FLOOR_S - 0.5:
        a.now_s += 0.5
        a.hear("b", alive(0))

    assert not a.protocol.is_over(2 * FLOOR_S - 0.1)
    assert a.protocol.is_over(2 * FLOOR_S)


def test_a_neighbour_that_trains_slowly_in_this_exchange_has_no_more_time():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.post()
    a.now_s = 5.0
    a.hear("b", alive(1))

    assert a.protocol.is_over(FLOOR_S)


def test_the_first_exchanges_wait_for_a_neighbour_that_is_alive_and_has_not_gone_further():
    a, _ = pair()
    a.protocol.start_by_s, a.protocol.starting_exchanges = 86_400.0, 5
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.post()
    while a.now_s < 10 * FLOOR_S:
        a.now_s += 0.5
        a.hear("b", alive(0))

    assert not a.protocol.is_over(a.now_s)
    assert a.protocol.is_over(a.now_s + FLOOR_S + 0.1)  # it has fallen silent


def test_waiting_ends_with_the_deadline_and_who_was_late_is_not_waited_for_again():
    a, b = Node("a", "b", "c"), Node("b", "a", incarnation=2)
    greeted(a, b)
    a.post()
    b.post()
    carry(a, b)

    assert not a.protocol.is_over(FLOOR_S - 0.001)
    assert a.protocol.is_over(FLOOR_S)
    a.now_s = FLOOR_S
    assert a.close() == ["c"]
    assert a.events[-1] == ("skipped", "c did not come to exchange 0")
    a.post()
    a.hear_update("b", 1, report=Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1))
    assert a.protocol.is_over(a.now_s)


def test_a_node_that_is_alone_does_not_run_ahead():
    a, _ = pair()
    a.alone_until_the_deadline()
    a.post()

    assert a.protocol.neighbours["b"].missed
    assert not a.protocol.is_over(a.now_s + FLOOR_S - 0.001)
    assert a.protocol.is_over(a.now_s + FLOOR_S)


def test_a_neighbour_that_returns_is_waited_for():
    a, _ = pair()
    a.alone_until_the_deadline()
    a.hear("b", alive(1))

    assert a.events[-1] == ("returned", "b is back at exchange 1")
    assert not a.protocol.neighbours["b"].missed


def test_what_does_not_come_is_asked_for_more_and_more_rarely():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    asked = []
    for tick in range(200):
        a.protocol.tick(tick / 10)
        asked += [tick / 10 for message in a.said_to("b") if message == want(0)]

    assert asked == [0.5, 1.5, 3.5, 7.5, 12.5, 17.5]


def test_a_repeated_question_gets_one_answer_at_a_time():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    a.now_s = 1.0
    a.hear("b", want(0, lost=True))
    a.hear("b", want(0, lost=True))
    a.now_s = 1.2
    a.hear("b", want(0, lost=True))

    assert len(a.frames_for("b")) == 1
    a.now_s = 1.25
    a.hear("b", want(0, lost=True))
    assert len(a.frames_for("b")) == 1


def test_a_question_for_what_is_not_there_is_answered_with_where_this_node_is():
    a, _ = pair()
    a.frames_for("b")
    a.hear("b", want(7))

    assert [(type(message), message.exchange) for message in a.said_to("b")] == [(Heartbeat, 0)]


def test_an_outbox_holds_the_newest_of_each_kind_and_never_too_much():
    a, _ = pair()
    neighbour = a.protocol.neighbours["b"]
    for exchange in range(2 * OUTBOX_LIMIT):
        neighbour.queue(want(exchange))
        neighbour.queue(SendUpdate(exchange=exchange, again=True))
        neighbour.queue(SendUpdate(exchange=exchange, again=True))

    assert len(neighbour.outbox) == OUTBOX_LIMIT
    assert [item for item in neighbour.outbox if isinstance(item, ResendRequest)] == [want(2 * OUTBOX_LIMIT - 1)]


# ---- falling behind


def test_a_node_that_fell_behind_jumps_and_says_that_it_merged_nothing():
    a, _ = pair()
    a.hear("b", alive(5))
    assert a.protocol.is_behind()
    assert a.protocol.furthest() == 5
    a.protocol.jump(5, a.now_s)
    a.protocol.begin(5, a.now_s)
    a.protocol.checkpointed(a.protocol.ledgers())

    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=4, merged=(), confirmed=-1, settled=4)
    assert a.kinds()[-1] == "jumped"


def test_a_node_that_jumped_asks_at_once_for_what_it_could_not_keep():
    a, _ = pair()
    a.frames_for("b")
    a.hear_update("b", 5)
    assert a.protocol.refused["far_round"] == 1
    a.protocol.jump(5, a.now_s)

    assert a.said_to("b") == [want(5)]


def test_one_exchange_behind_is_made_up_for():
    a, _ = pair()
    a.hear("b", alive(1))

    assert not a.protocol.is_behind()


def test_what_came_early_counts_in_the_next_exchange():
    a, _ = pair()
    a.hear_update("b", 0)
    a.hear_update("b", 1, report=Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1))
    a.post()
    a.close()
    a.post()

    assert a.protocol.is_over(a.now_s)
    assert list(a.protocol.arrivals()) == ["b"]


def in_step(a: Node, num_exchanges: int, duration_s: float) -> None:
    """Rounds of a node with one neighbour that does as it does."""
    for _ in range(num_exchanges):
        exchange = a.protocol.exchange
        a.post()
        a.now_s += duration_s
        before = max(exchange - 2, -1)
        merged = (exchange - 1,) if exchange else ()
        a.hear_update("b", exchange, report=Report(closed_through=exchange - 1, merged=merged, confirmed=before, settled=before))
        assert a.close() == []


def test_a_neighbour_cannot_be_far_ahead_in_no_time():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.hear("b", alive(10 + 8 + 3))
    assert a.protocol.refused == {"implausible_exchange": 1}
    assert not a.protocol.is_behind()

    a.hear("b", alive(10 + 2))
    assert a.protocol.refused == {"implausible_exchange": 2}
    a.now_s += 1.0
    a.hear("b", alive(10 + 8))
    assert a.protocol.is_behind()


def test_a_jump_gives_no_time_back():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.now_s += 1.0
    a.hear("b", alive(10 + 8))
    a.protocol.jump(a.protocol.furthest(), a.now_s)
    a.protocol.begin(18, a.now_s)
    for exchange in range(20, 300):
        a.hear("b", alive(exchange))

    assert not a.protocol.is_behind()


@pytest.mark.parametrize("exchange", [NUM_EXCHANGES + 1, 2**50])
def test_nobody_is_further_than_the_run_can_be(exchange):
    a, _ = pair()
    a.hear("b", alive(exchange))

    assert a.protocol.refused == {"implausible_exchange": 1}
    assert a.protocol.neighbours["b"].heard_exchange == 0


def test_a_node_that_was_cut_off_for_an_hour_believes_how_far_the_others_are():
    a, _ = pair()
    in_step(a, 10, 1.0)
    while a.now_s < 3600:  # nobody comes, so every round lasts until its deadline
        a.alone_until_the_deadline()
    a.hear("b", alive(3600))  # a second a round, as before

    assert not a.protocol.refused
    assert a.protocol.is_behind()


def test_a_node_that_stood_still_for_an_hour_believes_how_far_the_others_are():
    a, _ = pair()
    in_step(a, 10, 1.0)
    a.now_s += 3600
    a.hear("b", alive(3600))

    assert a.protocol.is_behind()


# ---- what continues what was sent before


def asked(a: Node) -> list[ResendRequest]:
    return [message for message in a.said_to("b") if isinstance(message, ResendRequest)]


def in_step_encoded(a: Node, b: Node, num_exchanges: int) -> None:
    for _ in range(num_exchanges):
        for node in (a, b):
            node.post()
        carry(a, b)
        assert (a.close(), b.close()) == ([], [])


def test_updates_continue_each_other_from_nothing_on():
    a, b = pair(ENCODED)
    in_step_encoded(a, b, 5)

    assert a.protocol.neighbours["b"].marks == b.protocol.marks == {0: mark_of(4)}
    assert a.protocol.neighbours["b"].values == {"x": "of exchange 4"}
    assert (a.protocol.resynchronised, a.protocol.refused) == (0, {})


def test_an_update_that_continues_what_is_not_here_counts_when_it_has_come_whole():
    a, _ = pair(ENCODED)
    a.post()
    a.frames_for("b")
    a.hear_encoded("b", 0, b"unheard of"[:8], mark_of(0))

    assert asked(a) == [want(0, whole=True)]
    assert not a.protocol.is_over(a.now_s)
    assert a.protocol.arrivals() == {}
    a.hear_encoded("b", 0, None, mark_of(0))
    assert a.protocol.is_over(a.now_s)
    assert a.close() == []
    assert a.events[-1] == ("resynchronised", "b at exchange 0")
    assert (a.protocol.resynchronised, a.protocol.neighbours["b"].marks) == (1, {0: mark_of(0)})
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))
    assert a.protocol.is_over(a.now_s)


def test_a_gap_before_an_update_that_came_early_is_noticed_in_its_exchange_and_the_neighbour_waited_for():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))  # what led to that has not come
    a.now_s = a.protocol.barrier.deadline_s
    a.frames_for("b")
    assert a.close() == ["b"]

    assert asked(a) == [want(1, whole=True)]
    a.post()
    assert not a.protocol.neighbours["b"].missed
    assert not a.protocol.is_over(a.now_s)
    a.hear_encoded("b", 1, None, mark_of(1))
    assert a.protocol.is_over(a.now_s)


def test_what_came_early_and_continues_what_came_in_between_needs_no_repair():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    a.frames_for("b")
    assert a.close() == []

    assert asked(a) == []
    assert list(a.protocol.arrivals()) == ["b"]


def test_an_update_that_came_too_late_leaves_a_gap():
    a, _ = pair(ENCODED)
    a.alone_until_the_deadline()
    a.post()
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    a.frames_for("b")
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))

    assert a.protocol.refused == {"stale_round": 1}
    assert asked(a) == [want(1, whole=True)]


def test_what_is_lacking_is_asked_for_until_it_comes():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 0, mark_of(7), mark_of(8))
    a.frames_for("b")
    for tick in range(20):
        a.protocol.tick(tick / 10)

    assert asked(a) == [want(0, whole=True)]


def test_a_neighbour_that_lacks_something_is_sent_it_whole_once_at_a_time():
    a, _ = pair(ENCODED)
    a.post()
    a.frames_for("b")
    for now_s in (1.0, 1.1, 1.2):
        a.now_s = now_s
        a.hear("b", want(0, whole=True, lost=True))
    (frames,) = a.frames_for("b")
    update, payload = decode(frames)

    assert (update.channels, update.marks) == (FORMAT.entries, (None, mark_of(0)))
    assert np.frombuffer(payload, "<f8").tolist() == [0.0, 0.0]
    a.now_s = 1.25
    a.hear("b", want(0, whole=True, lost=True))
    a.hear("b", want(0, lost=True))
    assert [decode(frames)[0].marks for frames in a.frames_for("b")] == [(None, mark_of(0)), (NOTHING_SAID, mark_of(0))]


def test_what_was_sent_whole_counts_once():
    a, _ = pair(ENCODED)
    a.post()
    items = []
    for now_s in (1.0, 2.0):
        a.now_s = now_s
        a.hear("b", want(0, whole=True, lost=True))
        items += [item for item in a.protocol.neighbours["b"].outbox if isinstance(item, SendUpdate) and item.whole]
        a.frames_for("b")

    assert items == [SendUpdate(exchange=0, again=False, whole=True), SendUpdate(exchange=0, again=True, whole=True)]


def test_where_nothing_is_encoded_an_update_is_whole_as_it_is():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    a.now_s = 1.0
    a.hear("b", want(0, whole=True, lost=True))

    assert [decode(frames)[0].marks for frames in a.frames_for("b")] == [None]


def test_what_was_posted_and_not_merged_is_not_continued():
    """A node jumps: its neighbour has taken in what it has not itself."""
    a, b = pair(ENCODED)
    in_step_encoded(a, b, 2)
    a.post()
    b.post()
    for frames in a.frames_for("b"):
        b.protocol.hear("a", tuple(map(memoryview, frames)), 0.0)
    b.close()
    for node in (a, b):
        node.protocol.jump(5, node.now_s)
        node.protocol.checkpointed(node.protocol.ledgers())
        node.protocol.begin(5, node.now_s)
        node.post()
    carry(a, b)

    assert (a.close(), b.close()) == ([], [])
    assert (b.events[-1], b.protocol.neighbours["a"].marks) == (("resynchronised", "a at exchange 5"), {0: mark_of(5)})
    assert a.protocol.resynchronised == 1  # of b's exchange 2, which a has not seen, too


def test_an_update_that_leads_to_no_numbers_is_refused_and_the_next_asked_for_whole():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    (received,) = a.protocol.came().values()
    a.protocol.hold("b", received, BadMessage("an update that leads to NaN", reason="not_finite"))

    assert a.protocol.refused == {"not_finite": 1}
    assert a.protocol.neighbours["b"].is_faulty
    assert a.protocol.neighbours["b"].marks == {}


# ---- large updates

LARGE = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(400_000,)),))  # four chunks


def large_pair() -> tuple[Node, Node, list[tuple]]:
    """a has sent b all of a large update; the frames are on their way."""
    a, b = pair(LARGE)
    a.protocol.post({"b": LARGE.pack(0, {"x": np.ones(400_000)})}, 0.0)
    frames = a.frames_for("b")
    b.protocol.post({"a": LARGE.pack(0, {"x": np.zeros(400_000)})}, 0.0)
    b.frames_for("a")
    return a, b, frames


def deliver(receiver: Node, sender: str, frames: list[tuple]) -> None:
    for each in frames:
        receiver.protocol.hear(sender, tuple(map(memoryview, each)), receiver.now_s)


def test_an_update_that_is_queued_or_on_its_way_is_not_sent_twice():
    a, _ = pair()
    a.post()
    a.hear("b", want(0))
    assert len(a.protocol.neighbours["b"].outbox) == 1
    a.frames_for("b")
    a.now_s = 60.0
    a.hear("b", want(0))

    assert a.said_to("b") == [Sent(exchange=0, whole=False)]


def test_what_the_asker_has_closed_by_now_is_not_sent_again():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    a.now_s = 1.0
    a.hear("b", alive(1, merged=(0,)), want(0, lost=True))

    assert a.said_to("b") == []
    assert not a.protocol.is_of_use(0, a.protocol.neighbours["b"])


def test_after_a_cut_only_what_is_missing_is_sent():
    a, b, frames = large_pair()
    deliver(b, "a", frames[:2])  # then the connection breaks
    a.now_s = b.now_s = 40.0
    b.protocol.tick(b.now_s)
    a.hear("b", *[message for message in b.said_to("a") if isinstance(message, ResendRequest)])
    deliver(b, "a", a.frames_for("b"))  # all of it has gone out before
    (lost,) = b.said_to("a")
    assert (lost.lost, lost.offset) == (True, 2**21)
    a.hear("b", lost)
    rest = a.frames_for("b")

    assert rest == frames[2:]
    deliver(b, "a", rest)
    assert b.protocol.came()["a"].arrays["x"].sum() == 400_000
    assert b.protocol.refused == {}


def test_a_gap_is_asked_for_at_once_and_once():
    _, b, frames = large_pair()
    deliver(b, "a", [frames[0], *frames[2:]])
    (lost,) = b.said_to("a")

    assert (lost.lost, lost.offset) == (True, 2**20)
    deliver(b, "a", frames[1:])
    assert list(b.protocol.came()) == ["a"]


def test_a_part_of_another_payload_is_not_continued():
    a, _, frames = large_pair()
    a.now_s = 40.0
    a.hear("b", want(0, lost=True, offset=2**20, digest=bytes(32)))

    assert a.frames_for("b") == frames


def test_a_sender_begins_where_it_is_asked_to_while_it_is_still_sending():
    a, b, frames = large_pair()
    neighbour = a.protocol.neighbours["b"]
    neighbour.sending, a.now_s = (0, False), 1.0
    deliver(b, "a", [frames[0], frames[2]])
    a.hear("b", *b.said_to("a"))

    assert neighbour.waiting_update(0, whole=False) == SendUpdate(exchange=0, again=True, offset=2**20)


def test_short_messages_overtake_an_update_and_a_last_word_does_not():
    a, _ = pair()
    a.post()
    neighbour = a.protocol.neighbours["b"]
    neighbour.queue(want(0))
    neighbour.queue(Goodbye(reason="pausing"))

    assert [neighbour.next_short(), neighbour.next_short()] == [want(0), None]
    assert neighbour.outbox == deque([SendUpdate(exchange=0, again=False), Goodbye(reason="pausing")])


def test_a_neighbour_that_was_restarted_is_sent_what_went_out_before():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    a.now_s = 0.1
    a.protocol.neighbours["b"].last_resent_s = 0.0
    a.hear("b", hello(exchange=0))
    a.frames_for("b")
    a.now_s = 1.0
    a.hear("b", want(0))

    assert [type(message).__name__ for message in a.said_to("b")] == ["Update"]


# ---- settling


def test_a_flow_that_the_neighbour_did_not_match_is_taken_back_once():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    a.hear("b", alive(1))
    a.hear("b", alive(1))

    assert [(neighbour.name, flow.exchange) for neighbour, flow in a.protocol.taken_back] == [("b", 0)]
    assert a.protocol.flows == {}
    assert a.kinds()[-1] == "took_back"


def test_a_flow_that_the_neighbour_matched_is_forgotten():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    assert list(a.protocol.flows) == [("b", 0)]
    a.hear("b", alive(1, merged=(0,)))

    assert (a.protocol.taken_back, a.protocol.flows) == ([], {})


def test_an_update_without_a_report_on_the_exchange_before_is_not_merged():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close()
    unheard = a.protocol.neighbours["b"].ledger
    a.hear_update("b", 1, report=Report(closed_through=-1, merged=(), confirmed=-1, settled=-1))

    assert a.protocol.refused == {"wrong_report": 1}
    assert not unheard.admits(1)
    assert a.protocol.arrivals() == {}


def test_nothing_is_told_before_it_is_on_disk():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0)
    a.close(keep=False)
    a.post()
    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    a.protocol.checkpointed(a.protocol.ledgers())

    assert a.protocol.neighbours["b"].ledger.report() == Report(closed_through=0, merged=(0,), confirmed=-1, settled=-1)


def test_a_restarted_neighbour_is_sent_again_what_it_may_have_lost():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    a.now_s += 1.0
    a.hear("b", hello(exchange=0))

    assert [type(message).__name__ for message in a.said_to("b")] == ["Update"]
    assert a.kinds()[-1] == "greeted"


def test_a_neighbour_that_restarts_all_the_time_is_not_sent_everything_each_time():
    a, _ = pair()
    a.post()
    a.frames_for("b")
    for incarnation in range(100, 200):
        a.hear("b", replace(hello(exchange=0), incarnation=incarnation))

    assert a.kinds().count("greeted") == 1


def test_the_exchange_number_of_a_neighbour_that_is_too_far_is_left_out_and_the_rest_believed():
    a, _ = pair()
    in_step(a, 10, 1.0)
    report = Report(closed_through=2000, merged=(), confirmed=-1, settled=-1)
    a.hear("b", Heartbeat(exchange=2001, report=report, stop=StopNews(agreed_for=0, stop_round=2000)))

    assert not a.protocol.is_behind()
    assert a.protocol.stop_round == 2000


def test_an_update_that_is_coming_in_is_waited_for_past_the_deadline():
    large = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float64", shape=(300_000,)),))
    a = Node("a", "b")
    neighbour = a.protocol.neighbours["b"]
    neighbour.session = LinkSession(peer="b", member="a", terms=TERMS, incarnation=1, formats=(large,))
    a.hear("b", hello(exchange=0))
    a.post()
    a.now_s = deadline_s = a.protocol.barrier.deadline_s
    first, *_ = large.pack(0, {"x": np.zeros(300_000)}).messages(Report(closed_through=-1, merged=(), confirmed=-1, settled=-1), NO_STOP)
    a.protocol.hear("b", tuple(map(memoryview, first)), a.now_s)

    assert not a.protocol.is_over(deadline_s + 2 * FLOOR_S)
    assert a.protocol.is_over(deadline_s + 2 * FLOOR_S + 0.1)


def test_the_first_exchange_waits_for_a_neighbour_that_is_alive_and_still_waits_itself():
    a, _ = pair()
    a.protocol.start_by_s = 1000.0
    a.post()
    a.now_s = 2 * FLOOR_S
    a.hear("b", alive(0))

    assert not a.protocol.is_over(a.now_s)
    assert a.protocol.is_over(a.now_s + 1.1 * FLOOR_S)


# ---- the end


def stopped(a: Node, reason: str = "converged") -> None:
    """As the daemon does when it has left its last round."""
    a.protocol.closing = reason
    a.protocol.checkpointed(a.protocol.ledgers())


def test_a_stopped_node_answers_whoever_is_still_running():
    a, _ = pair()
    in_step(a, 3, 1.0)
    stopped(a)
    a.frames_for("b")
    a.hear("b", alive(3, merged=(2,), confirmed=1, settled=1))

    assert [(type(message), message.exchange, message.reason) for message in a.said_to("b")] == [(Closing, 3, "converged")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_stopped_node_survives_updates_of_later_exchanges(ahead):
    a, _ = pair()
    in_step(a, 3, 1.0)
    a.protocol.exchange = 5  # the daemon leaves its last barrier behind
    stopped(a)
    a.hear_update("b", 5 + ahead)

    assert a.protocol.closing == "converged"
    assert a.protocol.neighbours["b"].heard_exchange == 5 + ahead


def test_settled_means_that_both_sides_know_of_each_other():
    a, b = pair()
    for node in (a, b):
        node.post()
    carry(a, b)
    a.close()
    b.close()
    for node in (a, b):
        stopped(node)
    assert not a.protocol.is_settled()
    for _ in range(3):
        for node in (a, b):
            node.protocol.checkpointed(node.protocol.ledgers())
            (neighbour,) = node.protocol.neighbours.values()
            neighbour.queue(node.protocol.closing_message(neighbour))
        carry(a, b)
    for node in (a, b):
        node.protocol.checkpointed(node.protocol.ledgers())

    assert a.protocol.is_settled()
    assert b.protocol.is_settled()


def test_a_neighbour_that_has_finished_is_not_waited_for():
    a, _ = pair()
    a.hear("b", Goodbye(reason="finished"))

    assert a.protocol.neighbours["b"].missed
    assert a.protocol.is_settled()


@pytest.mark.parametrize("reason", ["finished", "pausing"])
def test_a_last_word_is_the_last(reason):
    """A greeting behind it would take it back: the neighbour would wait in vain for a node that has gone."""
    a, b = pair()
    goodbye = Goodbye(reason=reason)
    neighbour = a.protocol.neighbours["b"]
    neighbour.outbox.extend([SendUpdate(exchange=e, again=True) for e in range(OUTBOX_LIMIT)])
    neighbour.queue(goodbye)
    neighbour.outbox = deque([neighbour.outbox[-1]])
    a.now_s += 2 * RESEND_AFTER_S
    a.hear("b", b.protocol.hello(b.protocol.neighbours["a"]))
    a.protocol.tick(a.now_s + 60.0)
    said = a.said_to("b")
    b.hear("a", *said)

    assert said == [goodbye]
    assert b.protocol.neighbours["a"].left == (reason == "finished")


def test_a_neighbour_that_pauses_has_the_time_that_everybody_has():
    a, _ = pair()
    a.hear("b", Goodbye(reason="pausing"))
    a.post()

    assert a.kinds()[-1] == "left"
    assert not a.protocol.is_over(FLOOR_S - 0.001)
    a.hear("b", hello(exchange=0))
    a.hear_update("b", 0)
    assert a.protocol.is_over(a.now_s)
    assert a.close() == []
    assert not a.protocol.is_settled()


def test_the_return_of_a_neighbour_that_paused_is_an_event_however_often_it_comes_and_goes():
    a, _ = pair()
    for number in range(40):
        a.hear("b", Goodbye(reason="pausing"))
        assert a.protocol.neighbours["b"].is_paused
        a.hear("b", replace(hello(exchange=0), incarnation=100 + number))
        assert not a.protocol.neighbours["b"].is_paused
        assert a.kinds()[-2:] == ["left", "greeted"]


def test_the_smallest_stop_round_heard_is_taken():
    a, _ = pair()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    for stop_round in (20, 12, 15):
        a.hear("b", Heartbeat(exchange=0, report=report, stop=StopNews(agreed_for=0, stop_round=stop_round)))

    assert a.protocol.stop_round == 12


# ---- refusals


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"member": "c"}, "wrong_name"),
        ({"terms": Terms(study="dd" * 32, layout=TERMS.layout, start=TERMS.start)}, "wrong_study"),
        ({"terms": Terms(study=TERMS.study, layout="dd" * 32, start=TERMS.start)}, "wrong_layout"),
        ({"terms": Terms(study=TERMS.study, layout=TERMS.layout, start="dd" * 32)}, "wrong_start"),
    ],
)
def test_who_has_something_else_in_mind_is_told_by_name(wrong, reason):
    a = Node("a", "b")
    a.hear("b", hello(**wrong))

    assert a.protocol.refused == {reason: 1}
    assert a.said_to("b") == [Goodbye(reason=reason)]
    assert a.kinds() == ["refused"]
    assert not a.protocol.neighbours["b"].session.is_open
    assert a.protocol.neighbours["b"].last_seen_s is None


def test_being_refused_is_an_event():
    a, _ = pair()
    a.hear("b", Goodbye(reason="wrong_study"))

    assert a.protocol.refused == {"refused_by_neighbour_wrong_study": 1}
    assert a.events[-1] == ("refused", "b does not talk to this node: wrong_study")


# ---- one neighbour's part


def test_who_sends_nonsense_is_disconnected_and_not_waited_for():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    greeted(a, b)
    greeted(a, c)
    a.post()
    a.hear_update("c", 0)
    assert not a.protocol.is_over(a.now_s)
    for _ in range(33):
        a.protocol.hear("b", (memoryview(b"\xc1"),), a.now_s)

    assert a.protocol.exclusion("c", a.now_s) is None
    assert a.protocol.exclusion("b", a.now_s) == (10.0, "messages that no member sends (bad_message)")
    assert a.events[-1] == ("excluded", "b is disconnected for 10 s: it sends messages that no member sends (bad_message)")
    assert a.protocol.is_over(a.now_s)


def test_messages_above_what_a_round_needs_are_not_even_decoded():
    a, _ = pair()
    for _ in range(3000):
        a.protocol.hear("b", (memoryview(bytes(100)),), a.now_s)

    decoded = a.protocol.refused["bad_message"]
    assert decoded <= 2000
    assert a.protocol.neighbours["b"].allowance.num_dropped == 3000 - decoded


def test_an_exchange_that_nobody_believes_brings_nobody_back():
    a, _ = pair()
    a.alone_until_the_deadline()
    assert a.protocol.neighbours["b"].missed
    for _ in range(10):
        a.hear("b", Goodbye(reason="finished"), hello(exchange=10**9, report=NOTHING_CLOSED))

    assert "returned" not in a.kinds()
    assert a.protocol.neighbours["b"].missed


# ---- checkpoints


def test_the_ledgers_of_a_story_are_those_that_come_back():
    a, _ = pair()
    in_step(a, 4, 1.0)
    metadata = a.protocol.metadata()

    assert (metadata["exchange"], metadata["closing"], metadata["stop_round"]) == (4, None, None)
    assert list(metadata["sent"]) == ["3"]
    assert EdgeLedger.from_dict(metadata["ledgers"]["b"]).report() == a.protocol.neighbours["b"].ledger.report()


def test_a_stop_before_its_time_is_refused():
    a, _ = pair()
    report = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
    a.hear("b", Heartbeat(exchange=0, report=report, stop=StopNews(agreed_for=0, stop_round=EARLIEST_STOP - 1)))

    assert a.protocol.stop_round is None
    assert a.protocol.refused["implausible_stop"] == 1


def test_a_neighbour_whose_update_cannot_be_merged_is_not_waited_for_until_one_can():
    a, _ = pair()
    a.post()
    a.hear_update("b", 0, value=float("nan"))

    assert a.protocol.refused["not_finite"] == 1
    assert a.protocol.neighbours["b"].missed
    a.hear("b", alive(0))
    assert a.protocol.neighbours["b"].missed
    a.hear_update("b", 0)
    assert not a.protocol.neighbours["b"].missed


def test_who_has_fallen_silent_is_not_waited_for_after_a_jump():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    for peer in (b, c):
        greeted(a, peer)
    a.post()
    for peer in ("b", "c"):
        a.hear_update(peer, 0)
    assert a.close() == []
    a.post()
    a.hear("b", alive(3))  # c has died; b has waited for a in vain and has gone on
    assert a.protocol.is_behind()
    a.protocol.jump(3, a.now_s)
    a.protocol.begin(3, a.now_s)
    a.post()
    a.hear_update("b", 3)

    assert a.protocol.is_over(a.now_s)
    assert a.close() == ["c"]


def test_what_came_too_early_is_asked_for_when_its_exchange_begins():
    a, b = Node("a", "b"), Node("b", "a", incarnation=2)
    greeted(a, b)
    a.post()
    a.hear_update("b", 0)
    a.hear_update("b", 2)  # b has not waited for a in exchange 1
    assert a.close() == []
    a.protocol.begin(2, a.now_s)

    assert [item for item in a.protocol.neighbours["b"].outbox if isinstance(item, ResendRequest)] == [want(2)]


def meeting_in_pairs(*, ahead: int) -> Node:
    node = Node("b", "a")
    node.protocol.meetings = deque()
    session = LinkSession(peer="a", member="b", terms=TERMS, incarnation=1, formats=(FORMAT,), ahead=ahead)
    node.protocol.neighbours["a"].session = session
    session.state = LinkState.OPEN
    return node


def test_of_a_neighbour_that_asks_again_and_again_only_the_newest_update_is_held():
    node = meeting_in_pairs(ahead=1000)
    for number in range(300):
        node.hear_update("a", number)

    assert [(name, number) for name, number, _ in node.protocol.meetings] == [("a", 299)]


def test_an_answer_that_is_waited_for_outlives_the_neighbours_next_question():
    node = meeting_in_pairs(ahead=1000)
    node.protocol.asked = ("a", 3)
    for number in (2, 3, 4, 5):
        node.hear_update("a", number)

    assert [(name, number) for name, number, _ in node.protocol.meetings] == [("a", 3), ("a", 5)]


def test_a_refusal_is_held_once_and_only_of_what_was_asked():
    node = meeting_in_pairs(ahead=1000)
    unasked = Busy(exchange=5)
    for _ in range(1000):
        node.hear("a", unasked)

    assert not node.protocol.meetings

    node.protocol.asked = ("a", 5)
    for _ in range(1000):
        node.hear("a", unasked)

    assert list(node.protocol.meetings) == [("a", 5, None)]

    node.protocol.meetings.clear()
    node.protocol.closing = "rounds"
    node.hear("a", unasked)

    assert not node.protocol.meetings


def test_closing_words_and_what_answers_them_do_not_answer_each_other_without_end():
    node = meeting_in_pairs(ahead=1000)
    closing = Closing(exchange=3, report=NOTHING_CLOSED, stop=NO_STOP, reason="rounds")
    said = []
    for _ in range(100):
        node.hear("a", closing)
        said += node.said_to("a")
    assert [type(message) for message in said] == [Heartbeat]

    node.now_s += RESEND_AFTER_S  # what answered them may have been lost
    node.hear("a", closing)
    assert [type(message) for message in node.said_to("a")] == [Heartbeat]


def test_a_neighbour_that_has_closed_an_exchange_unmerged_is_not_waited_for():
    a, b, c = Node("a", "b", "c"), Node("b", "a", incarnation=2), Node("c", "a", incarnation=3)
    greeted(a, b)
    a.protocol.tick(0)
    c.protocol.tick(0)
    carry(a, c)
    a.post()
    a.hear_update("c", 0)
    assert not a.protocol.is_over(a.now_s)

    a.hear("b", Heartbeat(exchange=1, report=Report(closed_through=0, merged=(), confirmed=-1, settled=-1), stop=NO_STOP))

    assert a.protocol.is_over(a.now_s)
    assert a.close() == ["b"]
    assert not a.protocol.neighbours["b"].missed  # it takes part in the next exchange
