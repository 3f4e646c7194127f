from __future__ import annotations

import tracemalloc
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.errors import BadMessage, Unauthorized
from p2pfl.wire.codec import CHUNK_BYTES, encode
from p2pfl.wire.link import TRANSITIONS, HandshakeEvent, LinkSession, LinkState, Terms
from p2pfl.wire.messages import (
    NO_STOP,
    NOTHING_CLOSED,
    Closing,
    DoctorAnswer,
    DoctorQuestion,
    Goodbye,
    Heartbeat,
    Hello,
    Remembered,
    Report,
    ResendRequest,
    Update,
)
from p2pfl.wire.update import UpdateFormat
from wire_samples import (
    CHUNK,
    CONTINUED,
    ENCODED,
    EVERY_MESSAGE,
    HELLO,
    MARKS,
    NEWS,
    PAYLOAD,
    SMALL,
    TERMS,
    UPDATE,
    WHOLE,
    frames_of,
    open_session,
    session,
)

LARGE = UpdateFormat(channels=(("x", "float32", (CHUNK_BYTES,)),))  # 4 MiB: four chunks


def large_frames(exchange=7, value=1.0):
    array = np.full(CHUNK_BYTES, value, dtype=np.float32)
    report = Report(closed_through=exchange - 1, merged=(), confirmed=-1, settled=-1)
    return list(LARGE.pack(exchange, {"x": array}).messages(report, NO_STOP))


def said(link, message, exchange=7):
    return link.receive(frames_of(message), exchange=exchange)


def refused(link, message, error):
    before = link.counters.copy()
    with pytest.raises(error) as caught:
        said(link, message)

    assert link.counters - before == {caught.value.reason: 1}
    return caught.value.reason


# ---- greeting


def test_a_stranger_that_has_not_heard_us_is_greeted_back():
    link = session()

    assert said(link, replace(HELLO, echo=0, is_open=False)).needs_answer
    assert link.state is LinkState.HALF_OPEN
    assert not link.is_open


def test_a_hello_that_bears_our_incarnation_opens_the_link():
    link = session()

    assert not said(link, HELLO).needs_answer
    assert link.is_open


def test_a_neighbour_that_waits_for_our_hello_gets_it_again_although_the_link_is_open_here():
    link = open_session()

    assert said(link, replace(HELLO, is_open=False)).needs_answer
    assert link.is_open


def test_our_hello_says_who_we_are_and_what_we_have_heard():
    link = open_session()
    news = {"exchange": 3, "report": NOTHING_CLOSED, "stop": NO_STOP}
    news |= {"anew": 5, "remembered": Remembered(anew=6, report=NOTHING_CLOSED)}
    digests = {"study": b"\xaa" * 32, "layout": b"\xbb" * 32, "start": b"\xcc" * 32}

    assert Hello(member="hospital-0", incarnation=11, echo=22, is_open=True, **digests, **news) == link.hello(**news)
    assert Hello(member="hospital-0", incarnation=11, echo=0, is_open=False, **digests, **news) == session().hello(**news)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"member": "hospital-2"}, "wrong_name"),
        ({"study": b"\xab" * 32}, "wrong_study"),
        ({"layout": b"\xab" * 32}, "wrong_layout"),
        ({"start": b"\xab" * 32}, "wrong_start"),
        ({"member": "hospital-2", "study": b"\xab" * 32}, "wrong_name"),
    ],
)
@pytest.mark.parametrize("prepare", [session, open_session])
def test_a_greeting_that_differs_is_refused_by_name_and_ends_what_was_open(wrong, reason, prepare):
    link = prepare()

    assert reason == refused(link, replace(HELLO, **wrong), Unauthorized)
    assert link.state is LinkState.UNKNOWN
    assert not link.is_open


