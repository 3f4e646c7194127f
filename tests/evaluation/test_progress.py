"""What takes long says how far it is."""

from __future__ import annotations

import logging

import pytest

from p2pfl.evaluation import progress
from p2pfl.launcher.network import what_is_waited_for
from p2pfl.launcher.watched import WatchedNode


def test_a_line_says_how_many_are_done(caplog, monkeypatch):
    now_s = iter([0.0, 1.0, 3.5, 4.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now_s))
    with caplog.at_level(logging.INFO, logger="p2pfl.evaluation.progress"):
        items = list(progress.logged("every model at every site", ["a", "b", "c", "d"]))

    assert items == ["a", "b", "c", "d"]
    assert caplog.messages == ["every model at every site: 1 of 4", "every model at every site: 3 of 4"]


@pytest.mark.parametrize(
    ("seen", "ended", "train_alone", "said"),
    [
        ({"a": 3, "b": 2}, set(), True, "round 5 of a, b"),
        ({"a": 3, "b": 2}, {"a"}, True, "round 5 of b"),
        ({"a": 3, "b": 3}, {"a", "b"}, True, "the end of 2 daemons, which train alone for comparison"),
        ({"a": 3}, {"a"}, True, "the end of 1 daemon, which trains alone for comparison"),
        ({"a": 3, "b": 3}, {"a", "b"}, False, "the end of 2 daemons"),
        ({"a": 3, "b": 5}, {"a"}, True, "the end of 2 daemons"),
        (dict.fromkeys("abcdefg", -1), set(), False, "round 5 of a, b, c, d, e and 2 more"),
    ],
)
def test_after_the_last_round_the_ends_of_daemons_are_waited_for(seen, ended, train_alone, said):
    assert what_is_waited_for(seen, ended, 4, train_alone=train_alone) == said


@pytest.mark.parametrize(
    ("last", "stop_round", "expected"), [(-1, None, False), (28, None, False), (29, None, True), (11, 12, False), (12, 12, True)]
)
def test_the_last_round_is_the_last_possible_one_or_the_one_agreed_on(last, stop_round, expected, tmp_path):
    site = WatchedNode(name="a", folder=tmp_path, rows={number: {"round": number, "stop_round": stop_round} for number in range(last + 1)})

    assert site.has_ended_its_rounds(30) is expected
