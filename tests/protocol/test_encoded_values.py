"""Updates that continue what was sent before, and full ones where something is lacking."""

from __future__ import annotations

import numpy as np
from nodes_by_hand import ENCODED, FORMAT, Node, carry, mark_of, pair, want

from p2pfl.errors import BadMessage
from p2pfl.protocol.neighbour import SendUpdate
from p2pfl.wire.codec import decode
from p2pfl.wire.messages import NOTHING_SAID, ResendRequest


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

    assert a.protocol.values.digests["b"] == b.protocol.values.own == {0: mark_of(4)}
    assert a.protocol.values.values["b"] == {"x": "of exchange 4"}
    assert (a.protocol.values.resynchronised, a.protocol.edges.refused) == (0, {})


def test_an_update_that_continues_what_is_not_here_counts_when_it_has_come_whole():
    a, _ = pair(ENCODED)
    a.post()
    a.frames_for("b")
    a.hear_encoded("b", 0, b"unheard of"[:8], mark_of(0))

    assert asked(a) == [want(0, whole=True)]
    assert not a.protocol.pace.is_over(a.now_s)
    assert a.protocol.admitted() == {}
    a.hear_encoded("b", 0, None, mark_of(0))
    assert a.protocol.pace.is_over(a.now_s)
    assert a.close() == []
    assert a.events[-1] == ("resynchronised", "b at exchange 0")
    assert (a.protocol.values.resynchronised, a.protocol.values.digests["b"]) == (1, {0: mark_of(0)})
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))
    assert a.protocol.pace.is_over(a.now_s)


def test_a_gap_before_an_update_that_came_early_is_noticed_in_its_exchange_and_the_neighbour_waited_for():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))  # what led to that has not come
    a.now_s = a.protocol.deadlines.deadline_s
    a.frames_for("b")
    assert a.close() == ["b"]

    assert asked(a) == [want(1, whole=True)]
    a.post()
    assert not a.protocol.neighbours["b"].missed
    assert not a.protocol.pace.is_over(a.now_s)
    a.hear_encoded("b", 1, None, mark_of(1))
    assert a.protocol.pace.is_over(a.now_s)


def test_what_came_early_and_continues_what_came_in_between_needs_no_repair():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    a.frames_for("b")
    assert a.close() == []

    assert asked(a) == []
    assert list(a.protocol.admitted()) == ["b"]


def test_an_update_that_came_too_late_leaves_a_gap():
    a, _ = pair(ENCODED)
    a.alone_until_the_deadline()
    a.post()
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    a.frames_for("b")
    a.hear_encoded("b", 1, mark_of(0), mark_of(1))

    assert a.protocol.edges.refused == {"stale_round": 1}
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
        items += [item for item in a.protocol.neighbours["b"].outbox if isinstance(item, SendUpdate) and item.full]
        a.frames_for("b")

    assert items == [SendUpdate(exchange=0, again=False, full=True), SendUpdate(exchange=0, again=True, full=True)]


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
        node.protocol.edges.checkpointed(node.protocol.edges.ledgers())
        node.protocol.begin(5, node.now_s)
        node.post()
    carry(a, b)

    assert (a.close(), b.close()) == ([], [])
    assert (b.events[-1], b.protocol.values.digests["a"]) == (("resynchronised", "a at exchange 5"), {0: mark_of(5)})
    assert a.protocol.values.resynchronised == 1  # of b's exchange 2, which a has not seen, too


def test_an_update_that_leads_to_no_numbers_is_refused_and_the_next_asked_for_whole():
    a, _ = pair(ENCODED)
    a.post()
    a.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    (received,) = a.protocol.came().values()
    a.protocol.hold("b", received, BadMessage("an update that leads to NaN", reason="not_finite"))

    assert a.protocol.edges.refused == {"not_finite": 1}
    assert a.protocol.neighbours["b"].is_faulty
    assert a.protocol.values.digests["b"] == {}