@pytest.mark.parametrize(
    "message",
    [m for m in EVERY_MESSAGE if not isinstance(m, Hello | Goodbye | DoctorQuestion | DoctorAnswer)],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("greeted", [False, True])
def test_before_the_greeting_nothing_else_is_heard(message, greeted):
    link = session()
    if greeted:
        said(link, replace(HELLO, echo=0, is_open=False))

    assert refused(link, message, Unauthorized) == "not_greeted"


def test_a_neighbour_that_restarted_is_greeted_anew_and_its_half_update_given_up():
    link = open_session(LARGE)
    link.receive(large_frames()[0], exchange=7)
    heard = said(link, replace(HELLO, incarnation=23, echo=0, is_open=False))

    assert heard.needs_answer
    assert (link.state, link.progress) == (LinkState.HALF_OPEN, None)


def test_the_same_incarnation_greeting_again_disturbs_nothing():
    link = open_session(LARGE)
    link.receive(large_frames()[0], exchange=7)

    assert said(link, replace(HELLO, echo=0, is_open=False)).needs_answer
    assert (link.is_open, link.progress) == (True, (7, CHUNK_BYTES))


def test_goodbye_closes_the_link_until_the_next_hello():
    link = open_session(LARGE)
    link.receive(large_frames()[0], exchange=7)

    assert said(link, Goodbye(reason="pausing")).message == Goodbye(reason="pausing")
    assert link.progress is None
    assert refused(link, ResendRequest(exchange=7, whole=False, lost=False, offset=0, digest=None), Unauthorized) == "not_greeted"
    assert said(link, replace(HELLO, echo=0, is_open=False)).needs_answer  # even the same process may come back
    said(link, HELLO)
    assert link.is_open


def test_a_neighbour_that_knows_us_from_before_our_restart_is_greeted_back():
    assert said(session(), replace(HELLO, echo=10)).needs_answer


def test_the_table_has_a_line_for_every_greeting_and_only_an_open_link_hears_the_rest():
    assert {
        (state, event) for state in LinkState for event in HandshakeEvent if event is not HandshakeEvent.MESSAGE
    } - TRANSITIONS.keys() == {
        (LinkState.UNKNOWN, HandshakeEvent.HELLO_AGAIN)  # an unknown peer has no incarnation that we know
    }
    assert [state for state, event in TRANSITIONS if event is HandshakeEvent.MESSAGE] == [LinkState.OPEN]


@pytest.mark.parametrize("digest", ["", "aa" * 31, "zz" * 32])
def test_terms_are_digests(digest):
    with pytest.raises(ValueError, match=r"hexadecimal"):
        Terms(study=digest, layout="bb" * 32, start="cc" * 32)


class Greeting:
    """Two nodes that greet until their link is open, and what they have sent to each other."""

    def __init__(self):
        self.incarnations = iter(range(1, 99))
        self.links, self.on_the_way = [None, None], (deque(), deque())
        self.restart(0)
        self.restart(1)

    def restart(self, side):
        me, peer = ("a", "b") if side == 0 else ("b", "a")
        incarnation = next(self.incarnations)
        self.links[side] = LinkSession(peer=peer, member=me, terms=TERMS, incarnation=incarnation, formats=(SMALL,))

    def send(self, side):
        self.on_the_way[1 - side].append(encode(self.links[side].hello(exchange=0, report=NOTHING_CLOSED, stop=NO_STOP)))

    def hear(self, side):
        if self.on_the_way[side] and self.links[side].receive(self.on_the_way[side].popleft(), exchange=0).needs_answer:
            self.send(side)

    def lose(self, side):
        if self.on_the_way[side]:
            self.on_the_way[side].popleft()

    def repeat(self, side):
        self.on_the_way[side].extend(list(self.on_the_way[side])[:1])

    def greeting_period(self):
        for side in range(2):
            if not self.links[side].is_open:
                self.send(side)
        for _ in range(100):
            for side in range(2):
                self.hear(side)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["send", "hear", "hear", "lose", "repeat", "restart"]), st.integers(0, 1)), max_size=40))
def test_two_nodes_open_their_link_whatever_was_lost_before_and_then_fall_silent(steps):
    greeting = Greeting()
    for step, side in steps:
        getattr(greeting, step)(side)
    for _ in range(3):
        greeting.greeting_period()

    assert [link.is_open for link in greeting.links] == [True, True]
    assert not any(greeting.on_the_way)
    for side, link in enumerate(greeting.links):
        assert link.receive(
            encode(ResendRequest(exchange=side, whole=False, lost=False, offset=0, digest=None)), exchange=0
        ).message == ResendRequest(exchange=side, whole=False, lost=False, offset=0, digest=None)


# ---- updates


def test_an_update_in_one_piece_arrives_with_its_news():
    heard = said(open_session(), UPDATE)

    assert heard.received.arrays["x"].tobytes() == PAYLOAD
    assert (7, NEWS["report"], NEWS["stop"]) == (heard.received.exchange, heard.received.report, heard.received.stop)
    assert heard.dropped is None


