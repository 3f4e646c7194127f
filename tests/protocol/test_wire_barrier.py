from __future__ import annotations

import pytest

from p2pfl.errors import StaleRound
from p2pfl.protocol.barrier import ExchangeBarrier
from p2pfl.wire.update import ReceivedUpdate
from wire_samples import NEWS


def received(exchange):
    return ReceivedUpdate(exchange=exchange, arrays={}, **NEWS)


@pytest.fixture
def barrier():
    return ExchangeBarrier(exchange=5, expected=frozenset({"a", "b"}), deadline_s=100.0)


def test_waiting_is_over_when_all_are_here(barrier):
    barrier.receive("a", received(5))
    before = barrier.is_over(0.0), barrier.missing()
    barrier.receive("b", received(5))

    assert (False, frozenset({"b"})) == before
    assert barrier.is_over(0.0)
    assert barrier.is_complete()


def test_waiting_is_over_at_the_deadline(barrier):
    assert not barrier.is_over(99.9)
    assert barrier.is_over(100.0)
    assert not barrier.is_complete()


def test_a_barrier_that_expects_nobody_is_over_at_once():
    assert ExchangeBarrier(exchange=0, expected=frozenset(), deadline_s=1.0).is_over(0.0)


def test_who_was_given_up_is_not_waited_for_and_counts_when_it_comes(barrier):
    barrier.give_up("b")
    barrier.receive("a", received(5))

    assert barrier.is_complete()
    barrier.receive("b", received(5))
    assert {"a", "b"} == barrier.received.keys()


def test_an_early_update_waits_for_the_next_barrier(barrier):
    early = received(6)
    barrier.receive("a", early)
    following = barrier.next(exchange=6, expected=frozenset({"a", "b"}), deadline_s=200.0)

    assert frozenset({"a", "b"}) == barrier.missing()
    assert following.received == {"a": early}
    assert frozenset({"b"}) == following.missing()
    assert following.early == {}


def test_a_jump_leaves_behind_what_came_early(barrier):
    barrier.receive("a", received(6))

    assert barrier.next(exchange=9, expected=frozenset({"a"}), deadline_s=200.0).received == {}


@pytest.mark.parametrize("exchange", [4, 5])
def test_time_does_not_run_backwards(barrier, exchange):
    with pytest.raises(ValueError, match=f"exchange {exchange} after 5"):
        barrier.next(exchange=exchange, expected=frozenset(), deadline_s=1.0)


@pytest.mark.parametrize(("exchange", "reason"), [(4, "stale_round"), (7, "far_round")])
def test_an_update_of_another_exchange_is_refused(barrier, exchange, reason):
    with pytest.raises(StaleRound) as caught:
        barrier.receive("a", received(exchange))

    assert reason == caught.value.reason


def test_the_first_of_two_updates_stands(barrier):
    first = received(5)
    barrier.receive("a", first)
    barrier.receive("a", received(5))

    assert barrier.received["a"] is first
