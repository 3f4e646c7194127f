"""What `make bench` calls a drop."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_compare", BENCHMARKS / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("simulator", None)


def test_a_drop_of_more_than_15_percent_is_told_and_one_of_less_is_not(compare):
    recorded = {"a": 1.0, "b": 400.0, "c": 2.0}

    assert compare.dropped({"a": 0.851, "b": 341.0, "c": 3.0}, recorded) == []
    assert compare.dropped({"a": 0.849, "b": 300.0, "c": 2.0}, recorded) == ["a: 0.849, recorded 1 (-15%)", "b: 300, recorded 400 (-25%)"]
    assert compare.dropped({"a": 1.0, "b": 400.0}, recorded) == ["c: recorded, and not measured"]


def test_the_command_fails_on_a_drop_and_records_only_when_told_to(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(compare, "measured", lambda: {"W1": 0.5})
    (tmp_path / "recorded.json").write_text('{"W1": 1.0}')
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    with pytest.raises(SystemExit, match=r"slower than recorded:\nW1: 0\.5, recorded 1 \(-50%\)"):
        compare.main()
    monkeypatch.setattr(sys, "argv", ["compare.py", "--record"])
    compare.main()

    assert json.loads((tmp_path / "recorded.json").read_text()) == {"W1": 0.5}
    assert capsys.readouterr().out.splitlines() == ["W1: 0.5 (recorded 1)", "W1: 0.5 (recorded 0.5)"]


def test_what_is_recorded_is_what_is_measured(compare):
    source = (BENCHMARKS / "compare.py").read_text()

    assert all(f'"{name}": ' in source for name in json.loads(compare.RECORDED.read_text()))