def test_an_update_in_chunks_arrives_with_the_last_and_its_progress_shows():
    link, progress, received = open_session(LARGE), [], []
    for frames in large_frames():
        received.append(link.receive(frames, exchange=7).received)
        progress.append(link.progress)

    assert progress == [(7, CHUNK_BYTES), (7, 2 * CHUNK_BYTES), (7, 3 * CHUNK_BYTES), None]
    assert received[:3] == [None] * 3
    assert np.array_equal(np.ones(CHUNK_BYTES), received[3].arrays["x"])


@pytest.mark.parametrize(("exchange", "dropped"), [(8, "stale_round"), (100, "stale_round"), (5, "far_round"), (0, "far_round")])
def test_an_update_of_a_far_exchange_is_dropped_and_its_news_heard(exchange, dropped):
    link = open_session()
    heard = said(link, UPDATE, exchange=exchange)

    assert (dropped, None) == (heard.dropped, heard.received)
    assert heard.message == UPDATE
    assert {dropped: 1} == link.counters


def test_an_update_of_the_next_exchange_is_taken():
    assert said(open_session(), UPDATE, exchange=6).received.exchange == 7


@pytest.mark.parametrize(("exchange", "place"), [(7, "usual"), (6, "early")])
def test_an_update_of_the_next_exchange_lies_in_room_of_its_own(exchange, place):
    made = []
    rooms = {f"make{kind}_room": lambda size, kind=kind: made.append(kind) or np.empty(size, np.uint8) for kind in ("", "_early")}
    link = session(LARGE, **rooms)
    link.receive(encode(HELLO), exchange=exchange)
    for frames in large_frames():
        heard = link.receive(frames, exchange=exchange)

    assert heard.received.exchange == 7
    assert made == [{"usual": "", "early": "_early"}[place]]


def test_updates_of_far_exchanges_cost_no_memory():
    link, frames = open_session(LARGE), large_frames()[0]
    tracemalloc.start()
    for exchange in (0, 5, 8, 10**6):
        assert link.receive(frames, exchange=exchange).dropped in ("stale_round", "far_round")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 100_000


def test_an_announced_size_of_two_tebibytes_is_refused_without_allocating():
    link, frames = open_session(), frames_of(replace(UPDATE, size_bytes=2**41, channels=(("x", "float32", 2**39),)))
    tracemalloc.start()
    with pytest.raises(BadMessage, match="wrong_size"):
        link.receive(frames, exchange=7)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 100_000


def test_an_update_that_came_already_is_dropped():
    link = open_session()
    said(link, UPDATE)

    assert said(link, UPDATE).dropped == "duplicate"
    assert link.counters == {"duplicate": 1}


def test_chunks_of_an_update_that_came_already_are_dropped():
    link, frames = open_session(LARGE), large_frames()
    for message in frames:
        link.receive(message, exchange=7)

    assert [link.receive(message, exchange=7).dropped for message in frames] == ["duplicate"] * 4


def test_another_update_of_the_same_exchange_does_not_replace_the_first():
    link = open_session(LARGE)
    for message in large_frames(value=1.0):
        link.receive(message, exchange=7)

    assert link.receive(large_frames(value=2.0)[0], exchange=7).dropped == "contradiction"


def test_of_one_exchange_there_is_one_update_that_continues_and_one_that_stands_by_itself():
    link = open_session(ENCODED)

    assert said(link, CONTINUED).received.state_digests == MARKS
    assert said(link, WHOLE).received.state_digests == (None, MARKS[1])
    assert [said(link, message).dropped for message in (CONTINUED, WHOLE)] == ["duplicate", "duplicate"]
    assert said(link, replace(WHOLE, digest=bytes(32))).dropped == "contradiction"


def test_a_whole_update_comes_in_chunks_after_one_that_continues():
    encoded = UpdateFormat(channels=(("q", "int8", (4,)),), full=LARGE)
    link, large = open_session(encoded), {"x": np.ones(CHUNK_BYTES, dtype=np.float32)}
    said(link, CONTINUED)
    first, *chunks = LARGE.pack(7, large, (None, MARKS[1])).messages(**NEWS)
    link.receive(first, exchange=7)
    assert said(link, CONTINUED).dropped == "duplicate"  # sent again over a new connection: the rest will not come
    assert link.receive(chunks[0], exchange=7).dropped == "duplicate"

    heard = [link.receive(frames, exchange=7) for frames in (first, *chunks)]
    assert heard[-1].received.arrays["x"][-1] == 1.0


