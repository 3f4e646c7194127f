"""When a link is worth a line in the log, and what the line says."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from p2pfl.protocol.link_watch import STATES, LinkReport, LinkWatch, report
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.transports import LinkCondition, LinkState

REFUSED = "connection refused at tcp://127.0.0.1:17741"


def neighbour(*, is_open=False, **facts):
    made = Neighbour(name="a", session=SimpleNamespace(is_open=is_open))
    for key, value in facts.items():
        setattr(made, key, value)
    return made


def link(state, detail="", since_s=0.0):
    return LinkState(state=state, detail=detail, since_s=since_s)


class Listener:
    """Looks at one link each half second, and keeps what was said and when."""

    def __init__(self):
        self.watch, self.now_s, self.said = LinkWatch(["a"]), 0.0, []

    def lasts(self, seconds, state, detail="", *, is_open=False, is_closing=False, **facts):
        since_s, end_s = self.now_s, self.now_s + seconds
        while self.now_s < end_s:
            now = report(neighbour(is_open=is_open, **facts), link(state, detail, since_s))
            if (saying := self.watch.look(now, self.now_s, is_closing=is_closing)) is not None:
                self.said.append((self.now_s, saying))
            self.now_s += 0.5
        return self

    def up(self, seconds):
        return self.lasts(seconds, LinkCondition.UP, is_open=True)

    def texts(self):
        return [text for _, (_, text, _) in self.said]

    def events(self):
        return [event for _, (_, _, event) in self.said if event is not None]

    def levels(self):
        return [level for _, (level, _, _) in self.said]


def test_a_neighbour_that_was_never_there_is_waited_for_by_name_and_cause():
    listener = Listener().lasts(5, LinkCondition.REFUSED, REFUSED)

    assert listener.texts() == [f"waiting for a: {REFUSED}"]
    assert listener.events() == [("waiting", f"a: {REFUSED}")]
    assert listener.levels() == [logging.INFO]


def test_a_problem_that_lasts_is_said_ever_more_rarely():
    listener = Listener().lasts(1000, LinkCondition.REFUSED, REFUSED)

    assert [when_s for when_s, _ in listener.said] == [3.0, 33.0, 93.0, 213.0, 453.0, 933.0]
    assert listener.texts()[1:3] == [f"waiting for a for 33 s: {REFUSED}", f"waiting for a for 93 s: {REFUSED}"]
    assert len(listener.events()) == 1


def test_a_change_is_said_and_what_passes_by_itself_is_not():
    listener = Listener().lasts(4, LinkCondition.REFUSED, REFUSED).lasts(1, LinkCondition.CONNECTING)
    listener.lasts(4, LinkCondition.NO_ANSWER, "no answer at x").lasts(1, LinkCondition.UP).up(5)

    assert listener.texts() == [f"waiting for a: {REFUSED}", "waiting for a: no answer at x", "a is here"]
    assert listener.levels() == [logging.INFO, logging.WARNING, logging.INFO]


def test_a_link_that_was_up_from_the_start_is_no_news():
    assert Listener().lasts(2, LinkCondition.CONNECTING).up(1000).texts() == []


def test_a_long_training_step_is_no_news():
    training = Listener().up(10)
    training.lasts(3600, LinkCondition.UP, is_open=True, last_seen_s=10.0)

    assert training.texts() == []


def test_a_neighbour_that_goes_and_comes_back_is_said():
    listener = Listener().up(10).lasts(1, LinkCondition.DOWN).lasts(60, LinkCondition.REFUSED, REFUSED).up(5)

    assert listener.texts() == [f"a is out for 4 s: {REFUSED}", f"a is out for 34 s: {REFUSED}", "a is back after 62 s"]
    assert listener.events() == [("link_down", f"a: {REFUSED}"), ("link_up", "a is back after 62 s")]
    assert listener.levels() == [logging.WARNING, logging.WARNING, logging.INFO]


def test_a_neighbour_that_was_there_between_two_looks_only_is_out():
    listener = Listener().lasts(5, LinkCondition.REFUSED, REFUSED, handshakes=1)

    assert listener.texts() == [f"a is out for 3 s: {REFUSED}"]


def test_a_neighbour_that_stands_still_is_out_although_it_is_connected():
    listener = Listener().up(10).lasts(5, LinkCondition.SILENT, "connected, and yet no sign of life comes", is_open=True)

    assert listener.texts() == ["a is out for 4 s: connected, and yet no sign of life comes"]


def test_a_neighbour_that_has_finished_or_a_node_that_stops_gives_no_warning():
    finished = Listener().up(10).lasts(100, LinkCondition.DOWN, left=True)
    closing = Listener().up(10).lasts(10, LinkCondition.DOWN, "the connection has ended", is_closing=True)
    pausing = Listener().up(10).lasts(10, LinkCondition.REFUSED, REFUSED, is_paused=True)

    assert finished.texts() == []
    assert set(closing.levels()) == set(pausing.levels()) == {logging.INFO}
    assert pausing.texts() == [f"a is out for 4 s: it said that it pauses; {REFUSED}"]


def test_another_study_is_named():
    refusal = "a holds study 2073…, this node 5a1c…"
    listener = Listener().lasts(5, LinkCondition.UP, refusal=refusal)

    assert listener.texts() == [f"waiting for a: {refusal}"]
    assert listener.levels() == [logging.WARNING]


def test_keys_that_nobody_knows_are_a_cause_of_waiting():
    found = report(neighbour(), link(LinkCondition.AWAITED), num_unknown_keys=3)

    assert found.detail == (
        "it has not dialled this node yet, and 3 connections with a key that is no neighbour's were refused: a new card, or another study"
    )


def test_a_link_that_flaps_does_not_fill_the_disk():
    listener = Listener()
    for _ in range(200):
        listener.up(5).lasts(5, LinkCondition.REFUSED, REFUSED)

    assert len(listener.texts()) == 2 * 200 - 1
    assert len(listener.events()) == sum(level > logging.DEBUG for level in listener.levels()) < 50


@pytest.mark.parametrize("condition", list(LinkCondition))
def test_only_a_link_that_is_up_and_greeted_is_good(condition):
    found = report(neighbour(is_open=True), link(condition))

    assert found.is_good == (condition == LinkCondition.UP)
    assert found.state in STATES
    assert isinstance(found, LinkReport)
    assert report(neighbour(is_open=False), link(condition)).is_good is False
