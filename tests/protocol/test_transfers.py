"""Updates on their way: what is asked for again, and from where on it is sent again."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

import numpy as np
from nodes_by_hand import Node, alive, hello, pair, want

from p2pfl.node.clock import LoopClock
from p2pfl.node.sending import Sending
from p2pfl.protocol.neighbour import OUTBOX_LIMIT, SendNew, SendUpdate
from p2pfl.wire.codec import decode
from p2pfl.wire.messages import Goodbye, Heartbeat, ResendRequest, Sent, Update
from p2pfl.wire.update import UpdateFormat


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


def test_news_that_are_new_once_more_keep_their_turn_before_an_update():
    a, _ = pair()
    neighbour = a.protocol.neighbours["b"]
    update = SendUpdate(exchange=0, again=False)
    for item in (SendNew.RECORDS, update, SendNew.RECORDS):
        neighbour.queue(item)

    assert list(neighbour.outbox) == [SendNew.RECORDS, update]


LARGE = UpdateFormat(channels=(("x", "float64", (400_000,)),))  # four chunks


def large_pair() -> tuple[Node, Node, list[tuple]]:
    """a has sent b all of a large update; the frames are on their way."""
    a, b = pair(LARGE)
    a.protocol.send({"b": LARGE.pack(0, {"x": np.ones(400_000)})}, 0.0)
    frames = a.frames_for("b")
    b.protocol.send({"a": LARGE.pack(0, {"x": np.zeros(400_000)})}, 0.0)
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
    assert not a.protocol.transfers.is_of_use(0, a.protocol.neighbours["b"])


def test_of_an_update_that_the_neighbour_has_closed_the_first_message_still_says_where_this_node_is():
    """Else a node that jumped to an exchange that is over elsewhere would not be heard, and not be waited for again."""
    a, _ = pair(update_format=LARGE)
    a.frames_for("b")
    a.hear("b", alive(1))
    a.post()
    said = []

    class Link:
        async def send(self, _peer, frames, _timeout_s):
            said.append(decode([memoryview(frame) for frame in frames])[0])

    async def send():
        neighbour = a.protocol.neighbours["b"]
        sending = asyncio.create_task(Sending(a.protocol, Link(), None, LoopClock()).run(neighbour))
        for _ in range(20):
            await asyncio.sleep(0)
        sending.cancel()

    asyncio.run(send())

    assert [(type(message), message.exchange) for message in said] == [(Update, 0)]


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
    assert b.protocol.edges.refused == {}


def test_a_gap_is_asked_for_at_once_and_once():
    _, b, frames = large_pair()
    deliver(b, "a", [frames[0], *frames[2:]])
    (lost,) = b.said_to("a")

    assert (lost.lost, lost.offset) == (True, 2**20)
    deliver(b, "a", frames[1:])
    assert list(b.protocol.came()) == ["a"]


def test_a_gap_is_asked_for_again_where_the_request_was_lost():
    _, b, frames = large_pair()
    b.now_s = 0.0
    deliver(b, "a", [frames[0], frames[2]])
    (lost,) = b.said_to("a")  # and is lost with a connection
    b.now_s = 9.0
    deliver(b, "a", [frames[2]])
    assert b.said_to("a") == []
    b.now_s = 10.0
    deliver(b, "a", [frames[2]])

    assert b.said_to("a") == [lost]


def test_a_part_of_another_payload_is_not_continued():
    a, _, frames = large_pair()
    a.now_s = 40.0
    a.hear("b", want(0, lost=True, offset=2**20, digest=bytes(32)))

    assert a.frames_for("b") == frames


def test_a_sender_begins_where_it_is_asked_to_while_it_is_still_sending():
    a, b, frames = large_pair()
    neighbour = a.protocol.neighbours["b"]
    a.protocol.transfers.note_sending("b", SendUpdate(exchange=0, again=False))
    a.now_s = 1.0
    deliver(b, "a", [frames[0], frames[2]])
    a.hear("b", *b.said_to("a"))

    assert neighbour.waiting_update(0, full=False) == SendUpdate(exchange=0, again=True, offset=2**20)


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
    a.protocol.transfers.receivers["b"].last_resent_s = 0.0
    a.hear("b", hello(exchange=0))
    a.frames_for("b")
    a.now_s = 1.0
    a.hear("b", want(0))

    assert [type(message).__name__ for message in a.said_to("b")] == ["Update"]


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
