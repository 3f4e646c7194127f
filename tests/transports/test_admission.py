"""Who may hold a connection and how many bytes of it: the policy alone, in time that the test makes."""

from __future__ import annotations

import random

import pytest

from p2pfl.transports.admission import Account, Admission, source_of

HONEST, ATTACKER = "192.0.2.7", "198.51.100.9"


class Shutting(Admission):
    """Admission whose caller shuts at once what it is told to."""

    def arrive(self, *arguments):
        return self._leave(super().arrive(*arguments))

    def authenticate(self, *arguments):
        return self._leave(super().authenticate(*arguments))

    def weigh(self, *arguments):
        return self._leave(super().weigh(*arguments))

    def _leave(self, shut):
        for number in shut:
            self.leave(number)
        return shut


def admission(**limits):
    return Shutting(**{"member_bytes": 1000, **limits}, draw=random.Random(14).random)


def flood(door, source, count, *, rate=500, start=1000, now_s=0.0):
    """Connections that come at a rate and say nothing; those that were shut, with the reason."""
    shut = {}
    for number in range(start, start + count):
        shut |= door.arrive(number, source, now_s + (number - start) / rate)
    return shut


def attempts_until_through(door, source, *, rate, handshake_s, pause_s=2.0):
    """How many times an honest dialler tries while silent unknown peers come from *source* at a rate."""
    now_s, unknown = 0.0, 10**6
    for attempt in range(1, 1000):
        until_s = now_s + pause_s
        while now_s < until_s:
            door.arrive(unknown, source, now_s)
            unknown += 1
            now_s += 1 / rate
        if attempt in door.arrive(attempt, HONEST, now_s):
            continue
        until_s = now_s + handshake_s
        while now_s < until_s and attempt in door._connections:
            door.arrive(unknown, source, now_s)
            unknown += 1
            now_s += 1 / rate
        if attempt in door._connections:
            return attempt
    raise AssertionError("never")


def test_five_thousand_silent_connections_hold_no_more_places_than_one_address_has():
    door = admission()

    shut = flood(door, ATTACKER, 5000)

    assert len(door.unknown_peers) == 24
    assert len(shut) == 5000 - 24
    assert set(shut.values()) == {"evicted"}


def test_many_addresses_hold_no_more_places_than_there_are():
    door = admission()

    for number in range(1000):
        door.arrive(number, f"10.0.{number // 250}.{number % 250}", number / 500)

    assert len(door.unknown_peers) == 32


def test_links_of_neighbours_are_never_evicted():
    door = admission()
    for number, member in enumerate(("b", "c", "d")):
        door.arrive(number, ATTACKER, 0.0)
        door.authenticate(number, member, Account())

    flood(door, ATTACKER, 5000)

    assert [door.member(number) for number in (0, 1, 2)] == ["b", "c", "d"]


def test_a_flood_from_one_address_costs_another_address_nothing():
    door = admission()
    flood(door, ATTACKER, 100)
    door.arrive(1, HONEST, 0.2)

    flood(door, ATTACKER, 5000, start=2000, now_s=0.2)

    assert 1 in door.unknown_peers


def test_where_all_places_are_taken_the_address_with_the_most_gives_one():
    door = admission(open_places=10, places_per_source=8)
    flood(door, ATTACKER, 8)
    for number in (1, 2):
        door.arrive(number, f"10.0.0.{number}", 10.0)

    shut = door.arrive(3, HONEST, 10.0)

    assert 3 in door.unknown_peers
    assert {1, 2} <= set(door.unknown_peers)
    assert list(shut.values()) == ["evicted"]


def test_an_address_that_a_neighbour_came_from_has_places_that_no_other_can_take():
    door = admission()
    door.arrive(1, HONEST, 0.0)
    door.authenticate(1, "b", Account())
    door.leave(1)
    for number in range(100, 1100):
        door.arrive(number, f"10.0.{number // 250}.{number % 250}", number / 500)

    door.arrive(2, HONEST, 3.0)
    for number in range(2000, 3000):
        door.arrive(number, f"10.1.{number // 250}.{number % 250}", number / 500)

    assert 2 in door.unknown_peers


