"""The part of a node that one neighbour may use: honest ones never come near the limits, floods end at them."""

from __future__ import annotations

import pytest

from p2pfl.protocol.allowance import (
    BYTES_AT_ONCE,
    EXCLUDED_AT_MOST_S,
    EXCLUDED_S,
    FORGIVEN_AFTER_S,
    MESSAGES_AT_ONCE,
    NONSENSE_AT_ONCE,
    NeighbourAllowance,
    TokenBucket,
)
from p2pfl.wire.codec import CHUNK_BYTES

SMALL = 112
GIB = 2**30


def send(allowance, size_bytes, per_s, seconds, began_s=0.0):
    """A stream of messages of one size; the number that were dropped, and when the neighbour was first to be disconnected."""
    dropped = 0
    for number in range(round(per_s * seconds)):
        now_s = began_s + number / per_s
        dropped += not allowance.admits(size_bytes, now_s)
        if (found := allowance.exclusion(now_s)) is not None:
            return dropped, now_s - began_s, found
    return dropped, None, None


def test_a_bucket_gives_what_it_holds_and_then_its_rate():
    bucket = TokenBucket(per_s=10.0, most=5.0)

    assert [bucket.take(1, 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [bucket.take(1, 0.25) for _ in range(3)] == [True, True, False]
    assert bucket.refill(1000.0) == 5.0


def test_a_bucket_whose_clock_stands_still_or_goes_back_gives_nothing_more():
    bucket = TokenBucket(per_s=10.0, most=1.0)

    assert [bucket.take(1, now_s) for now_s in (5.0, 5.0, 4.0)] == [True, False, False]


def test_the_fastest_rounds_that_a_disk_allows_are_within_the_limits():
    assert send(NeighbourAllowance(update_bytes=SMALL), 600, per_s=900, seconds=120) == (0, None, None)


def test_a_large_model_on_a_fast_link_is_within_the_limits():
    allowance, now_s = NeighbourAllowance(update_bytes=GIB), 0.0
    for _ in range(20):  # 10 Gbit/s, one round after the other
        allowance.earn()
        for _ in range(GIB // CHUNK_BYTES):
            assert allowance.admits(CHUNK_BYTES + 600, now_s)
            now_s += CHUNK_BYTES / 1.2e9
    assert allowance.exclusion(now_s) is None


def test_a_slow_link_is_within_the_limits():
    allowance, now_s = NeighbourAllowance(update_bytes=GIB), 0.0
    allowance.earn()
    for _ in range(GIB // CHUNK_BYTES):  # a chunk a minute
        assert allowance.admits(CHUNK_BYTES, now_s)
        now_s += 60.0


@pytest.mark.parametrize("update_bytes", [SMALL, 3 * CHUNK_BYTES, GIB])
def test_all_that_a_neighbour_has_kept_may_come_at_once_after_a_long_partition(update_bytes):
    allowance = NeighbourAllowance(update_bytes=update_bytes)
    assert allowance.admits(600, 0.0)
    later_s = 3600.0
    chunks = max(1, update_bytes // CHUNK_BYTES)
    admitted = [allowance.admits(min(update_bytes, CHUNK_BYTES) + 600, later_s) for _ in range(9 * chunks)]

    assert all(admitted)
    assert allowance.exclusion(later_s) is None


def test_a_node_that_was_held_up_for_long_drops_some_of_what_waited_and_excludes_nobody():
    allowance = NeighbourAllowance(update_bytes=SMALL)
    admitted = [allowance.admits(600, 60.0) for _ in range(3000)]

    assert sum(admitted) == MESSAGES_AT_ONCE
    assert allowance.num_dropped == 3000 - MESSAGES_AT_ONCE
    assert allowance.exclusion(60.0) is None


def test_the_records_of_256_members_are_within_the_limits():
    allowance, now_s = NeighbourAllowance(update_bytes=64 * 1024), 0.0
    for _ in range(1000):  # 30 rounds a second, of which each brings everybody's record in eight messages
        assert allowance.admits(64 * 1024 + 600, now_s)
        assert all(allowance.admits(32 * 150, now_s) for _ in range(8))
        now_s += 1 / 30
    assert allowance.exclusion(now_s) is None


@pytest.mark.no_cover
def test_an_honest_neighbour_with_another_schema_or_study_is_not_excluded():
    allowance = NeighbourAllowance(update_bytes=SMALL)
    for number in range(2 * 86_400):  # two greetings a second, all day
        allowance.refused("wrong_schema", number / 2)
        for reason in ("wrong_study", "not_greeted", "not_finite", "too_many_records", "stale_round", "out_of_order"):
            allowance.refused(reason, number / 2)

        assert allowance.exclusion(number / 2) is None


@pytest.mark.parametrize("reason", ["bad_message", "wrong_digest", "wrong_size", "wrong_schema", "bad_record", "wrong_signature"])
def test_nonsense_ends_a_link_at_once(reason):
    allowance = NeighbourAllowance(update_bytes=SMALL)
    told = []
    for number in range(round(NONSENSE_AT_ONCE) + 1):
        told.append(allowance.exclusion(0.001 * number))
        allowance.refused(reason, 0.001 * number)

    assert told == [None] * len(told)
    assert allowance.exclusion(0.1) == (EXCLUDED_S, f"messages that no member sends ({reason})")
    assert allowance.exclusion(0.1) is None
    assert not allowance.admits(1, 0.2)
    assert allowance.admits(1, 0.1 + EXCLUDED_S)


def test_three_frames_counted_by_the_transport_end_a_link():
    allowance = NeighbourAllowance(update_bytes=SMALL)
    allowance.refused("frame_count", 0.0, times=3000)

    assert allowance.exclusion(0.0) is not None


@pytest.mark.parametrize(
    ("size_bytes", "per_s", "within_s", "why"),
    [
        (300, 20_000, 0.3, "more messages"),
        (300, 2_000, 6.0, "more messages"),
        (CHUNK_BYTES, 300, 0.3, "more bytes"),
        (65_000, 2_000, 0.7, "more bytes"),
    ],
)
def test_a_flood_is_dropped_and_then_ends_the_link(size_bytes, per_s, within_s, why):
    dropped, after_s, found = send(NeighbourAllowance(update_bytes=SMALL), size_bytes, per_s, seconds=20)

    assert dropped > 0
    assert after_s < within_s
    assert found[0] == EXCLUDED_S
    assert found[1].startswith(why)


def test_with_a_small_model_no_more_than_some_chunks_are_decoded():
    allowance = NeighbourAllowance(update_bytes=SMALL)
    decoded = sum(allowance.admits(CHUNK_BYTES, number / 1000) for number in range(1000))

    assert decoded <= (BYTES_AT_ONCE + 2 * CHUNK_BYTES) / CHUNK_BYTES


def test_who_floods_again_and_again_is_excluded_for_longer_each_time_and_forgiven_after_an_hour():
    allowance, now_s, told = NeighbourAllowance(update_bytes=SMALL), 0.0, []
    for _ in range(2000):
        allowance.refused("bad_message", now_s, times=100)
        for_s, _ = allowance.exclusion(now_s)
        told.append(for_s)
        now_s += for_s

    assert told[:4] == [EXCLUDED_S, 2 * EXCLUDED_S, 4 * EXCLUDED_S, 8 * EXCLUDED_S]
    assert told[20:] == [EXCLUDED_AT_MOST_S] * len(told[20:])

    now_s += FORGIVEN_AFTER_S + 1
    allowance.refused("bad_message", now_s, times=100)

    assert allowance.exclusion(now_s)[0] == EXCLUDED_S
