"""Which events about a neighbour become rows: the first, then ever fewer, and what is held back is counted."""

from __future__ import annotations

import json

import pytest

from p2pfl.protocol.event_throttle import FIRST, PAUSE_S, EventThrottle
from p2pfl.runs.events import EventKind

DAY_S = 86_400
KINDS = ("left", "returned", "refused", "skipped", "took_back", "resynchronised", "state_lost", "link_down", "link_up", EventKind.EXCLUDED)


class Record:
    """What a node would write, on a clock that the test moves."""

    def __init__(self):
        self.throttle, self.rows = EventThrottle(), []

    def event(self, now_s, kind="left", member="b", detail="b has finished"):
        self.write(self.throttle.due(now_s))
        row = self.throttle.offer(kind, member, {"event": kind, "detail": detail, "s": now_s}, now_s)
        self.write([row] if row is not None else [])

    def write(self, rows):
        self.rows += rows

    def details(self):
        return [row["detail"] for row in self.rows]

    def size_bytes(self):
        return sum(len(json.dumps({"time": "2026-11-29T12:00:00.000Z", "round": 10**6, "node": "hospital-0", **row})) for row in self.rows)


def test_events_now_and_then_are_all_written():
    record = Record()
    for number in range(100):
        record.event(900.0 * number)

    assert len(record.rows) == 100
    assert set(record.details()) == {"b has finished"}


def test_the_first_ones_are_written_at_once_and_then_one_a_minute_with_a_count():
    record = Record()
    for number in range(90):
        record.event(float(number), detail=f"b {number}")

    assert record.details()[:FIRST] == [f"b {number}" for number in range(FIRST)]
    assert record.details()[FIRST:] == [f"b {FIRST - 2 + PAUSE_S:g} (and 58 times before)"]


def test_events_that_follow_each_other_closely_are_one_row_and_the_newest_comes_when_its_time_has():
    record = Record()
    for number in range(1000):
        record.event(number / 1000, detail=f"b {number}")
    assert record.details() == ["b 0"]
    assert record.throttle.due(PAUSE_S - 0.1) == []
    record.write(record.throttle.due(PAUSE_S))

    assert record.details() == ["b 0", "b 999 (and 998 times before)"]
    assert record.rows[-1]["s"] == 0.999  # when it happened, not when it is written


def test_what_is_held_back_is_written_at_the_end_in_the_order_in_which_it_happened():
    record = Record()
    for number in range(3):
        for kind in ("state_lost", "state_restored"):
            record.event(0.01 * number, kind=kind, detail=f"{kind} {number}")
    record.write(record.throttle.rest(1.0))

    assert [row["event"] for row in record.rows] == ["state_lost", "state_restored"] * 2
    assert record.details()[-1] == "state_restored 2 (and 1 times before)"
    assert record.throttle.rest(2.0) == []


def test_of_going_and_coming_back_the_newest_is_what_is_written():
    record = Record()
    for number in range(100):
        for kind in ("left", "greeted"):
            record.event(0.01 * number, kind=kind, detail=f"{kind} {number}")
    record.write(record.throttle.due(2 * PAUSE_S))

    assert record.details() == ["left 0", "greeted 0", "left 1", "greeted 1", "greeted 99 (and 195 times before)"]


def test_one_neighbour_and_one_kind_do_not_hold_back_another():
    record = Record()
    for _ in range(100):
        record.event(0.0, member="b")
    record.event(0.1, member="c", detail="c has finished")
    record.event(0.1, kind="skipped", detail="b did not answer")

    assert record.details() == ["b has finished", "c has finished", "b did not answer"]


def test_of_an_excluded_neighbour_hardly_anything_is_written_within_a_minute():
    record = Record()
    record.event(0.0, kind="refused", detail="b: bad_message")
    record.event(0.1, kind=EventKind.EXCLUDED, detail="b is disconnected for 10 s")
    for began_s in (3.0, 10.0, 30.0, 59.0):
        for kind in KINDS:
            for number in range(50):
                record.event(began_s + number / 100, kind=kind)

    assert len(record.rows) == 2
    record.write(record.throttle.due(PAUSE_S + 1))
    assert len(record.rows) == 2 + len(KINDS)


@pytest.mark.parametrize("burst", [1, FIRST, 100])
@pytest.mark.parametrize("pause_s", [1.0, 61.0, 901.0])
def test_one_neighbour_causes_less_than_a_megabyte_of_events_a_day_whatever_it_does(burst, pause_s):
    record = Record()
    for began_s in range(0, DAY_S, round(burst + pause_s)):
        for number in range(burst):
            record.event(float(began_s + number))
    record.write(record.throttle.rest(DAY_S))

    assert record.size_bytes() * len(KINDS) < 1e6
