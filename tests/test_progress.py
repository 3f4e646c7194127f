"""What takes long says how far it is."""

from __future__ import annotations

import logging

from p2pfl import progress


def test_a_line_says_how_many_are_done(caplog, monkeypatch):
    now_s = iter([0.0, 1.0, 3.5, 4.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now_s))
    with caplog.at_level(logging.INFO, logger="p2pfl.progress"):
        items = list(progress.told("every model at every site", ["a", "b", "c", "d"]))

    assert items == ["a", "b", "c", "d"]
    assert caplog.messages == ["every model at every site: 1 of 4", "every model at every site: 3 of 4"]
