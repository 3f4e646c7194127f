"""Members that go away, come back, were restored from a backup or lie about failure: one total each, and no second look at anybody."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_members import STATISTICS, ListStore, Network, drawn_values, terms_of

from p2pfl.errors import ConfigError
from p2pfl.privacy.fixed_point import subtracted
from p2pfl.wire.secure_messages import MaskedSubtotal, SignedTotal, Total


def network(graph, participants=None, *, seed=0, **more):
    terms = terms_of(len(graph), participants, **more)
    found = Network(graph, terms, drawn_values(terms, seed), seed=seed)
    found.open()
    return found


def arrays_of(found, member):
    return [each for sender, _, each in [*found.arrived, *found.waiting] if sender == member and isinstance(each, MaskedSubtotal)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whoever_is_killed_whenever_all_get_the_same_totals_in_the_next_session(data):
    whole = [(graph, None) for graph in (nx.path_graph(4), nx.star_graph(4), nx.cycle_graph(5))]
    graph, participants = data.draw(st.sampled_from([*whole, (nx.path_graph(5), [0, 2, 4]), (nx.star_graph(4), [1, 2, 3])]))
    found = network(graph, participants, seed=data.draw(st.integers(0, 2**32)), check=data.draw(st.booleans()), num_sums=3)
    for _ in range(data.draw(st.integers(1, 3))):
        stop_at = len(found.arrived) + data.draw(st.integers(0, 80))
        found.run(until=lambda network, stop_at=stop_at: len(network.arrived) >= stop_at)
        killed = data.draw(st.integers(0, len(graph) - 1))
        has_kept = data.draw(st.booleans())
        found.restart(killed, totals=found.members[killed].totals if has_kept else None)
        found.open(killed)
    found.finish()

    found.assert_exact()
    assert [len(found.stores[each].entries) for each in found.terms.participants] == [3] * len(found.terms.participants)


def test_a_member_that_is_away_ends_the_session_with_its_name_and_the_next_goes_on():
    found = network(nx.path_graph(4), num_sums=2)
    found.run(until=lambda network: network.totals_of(0)[0] is not None and network.members[3]._sum.position == 0)
    found.away = {2}
    found.run()
    found.look(61.0)
    found.run()

    ended = {me: (found.members[me].ended.reason, found.members[me].ended.names) for me in (1, 3)}
    assert ended == {1: ("clinic-2: away", (2,)), 3: ("clinic-2: away", (2,))}
    assert found.members[0].ended.names == (2,)
    found.away = set()
    found.restart(2)
    found.open(2)
    found.finish()
    found.assert_exact()


def test_a_member_that_never_opens_is_named_after_this_nodes_patience():
    found = network(nx.path_graph(3))
    found.away = {2}
    found.run()
    found.look(59.0)
    assert found.members[0].waits_for == [2]
    assert found.members[0].ended is None
    found.look(2.0)

    assert found.members[0].ended.reason == "clinic-2: away"


def test_a_total_that_one_member_holds_is_fetched_and_not_computed_again():
    found = network(nx.star_graph(3), num_sums=1)
    found.run()
    kept = found.members[2].totals
    for each in range(4):
        found.restart(each, totals=kept if each == 2 else None)
    found.arrived.clear()
    found.open(1)
    found.run()

    found.assert_exact()
    assert not [each for *_, each in found.arrived if isinstance(each, MaskedSubtotal)]
    assert {each.position for *_, each in found.arrived if isinstance(each, Total)} == {-1}


def claim_of_failure():
    """A network whose root knows the total of the first sum, and says that it failed."""
    found = network(nx.path_graph(4), num_sums=1)
    found.run(until=lambda network: network.members[0]._sum is not None and network.members[0]._sum.total is not None)
    first = found.members[0]._sum.total
    found.waiting = [each for each in found.waiting if not isinstance(each[2], Total | SignedTotal)]
    found.post(0, found.members[0].leave("it failed"))
    found.run()
    assert found.totals_of(0) == [None] * 4
    return found, first


def test_a_root_that_claims_failure_gets_the_same_total_again():
    found, first = claim_of_failure()
    found.open(1)
    found.run()

    found.assert_exact()
    assert found.totals_of(0)[0].tolist() == first.tolist()


def test_a_root_that_claims_failure_gets_no_total_of_other_numbers():
    found, _ = claim_of_failure()
    found.values[0][2] = found.values[0][2] + 1.0
    found.open(1)
    with pytest.raises(ConfigError, match="sum 0: this site has sent other numbers into it"):
        found.run()

    assert not [each for each in found.waiting if each[0] == 2 and isinstance(each[2], MaskedSubtotal)]


@pytest.mark.parametrize("study", ["5a" * 32, "bc" * 32], ids=["same study", "second study"])
def test_a_root_that_claims_failure_gets_no_total_without_one_member(study):
    found, _ = claim_of_failure()
    fewer = terms_of(4, [0, 1, 2], num_sums=1, study=study)
    again = Network(nx.path_graph(4), fewer, found.values, stores=found.stores)
    again.open(1)
    with pytest.raises(ConfigError, match="clinic-3"):
        again.run()

    assert not [each for each in again.arrived + again.waiting if isinstance(each[2], MaskedSubtotal)]


def sent_and_restored():
    """A network in which clinic-3 has sent into the first sum, and then comes back as it was before, with other data."""
    found = network(nx.path_graph(4), num_sums=3)
    backup = ListStore(found.stores[3].key)
    found.run(until=lambda network: bool(arrays_of(network, 3)))
    sent = arrays_of(found, 3)[0].limbs
    found.restart(3, store=backup)
    found.values = [[each + (member == 3) for member, each in enumerate(values)] for values in found.values]
    return found, sent


@pytest.mark.parametrize("asks", [True, False])
def test_a_restored_backup_is_found_out_and_sends_nothing_into_the_same_sum(asks):
    found, _ = sent_and_restored()
    if asks:
        found.post(3, found.members[3].ask_neighbours())
        while found.waiting and not found.members[3].history.is_restored:
            found.step()
        assert found.members[3].history.is_restored
    found.arrived.clear()
    found.open(3)
    with pytest.raises(ConfigError, match=r"sum 0: this site was restored from a backup .* from sum 2 of the plan on"):
        found.finish()

    assert found.members[3].history.is_restored
    assert not arrays_of(found, 3)
    assert found.stores[3].blocked_until(found.terms.study) == 0


def test_a_restored_site_takes_part_from_the_next_sum_on():
    found, _ = sent_and_restored()
    found.stores[3].append_block(found.terms.study, 0)
    member = found.member(3)
    others = [found.member(each) for each in range(3)]
    found.members = [*others, member]
    found.waiting.clear()
    position, sum_ids = 0, [found.terms.sum_id(each, []) for each in range(3)]
    found.contribute = lambda me: None
    found.open(0)
    found.run()
    assert sum_ids[position] not in member.totals
    for me, each in enumerate(found.members):
        found.post(me, each.contribute(1, [], found.values[1][me], 0.0))
    found.run()

    found.assert_exact(1)


def test_no_two_frames_differ_by_the_difference_of_the_data():
    """Even where nothing holds a site back: keys are fresh in each session, whatever is restored."""
    found, first = sent_and_restored()
    found.stores = [ListStore() for _ in found.stores]
    found.members = [found.member(each) for each in range(4)]
    found.waiting.clear()
    found.arrived.clear()
    found.open(0)
    found.run()
    second = next(each.limbs for each in arrays_of(found, 3) if each.position == 0)
    change = STATISTICS.encode(np.ones(3))

    assert not (subtracted(second, first) == change).all(axis=-1).any()


def test_what_is_left_of_an_ended_session_is_ignored():
    found = network(nx.path_graph(3), num_sums=1)
    found.run(until=lambda network: any(isinstance(each, MaskedSubtotal) for *_, each in network.waiting))
    late = [each for each in found.waiting if isinstance(each[2], MaskedSubtotal)]
    found.waiting.clear()
    found.open(0)
    found.run()
    found.waiting += late
    found.run()

    found.assert_exact()
    assert found.refused == []


def test_a_fetched_total_that_its_holder_has_not_signed_is_refused():
    found = network(nx.path_graph(4), num_sums=1)
    found.run()
    kept = found.members[1].totals
    for each in range(4):
        found.restart(each, totals=kept if each == 1 else None)
    found.change = altered_to_the_third
    found.open(1)
    found.run()

    assert found.refused == ["differs"]
    assert [each is None for each in found.totals_of(0)] == [False, False, True, True]


def altered_to_the_third(sender, receiver, message):
    """What a member gets that is told another total than the one that is held."""
    is_other = isinstance(message, Total) and (sender, receiver) == (1, 2)
    return replace(message, limbs=subtracted(message.limbs, message.limbs)) if is_other else message


@pytest.mark.parametrize("is_opening_first", [True, False])
def test_a_restored_site_is_held_back_up_to_the_sum_after_its_last_signed_one(is_opening_first):
    found = network(nx.path_graph(4), num_sums=4)
    backup = ListStore(found.stores[3].key)
    found.run(until=lambda network: network.totals_of(1)[2] is not None)
    found.restart(3, store=backup)
    answers = found.members[2].receive(3, *[message for _, message in found.members[3].ask_neighbours()], 0.0)
    assert [receiver for receiver, _ in answers] == [3, 3]
    for _, answer in answers if is_opening_first else reversed(answers):
        found.members[3].receive(2, answer, 0.0)

    assert found.members[3].history.is_restored
    assert backup.blocked_until(found.terms.study) == 2


def test_a_node_that_was_only_restarted_is_not_held_back():
    found = network(nx.path_graph(4), num_sums=2)
    found.run(until=lambda network: network.totals_of(0)[2] is not None)
    found.restart(3)
    for _, answer in found.members[2].receive(3, found.members[3].ask_neighbours()[0][1], 0.0):
        found.members[3].receive(2, answer, 0.0)

    assert not found.members[3].history.is_restored
    assert found.stores[3].blocks == {}


def test_a_total_to_which_a_member_has_not_added_is_refused():
    found = network(nx.path_graph(3), num_sums=1)
    give = found.contribute
    found.contribute = lambda me: give(me) if me != 2 else None
    found.run()
    sums = found.members[1]._sum
    form = found.terms.sums[0].number_format
    forged = Total(transcript=sums._transcript, sum_id=sums.sum_id, position=0, limbs=form.encode(np.zeros(3)))
    found.contribute = lambda me: None
    found.post(0, [(1, forged)])
    found.run()

    assert found.refused == ["wrong_place"]
    found.contribute = give
    found.run()
    found.assert_exact()


def test_neighbours_that_have_restarted_as_well_still_know_of_it():
    found = network(nx.path_graph(4), num_sums=3)
    backup = ListStore(found.stores[3].key)
    found.run(until=lambda network: network.totals_of(0)[2] is not None)
    kept = found.members[2].history.messages()
    found.restart(2)
    found.restart(3, store=backup)
    for message in kept:
        found.members[2].history.note(message)
    for _, answer in found.members[2].receive(3, found.members[3].ask_neighbours()[0][1], 0.0):
        found.members[3].receive(2, answer, 0.0)

    assert found.members[3].history.is_restored


def test_a_member_that_opens_one_session_twice_ends_it_with_its_name():
    found = network(nx.path_graph(4))
    found.run(until=lambda network: all(each.session and each.session.transcript for each in network.members))
    found.restart(3, store=ListStore())
    found.waiting.clear()
    found.contribute = lambda me: None
    found.open(3)
    found.run()

    assert {found.members[me].ended.names for me in range(3)} == {(3,)}
    assert found.members[3].history.is_restored


def test_a_site_that_cannot_give_its_numbers_leaves_and_all_know_which_one():
    found = network(nx.path_graph(4))
    found.values[0][1] = np.full(3, np.inf)
    with pytest.raises(ConfigError, match="not finite"):
        found.run()
    found.post(1, found.members[1].leave("clinic-1: sum 0 is outside its range"))
    found.contribute = lambda me: None
    found.run()

    assert {(each.ended.reason, each.ended.names) for each in found.members} == {("clinic-1: sum 0 is outside its range", (1,))}
