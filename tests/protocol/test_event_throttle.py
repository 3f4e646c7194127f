"""Which events about a neighbour become rows: the first, then ever fewer, and what is held back is counted."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from p2pfl.protocol.event_throttle import FIRST, PAUSE_S, EventThrottle
from p2pfl.runs.folder import RunFolder
from thorough import first_fast

DAY_S = 86_400
DAY_BYTES = 1_000_000
MINUTE_S = 60.0
MINUTE_BYTES = DAY_BYTES / 1440
DETAILS = {
    "left": "node-2 has finished",
    "greeted": "node-2 at exchange 123456",
    "returned": "node-2 is back at exchange 123456",
    "refused": "node-2: wrong_format: the update of exchange 123456 holds 5 channels, and 3 are expected",
    "excluded": "node-2 is disconnected for 3,600 s: it sends messages that no member sends (bad_message)",
    "skipped": "node-2 did not come to exchange 123456",
    "took_back": "node-2 did not match exchange 123456",
    "resynchronised": "node-2 at exchange 123456",
    "state_lost": "node-2: its state went back: it was that of round 123456, and now is that of round 0 (settled -1, confirmed -1); "
    "nothing of it is taken in until its state is restored, or it is started with --start-anew",
    "state_restored": "node-2: its state is again that of round 123456",
    "started_anew": "node-2: it has begun without its state: it was that of round 123456, and now is that of round 0",
    "far_update": "node-2: its model is 123.4 away, and 1.2 was the median of the last 50",
    "update_differs": "node-2: what it sent here in round 123456 is not the update that it has signed",
    "hurried": "node-2 says that it is at exchange 1000000000 while this node is at 123456, and no other member confirms it",
    "held": "node-2 spoke and did not come to 16384 exchanges, which waited for it for 491520 s in all",
    "link_down": "the link to node-2 is down: it is being dialled",
    "link_up": "the link to node-2 is up again after 12 s",
}
"""All kinds that a neighbour can cause, each with what a node writes."""


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


class Attack:
    """A neighbour that makes things happen, against what a node writes in events.jsonl, on a clock that the test moves."""

    def __init__(self, place, tick_s=0.1):
        self.throttle, self.folder = EventThrottle(), RunFolder.create(place, {})
        self.happened = Counter()
        self.written = []
        """When something was written, and how large the file was then."""
        self.tick_s, self.ticked_s = tick_s, 0.0

    def happen(self, kind, now_s, member="node-2"):
        while self.ticked_s + self.tick_s <= now_s and self.throttle.num_held_back(member):
            self.ticked_s += self.tick_s
            self.write(self.throttle.due(self.ticked_s), self.ticked_s)
        self.ticked_s = max(self.ticked_s, now_s - now_s % self.tick_s)
        self.happened[kind] += 1
        row = {"time": "2026-11-29T12:00:00.000Z", "round": 123_456, "node": "node-0", "event": kind, "detail": DETAILS[kind]}
        row = self.throttle.offer(kind, member, row, now_s)
        self.write([row] if row is not None else [], now_s)

    def write(self, rows, now_s):
        for row in rows:
            self.folder.append_event(row)
            self.written.append((now_s, self.size_bytes()))

    def size_bytes(self):
        return (self.folder.path / "events.jsonl").stat().st_size

    def within(self, from_s, to_s):
        """Bytes that were written from one time to another."""
        sizes = [0, *(size for now_s, size in self.written if now_s < from_s)]
        return max([sizes[-1], *(size for now_s, size in self.written if from_s <= now_s < to_s)]) - sizes[-1]

    def told(self):
        """How many events of each kind the rows speak of."""
        told = Counter()
        for row in self.folder.events():
            _, _, before = row["detail"].partition(" (and ")
            told[row["event"]] += 1 + int(before.partition(" ")[0].replace(",", "") or 0)
        return told


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


RATES = [0.1, 1.0, 10.0, 100.0, 1000.0]
STORIES = [("left", "greeted"), tuple(DETAILS), *((kind,) for kind in DETAILS)]
"""What a neighbour makes happen in turn: it comes and goes, does all that it can, or the same over and over."""


@pytest.mark.no_cover
@pytest.mark.parametrize("kinds", first_fast(STORIES, 3, alone=True), ids=lambda kinds: "-".join(kinds) if len(kinds) < 3 else "all")
def test_one_neighbour_causes_hardly_a_row_in_its_first_minute_however_fast_it_is(kinds, tmp_path):
    for rate in RATES:
        attack = Attack(tmp_path / f"{rate:g}")
        for number in range(round(MINUTE_S * rate)):
            for kind in kinds if number < 1000 or len(kinds) < 3 else ():  # the rest of all kinds' minute is like this
                attack.happen(kind, number / rate)

        assert 0 < attack.size_bytes() <= MINUTE_BYTES, rate


@pytest.mark.parametrize("rate", [0.1, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (1.0, 10.0))])
@pytest.mark.parametrize("kinds", [("left", "greeted"), tuple(DETAILS)], ids=["come-and-go", "all"])
def test_one_neighbour_causes_less_than_a_megabyte_of_events_a_day_and_all_are_counted(kinds, rate, tmp_path):
    attack = Attack(tmp_path / "run", tick_s=5.0)
    for number in range(round(DAY_S * rate)):
        attack.happen(kinds[number % len(kinds)], number / rate)
    attack.write(attack.throttle.rest(DAY_S), DAY_S)

    assert attack.size_bytes() <= DAY_BYTES
    assert attack.told().total() == attack.happened.total()
    assert kinds[-1] in attack.told()


@pytest.mark.parametrize("seed", range(3))
def test_there_is_no_minute_in_which_one_neighbour_causes_more(seed, tmp_path):
    chance, attack, now_s = random.Random(seed), Attack(tmp_path / "run", tick_s=1.0), 0.0
    for _ in range(100):
        now_s += chance.choice([0.0, 5.0, 60.0, 300.0, 900.0])
        for kind in chance.sample(list(DETAILS), chance.randint(1, 6)):
            for _ in range(chance.choice([1, 4, 30])):
                now_s += chance.choice([0.01, 1.0])
                attack.happen(kind, now_s)

    assert max(attack.within(at_s, at_s + MINUTE_S) for at_s, _ in attack.written) <= MINUTE_BYTES


def test_what_is_not_written_yet_is_counted_and_a_kind_that_was_never_written_comes_first(tmp_path):
    attack = Attack(tmp_path / "run")
    for kind in ("left", "greeted", "returned", "left", "greeted", "returned"):
        attack.happen(kind, 1.0)
    attack.happen("state_lost", 2.0)
    num_held_back = attack.throttle.num_held_back("node-2")
    (row,) = attack.throttle.due(2.0 + 10 * PAUSE_S)[:1]

    assert num_held_back + len(attack.written) == 7
    assert row["event"] == "state_lost"
    assert attack.throttle.num_held_back("node-1") == 0


def test_one_row_that_is_larger_than_all_that_is_allowed_is_written_where_nothing_else_was():
    throttle, row = EventThrottle(), {"event": "refused", "detail": "b: " + 2000 * "x"}

    assert throttle.offer("refused", "b", row, 0.0) == row
    assert throttle.offer("left", "b", {"event": "left", "detail": "b has finished"}, 1.0) is None


def test_the_end_of_an_outage_is_written_at_once_whatever_went_before(tmp_path):
    attack = Attack(tmp_path / "run")
    for second, kind in enumerate(("greeted", "skipped", "left", "link_down", "returned", "greeted", "returned", "refused")):
        attack.happen(kind, 2.0 * second)
    held_back = attack.throttle.num_held_back("node-2")
    attack.happen("link_up", 20.0)

    assert held_back
    assert attack.folder.events()[-1]["event"] == "link_up"
