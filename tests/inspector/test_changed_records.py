"""Records that somebody has changed: whoever inspects them reads a sentence, never a traceback."""

from __future__ import annotations

import json

import pytest

from p2pfl.cli.inspect import inspect
from p2pfl.errors import StoreError
from p2pfl.inspector.dashboard.board import Board


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experiment.yaml").write_text("task: {name: quadratic}\n")
    return tmp_path


def write_rows(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("rounds.jsonl", {}),
        ("nodes.jsonl", {"round": 0, "node": ["a"]}),
        ("events.jsonl", {"event": 3}),
    ],
)
def test_a_row_that_p2pfl_does_not_write_is_told_with_the_folder(folder, name, row):
    write_rows(folder, name, row)
    with pytest.raises(StoreError, match="its records are not as p2pfl writes them") as told:
        inspect(str(folder))
    assert str(folder) in str(told.value)


def test_the_dashboard_says_the_same_and_goes_on(folder):
    write_rows(folder, "rounds.jsonl", {})
    board = Board.of([str(folder)])
    board.look()
    assert "its records are not as p2pfl writes them" in str(board.sources[0].error)


@pytest.mark.parametrize("name", ["rounds.jsonl", "summary.json"])
def test_lists_without_end_are_not_json_that_can_be_read(folder, name):
    (folder / name).write_text("[" * 100_000 + "\n")
    with pytest.raises(StoreError, match=f"{name}.*not JSON"):
        inspect(str(folder))