def test_nobody_is_evicted_before_its_time_and_then_somebody_at_random():
    door = admission(open_places=4, places_per_source=4, grace_s=(1.0, 1.0))
    flood(door, ATTACKER, 4, start=0)

    assert door.arrive(4, ATTACKER, 0.5) == {4: "evicted"}

    evicted = set()
    for number in range(100, 130):
        evicted |= set(door.arrive(number, ATTACKER, 10.0 + 2 * number))

    assert evicted != set(range(30))  # not in the order of arrival
    assert len(evicted) == 30


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize(("handshake_s", "most"), [(0.02, 15), (0.5, 60)], ids=["near", "far"])
def test_an_honest_dialler_comes_through_a_flood_from_its_own_address(handshake_s, most):
    """At 700 unknown peers a second; attempts are 2 s apart: 15 are 30 s. A distant one needs a longer time of grace, which fewer have."""
    tried = sorted(attempts_until_through(admission(), HONEST, rate=700, handshake_s=handshake_s) for _ in range(3))

    assert tried[1] <= most


def test_a_member_has_two_connections_of_which_the_newest_stay():
    door = admission()
    for number in range(3):
        door.arrive(number, HONEST, 0.0)
    door.authenticate(0, "b", Account())

    assert door.authenticate(1, "b", Account()) == {}
    assert door.authenticate(2, "b", Account()) == {0: "replaced"}
    assert list(door._connections) == [1, 2]


def test_an_unknown_peer_that_sends_more_than_a_handshake_is_shut():
    door = admission()
    door.arrive(1, HONEST, 0.0)
    door.arrive(2, HONEST, 0.0)

    assert door.weigh({1: (4096, False), 2: (4097, False)}) == {2: "oversent"}


def test_those_who_have_not_said_a_word_share_one_budget_and_the_largest_goes():
    door = admission(newcomer_bytes=100)
    for number in range(3):
        door.arrive(number, HONEST, 0.0)

    assert door.weigh({0: (30, True), 1: (50, True), 2: (20, True)}) == {}
    assert door.weigh({0: (30, True), 1: (60, True), 2: (20, True)}) == {1: "oversent"}


def test_a_member_holds_so_many_bytes_over_all_its_connections():
    door = admission()
    accounts = [Account(), Account()]
    for number, account in enumerate(accounts):
        door.arrive(number, HONEST, 0.0)
        door.authenticate(number, "b", account)
    door.arrive(2, HONEST, 0.0)
    door.authenticate(2, "c", Account())
    accounts[0].delivered_bytes = 5000

    assert door.weigh({0: (5500, True), 1: (500, True), 2: (1000, True)}) == {}
    assert door.weigh({0: (5500, True), 1: (501, True), 2: (1000, True)}) == {0: "oversent", 1: "oversent"}
    assert list(door._connections) == [2]


def test_unread_messages_of_ended_connections_count_until_all_were_read():
    door = admission()
    door.arrive(0, HONEST, 0.0)
    door.authenticate(0, "b", Account())
    door.leave(0, (900, True))
    door.arrive(1, HONEST, 0.0)
    door.authenticate(1, "b", Account())

    assert door.has_remains
    assert door.weigh({1: (101, True)}) == {1: "oversent"}

    door.drained(["b"], None)  # another socket's messages

    assert door.has_remains

    door.drained(["b"], "b")
    door.arrive(2, HONEST, 0.0)
    door.authenticate(2, "b", Account())

    assert door.weigh({2: (1000, True)}) == {}


def test_nobody_may_come_in_while_messages_of_those_who_left_are_not_read():
    door = admission(newcomer_bytes=100)
    for number in range(2):
        door.arrive(number, HONEST, 0.0)
        door.leave(number, (60, True))

    assert door.arrive(2, HONEST, 0.0) == {2: "evicted"}

    door.drained([], None)

    assert door.arrive(3, HONEST, 0.0) == {}


def test_who_needs_a_file_gets_that_of_the_newest_unknown_peer():
    door = admission()
    for number in range(3):
        door.arrive(number, HONEST, 0.0)
    door.authenticate(2, "b", Account())
    door.dial(3, HONEST)

    given_up = []
    while (number := door.newest_unknown_peer()) is not None:
        given_up.append(number)
        door.leave(number)

    assert given_up == [1, 0]
    assert list(door._connections) == [2, 3]


def test_remembered_addresses_are_bounded():
    door = admission(known_sources=2, open_places=1, reserved_places=1)
    for number in range(3):
        door.arrive(number, f"10.0.0.{number}", 0.0)
        door.authenticate(number, f"member-{number}", Account())
    door.arrive(10, "10.0.0.2", 0.0)  # known: the reserved place
    door.arrive(11, "10.0.0.0", 0.0)  # forgotten: the open place

    assert door.arrive(12, HONEST, 0.0) == {12: "evicted"}
    assert door.unknown_peers == [10, 11]


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_the_addresses_of_one_party_are_one_source(host, source):
    assert source_of(host) == source
