"""Updates are kept by their neighbour's session as long as the pace needs them, and not longer."""

from __future__ import annotations

import weakref

from nodes_by_hand import ENCODED, Node, carry, greeted, mark_of, meeting_in_pairs, pair

from p2pfl.errors import BadMessage
from p2pfl.paces import Chosen
from p2pfl.protocol.edges import Flow
from p2pfl.wire.link import LinkState
from p2pfl.wire.messages import NOTHING_SAID


def node_of(pace: str, **parts) -> Node:
    node = Node("c", "a", pace=pace, **parts)
    node.protocol.neighbours["a"].session.state = LinkState.OPEN
    return node


def kept(node: Node, exchange: int, peer: str = "a") -> weakref.ref:
    """What shows whether anybody still holds the arrays of an update."""
    return weakref.ref(node.protocol.neighbours[peer].session.kept(exchange).arrays["x"])


def merge(node: Node) -> list[int]:
    """Merge what is due without keeping any of it; returns the ages of what came."""
    node.post()
    due, protocol = node.protocol.due(node.now_s, {"x"}), node.protocol
    ages = [each.age for each in protocol.pace.chosen().values()]
    protocol.close({name: Flow(exchange=protocol.edges.exchange, amounts={}) for name in due.admitted}, node.now_s)
    return ages


def test_an_update_in_step_is_released_when_the_next_exchange_begins():
    node = node_of("synchronous")
    for exchange in (0, 1):
        node.hear_update("a", exchange)
    merged, early = kept(node, 0), kept(node, 1)
    merge(node)

    assert node.protocol.came()["a"].arrays["x"] is merged()
    node.protocol.begin(1, node.now_s)
    assert merged() is None
    assert node.protocol.came()["a"].arrays["x"] is early()


def test_an_early_update_that_continues_what_is_not_here_gives_its_place_to_the_full_one():
    node, _ = pair(ENCODED)
    node.post()
    node.hear_encoded("b", 0, NOTHING_SAID, mark_of(0))
    node.hear_encoded("b", 1, mark_of(7), mark_of(1))
    early = weakref.ref(node.protocol.neighbours["b"].session.kept(1).arrays["q"])
    node.close()

    assert early() is None
    assert node.protocol.came() == {}
    node.hear_encoded("b", 1, None, mark_of(1))
    assert list(node.protocol.came()["b"].arrays) == ["x"]


def test_a_newer_update_takes_the_place_of_the_one_before():
    node = node_of("asynchronous", ahead=8, max_age=1)
    node.hear_update("a", 0)
    first = kept(node, 0)
    node.hear_update("a", 3)

    assert first() is None
    assert [held.number for held in node.protocol.admitted().values()] == [3]


def test_an_update_that_comes_during_a_merge_waits_beside_the_one_that_is_merged():
    node = node_of("asynchronous", ahead=8, max_age=1)
    node.hear_update("a", 0)
    merged = kept(node, 0)
    merge(node)
    node.hear_update("a", 1)

    assert node.protocol.came()["a"].arrays["x"] is merged()
    node.protocol.begin(1, node.now_s)
    assert merged() is None
    assert node.protocol.pace.chosen() == {"a": Chosen(number=1)}


def test_an_update_that_has_become_too_old_is_released_before_the_merge_without_it():
    node = node_of("asynchronous", ahead=8, max_age=1)
    node.hear_update("a", 0)
    held = kept(node, 0)
    for exchange, ages in enumerate(([0], [1])):
        assert merge(node) == ages
        node.protocol.begin(exchange + 1, node.now_s)

    assert held() is not None
    assert merge(node) == []
    assert held() is None


def test_a_refused_update_is_not_merged_again():
    node = node_of("asynchronous", ahead=8, max_age=5)
    node.hear_update("a", 0)
    held = kept(node, 0)
    node.protocol.hold("a", node.protocol.came()["a"], BadMessage("an update that leads to NaN", reason="not_finite"))

    assert held() is None
    assert node.protocol.came() == {}


def test_of_many_requests_one_update_is_kept_and_handed_out_once():
    node = meeting_in_pairs(ahead=1000)
    node.hear_update("a", 0)
    first = kept(node, 0)
    node.hear_update("a", 7)
    assert first() is None

    exchanges = node.protocol.pairwise_exchanges()
    peer, received = exchanges.next_request()
    held = weakref.ref(received.arrays["x"])
    assert (peer, received.exchange) == ("a", 7)
    assert exchanges.next_request() is None
    del received
    assert held() is None


def test_a_request_that_waits_for_the_end_of_another_one_comes_with_its_update():
    node = Node("b", "a", "c", ahead=1000, pace="pairwise")
    for neighbour in node.protocol.neighbours.values():
        neighbour.session.state = LinkState.OPEN
    exchanges = node.protocol.pairwise_exchanges()
    number = exchanges.pace.ask("c")
    node.hear_update("a", 4, value=2.0)
    assert exchanges.next_request() is None
    node.hear_update("c", number, value=3.0)
    assert exchanges.next_request() is None
    answer, waiting = weakref.ref(exchanges.answer().arrays["x"]), kept(node, 4)

    assert answer()[0] == 3.0
    requests = exchanges.conclude()
    assert [(peer, received.exchange, received.arrays["x"][0]) for peer, received in requests] == [("a", 4, 2.0)]
    del requests
    assert (answer(), waiting()) == (None, None)


def test_a_stopped_node_keeps_nothing_more():
    node = node_of("synchronous")
    node.protocol.stop("rounds", 0)
    node.hear_update("a", 0)

    assert node.protocol.came() == {}


def test_what_a_neighbour_sent_before_it_began_without_its_state_is_released():
    a, b = pair()
    for node in (a, b):
        node.post()
    carry(a, b)
    a.hear_update("b", 1)
    held = kept(a, 0, "b"), kept(a, 1, "b")
    greeted(a, Node("b", "a", incarnation=3, anew=5))

    assert [each() for each in held] == [None, None]
    assert a.protocol.came() == {}