def test_the_updates_of_this_exchange_and_the_next_are_held_apart():
    link = open_session(LARGE)
    for message in large_frames(8, value=8.0):
        early = link.receive(message, exchange=7).received
    for message in large_frames(7, value=7.0):
        received = link.receive(message, exchange=7).received

    assert (early.exchange, early.arrays["x"][-1]) == (8, 8.0)
    assert (received.exchange, received.arrays["x"][-1]) == (7, 7.0)
    assert link.receive(large_frames(8)[1], exchange=8).dropped == "duplicate"


def test_updates_are_kept_until_they_are_released_also_where_the_neighbour_has_left():
    link = open_session(LARGE)
    for exchange in (7, 8):
        for message in large_frames(exchange, value=float(exchange)):
            received = link.receive(message, exchange=7).received
        link.keep(received)
    link.receive(frames_of(Goodbye(reason="finished")), exchange=7)
    link.release({8, 9})

    assert link.kept(8) is received
    with pytest.raises(KeyError):
        link.kept(7)


def test_what_was_coming_in_when_its_exchange_ended_is_given_up():
    link, frames = open_session(LARGE), large_frames()
    link.receive(frames[0], exchange=7)

    assert link.receive(frames[1], exchange=8).dropped == "stale_round"
    assert link.progress is None


def test_chunks_whose_beginning_was_lost_are_dropped():
    link = open_session(LARGE)

    assert link.receive(large_frames()[1], exchange=7).dropped == "stray_chunk"
    link.receive(large_frames(8)[0], exchange=7)
    assert link.receive(large_frames(7)[1], exchange=7).dropped == "stray_chunk"
    assert link.progress == (8, CHUNK_BYTES)


def test_what_came_before_a_gap_is_kept_and_continued():
    link, frames = open_session(LARGE), large_frames()
    link.receive(frames[0], exchange=7)

    assert [link.receive(message, exchange=7).dropped for message in frames[2:]] == ["out_of_order"] * 2
    assert link.resend_request(7, full=False, lost=True).offset == CHUNK_BYTES
    assert [link.receive(message, exchange=7).received for message in frames[1:]][-1] is not None


def test_an_update_of_a_node_that_has_not_closed_the_exchange_before_is_refused():
    short = Report(closed_through=5, merged=(), confirmed=-1, settled=-1)

    assert refused(open_session(), replace(UPDATE, report=short), BadMessage) == "wrong_report"


def test_an_update_sent_again_later_may_report_on_itself():
    later = Report(closed_through=7, merged=(7,), confirmed=3, settled=6)

    assert said(open_session(), replace(UPDATE, report=later)).received.report == later


def test_nan_is_refused_and_the_next_update_taken():
    link = open_session()
    payload = np.array([0, 1, np.nan, 3], dtype=np.float32)
    (frames,) = SMALL.pack(7, {"x": payload}).messages(**NEWS)
    with pytest.raises(BadMessage, match="not_finite"):
        link.receive(frames, exchange=7)

    assert link.counters == {"not_finite": 1}
    assert said(link, UPDATE).received is not None


@pytest.mark.parametrize(
    "message",
    [
        ResendRequest(exchange=3, whole=False, lost=False, offset=0, digest=None),
        Heartbeat(exchange=9, **NEWS),
        Closing(exchange=9, reason="rounds", **NEWS),
    ],
)
def test_everything_else_is_passed_on(message):
    heard = said(open_session(), message)

    assert (message, None, None, False) == (heard.message, heard.received, heard.dropped, heard.needs_answer)


def test_refusals_are_counted_by_reason():
    link = open_session()
    for frames in ([b"\xc1"], [b"\xc1"], frames_of(replace(UPDATE, size_bytes=1))):
        with pytest.raises(BadMessage):
            link.receive(frames, exchange=7)
    said(link, CHUNK)

    assert link.counters == {"bad_message": 2, "wrong_size": 1, "stray_chunk": 1}
    assert isinstance(UPDATE, Update)
