from __future__ import annotations

import json

import pytest

from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.wire.messages import NOTHING_CLOSED, Report


def report(closed_through, merged=(), confirmed=-1, settled=-1):
    return Report(closed_through=closed_through, merged=merged, confirmed=confirmed, settled=settled)


def closed(ledger, exchange, *, merged):
    take_back = ledger.close(exchange, merged=merged)
    ledger.checkpointed(ledger.to_dict())
    return take_back


def test_a_flow_that_the_neighbour_matched_stays():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    closed(ledger, 0, merged=True)

    assert ledger.open_flow == 0
    assert ledger.report() == report(0, (0,))
    assert ledger.hear(report(0, (0,))) is None
    assert ledger.open_flow is None


def test_a_flow_that_the_neighbour_did_not_match_is_taken_back_once():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    closed(ledger, 0, merged=True)

    assert ledger.hear(report(0)) == 0
    assert ledger.hear(report(0)) is None
    assert ledger.merged == ()


def test_a_report_that_comes_before_its_exchange_is_closed_here_settles_it_at_the_close():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)

    assert ledger.hear(report(0)) is None
    assert ledger.close(0, merged=True) == 0


def test_an_older_report_changes_nothing():
    ledger = EdgeLedger()
    ledger.hear(report(3, (3,), settled=2))
    closed(ledger, 4, merged=True)
    before = ledger.to_dict()

    assert ledger.hear(report(2)) is None
    assert (before, 3) == (ledger.to_dict(), ledger.heard.closed_through)


def test_what_was_settled_before_a_restart_stays_settled_when_an_older_report_is_heard_first():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    closed(ledger, 0, merged=True)
    ledger.hear(report(0, (0,), settled=0))
    ledger.checkpointed(ledger.to_dict())
    again = EdgeLedger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    again.hear(NOTHING_CLOSED)

    assert (again.acknowledged, again.confirmed) == (0, 0)
    assert ledger.report() == again.report() == report(0, (), confirmed=0, settled=0)


def test_only_what_was_checkpointed_is_reported():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    ledger.close(0, merged=True)
    saved = ledger.to_dict()
    ledger.hear(report(0, (0,), settled=0))

    assert ledger.report() == NOTHING_CLOSED
    ledger.checkpointed(saved)
    assert report(0, (0,)) == ledger.report()


def test_a_merge_without_knowing_the_exchange_before_is_refused():
    ledger = EdgeLedger()

    assert not ledger.admits(0)
    ledger.hear(report(3))
    assert ledger.admits(4)
    assert not ledger.admits(5)
    with pytest.raises(ValueError, match="exchange 5 merged without a report"):
        ledger.close(5, merged=True)
    ledger.close(4, merged=True)
    with pytest.raises(ValueError, match="exchange 4 is over"):
        ledger.close(4, merged=False)


def test_exchanges_that_were_jumped_over_are_closed_unmerged():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    closed(ledger, 0, merged=True)
    closed(ledger, 9, merged=False)

    assert report(9, (0,)) == ledger.report()
    assert ledger.open_flow == 0


def test_sixteen_entries_are_all_that_a_neighbour_that_never_settles_gets_merged():
    ledger = EdgeLedger()
    for exchange in range(16):
        ledger.hear(report(exchange - 1, tuple(range(exchange))))
        closed(ledger, exchange, merged=True)
    ledger.hear(report(15, tuple(range(16))))

    assert not ledger.admits(16)
    assert tuple(range(16)) == ledger.report().merged


def test_a_link_that_carries_one_way_only_keeps_reports_short_and_takes_every_flow_back():
    ledger, taken_back = EdgeLedger(), []
    for exchange in range(100):
        taken_back.append(ledger.hear(report(exchange - 1)))
        closed(ledger, exchange, merged=True)

        assert (exchange,) == ledger.report().merged
    assert [None, *range(99)] == taken_back


def test_on_a_good_link_a_report_lists_two_exchanges_at_most():
    left, right = EdgeLedger(), EdgeLedger()
    for exchange in range(20):
        said = left.report(), right.report()
        assert [left.hear(said[1]), right.hear(said[0])] == [None, None]
        assert [closed(left, exchange, merged=True), closed(right, exchange, merged=True)] == [None, None]

    assert report(19, (18, 19), confirmed=17, settled=18) == left.report() == right.report()


def test_a_neighbour_that_claims_to_have_settled_the_future_cannot_push_our_report_beyond_what_we_closed():
    ledger = EdgeLedger()
    ledger.hear(report(10**9, settled=10**9))
    closed(ledger, 0, merged=True)

    assert report(0, (), confirmed=0, settled=0) == ledger.report()


def test_history_that_the_neighbour_remembers_and_we_do_not_is_counted():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)
    closed(ledger, 0, merged=True)

    assert ledger.hear(report(5, (), confirmed=3, settled=3)) is None
    assert ledger.counters == {"lost_history": 1}
    assert ledger.open_flow is None


def test_an_edge_is_settled_when_nobody_has_anything_left_to_learn():
    ledger = EdgeLedger()
    ledger.hear(NOTHING_CLOSED)

    assert ledger.is_acknowledged
    ledger.close(0, merged=False)
    assert not ledger.is_acknowledged  # what is not on the disk is not told yet
    ledger.checkpointed(ledger.to_dict())
    assert ledger.is_acknowledged
    ledger.hear(report(0))
    closed(ledger, 1, merged=True)
    assert not ledger.is_acknowledged
    ledger.hear(report(1, (1,)))
    ledger.checkpointed(ledger.to_dict())
    assert not ledger.is_acknowledged
    ledger.hear(report(1, (1,), settled=1))
    assert not ledger.is_acknowledged
    ledger.checkpointed(ledger.to_dict())
    assert ledger.is_acknowledged


@pytest.mark.parametrize(("heard", "settled"), [(report(0), False), (report(1, (1,)), False), (report(1), True), (report(2, (2,)), False)])
def test_a_neighbour_is_settled_when_it_is_as_far_and_lists_nothing(heard, settled):
    ledger = EdgeLedger()
    closed(ledger, 1, merged=False)

    assert not ledger.neighbour_is_acknowledged
    ledger.hear(heard)
    assert settled == ledger.neighbour_is_acknowledged


def test_a_merge_is_closed_whose_neighbour_begins_without_its_state_meanwhile():
    ledger = EdgeLedger()
    ledger.hear(report(3))
    assert ledger.admits(4)

    ledger.begin_anew(17)
    assert ledger.hear(NOTHING_CLOSED) is None
    assert not ledger.admits(4)
    assert closed(ledger, 4, merged=True) is None
    assert ledger.open_flow == 4
    assert ledger.hear(report(8)) == 4, "the neighbour jumped over it, so it is rolled back"


@pytest.mark.parametrize("exchange", [5, 6])
def test_no_merge_is_closed_that_was_not_admitted_before_the_neighbour_began_without_its_state(exchange):
    ledger = EdgeLedger()
    ledger.hear(report(3))
    ledger.begin_anew(17)
    ledger.hear(NOTHING_CLOSED)
    with pytest.raises(ValueError, match="without a report"):
        ledger.close(exchange, merged=True)

    closed(ledger, 4, merged=False)
    with pytest.raises(ValueError, match="without a report"):
        ledger.close(5, merged=True)
