"""The updates of one exchange, and who is waited for."""

from __future__ import annotations

import pytest
from nodes_by_hand import FLOOR_S, Node

from p2pfl.errors import StaleRound
from p2pfl.paces import Chosen
from p2pfl.paces.lockstep import Lockstep

AT = 5


@pytest.fixture
def node():
    """A node in exchange 5 whose update is on its way."""
    node = Node("c", "a", "b")
    node.protocol.begin(AT, 0.0)
    node.protocol.send({}, 0.0)
    return node


@pytest.fixture
def pace(node) -> Lockstep:
    return node.protocol.pace


def test_waiting_is_over_when_all_are_here(pace):
    pace.receive("a", AT)
    before = pace.is_over(0.0), pace.awaited()
    pace.receive("b", AT)

    assert before == (False, ["b"])
    assert pace.is_over(0.0)
    assert pace.awaited() == []


def test_waiting_is_over_at_the_deadline(pace):
    assert not pace.is_over(FLOOR_S - 0.1)
    assert pace.is_over(FLOOR_S)
    assert pace.awaited() == ["a", "b"]


def test_a_node_that_expects_nobody_is_over_at_once():
    assert Node("c").protocol.pace.is_over(0.0)


def test_who_was_given_up_is_not_waited_for_and_counts_when_it_comes(node, pace):
    node.protocol.neighbours["b"].note_missed()
    pace.receive("a", AT)

    assert pace.is_over(0.0)
    pace.receive("b", AT)
    assert {"a", "b"} == pace.chosen().keys()


def test_an_early_update_waits_for_its_exchange(pace):
    pace.receive("a", AT + 1)
    assert pace.awaited() == ["a", "b"]
    pace.begin(AT + 1)

    assert pace.chosen() == {"a": Chosen(number=AT + 1)}
    assert pace.awaited() == ["b"]


def test_a_jump_leaves_behind_what_came_early(pace):
    pace.receive("a", AT + 1)
    pace.begin(AT + 4)

    assert pace.chosen() == {}
    assert not pace.needed("a")


def test_time_does_not_run_backwards(pace):
    with pytest.raises(ValueError, match=f"exchange {AT - 1} after {AT}"):
        pace.begin(AT - 1)


@pytest.mark.parametrize(("exchange", "reason"), [(4, "stale_round"), (7, "far_round")])
def test_an_update_of_another_exchange_is_refused(pace, exchange, reason):
    with pytest.raises(StaleRound) as caught:
        pace.receive("a", exchange)

    assert reason == caught.value.reason


def test_the_first_of_two_updates_stands(pace):
    is_kept = [pace.receive("a", AT) for _ in range(2)]

    assert is_kept == [True, False]
    assert pace.chosen() == {"a": Chosen(number=AT)}
